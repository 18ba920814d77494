"""A router that does not learn: what is a learned one worth?

Choosing by a fixed rule is the floor under every router (hash layers, 2106.04426, choose by the token's id; nanochat's log
saw a learned router lose to a frozen random one at large learning rates). Ours: the usual router with its random weights
frozen. It sees the stream, not the id, so its choice depends on context, and on what the layers below learn. Its gate is
still the softmax, through which the stream learns to be routed; only the router's own weights stand still.
"""

from __future__ import annotations

from sigma_lite.config import ModelConfig
from sigma_lite.model import Router
from sigma_lite.model.assumes import Assumes


class Frozen(Router):
    """Random directions, drawn as the learned router's would be, that no step moves."""

    assumes = Assumes()

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.weight.requires_grad_(False)
