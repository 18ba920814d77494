"""The cuda backend as an operator: allocate, call the kernels, tell autograd what to keep.

Kept for the backward pass: the input, the pre-activations z and the plan. A sorted copy of the input is never made; the
hidden rows h and the experts' outputs are made and dropped. Launches, with gates in fp32 and one choice per token: five
forward, and backward four or five.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from sigma_lite.kernels.cuda.binding import DTYPES, call
from sigma_lite.kernels.node import assumed_constant
from sigma_lite.kernels.trial import wrong_results

TILE = "SIGMA_LITE_CUDA_TILE"  # environment variable: rows of a tile, 32, 64 or 128, instead of the rule below
CHUNKS = 256  # most pieces in which slots are counted

Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]
Tensors6 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def grouped_swiglu_cuda(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Same value as kernels/loop.py, bf16 or fp16 in, sums in fp32; D and F multiples of 8, E at most 1024.

    An id outside 0..E-1 stops the device, as torch's own indexing does.
    """
    _check(x_TD.device.type, x_TD.device.index, x_TD.dtype)
    return _GroupedSwiGLU.apply(x_TD, ids_TK, gates_TK.float(), w13, w2, tile_rows(ids_TK.numel(), w13.shape[0]))


def tile_rows(n_rows: int, n_experts: int) -> int:
    """Rows of a tile: 32 up to a mean of 32 rows an expert, 64 up to 128, else 128. SIGMA_LITE_CUDA_TILE overrules it."""
    if wanted := os.environ.get(TILE):
        if wanted not in ("32", "64", "128"):
            raise ValueError(f"{TILE}={wanted}: the kernel is compiled for tiles of 32, 64 or 128 rows")
        return int(wanted)
    return 32 if n_rows <= 32 * n_experts else 64 if n_rows <= 128 * n_experts else 128


