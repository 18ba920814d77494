"""The seam between routing and experts: how tokens reach the experts they chose, and how results come back.

A dispatch is any function (x_TD, routing, experts) -> y_TD. Here all experts are local and the kernel sorts and un-sorts
the tokens itself; scale/expert_parallel.py exchanges tokens between ranks around the same call.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from sigma_lite.model.experts import Experts
from sigma_lite.model.router import Routing

Dispatch = Callable[[Tensor, Routing, Experts], Tensor]


def local(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Every expert lives on this device."""
    return experts(x_TD, routing.ids, routing.gates)


def ragged(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """As `local`, but a slot of -1 goes nowhere: each token may have another number of experts, or none and result 0.

    A kept slot is a token of its own to the kernels, which so never see an empty one.
    """
    token_N, slot_N = (routing.ids >= 0).nonzero(as_tuple=True)
    ids_N1, gates_N1 = (chosen[token_N, slot_N, None] for chosen in (routing.ids, routing.gates))
    y_ND = experts(x_TD[token_N], ids_N1, gates_N1)
    return y_ND.new_zeros(x_TD.shape).index_add(0, token_N, y_ND)


def for_router(router: nn.Module) -> Dispatch:
    """`ragged` for a router that may leave slots empty, by its `leaves_empty`."""
    return ragged if getattr(router, "leaves_empty", False) else local
