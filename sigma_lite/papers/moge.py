"""Mixture of grouped experts (Pangu Pro MoE, 2505.21411, section 2): K / M experts from each of M groups.

Experts that live on one device form a group, so every device works for every token, equally: the imbalance score is 0 by
construction, for any router and any text.

The paper's: softmax over all E experts before the choice; K / M of each group; gates that are not renormalised. Its code
(vllm-ascend, pangu_moe.py) multiplies a gate by a learned factor of the expert, which the paper does not mention:
`learned_scale`. Ours: nothing is added; the shared experts of Pangu are left out. Confidence: text and code were read.

At K = 1 there is one group, and grouping is nothing: a model with one expert per token cannot be balanced so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Router
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.weights import GAIN


class Grouped(Router):
    """Top K / M of each of M groups of neighbouring experts.

    Args:
        groups: M; divides the number of experts and every K of the run.
        learned_scale: a factor on each expert's gate that is learned, 1 at the start.
    """

    assumes = Assumes(k="a multiple of the groups")

    def __init__(self, config: ModelConfig, groups: int = 4, learned_scale: bool = False):
        super().__init__(config)
        E = config.n_experts
        require(groups >= 1 and E % groups == 0, f"groups={groups}: must divide n_experts={E}")
        self.groups, self.scale = groups, None
        if learned_scale:
            self.scale = nn.Parameter(torch.ones(E))
            self.own_weights = {**self.own_weights, "scale": GAIN}
        self.set_k(config.top_k)

    def set_k(self, k: int) -> None:
        require(
            k % self.groups == 0,
            f"groups={self.groups} cannot share out {k} experts per token: their number must be a multiple of the groups,"
            " in every layer, before and after a switch of sparsity",
        )
        super().set_k(k)

    def choose(self, scores_TE: Tensor) -> Tensor:
        T, E = scores_TE.shape
        best_TMk = scores_TE.view(T, self.groups, -1).topk(self.top_k // self.groups, dim=-1).indices
        first_M1 = torch.arange(0, E, E // self.groups, device=scores_TE.device)[:, None]
        ids_TK = (best_TMk + first_M1).flatten(1)
        return ids_TK.gather(1, scores_TE.gather(1, ids_TK).argsort(dim=1, descending=True, stable=True))

    def gate(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        gates_TK = super().gate(scores_TE, ids_TK)
        return gates_TK if self.scale is None else gates_TK * self.scale[ids_TK]


def device_loads(ids_TK: Tensor, n_experts: int, devices: int) -> Tensor:
    """Expert computations on each device, int64 [devices], where neighbouring experts live together."""
    kept_N = ids_TK[ids_TK >= 0]
    return torch.bincount(kept_N // (n_experts // devices), minlength=devices)


def imbalance_score(ids_TK: Tensor, n_experts: int, devices: int) -> float:
    """IS = (busiest - idlest device) / tokens: 0 (even) .. K (one device does everything). No tokens: 0."""
    loads = device_loads(ids_TK, n_experts, devices)
    return float(loads.max() - loads.min()) / max(len(ids_TK), 1)
