"""The router: one linear layer and a softmax in FP32. The gate is the probability BEFORE top-k.

Sigma-MoE-Tiny (2512.16248) and every other top-1 model depend on that order. Softmax over the chosen experts only would
make the gate of a single winner exactly 1: a constant, through which the language-model loss cannot reach the router.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_lite.config import ModelConfig


class Routing(NamedTuple):
    """What a router decided for T tokens. Returned, never stored: losses and metrics are computed at the top."""

    probs: Tensor  # [T, E] fp32 softmax over all experts; each row sums to 1
    ids: Tensor  # [T, K] int64 chosen experts, most probable first
    gates: Tensor  # [T, K] fp32 probabilities of the chosen; they sum to less than 1, and are not renormalised
    logits: Tensor  # [T, E] fp32


class Router(nn.Module):
    """`top_k` may change between steps (progressive sparsification): the gates keep their scale, no weight changes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.top_k = config.top_k

    def forward(self, x_TD: Tensor) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):  # bf16 logits would change about 1 % of top-1 choices
            logits_TE = F.linear(x_TD.float(), self.weight.float())
        probs_TE = logits_TE.softmax(-1)
        gates_TK, ids_TK = probs_TE.topk(self.top_k, dim=-1)
        return Routing(probs_TE, ids_TK, gates_TK, logits_TE)
