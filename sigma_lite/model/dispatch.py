"""The seam between routing and experts: how tokens reach the experts they chose, and how results come back.

A dispatch is any function (x_TD, routing, experts) -> y_TD. Here all experts are local and the kernel sorts and un-sorts
the tokens itself; scale/expert_parallel.py exchanges tokens between ranks around the same call.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sigma_lite.model.experts import Experts
from sigma_lite.model.router import Routing

Dispatch = Callable[[Tensor, Routing, Experts], Tensor]


def local(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Every expert lives on this device."""
    return experts(x_TD, routing.ids, routing.gates)
