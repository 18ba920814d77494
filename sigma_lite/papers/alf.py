"""Bias rules that solve the assignment problem of loss-free balance (balance/dual.py) in other ways than by a small step.

Quantile balancing (kexue.fm/11619; Kimi K3, 2607.24653, section 2.3.3; code in torchtitan and Megatron). A token that
chooses the K best of s + b and has expert j among them keeps j as long as b_j stays above alpha - s_j, where alpha is its
(K + 1)-th best of s + b. So the K / E quantile of alpha - s_j over the batch is about the bias at which j would get its
share, the others standing still: exact for tokens that chose j, a little low for others. All experts move at once. A
residue is left: 9600 tokens, 96 experts, K = 1, frozen sigmoid scores: 1799 tokens off at first, 105 after one step,
23 after five; softmax scores: 135 and 58. With exact quantiles 102 and 26, and 20 in the end; the sign rule of rate 0.001
leaves 782 after 60 steps and 46 after 300.

Theirs: the rule, the mean taken off, the bias used from the next step on. Also theirs: the quantile is of a histogram
of 1000 bins, because a mean of quantiles is none, while histograms of micro-batches and ranks add up to that of the batch,
exactly. Ours: the histogram is a balancer's statistic; no moving average. Confidence: text and code read.

`online` is the other setting of Han & Zhong (2512.03915): each step brings new tokens. Where the expected dual is strongly
convex, steps of 1 / (mu n) have a regret that grows with log n only. The constants below are ours, from the usual proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, is_ours
from sigma_lite.balance.bias import centred
from sigma_lite.balance.losses import expert_counts
from sigma_lite.config import ConfigError, require
from sigma_lite.model import Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.block import MoE


class QuantileBalancing(Balancer):
    """No loss; after each step the bias at which, for its tokens, each expert alone would have got its share.

    It has to know the bias that chose: it keeps the one that it gave, which a checkpoint holds. Where something else has
    set the bias, such as the checkpoint of another run, it leaves the bias for one step and learns it.

    Args:
        score: the router's, "softmax" or "sigmoid": what the bias is added to.
        bins: of the histogram, over the width of the bias plus 2.
    """

    assumes = Assumes(k="fewer than all", state="a bias an expert")

    def __init__(self, score: str = "softmax", bins: int = 1000):
        require(score in ("softmax", "sigmoid"), f"score={score!r}: choose softmax or sigmoid, as net.router_score does")
        require(bins >= 2, f"bins={bins}: must be at least 2")
        self.score, self.bins = score, bins
        self.bias_LE: Tensor | None = None

    def must_fit(self, layer: MoE) -> None:
        router = layer.router
        name, own = type(router).__name__, not is_ours(router)
        require(
            own or type(router).choose is Router.choose,
            f"quantile balancing is of the top K of all experts, and {name} chooses in another way: balance it by a loss",
        )
        require(
            own or router.score == self.score,
            f"score={self.score!r} is not what {name} chooses by, which is {router.score}: QuantileBalancing takes"
            " softmax or sigmoid, as net.router_score says",
        )
        require(
            own or not router.sums_to_one,
            f"quantile balancing reads scores from gates, and {name} divides its gates by their sum: set"
            " net.renormalise=false",
        )

    def statistics(self, routings: Sequence[Routing]) -> Tensor:
        """[L, E, bins + 1]: the histogram of alpha - s_j of each expert j, and last the slots that j got."""
        biases = [None] * len(routings) if self.bias_LE is None else self.bias_LE
        return torch.stack([self._of_layer(r, b) for r, b in zip(routings, biases, strict=True)])

    def _of_layer(self, routing: Routing, bias_E: Tensor | None) -> Tensor:
        scores_TE, K = self._scores(routing), routing.ids.shape[1]
        E = scores_TE.shape[1]
        require(K < E, f"quantile balancing of {K} of {E} experts: every token takes all, there is nothing to balance")
        bias_E = scores_TE.new_zeros(E) if bias_E is None else bias_E.to(scores_TE.device)
        counts_EB = histogram(wanted_bias(scores_TE, bias_E, K), bias_E, self.bins)
        return torch.cat((counts_EB, expert_counts(routing.ids, E)[:, None]), 1)

    def _scores(self, routing: Routing) -> Tensor:
        scores_TE = routing.probs if self.score == "softmax" else routing.logits.sigmoid()
        same = torch.equal(scores_TE.gather(1, routing.ids.clamp(min=0)).where(routing.ids >= 0, 0.0), routing.gates)
        require(same, f"score={self.score!r} is not what this router chooses by: its gates are other numbers")
        return scores_TE

    def next_bias(self, bias_LE: Tensor, pooled: Tensor, step: int) -> Tensor | None:
        known_LE = torch.zeros_like(bias_LE) if self.bias_LE is None else self.bias_LE.to(bias_LE.device)
        if not torch.equal(known_LE, bias_LE):
            self.bias_LE = bias_LE
            return None
        layers = zip(pooled[..., :-1], pooled[..., -1], bias_LE, strict=True)
        self.bias_LE = centred(torch.stack([quantile(h, share_of(h, slots), b) for h, slots, b in layers]))
        return self.bias_LE

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.bias_LE is None else {"bias": self.bias_LE}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if unknown := sorted(state.keys() - {"bias"}):
            raise ConfigError(f"the checkpoint holds {', '.join(unknown)} of another balancer: begin a new run")
        self.bias_LE = state.get("bias")


def wanted_bias(scores_TE: Tensor, bias_E: Tensor, K: int) -> Tensor:
    """alpha_t - s_tj, [T, E]: the bias below which token t, if it chose expert j, would give it up."""
    alpha_T1 = (scores_TE + bias_E).topk(K + 1, dim=-1).values[:, K:]
    return alpha_T1 - scores_TE


def edges(bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """(lowest, highest) that alpha - s can be while scores lie in 0..1."""
    return bias_E.amin() - 1, bias_E.amax() + 1


def histogram(wanted_TE: Tensor, bias_E: Tensor, bins: int) -> Tensor:
    """Tokens of each expert in equal bins between `edges`, int64 [E, bins]; each row sums to T."""
    low, high = edges(bias_E)
    bin_TE = ((wanted_TE - low) / (high - low) * bins).long().clamp(0, bins - 1)
    E = wanted_TE.shape[1]
    flat_TE = bin_TE + bins * torch.arange(E, device=bin_TE.device)
    return torch.bincount(flat_TE.flatten(), minlength=E * bins).view(E, bins)


def share_of(counts_EB: Tensor, slots_E: Tensor) -> Tensor:
    """K / E, from what was counted: slots over tokens times experts."""
    return slots_E.sum() / counts_EB.sum().clamp(min=1)


def quantile(counts_EB: Tensor, level: Tensor, bias_E: Tensor) -> Tensor:
    """The value below which `level` of each row lies, fp32 [E]; inside a bin tokens are taken to lie evenly."""
    low, high = edges(bias_E)
    width = (high - low) / counts_EB.shape[1]
    below_EB = counts_EB.cumsum(1)
    target_E1 = level * below_EB[:, -1:]
    bin_E1 = (below_EB < target_E1).sum(1, keepdim=True).clamp(max=counts_EB.shape[1] - 1)
    inside_E1 = counts_EB.gather(1, bin_E1)
    part_E1 = (target_E1 - (below_EB.gather(1, bin_E1) - inside_E1)) / inside_E1.clamp(min=1)
    return (low + width * (bin_E1 + part_E1)).squeeze(1).float()


# -------------------------------------------------------------------------------------------------------------- online


class Online(NamedTuple):
    """N steps of several streams side by side."""

    price: Tensor  # [N, S, E], with which the n-th batch chose; mean 0
    cost: Tensor  # [N, S], f_n(p_n) = g_n(p_n) / T: the dual per token


def online(batches: Iterable[Tensor], K: int, step: Callable[[int], float]) -> Online:
    """The bias rule on a stream: p <- centred(p - step(n) (A_n / T - K / E)), where A_n are the loads of the n-th batch.

    The gradient's squared norm is at most K (1 - K / E). So for an expected cost that is mu-strongly convex over prices of
    mean 0, step(n) = 1 / (mu n) has an expected regret of at most K (1 - K / E) (1 + log N) / (2 mu) after N steps.

    Args:
        batches: scores of the n-th batch of each stream, [S, T, E]; a price sees only batches before its own.
        step: of n = 1, 2, ...
    """
    price_SE, prices, costs = None, [], []
    for n, gamma_STE in enumerate(batches, start=1):
        S, T, E = gamma_STE.shape
        price_SE = gamma_STE.new_zeros(S, E) if price_SE is None else price_SE
        best_STK = (gamma_STE + price_SE[:, None]).topk(K)
        loads_SE = torch.zeros_like(price_SE).scatter_add_(1, best_STK.indices.flatten(1), gamma_STE.new_ones(S, T * K))
        prices.append(price_SE)
        costs.append(best_STK.values.sum((1, 2)) / T - K / E * price_SE.sum(1))
        price_SE = centred(price_SE - step(n) * (loads_SE / T - K / E))
    return Online(torch.stack(prices), torch.stack(costs))
