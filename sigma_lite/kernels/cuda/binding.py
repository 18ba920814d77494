"""The C interface of grouped_swiglu.cu through ctypes: no torch headers, so that nvcc alone can compile it."""

from __future__ import annotations

import ctypes
import functools
import os

import torch
from torch import Tensor

from sigma_lite.kernels.compiler import build
from sigma_lite.kernels.cuda.build import OLDEST, SOURCES, emulator_command, gpu_command

EMULATE = (
    "SIGMA_LITE_CUDA_EMULATE"  # environment variable: run the kernel on CPU tensors, thread by thread, to test or study
)
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
MAX_EXPERTS = 1024

_NUMBERS = (
    *("device", "dtype", "tokens", "k", "experts", "width", "units", "tile", "chunk", "chunks", "max_tiles", "gate_parts"),
)
_POINTERS = (
    *("ids", "counts", "slot", "token", "ends", "tiles", "x", "w13", "w2", "gates", "z", "h", "y"),
    *("dy", "dz", "gated_h", "dgates", "dx", "dw13", "dw2", "stream"),
)


class Layer(ctypes.Structure):
    """`struct Layer` of grouped_swiglu.cu, field by field."""

    _fields_ = [(name, ctypes.c_int) for name in _NUMBERS] + [(name, ctypes.c_void_p) for name in _POINTERS]


def why_not(x_TD: Tensor, w13: Tensor) -> str:
    """Why the kernel cannot run tensors like these; empty if it can. Does not compile anything."""
    E, F2, D = w13.shape
    if x_TD.dtype not in DTYPES:
        return f"{str(x_TD.dtype).removeprefix('torch.')}, and the tensor cores multiply bfloat16 or float16"
    for letter, size in (("D", D), ("F", F2 // 2)):
        if size % 8:
            return f"{letter}={size} is not a multiple of 8: rows are copied 16 bytes at a time"
    if E > MAX_EXPERTS:
        return f"E={E} experts, and the plan has one thread for each of at most {MAX_EXPERTS}"
    if not x_TD.is_cuda:
        return "" if emulating() else f"tensors on {x_TD.device.type}, and it needs a GPU ({EMULATE}=1 emulates one, slowly)"
    capability = torch.cuda.get_device_capability(x_TD.device)
    return "" if capability >= OLDEST else f"compute capability {capability}, and it needs {OLDEST}"


def emulating() -> bool:
    return os.environ.get(EMULATE, "0") not in ("", "0")


def call(function: str, tensors: dict[str, Tensor | None], **numbers: int) -> None:
    """Run sigma_`function` on the current stream of the tensors' device. Raises RuntimeError if it cannot be started."""
    some = next(t for t in tensors.values() if t is not None)
    layer = Layer(**numbers)
    for name, tensor in tensors.items():
        setattr(layer, name, None if tensor is None else tensor.data_ptr())
    if some.is_cuda:
        layer.device, layer.stream = some.device.index, torch.cuda.current_stream(some.device).cuda_stream
        library = gpu_library(torch.cuda.get_device_capability(some.device))
    else:
        library = emulator_library()
    code = getattr(library, f"sigma_{function}")(ctypes.byref(layer))
    if code:
        raise RuntimeError(f"backend 'cuda': {function} did not start: {library.sigma_error(code).decode()}")


def gpu_library(capability: tuple[int, int]) -> ctypes.CDLL:
    return load(tuple(gpu_command(capability)))


def emulator_library() -> ctypes.CDLL:
    return load(tuple(emulator_command()))


@functools.cache
def load(command: tuple[str, ...]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(command, SOURCES)))
    library.sigma_error.restype = ctypes.c_char_p
    size = library.sigma_size_of_layer()
    if size != ctypes.sizeof(Layer):
        raise RuntimeError(f"binding.py's Layer has {ctypes.sizeof(Layer)} bytes, the compiled one {size}: fields differ")
    return library
