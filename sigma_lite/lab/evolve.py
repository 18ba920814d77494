"""How expressions have children, and which children are new: random trees, mutation, crossover, behaviour.

Every child has the type of its place, so every child can be evaluated. Two expressions are the same where they train the
same: a value without a gradient trains nothing, and as the probabilities of a token sum to 1, a gradient that is equal for
all experts does not either. So behaviour is the rest of the gradient, on a fixed set of loads and probabilities.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sigma_lite.lab.expressions import EACH, LEAVES, REDUCE, SCALAR, SIGNS, VECTOR, Node, evaluate, number

MOST_NODES = 24
PROBED = 16  # experts of a probe
SAME = 0.02  # mean relative distance of gradients below which two expressions train alike

Place = tuple[int, ...]  # which argument at each level, from the root


# -------------------------------------------------------------------------------------------------------------- trees


def places(node: Node, at: Place = ()) -> Iterator[tuple[Place, Node]]:
    """Every node with its place, the root first."""
    yield at, node
    for i, arg in enumerate(node.args):
        yield from places(arg, (*at, i))


def replaced(node: Node, at: Place, by: Node) -> Node:
    """The same tree with another at a place."""
    if not at:
        return by
    args = list(node.args)
    args[at[0]] = replaced(args[at[0]], at[1:], by)
    return node._replace(args=tuple(args))


def grown(chance: random.Random, kind: str, depth: int) -> Node:
    """A random tree of a type, at most so deep."""
    if depth <= 0 or chance.random() < 0.2:
        if kind == VECTOR:
            return Node(chance.choice(("f", "P")))
        return Node("sure") if chance.random() < 0.3 else number(10 ** chance.uniform(-1.5, 1.0))
    if chance.random() < 0.6:
        kinds = [kind, chance.choice((kind, SCALAR))]
        chance.shuffle(kinds)
        return Node(chance.choice(list(SIGNS)), tuple(grown(chance, each, depth - 1) for each in kinds))
    if kind == SCALAR and chance.random() < 0.6:
        return Node(chance.choice(list(REDUCE)), (grown(chance, VECTOR, depth - 1),))
    return Node(chance.choice(list(EACH)), (grown(chance, kind, depth - 1),))


def _another_tree(chance: random.Random, node: Node) -> Node:
    return grown(chance, node.kind, 3)


def _another_operation(chance: random.Random, node: Node) -> Node:
    alike = next((family for family in (SIGNS, EACH, REDUCE) if node.op in family), None)
    if alike:
        return node._replace(op=chance.choice([op for op in alike if op != node.op]))
    if node.op:
        return Node(chance.choice([leaf for leaf, kind in LEAVES.items() if kind == node.kind and leaf != node.op]))
    return number(node.value * 10 ** chance.gauss(0, 0.3))


def _one_level_up(chance: random.Random, node: Node) -> Node:
    below = [inner for at, inner in places(node) if at and inner.kind == node.kind]
    return chance.choice(below) if below else _another_tree(chance, node)


def _wrapped(chance: random.Random, node: Node) -> Node:
    if chance.random() < 0.3:
        return Node(chance.choice(list(EACH)), (node,))
    both = [node, grown(chance, chance.choice((node.kind, SCALAR)), 2)]
    chance.shuffle(both)
    return Node(chance.choice(list(SIGNS)), tuple(both))


MUTATIONS = (_another_tree, _another_operation, _another_operation, _one_level_up, _wrapped)


def mutated(chance: random.Random, node: Node) -> Node:
    """One place changed: another tree, another operation or number, a part of it in its stead, or more around it."""
    while True:
        at, old = chance.choice(list(places(node)))
        child = replaced(node, at, chance.choice(MUTATIONS)(chance, old))
        if child != node and child.size <= MOST_NODES:
            return child


def crossed(chance: random.Random, node: Node, other: Node) -> Node:
    """A place of one tree with a tree of the same type from another; one of `mutated` where they have none that fits."""
    for _ in range(20):
        at, old = chance.choice(list(places(node)))
        fitting = [inner for _, inner in places(other) if inner.kind == old.kind and inner != old]
        if fitting:
            child = replaced(node, at, chance.choice(fitting))
            if child.size <= MOST_NODES:
                return child
    return mutated(chance, node)


# ---------------------------------------------------------------------------------------------------------- behaviour


def _probes() -> list[tuple[Tensor, Tensor, float, int]]:
    """(E f, E P, sure, K): random ones from nearly even to steep; then degenerate loads, at which all must stay finite."""
    generator, E = torch.Generator().manual_seed(0), PROBED
    found = []
    for steep in (0.1, 0.3, 1.0, 1.0, 2.0, 3.0):
        f, P = (E * (steep * torch.randn(E, generator=generator, dtype=torch.float64)).softmax(0) for _ in range(2))
        found.append((0.5 * f + 0.5 * P, P, float(torch.rand((), generator=generator)), 1 + len(found) % 2))
    one, even = E * torch.eye(E, dtype=torch.float64)[0], torch.ones(E, dtype=torch.float64)
    return [
        *found,
        (one, even, 1 / E, 1),
        (even, one, 1.0, 1),
        (one, one, 1.0, 1),
        (even, even, 0.5, 2),
        (0 * one, one, 0.0, 1),
    ]


PROBES = _probes()
ALIVE = 6  # of PROBES: the random ones


def behaviour(node: Node) -> Tensor:
    """Gradients at PROBES, [probes, PROBED + 1] fp64: of P less their mean, and of `sure`. Not finite: some is not."""
    found = []
    for f, P, sure, K in PROBES:
        leaves = P.clone().requires_grad_(), torch.tensor(sure, dtype=torch.float64, requires_grad=True)
        facts = {"f": f, "P": leaves[0], "sure": leaves[1], "K": f.new_tensor(float(K)), "E": f.new_tensor(float(PROBED))}
        value = evaluate(node, facts)
        value = value + 0 * (leaves[0].sum() + leaves[1])  # connected, whatever it reads
        dP, dsure = torch.autograd.grad(value, leaves)
        found.append(torch.cat([dP - dP.mean(), dsure[None]]))
    return torch.stack(found)


def flaw(acts: Tensor, known: Sequence[Tensor]) -> str:
    """Why a behaviour is not worth training: "not finite", "no gradient", "not new"; "" where it is."""
    if not acts.isfinite().all():
        return "not finite"
    if acts[:ALIVE].abs().amax() < 1e-9:
        return "no gradient"
    return "not new" if any(distance(acts, other) < SAME for other in known) else ""


def distance(one: Tensor, other: Tensor) -> float:
    """Mean over probes of the relative distance: 0 (train alike) .. 2 (opposite)."""
    length = torch.maximum(one.norm(dim=1), other.norm(dim=1)).clamp(min=1e-9)
    return ((one - other).norm(dim=1) / length).mean().item()
