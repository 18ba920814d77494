"""The expert layer on a GPU, as few launches as it takes, and no wait for the device.

Forward is 6 launches, 4 of them small ones for the plan, and backward 4. K > 1 adds one to each, the sum over choices, and
an F of several tiles one that adds up the gate's gradient. How many programs to launch never depends on the routing.

What is kept for backward: z, 2F numbers a slot, and the routing plan. Not x in sorted order (the kernels gather), not h
(rebuilt from z), not the experts' outputs (the gate's gradient does not need them).
"""

import torch
import triton
from torch import Tensor

from sigma_lite.kernels import triton_kernels as kernels
from sigma_lite.kernels.node import one_node
from sigma_lite.kernels.triton_plan import max_tiles, tile_plan
from sigma_lite.kernels.triton_tiles import LONG, Launcher, rows_per_tile, tile

Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]
Tensors5 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def grouped_swiglu_triton(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Same value as kernels/loop.py, in fp32, fp16 or bf16 with sums in fp32. D and F must be multiples of 16."""
    return _apply(x_TD, ids_TK, gates_TK, w13, w2)


def forward_with(launch, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensors5:
    """y_TD, and what the backward pass needs: the pre-activations and the plan."""
    x_TD, ids_TK, gates_TK, w13, w2 = (t.contiguous() for t in (x_TD, ids_TK, gates_TK, w13, w2))
    (T, K), (E, F2, D) = ids_TK.shape, w13.shape
    N, F = T * K, F2 // 2
    BM = rows_per_tile(N, E, x_TD.dtype)
    plan = tile_plan(launch, ids_TK, E, BM)
    where, n_tiles = (plan.slot_N, plan.tiles_2M, plan.ends_E), plan.tiles_2M.shape[1]
    z_NF2, h_NF = x_TD.new_empty(N, F2), x_TD.new_empty(N, F)
    y_TKD = x_TD.new_empty(T, K, D)

    c = tile("swiglu_forward", BM, (BM, F, D), x_TD.dtype, launch.shared)
    launch(kernels.swiglu_forward, n_tiles * triton.cdiv(F, c["BN"]), x_TD, *where, w13, z_NF2, h_NF, n_tiles, K, D,
           D=D, F=F, **c)  # fmt: skip
    c = tile("project", BM, (BM, D, F), x_TD.dtype, launch.shared)
    launch(kernels.project, n_tiles * triton.cdiv(D, c["BN"]), h_NF, *where, w2, gates_TK, y_TKD, n_tiles, F,
           WIDTH=F, OUT=D, GATED=True, **c)  # fmt: skip
    return _sum_choices(launch, y_TKD), z_NF2, *plan


def backward_with(
    launch,
    dy_TD: Tensor,
    z_NF2: Tensor,
    slot_N: Tensor,
    ends_E: Tensor,
    tiles_2M: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
) -> Tensors4:
    """Gradients of x, gates, w13 and w2."""
    dy_TD, x_TD, gates_TK, w13, w2 = (t.contiguous() for t in (dy_TD, x_TD, gates_TK, w13, w2))
    (T, K), (E, F2, D) = gates_TK.shape, w13.shape
    N, F, dtype = T * K, F2 // 2, x_TD.dtype
    BM, n_tiles = rows_per_tile(N, E, dtype), tiles_2M.shape[1]
    where = slot_N, tiles_2M, ends_E
    dz_NF2, h_NF, dx_TKD = torch.empty_like(z_NF2), z_NF2.new_empty(N, F), x_TD.new_empty(T, K, D)
    dw13, dw2 = torch.empty_like(w13), torch.empty_like(w2)

    c = tile("swiglu_backward", BM, (BM, F, D), dtype, launch.shared)
    shares = triton.cdiv(F, c["BN"])
    dgates = gates_TK.new_empty(shares, T, K, dtype=gates_TK.dtype if shares == 1 else torch.float32)
    launch(kernels.swiglu_backward, n_tiles * shares, dy_TD, *where, w2, z_NF2, gates_TK, dz_NF2, h_NF, dgates,
           n_tiles, N, K, D, D=D, F=F, **c)  # fmt: skip
    _weight_gradient(launch, dy_TD, h_NF, slot_N, ends_E, dw2, N // E, K, gather_a=True)
    c = tile("project", BM, (BM, D, F2), dtype, launch.shared)
    launch(kernels.project, n_tiles * triton.cdiv(D, c["BN"]), dz_NF2, *where, w13, gates_TK, dx_TKD, n_tiles, F2,
           WIDTH=F2, OUT=D, GATED=False, **c)  # fmt: skip
    _weight_gradient(launch, dz_NF2, x_TD, slot_N, ends_E, dw13, N // E, K, gather_a=False)
    dgates_TK = dgates[0] if shares == 1 else dgates.sum(0).to(gates_TK.dtype)
    return _sum_choices(launch, dx_TKD), dgates_TK, dw13, dw2


def _weight_gradient(launch, a, b, slot_N, ends_E, dw, tokens: int, K: int, gather_a: bool) -> None:
    E, M, N = dw.shape
    c = tile("weight_gradient", "long" if tokens >= LONG else "short", (M, N, tokens), dw.dtype, launch.shared)
    programs = E * triton.cdiv(M, c["BM"]) * triton.cdiv(N, c["BN"])
    launch(kernels.weight_gradient, programs, a, b, slot_N, ends_E, dw, K, M=M, N=N, GATHER_A=gather_a, **c)


def _sum_choices(launch, slots_TKD: Tensor) -> Tensor:
    T, K, D = slots_TKD.shape
    if K == 1:
        return slots_TKD.view(T, D)
    out_TD = slots_TKD.new_empty(T, D)
    BD = min(512, triton.next_power_of_2(D))
    BT = 4096 // BD
    launch(kernels.sum_choices, triton.cdiv(T, BT) * triton.cdiv(D, BD), slots_TKD, out_TD, T, K, D=D, BT=BT, BD=BD)
    return out_TD


def _forward(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensors5:
    with torch.cuda.device_of(x_TD):  # Triton launches on the current device, whatever device the tensors are on
        return forward_with(Launcher(x_TD.device), x_TD, ids_TK, gates_TK, w13, w2)


def _backward(
    dy_TD: Tensor,
    z_NF2: Tensor,
    slot_N: Tensor,
    ends_E: Tensor,
    tiles_2M: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
) -> Tensors4:
    with torch.cuda.device_of(x_TD):
        return backward_with(Launcher(x_TD.device), dy_TD, z_NF2, slot_N, ends_E, tiles_2M, x_TD, gates_TK, w13, w2)


def _forward_fake(x_TD, ids_TK, gates_TK, w13, w2):
    N, (E, F2, _) = ids_TK.numel(), w13.shape
    n_tiles = max_tiles(N, E, rows_per_tile(N, E, x_TD.dtype))
    plan = (ids_TK.new_empty(shape, dtype=torch.int32) for shape in ((N,), (E,), (2, n_tiles)))
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(N, F2), *plan


def _backward_fake(dy_TD, z_NF2, slot_N, ends_E, tiles_2M, x_TD, gates_TK, w13, w2):
    return tuple(t.new_empty(t.shape) for t in (x_TD, gates_TK, w13, w2))


_apply, _forward_op, _backward_op = one_node(
    "grouped_swiglu_triton", _forward, _backward, _forward_fake, _backward_fake, keep_x=True
)
