"""What compiles grouped_swiglu.cu: nvcc for a GPU, or a C++ compiler for the emulator."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sigma_lite.kernels.compiler import BuildError, find_cxx

HERE = Path(__file__).parent
_NAMES = ("grouped_swiglu.cu", "tile.cuh", "plan.cuh", "launch.cuh", "primitives.cuh", "emulate.h", "emulate_warp.h")
SOURCES = tuple(HERE / name for name in _NAMES)
DEFAULT_NVCC = Path("/usr/local/cuda/bin/nvcc")  # where NVIDIA's installer puts it, not always on PATH
OLDEST = (8, 0)  # cp.async and the bf16 mma came with compute capability 8.0


def gpu_command(capability: tuple[int, int]) -> list[str]:
    """nvcc's command line without the output file. Raises BuildError where the GPU is too old or nvcc is missing."""
    if capability < OLDEST:
        raise BuildError(f"backend 'cuda' needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}")
    arch = f"-arch=sm_{capability[0]}{capability[1]}"
    return [find_nvcc(), "-O3", "-std=c++17", arch, f"-DSTAGES={stages(capability)}", "-shared", "-Xcompiler", "-fPIC"]


def stages(capability: tuple[int, int]) -> int:
    """Slices of both operands that a block holds in shared memory: the one being multiplied and those on their way.

    Two blocks are to fit one multiprocessor: 2 x 96 KB with three slices, and only the 9.x and 10.x have that.
    """
    return 3 if capability[0] in (9, 10) else 2


def emulator_command() -> list[str]:
    """The C++ compiler's command line. Raises BuildError where there is none."""
    compiler = find_cxx("the emulator of backend 'cuda'")
    return [compiler, "-O2", "-std=c++17", "-DEMULATE", "-fno-strict-aliasing", "-fPIC", "-shared", "-w", "-x", "c++"]


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for found in (*(shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes), shutil.which("nvcc")):
        if found:
            return found
    if DEFAULT_NVCC.exists():
        return str(DEFAULT_NVCC)
    raise BuildError(
        "backend 'cuda' is compiled at first use and found no nvcc on PATH or in CUDA_HOME: install the CUDA toolkit "
        "(12 or newer), set CUDA_HOME, or use backend 'grouped'"
    )
