"""Expert threshold (2603.11535): a token goes to every expert whose score of it exceeds that expert's threshold.

The paper's, from its abstract only, so this is our reading: expert i takes a token where its score exceeds c_i, and c_i is
a running average of the score's (1 - 1 / E) quantile over past global batches. So each expert gets its share of a stream
that does not change, as in expert choice, but each token is judged by itself: no later token matters. Tokens have no
expert, one or several; no balance loss. Ours: the level is 1 - K / E, so K experts on average; sigmoid scores, and the
average is of thresholds on them; the quantile is of a histogram, which adds up over ranks and micro-batches; the first
step, before there are thresholds, takes the top K; the gate is the score. The thresholds are the router's bias with the
opposite sign, so a checkpoint holds them. Confidence: second hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, is_ours
from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.block import MoE
from sigma_lite.model.router import slots
from sigma_lite.papers.alf import histogram, quantile

BINS = 2000  # of scores in -1..1, the range of alf.histogram without a bias: 1000 of them are used


class Above(Router):
    """Every expert whose sigmoid score exceeds its threshold; to be used with `Thresholds`."""

    assumes = Assumes(k="0 to E, K on average", state="a threshold an expert")
    leaves_empty = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.score = "sigmoid"

    def set_k(self, k: int) -> None:
        use = "thresholds decide how many experts a token has: leave out model.sparsity.head"
        require(k == self.top_k, f"{k} experts per token beside net.top_k={self.top_k}: {use}")

    def must_fit(self, balancer: Balancer) -> None:
        require(
            isinstance(balancer, Thresholds) or not is_ours(balancer),
            f"{balancer} sets no thresholds: tokens would go to their top K, or with a bias to every expert; set"
            " model.custom_balance: sigma_lite.papers.threshold.Thresholds",
        )

    def choose(self, scores_TE: Tensor) -> Tensor:
        """`scores_TE` have the bias added, which is minus the threshold."""
        return slots(scores_TE > 0, scores_TE) if self.bias.any() else super().choose(scores_TE)


class Thresholds(Balancer):
    """No loss; after each step the thresholds move towards the quantile of the step's scores.

    Args:
        k: experts per token on average.
        keep: share of the old threshold in the new one, 0..1; the paper's is unknown, 0.9 is ours.
    """

    assumes = Assumes(state="a threshold an expert")

    def __init__(self, k: int = 1, keep: float = 0.9):
        require(k >= 1, f"k={k}: must be at least 1")
        require(0 <= keep < 1, f"keep={keep}: a share of the old threshold, so it must lie in 0..1, without 1")
        self.k, self.keep = k, keep

    def must_fit(self, layer: MoE) -> None:
        router = layer.router
        name = "sigma_lite.papers.threshold.Above"
        require(
            isinstance(router, Above) or not is_ours(router),
            f"Thresholds are no bias for the top K of {type(router).__name__}: set model.parts.router: {name}",
        )
        require(
            self.k == router.top_k,
            f"Thresholds(k={self.k}) beside net.top_k={router.top_k}, which only the first step uses: give both one number",
        )

    def statistics(self, routings: Sequence[Routing]) -> Tensor:
        """[L, E, bins]: how often each expert gave which score."""
        return torch.stack([histogram(r.logits.sigmoid(), r.logits.new_zeros(1), BINS) for r in routings])

    def next_bias(self, bias_LE: Tensor, pooled: Tensor, step: int) -> Tensor:
        level = torch.tensor(1 - self.k / bias_LE.shape[1], device=pooled.device)
        now_LE = -torch.stack([quantile(counts_EB, level, bias_LE.new_zeros(1)) for counts_EB in pooled])
        begun_L1 = bias_LE.any(-1, keepdim=True)
        return torch.where(begun_L1, self.keep * bias_LE + (1 - self.keep) * now_LE, now_LE)
