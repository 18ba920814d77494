"""Load statistics over a WINDOW of tokens. One toy micro-batch is mostly noise: 85 tokens an expert scatter by 11 %."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from sigma_lite.balance.exact import UNIT, lost, whole
from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.model import Routing


def load_deviation(f: Tensor) -> tuple[Tensor, Tensor]:
    """(max, min) of E * f - 1 along the last axis: the report's Fig. 2a.

    0: uniform. max lies in 0..E-1 (E - 1: one expert has everything); min in -1..0 (-1: an expert gets no token).
    """
    relative = f.shape[-1] * f - 1
    return relative.amax(-1), relative.amin(-1)


def entropy(p: Tensor) -> Tensor:
    """-sum p log p along the last axis, in nats: 0 (one-hot) .. log E (uniform)."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)  # xlogy's gradient at 0 is NaN


class ExpertLoad(Metric):
    """Counts and probabilities of every expert in every layer since the last reset, summed over ranks.

    update(routings): one Routing a layer, of E experts; columns of its router beyond them belong to none, and empty slots
    are not counted. load(): dict of fp32 tensors
        f [L, E] load share, P [L, E] mean probability, lbl [L] = E sum f P over the window (balanced: 1),
        max_deviation and min_deviation [L] (load_deviation), dead [L] experts without a token,
        load_entropy [L] of f and router_entropy [L], mean over tokens of each token's entropy; both 0 .. log E nats.
    """

    full_state_update = False
    counts_LE: Tensor
    probs_LE: Tensor  # in multiples of UNIT, as entropy_L: see balance/exact.py
    entropy_L: Tensor
    lost_L: Tensor  # sums of a micro-batch that were no numbers
    tokens: Tensor

    def __init__(self, n_layers: int, n_experts: int):
        super().__init__()
        self.add_state("counts_LE", torch.zeros(n_layers, n_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("probs_LE", torch.zeros(n_layers, n_experts, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("entropy_L", torch.zeros(n_layers, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("lost_L", torch.zeros(n_layers, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, routings: Sequence[Routing]) -> None:
        E = self.counts_LE.shape[1]
        self.counts_LE += torch.stack([expert_counts(r.ids, E) for r in routings])
        probs_LE = torch.stack([r.probs[:, :E].sum(0) for r in routings])
        self.probs_LE += whole(probs_LE)
        self.entropy_L += whole(torch.stack([entropy(r.probs).sum() for r in routings]))
        self.lost_L += lost(probs_LE).sum(-1)
        self.tokens += routings[0].ids.shape[0]

    def load(self) -> dict[str, Tensor]:
        """`compute()`, summed over ranks, in full shape: torchmetrics squeezes tensors of one element."""
        L, E = self.counts_LE.shape
        return {name: v.view(L, E) if name in ("f", "P") else v.view(L) for name, v in self.compute().items()}

    def compute(self) -> dict[str, Tensor]:
        per_token_L = torch.where(self.lost_L > 0, torch.nan, UNIT / self.tokens.clamp(min=1))
        f, P = load_share(self.counts_LE), self.probs_LE * per_token_L[:, None]
        high, low = load_deviation(f)
        return {
            "f": f,
            "P": P,
            "lbl": f.shape[-1] * (f * P).sum(-1),
            "max_deviation": high,
            "min_deviation": low,
            "dead": (self.counts_LE == 0).sum(-1).float(),
            "load_entropy": entropy(f),
            "router_entropy": self.entropy_L * per_token_L,
        }


def rounded(values: Tensor, digits: int = 5) -> list:
    """Nested lists with so many significant digits: a share of one token in millions must not become 0."""
    if values.dim() > 1:
        return [rounded(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
