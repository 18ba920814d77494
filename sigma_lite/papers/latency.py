"""ShiftAddViT's mixture of primitives, balanced by what they cost (2306.06446; repository GATECH-EIC/ShiftAddViT).

The paper's: some experts multiply, others only shift: their weights are signed powers of two, trained straight through. A
fair share of tokens is then not an even one, but the one with which all experts finish together: load of i in proportion to
1 / Lat_i. The loss is CV^2 of alpha_i * importance_i plus CV^2 of alpha_i * load_i, alpha_i = Lat_i / sum of Lat, where
importance sums gates, load sums smooth probabilities to be chosen, and CV^2 is variance / mean^2; at latencies of 6 and 4,
40 and 60 % of the tokens.

Its code: factors 6 and 4 are written in; training takes another gate and a balance loss of 0, so the released models were
trained without it; and at K = 1 importance sums a softmax over one logit, which is 1 whatever the logit is: no gradient
(`importance_of_chosen`, kept to show it). Ours: importance sums the router's probabilities over all experts; the smooth
load has a fixed width instead of a learned noise; and `LatencyLBL`, the usual loss with f weighted by latency, is our form
for a language model. On a CPU a shift expert is no faster than another, only a narrower one is: `measured_latency` says
what is true on the machine at hand. Confidence: code read, symbols of the paper from memory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.losses import load_balancing_loss, mean_over_tokens
from sigma_lite.config import ModelConfig, require
from sigma_lite.model import NamedRouting, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.block import MoE
from sigma_lite.model.experts import Experts


def power_of_two(weight: Tensor) -> Tensor:
    """sign(w) 2^round(log2 |w|), 0 for 0; the gradient is that of w itself."""
    rounded = weight.sign() * weight.abs().clamp(min=2.0**-40).log2().round().exp2()
    return weight + (rounded - weight).detach()


class ShiftExperts(Experts):
    """Experts whose weights are signed powers of two."""

    assumes = Assumes()

    def weights(self) -> tuple[Tensor, Tensor]:
        return power_of_two(self.w13), power_of_two(self.w2)


class Mixed(nn.Module):
    """`full` usual experts, then shift experts, which may be narrower.

    Args:
        full: how many multiply; default half.
        shift_width: hidden units of a shift expert; default those of a full one.
    """

    assumes = Assumes()

    def __init__(self, config: ModelConfig, full: int | None = None, shift_width: int | None = None):
        super().__init__()
        full = config.n_experts // 2 if full is None else full
        require(0 < full < config.n_experts, f"full={full}: must lie in 1..{config.n_experts - 1}, so that both kinds exist")
        width = config.d_expert if shift_width is None else shift_width
        require(width >= 1, f"shift_width={width}: must be at least 1")
        kinds = ((Experts, full, config.d_expert), (ShiftExperts, config.n_experts - full, width))
        self.kinds = nn.ModuleList(
            kind(dataclasses.replace(config, n_experts=n, d_expert=F, top_k=1, renormalise=False)) for kind, n, F in kinds
        )

    def forward(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        y_TD, first = None, 0
        for experts in self.kinds:
            ids = ids_TK - first
            token_N, slot_N = ((ids >= 0) & (ids < len(experts.w13))).nonzero(as_tuple=True)
            y_ND = experts(x_TD[token_N], ids[token_N, slot_N, None], gates_TK[token_N, slot_N, None])
            y_TD = (y_ND.new_zeros(x_TD.shape) if y_TD is None else y_TD).index_add(0, token_N, y_ND)
            first += len(experts.w13)
        return y_TD


def per_expert(latency: Sequence[float], E: int) -> Tensor:
    """Latencies of kinds, each of which has E / len neighbouring experts, as [E]."""
    require(E % len(latency) == 0, f"latency={list(latency)}: {len(latency)} kinds do not divide {E} experts")
    return torch.tensor(latency, dtype=torch.float32).repeat_interleave(E // len(latency))


class LatencyLBL(Balancer):
    """E sum_i w_i f_i P_i, w_i = Lat_i / mean Lat. Least where load_i is in proportion to 1 / Lat_i. Of heads: the LBL.

    Args:
        latency: of each kind of expert, in any unit; kinds have equally many neighbouring experts.
    """

    assumes = Assumes()

    def __init__(self, latency: Sequence[float] = (6.0, 4.0)):
        require(len(latency) > 0 and min(latency) > 0, f"latency={list(latency)}: at least one, all greater than 0")
        self.latency = tuple(latency)

    def must_fit(self, layer: MoE) -> None:
        """As many kinds as experts have, of equally many each; of experts of one kind it only has to divide their number."""
        per_expert(self.latency, len(layer.router.bias))
        sizes = [len(kind.w13) for kind in layer.experts.kinds] if isinstance(layer.experts, Mixed) else self.latency
        require(
            len(sizes) == len(self.latency) and (sizes is self.latency or len({*sizes}) == 1),
            f"latency={list(self.latency)}: {len(self.latency)} kinds of equally many neighbouring experts, and Mixed has"
            f" kinds of {sizes} experts: leave its `full` out, and give two",
        )

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        if isinstance(routing, NamedRouting):  # heads take equally long
            return load_balancing_loss(routing.probs, routing.ids, f_E)
        w_E = per_expert(self.latency, len(f_E)).to(f_E.device)
        return len(f_E) * (w_E / w_E.mean() * f_E * mean_over_tokens(routing.probs)).sum()


class LatencyCV(LatencyLBL):
    """CV^2 of latency times importance plus CV^2 of latency times smooth load, as in the paper. Of heads: the LBL.

    Args:
        width: of the gate noise that makes the load smooth, in logits.
    """

    assumes = Assumes(k="fewer than all")

    def __init__(self, latency: Sequence[float] = (6.0, 4.0), width: float = 0.1):
        super().__init__(latency)
        require(width > 0, f"width={width}: must be greater than 0")
        self.width = width

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        if isinstance(routing, NamedRouting):  # heads take equally long
            return load_balancing_loss(routing.probs, routing.ids, f_E)
        alpha_E = per_expert(self.latency, len(f_E)).to(f_E.device)
        alpha_E = alpha_E / alpha_E.sum()
        load_E = smooth_load(routing.logits, routing.ids.shape[1], self.width)
        return cv_squared(alpha_E * routing.probs.sum(0)) + cv_squared(alpha_E * load_E)


def cv_squared(x_E: Tensor) -> Tensor:
    """Unbiased variance over squared mean, as in the code: 0 where all are equal."""
    return x_E.var() / (x_E.mean().square() + 1e-10)


def smooth_load(logits_TE: Tensor, K: int, width: float) -> Tensor:
    """Expected tokens of each expert, [E], if its logit had normal noise: Phi((z - threshold) / width).

    The threshold is what z has to beat: the (K + 1)-th largest logit for one inside the top K, the K-th for one outside.
    """
    require(logits_TE.shape[1] > K, f"{K} of {logits_TE.shape[1]} experts: every token takes all, nothing has to be beaten")
    best = logits_TE.topk(K + 1, dim=-1).values
    inside_TE = logits_TE > best[:, K:]
    threshold_TE = torch.where(inside_TE, best[:, K:], best[:, K - 1 : K])
    return torch.special.ndtr((logits_TE - threshold_TE) / width).sum(0)


def importance_of_chosen(logits_TE: Tensor, K: int) -> Tensor:
    """What the released gate sums, [E]: a softmax over the chosen logits only. At K = 1 it counts, and has no gradient."""
    best = logits_TE.topk(K, dim=-1)
    return torch.zeros_like(logits_TE).scatter(1, best.indices, best.values.softmax(-1)).sum(0)


def makespan(counts_E: Tensor, latency_E: Tensor) -> float:
    """When the last expert is done, where each works alone: max of latency times tokens."""
    return float((counts_E * latency_E).max())


@torch.no_grad()
def measured_latency(experts: Mixed, d_model: int, tokens: int = 4096, repeats: int = 5) -> list[float]:
    """Seconds per token of each kind on this machine: the shortest of some passes in which it alone has all tokens."""
    x_TD, found = torch.randn(tokens, d_model, device=experts.kinds[0].w13.device), []
    for kind in experts.kinds:
        ids_T1 = torch.arange(tokens, device=x_TD.device)[:, None] % len(kind.w13)
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            kind(x_TD, ids_T1, torch.ones_like(ids_T1, dtype=x_TD.dtype)).sum().item()  # waits for a GPU
            times.append(time.perf_counter() - begun)
        found.append(min(times) / tokens)
    return found
