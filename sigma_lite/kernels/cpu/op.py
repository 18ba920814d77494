"""The cpu backend as an operator: allocate, call the kernel, tell autograd what to keep.

Kept for the backward pass: the input, the pre-activations z and the slots by expert.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from sigma_lite.kernels.compiler import BuildError
from sigma_lite.kernels.cpu.binding import call, lanes
from sigma_lite.kernels.node import assumed_constant, one_node
from sigma_lite.kernels.trial import wrong_results
from sigma_lite.storage import StorageError

Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]


def grouped_swiglu_cpu(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Same value as kernels/loop.py, fp32, D and F multiples of 16. Raises IndexError for an id outside 0..E-1."""
    return _apply(x_TD, ids_TK, gates_TK.to(x_TD.dtype), w13, w2)


def why_not(x_TD: Tensor, w13: Tensor) -> str:
    """Why the kernel cannot run tensors like these; empty if it can. Compiles it, the first time on a machine."""
    if x_TD.device.type != "cpu":
        return f"tensors on {x_TD.device.type}"
    if x_TD.dtype != torch.float32:
        return f"{str(x_TD.dtype).removeprefix('torch.')}, and it computes in float32"
    for letter, size in (("D", w13.shape[2]), ("F", w13.shape[1] // 2)):
        if size % 16:
            return f"{letter}={size} is not a multiple of 16, the floats in the longest vector register"
    return _obstacle_here()


@assumed_constant
def _obstacle_here() -> str:
    return trial()


@functools.cache
def trial() -> str:
    """Compile it, compare a small layer with the float64 loop: what is wrong, or "". Warns unless there is no compiler."""
    try:
        lanes()
    except (BuildError, StorageError, OSError) as error:  # no compiler; no folder to keep it in, or one that runs nothing
        if "needs a C++ compiler" not in str(error):
            warnings.warn(f"backend 'cpu': {error}\nbackend='auto' goes on without it", stacklevel=2)
        return str(error)
    wrong = wrong_results(_once, torch.device("cpu"), torch.float32, T=130, D=48, F=32)
    if wrong:
        wrong = f"the compiled kernel differs from the float64 loop in {wrong}"
        warnings.warn(f"{wrong}; backend='auto' goes on without it", stacklevel=2)
    return wrong


def _once(x_TD, ids_TK, gates_TK, w13, w2, dy_TD):
    y_TD, *kept = _forward(x_TD, ids_TK, gates_TK, w13, w2)
    return [y_TD, *_backward(dy_TD, *kept, x_TD, gates_TK, w13, w2)]


def _sizes(gates_TK: Tensor, w13: Tensor) -> dict[str, int]:
    (T, K), (E, F2, D) = gates_TK.shape, w13.shape
    return {"tokens": T, "k": K, "experts": E, "width": D, "units": F2 // 2}


def _forward(
    x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y_TD, and what the backward pass needs: the slots by expert, where each expert's begin, the pre-activations."""
    x_TD, ids_TK, gates_TK, w13, w2 = (t.contiguous() for t in (x_TD, ids_TK.long(), gates_TK, w13, w2))
    y_TD, slot_N, start, z = _forward_fake(x_TD, ids_TK, gates_TK, w13, w2)
    inputs = {"x": x_TD, "ids": ids_TK, "gates": gates_TK, "w13": w13, "w2": w2}
    call("forward", _sizes(gates_TK, w13), **inputs, slot=slot_N, start=start, z=z, y=y_TD, rows=_rows(y_TD, ids_TK))
    return y_TD, slot_N, start, z


def _backward(
    dy_TD: Tensor, slot_N: Tensor, start: Tensor, z: Tensor, x_TD: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor
) -> Tensors4:
    """Gradients of x, gates, w13 and w2."""
    dy_TD, x_TD, gates_TK, w13, w2 = inputs = [t.contiguous() for t in (dy_TD, x_TD, gates_TK, w13, w2)]
    dx_TD, dgates_TK, dw13, dw2 = gradients = _backward_fake(dy_TD, slot_N, start, z, *inputs[1:])
    named = dict(zip(("dx", "dgates", "dw13", "dw2"), gradients, strict=True))
    named |= dict(zip(("dy", "x", "gates", "w13", "w2"), inputs, strict=True))
    call("backward", _sizes(gates_TK, w13), **named, slot=slot_N, start=start, z=z, rows=_rows(dx_TD, gates_TK))
    return gradients


def _rows(sum_TD: Tensor, slots_TK: Tensor) -> Tensor:
    """Room for one row a slot; with one choice a token that is the sum itself."""
    return sum_TD if slots_TK.shape[1] == 1 else sum_TD.new_empty(slots_TK.numel(), sum_TD.shape[1])


def _forward_fake(x_TD, ids_TK, gates_TK, w13, w2):
    N, (E, F2, _) = ids_TK.numel(), w13.shape
    padded = N + E * (lanes() - 1)  # tokens of an expert stand in whole registers
    slots = (ids_TK.new_empty(n, dtype=torch.int32) for n in (N, E + 1))
    return x_TD.new_empty(x_TD.shape), *slots, x_TD.new_empty(padded * F2)


def _backward_fake(dy_TD, slot_N, start, z, x_TD, gates_TK, w13, w2):
    return tuple(t.new_empty(t.shape) for t in (x_TD, gates_TK, w13, w2))


_apply, _forward_op, _backward_op = one_node(
    "grouped_swiglu_cpu", _forward, _backward, _forward_fake, _backward_fake, keep_x=True
)
