"""A shared expert (DeepSeekMoE, 2401.06066): one expert that every token visits, beside those that a router chooses.

The paper's: what all tokens need is learned once, in experts that no gate multiplies, so that routed ones can be special.
Sigma-MoE-Tiny has none; DeepSeek-V2 to V4, Pangu and LatentMoE have. Ours: the shared experts are one wider network, which
is the same sum; routed ones keep their size, so a model has more parameters, and more of them work for each token.
Confidence: text read.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts


class WithShared(nn.Module):
    """The usual experts, and one network for every token, whose width is `shared` experts'.

    Args:
        shared: how many experts are shared.
    """

    assumes = Assumes(parameters="the shared experts")

    def __init__(self, config: ModelConfig, shared: int = 1):
        super().__init__()
        require(shared >= 1, f"shared={shared}: must be at least 1")
        self.routed = Experts(config)
        width = config.d_expert * shared
        one = dataclasses.replace(config, n_experts=1, top_k=1, renormalise=False, d_expert=width, expert_gain=1.0)
        self.shared = Experts(one)

    def around(self, x_TD: Tensor, routing: Routing, dispatch: Dispatch) -> Tensor:
        one_T1 = x_TD.new_zeros(len(x_TD), 1)
        return self.shared(x_TD, one_T1.long(), torch.ones_like(one_T1)) + dispatch(x_TD, routing, self.routed)
