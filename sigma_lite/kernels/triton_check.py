"""May the Triton kernels run here? The rules, and a trial on the device itself before anything relies on them.

The first use on a device, of a dtype and a shape, runs the very kernels that training would run on a small problem, and
compares them with the float64 loop (kernels/trial.py).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from sigma_lite.kernels.node import assumed_constant
from sigma_lite.kernels.trial import TOLERANCE, wrong_results
from sigma_lite.kernels.triton_tiles import rows_per_tile

INSTALLED = importlib.util.find_spec("triton") is not None
EXPERTS, CHOICES = 4, 2  # of the trial
TOKENS = {16: 9, 32: 20, 64: 45, 128: 150}  # tokens per expert for which a tile has that many rows


def triton_obstacle(x_TD: Tensor, w13: Tensor, choices: int = 1) -> str:
    """Why the Triton kernels cannot run tensors like these with K = `choices`: rule, value and fix; "" if they can."""
    E, F2, D = w13.shape
    if not INSTALLED:
        return "triton is not installed: pip install 'sigma-lite[kernels]'"
    if x_TD.dtype not in TOLERANCE:
        return f"{str(x_TD.dtype).removeprefix('torch.')}, and its kernels take float32, float16 and bfloat16"
    for letter, size in (("D", D), ("F", F2 // 2)):
        if size % 16:
            return f"{letter}={size} is not a multiple of 16, the least width of a tile"
    if x_TD.device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return (
            ""
            if interpreted
            else f"x is on {x_TD.device.type}: move it to a GPU, or set TRITON_INTERPRET=1 before Python starts"
        )
    rows = rows_per_tile(x_TD.shape[0] * choices, E, x_TD.dtype)
    return _device_obstacle(x_TD.device.index, x_TD.dtype, D, F2 // 2, rows)


@assumed_constant
def _device_obstacle(index: int, dtype: torch.dtype, D: int, F: int, rows: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}, and its kernels need 8.0 or more"
    if torch.cuda.is_current_stream_capturing():
        return ""  # no trial inside a CUDA graph: a call runs once before it is captured
    return trial(torch.device("cuda", index), dtype, D, F, rows)


@functools.cache
def trial(device: torch.device, dtype: torch.dtype, D: int, F: int, rows: int) -> str:
    """Forward and backward with tiles of `rows` rows against the float64 loop; what is wrong, or "". Warns if so."""
    try:
        wrong = wrong_results(_once, device, dtype, T=TOKENS[rows] * EXPERTS // CHOICES, D=D, F=F, E=EXPERTS, K=CHOICES)
    except Exception as error:  # compiler, assembler, driver: whatever it is, there is another backend
        problem = f"they do not run, {type(error).__name__}: {error}"
    else:
        if not wrong:
            return ""
        problem = f"they differ from the float64 loop in {wrong}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    message = f"the Triton kernels fail their trial on {name} in {dtype} at D={D}, F={F}: {problem}"
    warnings.warn(f"{message}. backend='auto' uses grouped_mm there", stacklevel=2)
    return message


def _once(x_TD, ids_TK, gates_TK, w13, w2, dy_TD):
    from sigma_lite.kernels.triton_grouped import _backward, _forward

    y_TD, *kept = _forward(x_TD, ids_TK, gates_TK, w13, w2)
    return [y_TD, *_backward(dy_TD, *kept, x_TD, gates_TK, w13, w2)]
