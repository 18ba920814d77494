"""Give every expert a box of `capacity` rows, fill the rest with zeros, and multiply all boxes in one `bmm`.

GShard (2006.16668) and Switch (2101.03961) train so: shapes do not depend on the routing, which static graphs need. The
price is paid twice. Boxes that are not full multiply zeros, and a token that finds its expert's box full is dropped.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.kernels.plan import Plan, routing_plan


def expert_capacity(n_slots: int, n_experts: int, factor: float) -> int:
    """Rows of one box: `factor` times a fair share of the slots, rounded up; 1.0 has room for all if balanced."""
    return math.ceil(factor * n_slots / n_experts)


def has_room(ids_TK: Tensor, n_experts: int, capacity: int) -> Tensor:
    """bool [T, K]: False where the slot is dropped. First come, first served in token order, as in Switch.

    1 - has_room(...).float().mean() is the share that was dropped. Dropping a slot is the same as a gate of 0 there.
    """
    plan = routing_plan(ids_TK, n_experts)
    return (_place_N(plan, capacity) < n_experts * capacity)[plan.row_TK]


def grouped_swiglu_padded(
    x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor, capacity: int | None = None
) -> Tensor:
    """kernels/loop.py with every slot outside `has_room` dropped, in any dtype.

    `capacity=None` makes the boxes as large as the fullest expert: nothing is dropped, and the device is waited for.
    Work and memory grow with E * capacity: one expert that takes all T tokens makes E * T rows of them.
    """
    E, _, D = w13.shape
    plan = routing_plan(ids_TK, E)
    if capacity is None:
        capacity = int(_counts_E(plan).max())
    place_N = _place_N(plan, capacity)
    boxes = x_TD.new_zeros(E * capacity + 1, D).index_copy(0, place_N, x_TD[plan.token_N])
    gate, up = torch.bmm(boxes[:-1].view(E, capacity, D), w13.transpose(1, 2)).chunk(2, dim=-1)
    y = torch.bmm(F.silu(gate) * up, w2.transpose(1, 2)).flatten(0, 1)
    y = torch.cat((y, y.new_zeros(1, D)))  # the last row: what became of the dropped
    return (y[place_N[plan.row_TK]] * gates_TK[..., None].to(y.dtype)).sum(1)


def _counts_E(plan: Plan) -> Tensor:
    return plan.ends_E.diff(prepend=plan.ends_E.new_zeros(1))


def _place_N(plan: Plan, capacity: int) -> Tensor:
    """Row of all boxes laid end to end for each sorted slot; one past the last for a slot without room."""
    E, N = len(plan.ends_E), len(plan.slot_N)
    row_N = torch.arange(N, device=plan.slot_N.device)
    expert_N = torch.searchsorted(plan.ends_E.long(), row_N, right=True)
    rank_N = row_N - (plan.ends_E - _counts_E(plan))[expert_N]
    return torch.where(rank_N < capacity, expert_N * capacity + rank_N, E * capacity)