def _sizes(x_TD: Tensor, ids_TK: Tensor, w13: Tensor, tile: int) -> dict[str, int]:
    (T, K), (E, F2, D) = ids_TK.shape, w13.shape
    chunk = max(256, -(-T * K // CHUNKS))
    parts = -(-F2 // 2 // (32 if tile == 32 else 64))  # columns of one warp
    shapes = {"tokens": T, "k": K, "experts": E, "width": D, "units": F2 // 2}
    plan = {"tile": tile, "chunk": chunk, "chunks": -(-T * K // chunk), "max_tiles": T * K // tile + E}
    return {"dtype": DTYPES[x_TD.dtype], **shapes, **plan, "gate_parts": parts}


def _forward(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor, tile: int, keep: bool) -> Tensors6:
    """y_TD, and for the backward pass the pre-activations (empty unless `keep`) and the plan."""
    (T, K), (E, F2, D) = ids_TK.shape, w13.shape
    sizes, ints = _sizes(x_TD, ids_TK, w13, tile), {"dtype": torch.int32, "device": x_TD.device}
    slot, token, ends = (torch.empty(n, **ints) for n in (T * K, T * K, E))
    tiles = torch.empty(sizes["max_tiles"], 2, **ints)
    counts = torch.empty(max(sizes["chunks"], 1), E, **ints)
    plan = {"slot": slot, "token": token, "ends": ends, "tiles": tiles}
    call("plan", {"ids": ids_TK.contiguous(), "counts": counts, **plan}, **sizes)

    z, h, y = x_TD.new_empty(T * K if keep else 0, F2), x_TD.new_empty(T * K, F2 // 2), x_TD.new_empty(T * K, D)
    inputs = {"x": _aligned(x_TD), "gates": gates_TK.contiguous(), "w13": _aligned(w13), "w2": _aligned(w2)}
    call("forward", {**inputs, **plan, "z": z if keep else None, "h": h, "y": y}, **sizes)
    return _combine(y, K), z, slot, token, ends, tiles


def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    z: Tensor,
    slot: Tensor,
    token: Tensor,
    ends: Tensor,
    tiles: Tensor,
    tile: int,
) -> Tensors4:
    """Gradients of x, gates, w13 and w2."""
    (_, F2, D), (N, K) = w13.shape, (gates_TK.numel(), gates_TK.shape[1])
    sizes = _sizes(x_TD, gates_TK, w13, tile)
    plan = {"slot": slot, "token": token, "ends": ends, "tiles": tiles, "z": z}
    inputs = {"x": _aligned(x_TD), "gates": gates_TK.contiguous(), "w13": _aligned(w13), "w2": _aligned(w2)}
    scratch = {"dz": torch.empty_like(z), "gated_h": x_TD.new_empty(N, F2 // 2)}
    dgates = gates_TK.new_empty(N, sizes["gate_parts"])
    dx, dw13, dw2 = x_TD.new_empty(N, D), w13.new_empty(w13.shape), w2.new_empty(w2.shape)
    gradients = {"dgates": dgates, "dx": dx, "dw13": dw13, "dw2": dw2}
    call("backward", {"dy": _aligned(dy_TD), **inputs, **plan, **scratch, **gradients}, **sizes)
    dgates = dgates if sizes["gate_parts"] == 1 else dgates.sum(1)
    return _combine(dx, K), dgates.view_as(gates_TK), dw13, dw2


def _combine(rows_ND: Tensor, K: int) -> Tensor:
    """Add the K rows of each token. They stand in slot order, one after the other, so this is a plain sum."""
    return rows_ND if K == 1 else rows_ND.view(-1, K, rows_ND.shape[1]).sum(1)


def _aligned(t: Tensor) -> Tensor:
    """Contiguous, and on a 16-byte boundary, which a slice of something else may not be."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


_forward_op = torch.library.custom_op("sigma_lite::grouped_swiglu_cuda", _forward, mutates_args=())
_backward_op = torch.library.custom_op("sigma_lite::grouped_swiglu_cuda_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x_TD, ids_TK, gates_TK, w13, w2, tile, keep):
    N, (E, F2, _) = ids_TK.numel(), w13.shape
    plan = (ids_TK.new_empty(shape, dtype=torch.int32) for shape in ((N,), (N,), (E,), (N // tile + E, 2)))
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(N if keep else 0, F2), *plan


@_backward_op.register_fake
def _(dy_TD, x_TD, gates_TK, w13, w2, z, slot, token, ends, tiles, tile):
    return tuple(t.new_empty(t.shape) for t in (x_TD, gates_TK, w13, w2))


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, ids_TK, gates_TK, w13, w2, tile):
        run = _forward_op if torch.compiler.is_compiling() else _forward
        y_TD, *kept = run(x_TD, ids_TK, gates_TK, w13, w2, tile, any(ctx.needs_input_grad))
        ctx.save_for_backward(x_TD, gates_TK, w13, w2, *kept)
        ctx.tile = tile
        return y_TD

    @staticmethod
    def backward(ctx, dy_TD):
        run = _backward_op if torch.compiler.is_compiling() else _backward
        dx_TD, dgates_TK, dw13, dw2 = run(dy_TD, *ctx.saved_tensors, ctx.tile)
        return dx_TD, None, dgates_TK, dw13, dw2, None


@assumed_constant
def _check(kind: str, index: int | None, dtype: torch.dtype) -> None:
    if kind == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # the check would wait for the device; a call runs once before it is captured in a graph
    check_once(torch.device(kind, index), dtype)


@functools.cache
def check_once(device: torch.device, dtype: torch.dtype) -> None:
    """Run a tiny layer forward and backward against the float64 loop, before the first result is believed.

    Raises RuntimeError with the numbers.
    """
    if wrong := wrong_results(_autograd, device, dtype, T=70, D=72, F=40, E=3):
        raise RuntimeError(f"backend 'cuda' differs from the float64 loop on {device} in {wrong}; use 'grouped'")


def _autograd(x_TD, ids_TK, gates_TK, w13, w2, dy_TD):
    x_TD, gates_TK, w13, w2 = leaves = [t.detach().requires_grad_() for t in (x_TD, gates_TK.float(), w13, w2)]
    y_TD = _GroupedSwiGLU.apply(x_TD, ids_TK, gates_TK, w13, w2, 64)
    return [y_TD, *torch.autograd.grad(y_TD, leaves, dy_TD)]
