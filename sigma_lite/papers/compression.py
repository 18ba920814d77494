"""Ways to make a trained mixture of experts smaller, as surveys of inference list them (2412.14219; awesome-moe-inference).

    Prune      leave out the experts that did least: gate x norm of the output, summed over tokens
    Merge      one network for experts that are chosen alike, hidden units aligned first, weighted by use
    Factorise  every matrix as a product of two thin ones
    Quantise   experts in 16, 8 or 4 bits; router, attention and embedding stay as they are
    Skip, TopP fewer experts for tokens whose first choice is sure: nothing is smaller, less is read
    ToDense    one network, which begins as the most used experts side by side and is distilled
    Plain      experts that are stored in any such way as usual ones, so that `export` can write them

Theirs: the rules, in plain form; no single paper. Ours: greedy alignment instead of an exact assignment; a merged layer's
router is left as it was. Confidence: rules recalled, standard.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_lite.balance.losses import expert_counts
from sigma_lite.config import nearest, require
from sigma_lite.convert.calibrate import expert_inputs
from sigma_lite.convert.distil import distil
from sigma_lite.convert.rebuild import rebuilt, units
from sigma_lite.convert.stored import KeptExperts, KeptRouter, LowRank, Mapped, Quantised, Skipping, TopP
from sigma_lite.data.rows import Batch
from sigma_lite.model import Parts, Transformer
from sigma_lite.model.experts import Experts


class Use(NamedTuple):
    """What calibration rows say of each expert."""

    score: Tensor  # [L, E]: sum over tokens of gate x norm of the expert's output
    count: Tensor  # [L, E]: slots
    gate: Tensor  # [L, E]: sum of the gates of its tokens
    alike: Tensor  # [L, E, E]: cosine of two experts' router logits over tokens, after each token's mean
    tokens: int


@torch.no_grad()
def use(model: Transformer, rows: Sequence[Batch]) -> Use:
    """One pass over the rows."""
    _require_usual(model)
    require(bool(rows), "compression needs rows to calibrate on")
    L, E, tokens = model.config.n_layers, model.config.n_experts, 0
    score_LE, gate_LE, products_LEE = torch.zeros(L, E), torch.zeros(L, E), torch.zeros(L, E, E)
    count_LE = torch.zeros(L, E, dtype=torch.long)
    for layers in expert_inputs(model, rows):
        tokens += len(layers[0][0])
        for layer, (x_TD, routing) in enumerate(layers):
            token_N, slot_N = (routing.ids >= 0).nonzero(as_tuple=True)
            ids_N, gates_N = routing.ids[token_N, slot_N], routing.gates[token_N, slot_N]
            y_ND = model.blocks[layer].moe.experts(x_TD[token_N], ids_N[:, None], torch.ones_like(gates_N)[:, None])
            score_LE[layer].index_add_(0, ids_N, gates_N * y_ND.norm(dim=1))
            gate_LE[layer].index_add_(0, ids_N, gates_N)
            count_LE[layer] += expert_counts(routing.ids, E)
            centred_TE = routing.logits - routing.logits.mean(1, keepdim=True)
            products_LEE[layer] += centred_TE.T @ centred_TE
    length_LE = products_LEE.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-12)
    return Use(score_LE, count_LE, gate_LE, products_LEE / length_LE[:, :, None] / length_LE[:, None], tokens)


def _require_usual(model: Transformer) -> None:
    own = ", ".join(f"{n}={getattr(p, '__name__', p)}" for n, p in model.parts.custom.items() if n in ("router", "experts"))
    require(not own, f"this model has its own {own}: only usual experts behind a usual router can be compressed")
    require(model.config.n_experts > 1, "a dense model has no experts to leave out: quantise it, or split it first")


def _share(keep: float, model: Transformer) -> int:
    """Experts of a layer that a share of them is."""
    require(0 < keep <= 1, f"keep={keep}: a share of the experts, in (0, 1]")
    K, kept = model.config.top_k, max(1, round(keep * model.config.n_experts))
    require(kept >= K, f"keep={keep} leaves {kept} experts, and each token chooses {K}")
    return kept


@dataclass(frozen=True)
class Prune:
    """Leave out the experts with the least gate x output norm: the same share of each layer, or the least of all layers.

    A token whose expert is gone takes the next best; the softmax is over those that are left, so gates grow.
    """

    keep: float = 0.5  # share of the experts that stay
    scope: str = "layer"  # layer | global

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        require(self.scope in ("layer", "global"), f"scope={self.scope!r}: {nearest(self.scope, ('layer', 'global'))}")
        score_LE, kept = use(model, rows).score, _share(self.keep, model)
        order_LE = score_LE.argsort(dim=1, descending=True)
        if self.scope == "layer":
            config = dataclasses.replace(model.config, n_experts=kept)
            return _keeping(model, rebuilt(model, config), [order_E[:kept] for order_E in order_LE])
        best_L = torch.zeros_like(score_LE, dtype=torch.bool)
        best_L.scatter_(1, order_LE[:, : model.config.top_k], True)  # a layer needs as many as a token chooses
        score_LE = score_LE.masked_fill(best_L, torch.inf)
        chosen = score_LE.flatten().topk(kept * len(score_LE)).indices // score_LE.shape[1]
        sizes = torch.bincount(chosen, minlength=len(score_LE)).tolist()
        parts = Parts(functools.partial(KeptRouter, kept=sizes), functools.partial(KeptExperts, kept=sizes))
        config = dataclasses.replace(model.config, n_experts=max(sizes))
        new = rebuilt(model, config, dataclasses.replace(model.parts, router=parts.router, experts=parts.experts))
        return _keeping(model, new, [order_E[:size] for order_E, size in zip(order_LE, sizes, strict=True)])


@torch.no_grad()
def _keeping(old: Transformer, new: Transformer, kept: Sequence[Tensor]) -> Transformer:
    """Fill `new` with these experts of each layer, and their router rows."""
    for was, block, ids in zip(old.blocks, new.blocks, kept, strict=True):
        router, experts = block.moe.router, block.moe.experts
        router.weight[: len(ids)] = was.moe.router.weight[ids]
        router.bias[: len(ids)] = was.moe.router.bias[ids]
        experts.w13.copy_(was.moe.experts.w13[ids])
        experts.w2.copy_(was.moe.experts.w2[ids])
    return new


@dataclass(frozen=True)
class Merge:
    """Experts that are chosen alike become one: the two most alike groups are joined until so few are left.

    A group is as its most used expert is. The router stays as it was, so all its experts can be chosen, and those of a
    group lead to one network.
    """

    keep: float = 0.5  # share of the networks that stay
    align: bool = True  # bring each joining expert's hidden units into the order of the one that stays

    @torch.no_grad()
    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        found, kept = use(model, rows), _share(self.keep, model)
        parts = dataclasses.replace(model.parts, experts=functools.partial(Mapped, kept=kept))
        new = rebuilt(model, parts=parts)
        for layer, (was, block) in enumerate(zip(model.blocks, new.blocks, strict=True)):
            for place, group in enumerate(groups(found.alike[layer], found.count[layer], kept)):
                block.moe.experts.place_E[group] = place
                self._merge(was.moe.experts, block.moe.experts, place, group, found.count[layer])
        return new

    def _merge(self, old: Experts, new: Experts, place: int, group: list[int], count_E: Tensor) -> None:
        share = count_E[group].float().clamp(min=1e-6)
        share = share / share.sum()
        first = units(old.w13[group[0]], old.w2[group[0]])
        total = share[0] * first
        for weight, expert in zip(share[1:], group[1:], strict=True):
            joining = units(old.w13[expert], old.w2[expert])
            total = total + weight * (joining[aligned(first, joining)] if self.align else joining)
        D = old.w2.shape[1]
        new.w13[place].copy_(torch.cat([total[:, :D], total[:, D : 2 * D]]))
        new.w2[place].copy_(total[:, 2 * D :].T)


def groups(alike_EE: Tensor, count_E: Tensor, kept: int) -> list[list[int]]:
    """E experts in `kept` groups, the most used expert of a group first."""
    found = {expert: [expert] for expert in range(len(count_E))}  # by the expert that stands for the group
    alike_EE = alike_EE.clone().fill_diagonal_(-torch.inf)
    while len(found) > kept:
        pair = divmod(int(alike_EE.argmax()), len(alike_EE))
        stays, goes = sorted(pair, key=lambda expert: -int(count_E[expert]))
        found[stays] += found.pop(goes)
        alike_EE[goes], alike_EE[:, goes] = -torch.inf, -torch.inf
    return list(found.values())


def aligned(one_FU: Tensor, other_FU: Tensor) -> Tensor:
    """The order of `other`'s units that fits `one`'s, int64 [F]: the most similar pair first, then the next, and so on."""
    alike_FF = torch.nn.functional.normalize(one_FU, dim=1) @ torch.nn.functional.normalize(other_FU, dim=1).T
    order_F, F = torch.empty(len(one_FU), dtype=torch.long), len(one_FU)
    for _ in range(F):
        row, column = divmod(int(alike_FF.argmax()), F)
        order_F[row] = column
        alike_FF[row], alike_FF[:, column] = -torch.inf, -torch.inf
    return order_F


def _stored(model: Transformer, part: functools.partial) -> Transformer:
    """The same model with experts that keep their weights in another way."""
    own = getattr(model.parts.experts, "__name__", model.parts.experts)
    require(model.parts.experts is Experts, f"this model's experts are {own} already: make them usual ones first, by Plain")
    new = rebuilt(model, parts=dataclasses.replace(model.parts, experts=part))
    for was, block in zip(model.blocks, new.blocks, strict=True):
        block.moe.experts.keep(was.moe.experts.w13.detach(), was.moe.experts.w2.detach())
    return new


@dataclass(frozen=True)
class Factorise:
    """Every expert's two matrices as products of rank `rank`: the nearest ones, by singular values."""

    rank: int = 16

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        return _stored(model, functools.partial(LowRank, rank=self.rank))


