"""SimBal (2506.14038): a router whose rows are orthogonal to each other, so that no loads need to be counted.

The paper's: the loss || R R^T - I ||_1 on the router's rows (its text writes R^T R, with rows as columns). Experts that look
in different directions get different tokens. Nothing of the batch enters: no counts, no probabilities. Ours: divided by E,
so that a layer's loss does not grow with its size; the router hands its rows on beside its routing.

Why it cannot work at E > d, as in our lab (96 experts, width 64): R R^T has at most rank d, so at least E - d of its
eigenvalues are 0 where I has 1, and || R R^T - I ||_1 >= || R R^T - I ||_F >= sqrt(E - d). No router reaches 0, and what is
minimised trades angles between rows, not loads. Even at 0 tokens need not be spread evenly over directions. Confidence: the
formula was read, its code not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, is_ours
from sigma_lite.balance.losses import load_balancing_loss
from sigma_lite.config import require
from sigma_lite.model import NamedRouting, Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.block import MoE

NEEDS_ROWS = "SimBal sees the router's rows: set model.parts.router: sigma_lite.papers.simbal.WithRows"


class RoutingWithRows(Routing):
    """A routing that also holds the router's weight."""

    rows_ED: Tensor


class WithRows(Router):
    """The usual router; its routings hold its rows."""

    assumes = Assumes()

    def forward(self, x_TD: Tensor) -> Routing:
        routing = RoutingWithRows(*super().forward(x_TD))
        routing.rows_ED = self.weight
        return routing


class SimBal(Balancer):
    """`row_similarity` of each layer's router, which has to be `WithRows`. Of attention heads: the LBL."""

    assumes = Assumes()

    def must_fit(self, layer: MoE) -> None:
        require(isinstance(layer.router, WithRows) or not is_ours(layer.router), NEEDS_ROWS)

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        if isinstance(routing, NamedRouting):  # attention shows no rows
            return load_balancing_loss(routing.probs, routing.ids, f_E)
        require(isinstance(routing, RoutingWithRows), NEEDS_ROWS)
        return row_similarity(routing.rows_ED)


def row_similarity(rows_ED: Tensor) -> Tensor:
    """|| R R^T - I ||_1 / E: 0 for orthonormal rows, 1 for rows of 0; at least sqrt(E - D) / E where E > D."""
    E = rows_ED.shape[0]
    with torch.autocast(rows_ED.device.type, enabled=False):  # with bf16 products orthonormal rows cost 0.016
        return (rows_ED @ rows_ED.T - torch.eye(E, device=rows_ED.device)).abs().sum() / E
