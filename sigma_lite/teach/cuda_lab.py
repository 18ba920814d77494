"""The CUDA kernel without a GPU: as nvcc compiles it, and on the emulator with one of its safeguards taken out.

Every safeguard is a few characters of the source. The lab puts a switch at each of them, compiles once, and runs a small
layer with one switch off. What the chapter says about a broken kernel is therefore what the broken kernel did.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from sigma_lite.config import require
from sigma_lite.kernels.compiler import BuildError, build, version_of
from sigma_lite.kernels.cuda import binding
from sigma_lite.kernels.cuda.build import SOURCES, emulator_command, find_nvcc
from sigma_lite.kernels.cuda.op import _forward
from sigma_lite.kernels.cuda.resources import Used, compiled_resources
from sigma_lite.kernels.loop import grouped_swiglu_loop
from sigma_lite.teach.session import fast, recorded

RECORD = "bench/cuda-nvcc13.json"  # made by benchmarks/cuda_build.py
TILE, T, E = 64, 160, 3  # some 53 rows an expert, so that no tile is full
ROUND, ODD = (256, 128), (200, 136)  # D, F: multiples of the slice of 64 columns, and not


class Safeguard(NamedTuple):
    what: str  # what it keeps from happening
    file: str
    line: str  # as it stands in the source
    switched: str  # the same, gone when `broken` has this safeguard's number


SAFEGUARDS = {
    "swizzle": Safeguard(
        "eight rows in one bank",
        "tile.cuh",
        "((chunk ^ (row & 7)) << 3)",
        "((chunk ^ (broken == 1 ? 0 : row & 7)) << 3)",
    ),
    "wait": Safeguard(
        "reading before the copy has landed",
        "tile.cuh",
        "copy_wait<STAGES - 2>();",
        "if (broken != 2) copy_wait<STAGES - 2>();",
    ),
    "barrier": Safeguard(
        "reading what another thread has not copied yet",
        "tile.cuh",
        "__syncthreads();          // everyone's has",
        "if (broken != 3) __syncthreads();  // everyone's has",
    ),
    "row mask": Safeguard(
        "writing into the next expert's rows",
        "grouped_swiglu.cu",
        "const bool inside = row < at.last;",
        "const bool inside = row < (broken == 4 ? l.tokens * l.k : at.last);",
    ),
    "zero fill": Safeguard(
        "multiplying what lies behind the edge",
        "tile.cuh",
        "chunk), from, inside);",
        "chunk), from, inside || broken == 5);",
    ),
    "last commits": Safeguard(
        "waiting for too few groups at the end",
        "tile.cuh",
        "copy_commit();  // also when",
        "if (broken != 6 || s + STAGES - 1 < steps) copy_commit();  // also when",
    ),
}


class Trial(NamedTuple):
    error: float  # ||y - exact|| / ||exact||; rounding to bf16 alone makes some 2e-3 of it
    conflicts: int  # rows of an ldmatrix that wanted a bank which another of the eight had


def planted() -> dict[str, str]:
    """All sources with their switches, by file name; raises ConfigError where a line has left the source."""
    texts = {source.name: source.read_text("utf-8") for source in SOURCES}
    for name, guard in SAFEGUARDS.items():
        require(texts[guard.file].count(guard.line) == 1, f"the safeguard {name!r} is no longer one line of {guard.file}")
        texts[guard.file] = texts[guard.file].replace(guard.line, guard.switched)
    first = SOURCES[0].name
    switch = '\nextern "C" void sigma_break(int number) { broken = number; }\n'
    return {**texts, first: "inline int broken = 0;\n" + texts[first] + switch}


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled for the emulator, once. Raises BuildError where there is no C++ compiler that can."""
    texts = planted()
    with tempfile.TemporaryDirectory() as folder:
        paths = tuple(Path(folder) / name for name in texts)
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_text(text, "utf-8")
        quick = tuple("-O1" if option == "-O2" else option for option in emulator_command())
        return _typed(ctypes.CDLL(str(build(quick, paths))))


def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.sigma_error.restype, loaded.sigma_bank_conflicts.restype = ctypes.c_char_p, ctypes.c_long
    return loaded


def run(without: str = "", D: int = 256, F: int = 128, late: bool = False) -> Trial:
    """A layer of three experts, forward, by the kernel `without` one of SAFEGUARDS, against the float64 loop.

    `late`: copies land as late as they may, and blocks and threads run backwards. Raises BuildError as `library` does.
    """
    require(without in ("", *SAFEGUARDS), f"{without!r} is no safeguard; they are {', '.join(SAFEGUARDS)}")
    kernel, random = library(), torch.Generator().manual_seed(18)
    new = lambda *shape: torch.randn(shape, generator=random)  # noqa: E731
    ids_TK, gates_TK = torch.randint(E, (T, 1), generator=random), torch.rand(T, 1, generator=random)
    x_TD, w13, w2 = (t.bfloat16() for t in (new(T, D), new(E, 2 * F, D) / D**0.5, new(E, D, F) / F**0.5))
    exact_TD = grouped_swiglu_loop(x_TD.double(), ids_TK, gates_TK.double(), w13.double(), w2.double())
    kernel.sigma_break(1 + list(SAFEGUARDS).index(without) if without else 0)
    kernel.sigma_emulate_late(late)
    before = kernel.sigma_bank_conflicts()
    with mock.patch.object(binding, "emulator_library", lambda: kernel):  # the one without safeguards, for this call
        y_TD, *_ = _forward(x_TD, ids_TK, gates_TK, w13, w2, TILE, False)
    error = (y_TD.double() - exact_TD).norm() / exact_TD.norm()
    return Trial(float(error), kernel.sigma_bank_conflicts() - before)


def build_report(capability: tuple[int, int] = (9, 0)) -> dict[str, Used]:
    """Registers and spills of every kernel, as nvcc says on this machine; recorded where there is none, and in fast mode."""
    try:
        if not fast():
            made = compiled_resources(capability)
            print(f"compiled on this machine with nvcc {nvcc_release()}")
            return made
    except BuildError as error:
        print(str(error).splitlines()[0])
    record = json.loads(recorded(RECORD).read_text("utf-8"))
    print(f"as recorded with nvcc {record['nvcc']}")
    kernels = record["registers and spilled bytes of a thread"]["{}.{}".format(*capability)]
    return {name: Used(*numbers) for name, numbers in kernels.items()}


def nvcc_release() -> str:
    """Such as "13.0"; raises BuildError where there is no nvcc."""
    found = re.search(r"release ([\d.]+)", version_of(find_nvcc()))
    return found[1] if found else "of an unknown release"


def trials() -> dict[str, dict[str, float]]:
    """What each broken kernel did: its error in four runs, and its bank conflicts in the first.

    Read from results/, with a sentence that says so, where no compiler makes the emulator.
    """
    try:
        library()
    except BuildError as error:
        print(f"{str(error).splitlines()[0]}; these are the recorded results")
        kept = json.loads(recorded(RECORD).read_text("utf-8"))["safeguards"]
        return {name: kept[name] for name in ("nothing", *SAFEGUARDS)}
    runs = {"round sizes": (*ROUND, False), "round sizes, backwards": (*ROUND, True)}
    runs |= {"odd sizes": (*ODD, False), "odd sizes, backwards": (*ODD, True)}
    found = {}
    for name in ("", *SAFEGUARDS):
        done = {title: run(name, *setting) for title, setting in runs.items()}
        errors = {title: trial.error for title, trial in done.items()}
        found[name or "nothing"] = {**errors, "conflicts": done["round sizes"].conflicts}
    return found