@dataclass(frozen=True)
class Quantise:
    """Experts in fewer bits; everything else stays as it is."""

    bits: int = 8  # 16 (bfloat16) | 8 | 4
    group: int = 0  # numbers that share a scale; 0: a row

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        return _stored(model, functools.partial(Quantised, bits=self.bits, group=self.group))


@dataclass(frozen=True)
class Skip:
    """Drop a token's later choices where their gate is below `beta` times the first one's."""

    beta: float | None = None  # null: the median ratio of the second to the first gate on the calibration rows

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        _require_choices(model)
        beta = self.beta
        if beta is None:
            gates = [r.gates for layers in expert_inputs(model, rows) for _, r in layers]
            beta = round(float(torch.cat([g[:, 1] / g[:, 0] for g in gates]).median()), 4)
        return rebuilt(model, parts=dataclasses.replace(model.parts, router=functools.partial(Skipping, beta=beta)))


@dataclass(frozen=True)
class Nucleus:
    """As many of a token's experts as it takes for their gates to reach the sum `p`."""

    p: float = 0.5

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        _require_choices(model)
        return rebuilt(model, parts=dataclasses.replace(model.parts, router=functools.partial(TopP, p=self.p)))


def _require_choices(model: Transformer) -> None:
    _require_usual(model)
    require(model.config.top_k > 1, "one expert per token: there is no second choice to leave out")


