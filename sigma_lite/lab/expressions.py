"""Balance losses as small typed expressions: read from text, written as text, and finite whatever the loads are.

    mean(f * P)                                       the global-batch LBL
    mean(P * P) / sure                                Top-1 LBL at temperature 1
    mean(f * P) + 0.1 * ((1.5 - entropy(P)) * mean(relu(0.64 - f)))          ShinkaEvolve's

What an expression can see of one layer, all of it unchanged where a constant is added to all logits of a token:

    f     load share of each expert times E, vector; even: 1. It is counted, so nothing flows back through it
    P     mean probability of each expert times E, vector; even: 1
    sure  mean over tokens of the probability of their chosen experts, scalar, 0..1
    K, E  experts per token, experts

Two types, vector and scalar. Arithmetic and functions of one element at a time give a vector where an argument is one;
mean, largest, smallest and entropy make a scalar of a vector; the whole must be a scalar. No token's own logits, no bias.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.losses import mean_over_tokens
from sigma_lite.config import ConfigError, nearest, require
from sigma_lite.model import Routing
from sigma_lite.model.assumes import Assumes

VECTOR, SCALAR = "vector", "scalar"
LEAVES = {"f": VECTOR, "P": VECTOR, "sure": SCALAR, "K": SCALAR, "E": SCALAR}
MOST, LEAST = 1e6, 1e-6
"""No value leaves -MOST..MOST; what is divided by, or under a log or a root, is kept at least LEAST from 0."""
DIGITS = 4  # significant, of a constant


class Node(NamedTuple):
    """A leaf by name, a number ("" with its value), or an operation on others."""

    op: str
    args: tuple[Node, ...] = ()
    value: float = 0.0

    @property
    def kind(self) -> str:
        """VECTOR or SCALAR."""
        if not self.args:
            return LEAVES.get(self.op, SCALAR)
        return SCALAR if self.op in REDUCE else VECTOR if any(arg.kind == VECTOR for arg in self.args) else SCALAR

    @property
    def size(self) -> int:
        """Nodes."""
        return 1 + sum(arg.size for arg in self.args)

    def __str__(self) -> str:
        if self.op in SIGNS:
            return "(" + f" {self.op} ".join(map(str, self.args)) + ")"
        return f"{self.op}({str(self.args[0])})" if self.args else self.op or f"{self.value:.{DIGITS}g}"


def number(value: float) -> Node:
    """A constant of DIGITS digits, so that text holds all of it."""
    return Node("", value=float(f"{value:.{DIGITS}g}"))


# -------------------------------------------------------------------------------------------------------- operations


def _away_from_0(x: Tensor) -> Tensor:
    return torch.where(x < 0, x.clamp(max=-LEAST), x.clamp(min=LEAST))


def _entropy(x_E: Tensor) -> Tensor:
    """Of |x| as shares, over its largest: 0 (one has all) .. 1 (all alike)."""
    share_E = x_E.abs().clamp(min=LEAST)
    share_E = share_E / share_E.sum()
    return -(share_E * share_E.log()).sum() / math.log(len(x_E))


SIGNS: dict[str, Callable] = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": lambda a, b: a / _away_from_0(b),
}
EACH: dict[str, Callable] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": lambda x: x.abs().clamp(min=LEAST).sqrt(),
    "log": lambda x: x.abs().clamp(min=LEAST).log(),
    "exp": lambda x: x.clamp(max=10.0).exp(),
    "stop": torch.detach,
}
REDUCE: dict[str, Callable] = {"mean": torch.mean, "largest": torch.amax, "smallest": torch.amin, "entropy": _entropy}
FUNCTIONS = {**SIGNS, **EACH, **REDUCE}


def evaluate(node: Node, facts: Mapping[str, Tensor]) -> Tensor:
    """The value: a vector [E] or a scalar, never beyond MOST.

    Args:
        facts: a tensor for each of LEAVES.
    """
    if not node.args:
        return facts[node.op] if node.op else facts["E"].new_tensor(node.value)
    return FUNCTIONS[node.op](*(evaluate(arg, facts) for arg in node.args)).clamp(-MOST, MOST)


# -------------------------------------------------------------------------------------------------------------- text

_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def read(text: str) -> Node:
    """The expression of a text. Raises ConfigError that names what cannot be read, and for a loss that is a vector."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{text!r} is no expression: {error}") from error
    node = _read(tree, text)
    require(node.kind == SCALAR, f"{text!r} is a vector, one number an expert: take its mean, largest or smallest")
    return node


def _read(tree: ast.expr, text: str) -> Node:
    match tree:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) <= MOST:
            return number(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if abs(value) <= MOST:
            return number(-value)
        case ast.Name(id=name):
            require(name in LEAVES, f"{text!r} reads {name!r}, which does not exist; {nearest(name, LEAVES)}")
            return Node(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return Node(_OPERATORS[type(op)], (_read(left, text), _read(right, text)))
        case ast.Call(func=ast.Name(id=name), args=[one], keywords=[]):
            known = {**EACH, **REDUCE}
            require(name in known, f"{text!r} calls {name!r}, which does not exist; {nearest(name, known)}")
            arg = _read(one, text)
            require(name in EACH or arg.kind == VECTOR, f"{text!r}: {name}() takes a vector, and {arg} is a scalar")
            return Node(name, (arg,))
    raise ConfigError(f"{text!r}: {ast.unparse(tree)} is none of + - * /, a function of one value, a name or a number")


# ---------------------------------------------------------------------------------------------------------- a balancer


class Candidate(Balancer):
    """A balance loss given as text. Its gradient is finite too: what is not a number becomes 0, and no entry exceeds 1e6.

    Args:
        expression: such as "mean(f * P)"; see lab/expressions.py for what it may hold.
    """

    assumes = Assumes()

    def __init__(self, expression: str):
        self.expression, self._node = expression, read(expression)

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        return evaluate(self._node, facts_of(routing, f_E))


def facts_of(routing: Routing, f_E: Tensor) -> dict[str, Tensor]:
    """What an expression can see of a layer: a tensor for each of LEAVES."""
    T, E = routing.probs.shape
    chosen_TK = routing.probs.gather(1, routing.ids.clamp(min=0)).where(routing.ids >= 0, 0.0)
    facts = {"P": E * mean_over_tokens(routing.probs), "sure": chosen_TK.sum() / max(T, 1)}
    for fact in facts.values():
        if fact.requires_grad:
            fact.register_hook(_finite)
    K, experts = (f_E.new_tensor(float(n)) for n in (routing.ids.shape[1], E))
    return {**facts, "f": E * f_E, "K": K, "E": experts}


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(0.0, MOST, -MOST).clamp(-MOST, MOST)
