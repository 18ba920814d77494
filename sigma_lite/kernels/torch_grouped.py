"""Sort the tokens by expert, then let `torch.nn.functional.grouped_mm` multiply each group by its expert's matrix.

One autograd node around the whole pipeline instead of eight: it keeps only what the backward pass needs (the sorted
rows and the pre-activations), rebuilds the rest, and hands grouped_mm contiguous gradients, which it insists on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Plan(NamedTuple):
    """Which row goes where. Slots are (token, choice) pairs flattened: slot n belongs to token n // K."""

    slot_N: Tensor  # int64: slots sorted by expert; ties keep the token order
    token_N: Tensor  # int64: the token of each sorted row
    ends_E: Tensor  # int32: expert e owns rows ends[e-1] .. ends[e] - 1


def routing_plan(ids_TK: Tensor, n_experts: int) -> Plan:
    """Group slots by expert, on the device of `ids_TK` and without waiting for it."""
    flat_N = ids_TK.flatten()
    slot_N = flat_N.argsort(stable=True)
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=ids_TK.device)
    counts_E = counts_E.scatter_add_(0, flat_N, torch.ones_like(flat_N))
    return Plan(slot_N, slot_N.div(ids_TK.shape[1], rounding_mode="floor"), counts_E.cumsum(0).to(torch.int32))


def grouped_swiglu_torch(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Same value as kernels/loop.py. Every stride must be a multiple of 16 bytes: D and F % 4 in fp32, % 8 in bf16."""
    return _GroupedSwiGLU.apply(x_TD, ids_TK, gates_TK.to(x_TD.dtype), w13, w2)


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, ids_TK, gates_TK, w13, w2):
        plan = routing_plan(ids_TK, w13.shape[0])
        x_ND = x_TD[plan.token_N]
        z_NF2 = F.grouped_mm(x_ND, w13.transpose(1, 2), offs=plan.ends_E)
        gate_NF, up_NF = z_NF2.chunk(2, dim=-1)
        y_ND = F.grouped_mm(F.silu(gate_NF).mul_(up_NF), w2.transpose(1, 2), offs=plan.ends_E)
        y_ND.mul_(gates_TK.flatten()[plan.slot_N, None])
        ctx.save_for_backward(x_ND, z_NF2, gates_TK, w13, w2, *plan)
        return _sum_slots(y_ND, plan, ids_TK.shape)

    @staticmethod
    def backward(ctx, dy_TD):
        x_ND, z_NF2, gates_TK, w13, w2, *plan = ctx.saved_tensors
        plan = Plan(*plan)
        gates_N = gates_TK.flatten()[plan.slot_N, None]
        dy_ND = dy_TD[plan.token_N]  # indexing copies: contiguous even where the incoming gradient is expanded

        # y = gate * w2 h, so with dh = w2^T dy the gate's gradient is <dh, h>: y itself need not be kept.
        gate_NF, up_NF = z_NF2.chunk(2, dim=-1)
        sigmoid_NF = gate_NF.sigmoid()
        silu_NF = gate_NF * sigmoid_NF
        h_NF = silu_NF * up_NF
        dh_NF = F.grouped_mm(dy_ND, w2, offs=plan.ends_E)
        dgates_N = torch.linalg.vecdot(dh_NF, h_NF)
        dh_NF.mul_(gates_N)
        dw2 = F.grouped_mm(dy_ND.mul_(gates_N).transpose(0, 1), h_NF, offs=plan.ends_E)

        dz_NF2 = torch.empty_like(z_NF2)
        dgate_NF, dup_NF = dz_NF2.chunk(2, dim=-1)
        torch.mul(dh_NF, silu_NF, out=dup_NF)
        dh_NF.mul_(up_NF)  # silu'(g) = s + g s (1 - s) = s + silu(g) (1 - s)
        torch.mul(dh_NF, torch.addcmul(sigmoid_NF, silu_NF, 1 - sigmoid_NF), out=dgate_NF)
        dx_ND = F.grouped_mm(dz_NF2, w13, offs=plan.ends_E)
        dw13 = F.grouped_mm(dz_NF2.transpose(0, 1), x_ND, offs=plan.ends_E)

        dgates_TK = torch.empty_like(gates_TK).view(-1).index_copy_(0, plan.slot_N, dgates_N).view_as(gates_TK)
        return _sum_slots(dx_ND, plan, gates_TK.shape), None, dgates_TK, dw13, dw2


def _sum_slots(rows_ND: Tensor, plan: Plan, shape_TK: torch.Size) -> Tensor:
    """Undo the sort and add each token's K rows: a permutation, then a sum, hence the same result every time."""
    T, K = shape_TK
    slots_ND = torch.empty_like(rows_ND).index_copy_(0, plan.slot_N, rows_ND)
    return slots_ND if K == 1 else slots_ND.view(T, K, -1).sum(1)
