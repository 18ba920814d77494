"""Sort the tokens by expert, then let `torch.nn.functional.grouped_mm` multiply each group by its expert's matrix.

One operator around the whole pipeline instead of eight: it keeps only what the backward pass needs (the sorted rows and
the pre-activations), rebuilds the rest, and hands grouped_mm contiguous gradients, which it insists on. Rows are gathered
by `index_select` and brought back, weighted and summed in one pass, by `embedding_bag`: on a CPU those two are seven to
eleven times as fast as indexing and `index_copy`.

To `torch.compile` it is opaque (kernels/node.py): grouped_mm's shape rules refuse fp32 although its kernel computes it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.kernels.node import one_node
from sigma_lite.kernels.plan import Plan, combine, routing_plan

Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]
Tensors6 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def grouped_swiglu_torch(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Same value as kernels/loop.py. Every stride must be a multiple of 16 bytes: D and F % 4 in fp32, % 8 in bf16."""
    return _apply(x_TD, ids_TK, gates_TK.to(x_TD.dtype), w13, w2)


def _forward(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensors6:
    """y_TD, and what the backward pass needs: the sorted rows, their pre-activations and the plan."""
    plan = routing_plan(ids_TK, w13.shape[0])
    x_ND = x_TD.index_select(0, plan.token_N)
    z_NF2 = F.grouped_mm(x_ND, w13.transpose(1, 2), offs=plan.ends_E)
    gate_NF, up_NF = z_NF2.chunk(2, dim=-1)
    y_ND = F.grouped_mm(F.silu(gate_NF).mul_(up_NF), w2.transpose(1, 2), offs=plan.ends_E)
    return combine(y_ND, plan, gates_TK), x_ND, z_NF2, *plan


def _backward(
    dy_TD: Tensor,
    x_ND: Tensor,
    z_NF2: Tensor,
    slot_N: Tensor,
    row_TK: Tensor,
    ends_E: Tensor,
    gates_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
) -> Tensors4:
    """Gradients of x, gates, w13 and w2."""
    plan = Plan(slot_N, row_TK, ends_E)
    gates_N = gates_TK.flatten().index_select(0, slot_N)[:, None]
    dy_ND = dy_TD.index_select(0, plan.token_N)  # contiguous, even where the incoming gradient is expanded

    # y = gate * w2 h. With dh = w2^T dy the gate's gradient is <dh, h>: y itself need not be kept.
    gate_NF, up_NF = z_NF2.chunk(2, dim=-1)
    silu_NF = F.silu(gate_NF)
    h_NF = silu_NF * up_NF
    dh_NF = F.grouped_mm(dy_ND, w2, offs=ends_E)
    dgates_N = torch.linalg.vecdot(dh_NF, h_NF)
    dw2 = F.grouped_mm(dy_ND.transpose(0, 1), h_NF.mul_(gates_N), offs=ends_E)

    dh_NF.mul_(gates_N)
    dz_NF2 = torch.empty_like(z_NF2)
    dgate_NF, dup_NF = dz_NF2.chunk(2, dim=-1)
    torch.mul(silu_NF, dh_NF, out=dup_NF)
    torch.ops.aten.silu_backward.grad_input(dh_NF.mul_(up_NF), gate_NF, grad_input=dgate_NF)
    dx_ND = F.grouped_mm(dz_NF2, w13, offs=ends_E)
    dw13 = F.grouped_mm(dz_NF2.transpose(0, 1), x_ND, offs=ends_E)
    return combine(dx_ND, plan), dgates_N.index_select(0, row_TK.flatten()).view_as(gates_TK), dw13, dw2


def _forward_fake(x_TD, ids_TK, gates_TK, w13, w2):
    N, (E, F2, D) = ids_TK.numel(), w13.shape
    plan = ids_TK.new_empty(N), torch.empty_like(ids_TK), ids_TK.new_empty(E, dtype=torch.int32)
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(N, D), x_TD.new_empty(N, F2), *plan


def _backward_fake(dy_TD, x_ND, z_NF2, slot_N, row_TK, ends_E, gates_TK, w13, w2):
    return tuple(t.new_empty(t.shape) for t in (dy_TD, gates_TK, w13, w2))


_apply, _forward_op, _backward_op = one_node(
    "grouped_swiglu", _forward, _backward, _forward_fake, _backward_fake, keep_x=False
)
