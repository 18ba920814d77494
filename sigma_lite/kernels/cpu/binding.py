"""The C interface of grouped_swiglu.cpp through ctypes: no torch headers, so that any C++17 compiler makes it in seconds."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from sigma_lite.kernels.compiler import build, find_cxx, run

HERE = Path(__file__).parent
SOURCES = (HERE / "grouped_swiglu.cpp", HERE / "tile.h")
OPTIONS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")

_NUMBERS = ("tokens", "k", "experts", "width", "units", "threads")
_POINTERS = (
    *("ids", "x", "w13", "w2", "gates", "slot", "start", "z", "rows", "y"),
    *("dy", "dgates", "dx", "dw13", "dw2"),
)


class Layer(ctypes.Structure):
    """`struct Layer` of grouped_swiglu.cpp, field by field."""

    _fields_ = [(name, ctypes.c_int64) for name in _NUMBERS] + [(name, ctypes.c_void_p) for name in _POINTERS]


def call(function: str, sizes: dict[str, int], **tensors: Tensor) -> None:
    """Run sigma_`function` on as many threads as torch uses. Raises IndexError for an expert that does not exist."""
    layer = Layer(threads=torch.get_num_threads(), **sizes)
    for name, tensor in tensors.items():
        setattr(layer, name, tensor.data_ptr())
    if getattr(library(), f"sigma_{function}")(ctypes.byref(layer)):
        E, ids = sizes["experts"], tensors["ids"]
        raise IndexError(f"ids must lie in 0..{E - 1}, these reach from {ids.min()} to {ids.max()}")


def lanes() -> int:
    """Floats in a vector register; D and F must be multiples of it."""
    return library().sigma_lanes()


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled on first use, for the very processor: its vector length decides the tiles. Raises BuildError.

    SIGMA_LITE_MARCH compiles for another one, such as x86-64-v3 (AVX2) where the machine has more.
    """
    compiler, processor = find_cxx("backend 'cpu'"), f"-march={os.environ.get('SIGMA_LITE_MARCH', 'native')}"
    machine = run([compiler, processor, "-dM", "-E", "-x", "c++", "/dev/null"])  # names all that it can do
    loaded = ctypes.CDLL(str(build((compiler, processor, *OPTIONS), SOURCES, machine)))
    if loaded.sigma_size_of_layer() != ctypes.sizeof(Layer):
        raise RuntimeError("binding.py's Layer and the compiled one differ in size: a field is missing in one of them")
    return loaded
