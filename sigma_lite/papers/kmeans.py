"""Online K-means as a router (2605.12476): an expert is where its tokens have been; nothing of the router is learned.

The paper's, from its abstract only, so this is our reading: each expert has a centroid, the running mean of the states
that it was given; a token goes to the centroid with the largest cosine. Ours: states are normalised before they are
averaged; centroids move in each micro-batch of training by `keep`; scores are a softmax of the cosines over a temperature,
as gate and for the losses that are measured; centroids begin as random directions. An expert without tokens stays where
it is. Sums go over all ranks. Filler of rows that are not packed moves centroids like any token, and all layers begin with
the same directions. A step cut into more micro-batches moves the centroids more often: it is another run.
Confidence: second hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.balance.losses import expert_counts
from sigma_lite.balance.pooled import sum_over_ranks
from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.weights import Weight, fill


class OnlineKMeans(Router):
    """Top K by cosine to the experts' centroids.

    Args:
        keep: share of the old centroid in the new one; ours.
        temperature: of the softmax of cosines; ours.
    """

    assumes = Assumes(state="a centroid an expert", parameters="none, and no router weights")
    weight: Tensor

    def __init__(self, config: ModelConfig, keep: float = 0.99, temperature: float = 0.1):
        super().__init__(config)
        require(0 <= keep < 1, f"keep={keep}: a share of the old centroid, so it must lie in 0..1, without 1")
        require(temperature > 0, f"temperature={temperature}: must be greater than 0")
        self.keep, self.temperature, self.own_weights = keep, temperature, {}
        begun = self.weight.detach()
        del self.weight
        self.register_buffer("weight", begun)
        if not begun.is_meta:
            fill(begun, Weight(1.0), "centroids")

    def forward(self, x_TD: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            directions_TD = F.normalize(x_TD.float(), dim=-1)
            routing = self.routing(directions_TD @ F.normalize(self.weight, dim=-1).T / self.temperature)
        if self.training:
            self._follow(directions_TD.detach(), routing.ids)
        return routing

    @torch.no_grad()
    def _follow(self, directions_TD: Tensor, ids_TK: Tensor) -> None:
        sums_ED = torch.zeros_like(self.weight)
        for ids_T in ids_TK.unbind(1):
            sums_ED.index_add_(0, ids_T, directions_TD)
        sums_ED, counts_E = sum_over_ranks(sums_ED), sum_over_ranks(expert_counts(ids_TK, len(self.weight)))
        mean_ED = sums_ED / counts_E.clamp(min=1)[:, None]
        moved_ED = self.keep * F.normalize(self.weight, dim=-1) + (1 - self.keep) * mean_ED
        self.weight.copy_(torch.where(counts_E[:, None] > 0, moved_ED, self.weight))
