"""Experts of different kinds, aligned before they compete, after ASTREA (2503.09445).

The paper's, as far as its abstract says: four visual experts (detection, segmentation, classification, captioning) in one
model, "progressive pre-alignment" by contrastive learning with momentum, stochastic residuals, weights that adapt;
12 benchmarks, +4.7 % on average. Its equations and code were not to be had: WHAT FOLLOWS IS OUR FORMALISATION.

    y = x + sum_e a_e(x) z_e Adapter_e(Expert_e(x)),     z_e ~ Bernoulli(q) / q in training, 1 otherwise

with a_e the router's probability for the chosen expert and 0 for others. Before that each expert learns alone, one after
another, to point where the target points: InfoNCE at temperature 0.07 between Adapter_e(Expert_e(x)) and the target as an
encoder sees it whose weights follow slowly (theta_k <- m theta_k + (1 - m) theta_q, MoCo, 1911.05722), against a queue of
earlier targets. Then all train together, balanced by what a kind costs (papers/latency.py).

The question: a kind that learns slowly gets few tokens because it is bad, and stays bad because it gets few. Does it starve,
and does alignment help? `Task` has tokens of four types, each of which one kind alone can do. Measured, with three seeds
(results/bench/astrea.json): in two of them the convolution gets 25 and 9 % of its tokens after 100 steps, in one still 3 %
after 400; aligned on tokens of its own type 92 to 100 %. Aligned on all tokens, kinds become alike, and in every seed two of
the four have 3 % or less of their tokens in the end.

A layer of its own and no part of the language model: convolution and attention need rows, and parts get tokens.
Confidence: abstract only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.config import nearest, require
from sigma_lite.model import Routing
from sigma_lite.model.router import logits_of
from sigma_lite.papers.latency import LatencyLBL

KINDS = ("mlp", "convolution", "attention", "lookup")
COSTS = (4.0, 3.0, 6.0, 1.0)  # of a token, assumed; only their ratios count
TEMPERATURE = 0.07


# --------------------------------------------------------------------------------------------------------- the kinds


class Mlp(nn.Module):
    """Each token by itself."""

    def __init__(self, D: int, ids: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D))

    def forward(self, x_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        return self.layers(x_BSD)


class Convolution(nn.Module):
    """A token and the three before it, feature by feature."""

    def __init__(self, D: int, ids: int):
        super().__init__()
        self.conv = nn.Conv1d(D, D, 4, groups=D)

    def forward(self, x_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        return self.conv(F.pad(x_BSD.transpose(1, 2), (3, 0))).transpose(1, 2)


class AttentionLite(nn.Module):
    """One narrow head over all tokens so far."""

    def __init__(self, D: int, ids: int, width: int = 8):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(D, width), nn.Linear(D, width), nn.Linear(D, D)

    def forward(self, x_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x_BSD), self.key(x_BSD), self.value(x_BSD), is_causal=True)


class Lookup(nn.Module):
    """A table by the token's id, as DeepSeek's Engram keeps one beside its experts; it reads nothing else."""

    def __init__(self, D: int, ids: int):
        super().__init__()
        self.table = nn.Embedding(ids, D)

    def forward(self, x_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        return self.table(ids_BS)


class Kinds(nn.Module):
    """One layer of experts of different kinds, one for each token.

    Args:
        D: width of a token.
        ids: how many different tokens there are, for the table.
        keep: q, chance of an expert's output to be there in a training step; 1: always.
    """

    def __init__(self, D: int, ids: int, keep: float = 0.9):
        super().__init__()
        require(0 < keep <= 1, f"keep={keep}: is a chance, above 0 and at most 1")
        self.router, self.keep = nn.Linear(D, len(KINDS)), keep
        self.experts = nn.ModuleList(kind(D, ids) for kind in (Mlp, Convolution, AttentionLite, Lookup))
        self.adapters = nn.ModuleList(nn.Linear(D, D) for _ in KINDS)

    def alone(self, e: int, x_BSD: Tensor, ids_BS: Tensor) -> Tensor:
        """What expert e says of every token, through its adapter."""
        return self.adapters[e](self.experts[e](x_BSD, ids_BS))

    def forward(self, x_BSD: Tensor, ids_BS: Tensor) -> tuple[Tensor, Routing]:
        logits_TE = logits_of(x_BSD, self.router.weight, self.router.bias).flatten(0, 1)
        probs_TE = logits_TE.softmax(-1)
        chosen_T1 = probs_TE.argmax(-1, keepdim=True)
        routing = Routing(probs_TE, chosen_T1, probs_TE.gather(1, chosen_T1), logits_TE)
        a_BSE = (probs_TE * F.one_hot(chosen_T1[:, 0], len(KINDS))).view(*x_BSD.shape[:2], -1)
        z_E = torch.ones(len(KINDS), device=x_BSD.device)
        if self.training:
            z_E = torch.bernoulli(self.keep * z_E) / self.keep
        said = [a_BSE[..., e, None] * z_E[e] * self.alone(e, x_BSD, ids_BS) for e in range(len(KINDS))]
        return x_BSD + sum(said), routing


# ------------------------------------------------------------------------------------------------------- alignment


class Targets(nn.Module):
    """Targets as a slow encoder sees them, and a queue of those it saw before.

    Args:
        size: targets in the queue.
        momentum: m, how much of the slow weights stays in a step.
    """

    queue: Tensor

    def __init__(self, D: int, size: int = 1024, momentum: float = 0.99):
        super().__init__()
        require(0 <= momentum < 1, f"momentum={momentum}: must lie in 0..1, below 1")
        self.fast, self.momentum = nn.Linear(D, D, bias=False), momentum
        nn.init.eye_(self.fast.weight)  # targets themselves, at first
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(size, D), dim=-1))

    def loss(self, said_ND: Tensor, target_ND: Tensor) -> Tensor:
        """InfoNCE of what an expert says against slow targets and the queue, and of fast targets against what it says.

        The queue is of earlier targets. In the second term the candidates are the batch's own answers, the right one too: it
        then counts twice, once as the key.
        """
        said, fast = F.normalize(said_ND, dim=-1), F.normalize(self.fast(target_ND), dim=-1)
        slow = F.normalize(self.slow(target_ND), dim=-1)
        return info_nce(said, slow, self.queue) + info_nce(fast, said.detach(), said.detach())

    @torch.no_grad()
    def step(self, target_ND: Tensor) -> None:
        """After an optimizer step: slow weights follow, new targets push the oldest out of the queue."""
        self.slow.weight.lerp_(self.fast.weight, 1 - self.momentum)
        new = F.normalize(self.slow(target_ND), dim=-1)[: len(self.queue)]
        self.queue.copy_(torch.cat((self.queue[len(new) :], new)))


def info_nce(query_ND: Tensor, key_ND: Tensor, others_MD: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """-log of each key's share among its query's similarities; all are unit vectors. log(1 + M) where nothing is learned."""
    right_N1 = (query_ND * key_ND).sum(-1, keepdim=True)
    logits = torch.cat((right_N1, query_ND @ others_MD.T), dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


# ------------------------------------------------------------------------------------------------------------ a task


class Task:
    """Rows of tokens of four types; what is asked of each type, one kind of expert alone can do.

    0  a fixed random network of the token             mlp
    1  the mean of the last four tokens, turned         convolution
    2  what the marked token before it says, turned     attention
    3  a random vector for the token's id               lookup
    """

    def __init__(self, D: int = 32, ids: int = 64, seed: int = 0):
        self.D, self.ids, self.chance = D, ids, torch.Generator().manual_seed(seed)
        self.inner, self.outer = (self._normal(D, D) / D**0.5 for _ in range(2))
        self.turns, self.table = [torch.linalg.qr(self._normal(D, D)).Q for _ in range(2)], self._normal(ids, D)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.chance)

    def batch(self, B: int = 16, S: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x [B, S, D], ids [B, S], target [B, S, D], types [B, S])."""
        type_BS = torch.randint(4, (B, S), generator=self.chance)
        ids_BS = torch.randint(self.ids, (B, S), generator=self.chance)
        x = self._normal(B, S, self.D)
        x[..., :4] = 2.0 * F.one_hot(type_BS, 4)
        marked_B = torch.randint(S // 4, (B,), generator=self.chance)
        x[..., 4] = 0.0
        x[torch.arange(B), marked_B, 4] = 6.0
        seen = torch.arange(S)[None] >= marked_B[:, None]
        past = F.pad(x, (0, 0, 3, 0)).unfold(1, 4, 1).mean(-1)
        found = x[torch.arange(B), marked_B][:, None].expand_as(x) * seen[..., None]
        answers = torch.stack((2 * (x @ self.inner).tanh() @ self.outer, 2 * past @ self.turns[0], found @ self.turns[1]))
        answers = torch.cat((answers, self.table[ids_BS][None]))
        return x, ids_BS, answers.gather(0, type_BS[None, ..., None].expand(1, *x.shape))[0], type_BS


class Measured(NamedTuple):
    """Of a run, at several steps: share of each type's tokens that go to the kind which can do them, and the error."""

    steps: list[int]
    right: list[list[float]]  # at each of these steps, one share a kind
    error: list[list[float]]  # mean squared, relative to the target's variance, one a type


def run(
    seed: int,
    steps: int = 600,
    align: int = 0,
    on: str = "own",
    keep: float = 0.9,
    weight: float = 0.01,
    costs: Sequence[float] = COSTS,
    every: int = 50,
    lr: float = 3e-3,
) -> Measured:
    """Train a layer of kinds on `Task`.

    Args:
        align: steps of alignment for each kind before that, one kind after another.
        on: own: a kind is aligned on tokens of its own type, as a detector is on pictures with boxes; all: on every token.
        every: steps between two measurements.
    """
    require(on in ("own", "all"), f"on={on!r}: {nearest(on, ('own', 'all'))}")
    torch.manual_seed(seed)
    task = Task(seed=seed)
    layer, targets, balance = Kinds(task.D, task.ids, keep), Targets(task.D), LatencyLBL(costs)
    for e in range(len(KINDS)) if align else ():
        learns = [*layer.experts[e].parameters(), *layer.adapters[e].parameters(), targets.fast.weight]
        optimizer = torch.optim.Adam(learns, lr)
        for _ in range(align):
            x, ids, target, types = task.batch()
            mask = types == e if on == "own" else torch.ones_like(types, dtype=torch.bool)
            target_ND = target[mask]
            optimizer.zero_grad()
            targets.loss(layer.alone(e, x, ids)[mask], target_ND).backward()
            optimizer.step()
            targets.step(target_ND)
    optimizer, found = torch.optim.Adam(layer.parameters(), lr), Measured([], [], [])
    for step in range(steps + 1):
        if step % every == 0:
            _measure(layer, task, step, found)
        x, ids, target, _ = task.batch()
        optimizer.zero_grad()
        y, routing = layer(x, ids)
        f_E = load_share(expert_counts(routing.ids, len(KINDS)))
        ((y - x - target).square().mean() + weight * balance.loss(routing, f_E)).backward()
        optimizer.step()
    return found


@torch.no_grad()
def _measure(layer: Kinds, task: Task, step: int, found: Measured) -> None:
    x, ids, target, types = task.batch(B=64)
    y, routing = layer.eval()(x, ids)
    layer.train()
    chosen, error = routing.ids.view_as(types), (y - x - target).square().mean(-1)
    found.steps.append(step)
    of_type = [types == kind for kind in range(len(KINDS))]
    found.right.append([float((chosen[mask] == kind).float().mean()) for kind, mask in enumerate(of_type)])
    found.error.append([float(error[mask].mean() / target[mask].var()) for mask in of_type])