@dataclass(frozen=True)
class ToDense:
    """A dense model: in each layer the most used experts side by side, weighted by their mean gate, then distilled."""

    experts: int = 2  # whose widths together are the new width
    steps: int = 60  # of distillation, a batch of rows each
    lr: float = 2e-3

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        E, F = model.config.n_experts, model.config.d_expert
        require(1 <= self.experts <= E, f"experts={self.experts}: must lie in 1..{E}")
        found = use(model, rows)
        shape = {"n_experts": 1, "top_k": 1, "renormalise": False, "d_expert": self.experts * F}
        new = rebuilt(model, dataclasses.replace(model.config, **shape))
        with torch.no_grad():
            for layer, (was, block) in enumerate(zip(model.blocks, new.blocks, strict=True)):
                ids = found.count[layer].argsort(descending=True, stable=True)[: self.experts]
                halves = was.moe.experts.w13[ids].chunk(2, dim=1)
                block.moe.experts.w13[0].copy_(torch.cat([half.flatten(0, 1) for half in halves]))
                gates = found.gate[layer, ids] / found.count[layer, ids].clamp(min=1)
                block.moe.experts.w2[0].copy_(torch.cat(list(was.moe.experts.w2[ids] * gates[:, None, None]), 1))
        learns = [weight for block in new.blocks for weight in block.moe.experts.parameters()]
        distil(new, model, rows, self.steps, learns=learns, lr=self.lr)
        return new


@dataclass(frozen=True)
class Plain:
    """Experts that are rounded, thin or shared between ids as usual ones, which compute the same: for `export`."""

    @torch.no_grad()
    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        kinds = (Quantised, LowRank, Mapped)
        fits = all(isinstance(block.moe.experts, kinds) for block in model.blocks)
        require(fits, f"only {', '.join(kind.__name__ for kind in kinds)} can be made usual experts")
        new = rebuilt(model, parts=dataclasses.replace(model.parts, experts=Experts))
        for was, block in zip(model.blocks, new.blocks, strict=True):
            place = getattr(was.moe.experts, "place_E", slice(None))
            for mine, theirs in zip((block.moe.experts.w13, block.moe.experts.w2), was.moe.experts.weights(), strict=True):
                mine.copy_(theirs[place])
        return new
