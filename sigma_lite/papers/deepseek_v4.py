"""DeepSeek-V4's routing (transformers PR 45643, Megatron PR 4481): square-root-softplus scores, and low layers that hash.

Theirs: the score sqrt(softplus(z)), which has no upper end, where a sigmoid saturates; a loss-free bias for the choice
only; gates of the unbiased scores divided by their sum, times 1.5 or 2.5; and the first three layers choose by a table of
the token's id, while the gate of the chosen is still learned. Why they hash is not explained there: a field answer to the
low layers that Sigma-MoE-Tiny cannot balance. Ours: the table is a hash (papers/hash.py), so loads in those layers follow
token frequencies; `renormalise=False` keeps the raw scores, which K = 1 needs, because a single gate divided by itself is
constant; their shared expert is papers/shared.py. Confidence: code read second hand.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.papers.hash import hashed

LOWEST = -80.0  # softplus of less is no normal fp32 number, and the gradient of its root would be 0 * infinity


class SqrtSoftplus(Router):
    """Top K of sqrt(softplus(logits)).

    Args:
        renormalise: divide a token's gates by their sum; needs K > 1.
        scale: of the renormalised gates.
    """

    assumes = Assumes(k="any; 2 or more if renormalised")

    def __init__(self, config: ModelConfig, renormalise: bool = True, scale: float = 1.5):
        super().__init__(config)
        self.score, self.sums_to_one, self.scale = "sqrt-softplus", renormalise, scale if renormalise else 1.0
        self.set_k(config.top_k)

    def set_k(self, k: int) -> None:
        why = "a single gate divided by itself is 1, and the router would not learn: set renormalise: false"
        require(k > 1 or not self.sums_to_one, f"renormalise=True with {k} expert per token: {why}")
        super().set_k(k)

    def scores(self, logits_TE: Tensor) -> Tensor:
        return F.softplus(logits_TE.clamp(min=LOWEST)).sqrt()

    def gate(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        return self.scale * super().gate(scores_TE, ids_TK)


class HashedLow(SqrtSoftplus):
    """As above, but the lowest layers choose by the token's id.

    Args:
        layers: how many.
    """

    assumes = Assumes(k="any; 2 or more if renormalised")
    reads_tokens = True

    def __init__(self, config: ModelConfig, layers: int = 3, renormalise: bool = True, scale: float = 1.5):
        super().__init__(config, renormalise, scale)
        require(layers >= 0, f"layers={layers}: must be 0 or more")
        self.layers = layers

    def forward(self, x_TD: Tensor, tokens_T: Tensor) -> Routing:
        routing = super().forward(x_TD)
        if self.layer >= self.layers:
            return routing
        ids_TK = hashed(tokens_T, routing.probs.shape[1], self.top_k, self.layer)
        return routing.with_tensors(ids=ids_TK, gates=self.gate(self.scores(routing.logits), ids_TK))
