"""Gates of another size: is the gate why hash routing learns faster? Two controls of the family, ours.

A learned router's gate is its probability, near 1 / E at first and small to the end where the router stays unsure. Hash
routing (papers/hash.py) has the gate 1. Each control changes the gate alone and keeps the choice: a learned router with the
gate 1, and a hash with the gate 1 / E. (`expert_gain` scales the experts at the start only.)
"""

from __future__ import annotations

from torch import Tensor

from sigma_lite.model import Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.papers.hash import Hashed


class Whole(Router):
    """The usual router, whose gates are exactly 1 going forward; going backward they have the gradient of their logarithm.

    Without that gradient the language-model loss could not reach the router: a constant gate teaches nothing.
    """

    assumes = Assumes()

    def gate(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        gates_TK = super().gate(scores_TE, ids_TK)
        return gates_TK / gates_TK.detach()


class Small(Hashed):
    """Hash routing with gates E times smaller, all through training."""

    assumes = Hashed.assumes

    def forward(self, x_TD: Tensor, tokens_T: Tensor) -> Routing:
        routing = super().forward(x_TD, tokens_T)
        return routing.with_tensors(gates=routing.gates / self.n_experts)
