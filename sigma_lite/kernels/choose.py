"""Which backend, and why. The rules and measurements behind them: book/, chapter on the grouped matmul."""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor

from sigma_lite.kernels.cpu import grouped_swiglu_cpu
from sigma_lite.kernels.cpu import why_not as cpu_why_not
from sigma_lite.kernels.cuda import grouped_swiglu_cuda
from sigma_lite.kernels.cuda import why_not as cuda_why_not
from sigma_lite.kernels.loop import grouped_swiglu_loop
from sigma_lite.kernels.naive import grouped_swiglu_naive
from sigma_lite.kernels.padded import grouped_swiglu_padded
from sigma_lite.kernels.torch_grouped import grouped_swiglu_torch
from sigma_lite.kernels.triton_check import triton_obstacle


def _triton(*tensors: Tensor) -> Tensor:
    from sigma_lite.kernels.triton_grouped import grouped_swiglu_triton  # here, because importing triton takes seconds

    return grouped_swiglu_triton(*tensors)


BACKENDS = {
    "loop": grouped_swiglu_loop,  # the specification
    "naive": grouped_swiglu_naive,  # to be measured: its backward work grows with E squared
    "padded": grouped_swiglu_padded,  # boxes as large as the fullest expert; with a capacity it drops, see padded.py
    "grouped": grouped_swiglu_torch,
    "cpu": grouped_swiglu_cpu,  # C++ for vector registers, compiled at first use
    "triton": _triton,  # GPUs from compute capability 8.0 on
    "cuda": grouped_swiglu_cuda,  # CUDA C++, compiled at first use; asked for by name, to be read and measured
}
OVERRIDE = "SIGMA_LITE_BACKEND"  # environment variable that wins over "auto"


def grouped_swiglu(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor, backend: str = "auto") -> Tensor:
    """Send each token through its chosen SwiGLU experts and add the results, weighted by the gates.

    Args:
        x_TD: token vectors, [T, D], T >= 0.
        ids_TK: chosen experts, int64 [T, K], each in 0..E-1, distinct within a token.
        gates_TK: weight of each choice, [T, K].
        w13: gate and up projections stacked, [E, 2F, D]; the first F rows are the gate (Hugging Face layout).
        w2: down projections, [E, D, F].
        backend: "auto" or a name in BACKENDS.

    Returns: [T, D] in the dtype of `x_TD`; differentiable in everything but `ids_TK`.
    Raises: ValueError for shapes that do not fit, an unknown backend, or one that cannot run these tensors.
    """
    _check_shapes(x_TD, ids_TK, gates_TK, w13, w2)
    name, _ = choose_backend(x_TD, w13, backend, choices=ids_TK.shape[1])
    return BACKENDS[name](x_TD, ids_TK, gates_TK, w13, w2)


def choose_backend(x_TD: Tensor, w13: Tensor, backend: str = "auto", choices: int = 1) -> tuple[str, str]:
    """(name, reason) for tensors like these and K = `choices`."""
    wanted = os.environ.get(OVERRIDE, "auto") if backend == "auto" else backend
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"backend {wanted!r} does not exist: choose auto, {', '.join(BACKENDS)}")
    triton = partial(triton_obstacle, choices=choices)
    why_nots = {"grouped": _grouped_why_not, "cpu": cpu_why_not, "triton": triton, "cuda": cuda_why_not}
    if wanted != "auto":
        if wanted in why_nots and (why_not := why_nots[wanted](x_TD, w13)):
            raise ValueError(f"backend {wanted!r} cannot run this: {why_not}; use 'loop' or 'auto'")
        return wanted, f"asked for by {'argument' if backend == wanted else OVERRIDE}"
    reason = "grouped_mm is the fastest torch path for this dtype and shape"
    if x_TD.device.type == "cuda":
        if not (why_not := triton(x_TD, w13)):
            return "triton", "gather, SwiGLU and scatter are part of its matmuls: fewest bytes moved, fewest launches"
        reason += f" where Triton cannot run ({why_not})"
    elif not (why_not := cpu_why_not(x_TD, w13)):
        return "cpu", "its vectors hold one feature of many tokens, so that weights are read where they lie"
    else:
        reason += f" where the cpu kernel cannot run ({why_not})"
    why_not = _grouped_why_not(x_TD, w13)
    return ("loop", why_not) if why_not else ("grouped", reason)


def explain_backend(x_TD: Tensor, w13: Tensor, backend: str = "auto") -> str:
    """One line such as `loop: float64, which grouped_mm refuses`."""
    return "{}: {}".format(*choose_backend(x_TD, w13, backend))


def _grouped_why_not(x_TD: Tensor, w13: Tensor) -> str:
    if x_TD.device.type == "mps":
        return "mps, on which grouped_mm was never tried"
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(x_TD.dtype).removeprefix('torch.')}, which grouped_mm refuses"
    multiple = 16 // x_TD.element_size()
    for letter, size in (("D", w13.shape[2]), ("F", w13.shape[1] // 2)):
        if size % multiple:
            return f"{letter}={size} is not a multiple of {multiple}: grouped_mm wants strides of 16 bytes"
    return ""


def _check_shapes(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> None:
    E, F2, D = w13.shape
    rules = {
        f"x is {list(x_TD.shape)}, expected [T, D={D}]": x_TD.dim() == 2 and x_TD.shape[1] == D,
        f"ids is {list(ids_TK.shape)}, expected [T={x_TD.shape[0]}, K]": ids_TK.shape[:1] == x_TD.shape[:1]
        and ids_TK.dim() == 2,
        f"gates is {list(gates_TK.shape)}, expected the shape of ids {list(ids_TK.shape)}": gates_TK.shape == ids_TK.shape,
        f"w2 is {list(w2.shape)}, expected [E={E}, D={D}, F={F2 // 2}] to fit w13 {list(w13.shape)}": F2 % 2 == 0
        and w2.shape == (E, D, F2 // 2),
        f"x is {x_TD.dtype} but the experts are {w13.dtype} and {w2.dtype}": x_TD.dtype == w13.dtype == w2.dtype,
    }
    for message, holds in rules.items():
        if not holds:
            raise ValueError("grouped_swiglu: " + message)
