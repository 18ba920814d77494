"""Compile grouped_swiglu.cu at first use and keep the result: nvcc for a GPU, or a C++ compiler for the emulator."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from sigma_lite.storage import alone

HERE = Path(__file__).parent
SOURCES = (
    *("grouped_swiglu.cu", "tile.cuh", "plan.cuh", "launch.cuh", "primitives.cuh"),
    *("emulate.h", "emulate_warp.h"),
)
DEFAULT_NVCC = Path("/usr/local/cuda/bin/nvcc")  # where NVIDIA's installer puts it, not always on PATH
OLDEST = (8, 0)  # cp.async and the bf16 mma came with compute capability 8.0


class BuildError(RuntimeError):
    """The kernel cannot be compiled here. The message names what is missing and the fix."""


def gpu_command(capability: tuple[int, int]) -> list[str]:
    """nvcc's command line without the output file. Raises BuildError where the GPU is too old or nvcc is missing."""
    if capability < OLDEST:
        raise BuildError(f"backend 'cuda' needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}")
    # Two blocks are to fit one multiprocessor: 2 x 96 KB with three tiles under way, and only the 9.x and 10.x have that.
    stages = 3 if capability[0] in (9, 10) else 2
    arch = f"-arch=sm_{capability[0]}{capability[1]}"
    return [find_nvcc(), "-O3", "-std=c++17", arch, f"-DSTAGES={stages}", "-shared", "-Xcompiler", "-fPIC"]


def emulator_command() -> list[str]:
    """The C++ compiler's command line. Raises BuildError where there is none."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")  # macOS has the latter
    if compiler is None:
        raise BuildError("the emulator of backend 'cuda' needs a C++ compiler: install g++ or set CXX")
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


@functools.cache
def build(command: tuple[str, ...]) -> Path:
    """Path of the shared library; compiles only when source, options or compiler are new. Safe with several processes."""
    key = hashlib.sha256()
    for part in (*command, version_of(command[0])):
        key.update(part.encode() + b"\0")
    for name in SOURCES:
        key.update((HERE / name).read_bytes())
    folder = cache_folder()
    library = folder / f"grouped_swiglu-{key.hexdigest()[:16]}.so"
    with alone(folder / "lock"):
        if not library.exists():
            partial = library.with_suffix(".partial")
            run([*command, str(HERE / SOURCES[0]), "-o", str(partial)])
            os.replace(partial, library)  # whole or absent, also when the compiler is killed
    return library


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sigma_lite" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def version_of(compiler: str) -> str:
    return run([compiler, "--version"])


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).splitlines()[:20])
        raise BuildError(f"this command failed, so backend 'cuda' cannot be used:\n  {' '.join(command)}\n{said}")
    return done.stdout
