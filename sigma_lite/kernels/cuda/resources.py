"""What a compiled kernel takes of a multiprocessor, and how many of its blocks have room there. Needs nvcc, but no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from sigma_lite.kernels.compiler import BuildError
from sigma_lite.kernels.cuda.build import SOURCES, gpu_command

RESERVED = 1024  # bytes of shared memory that each block costs besides its own
REGISTER_UNIT, SHARED_UNIT = 256, 128  # registers come in so many for a warp, shared memory in so many bytes
LINE = re.compile(
    r"entry function '_Z(?P<length>\d+)(?P<rest>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    flags=re.S,
)


class Multiprocessor(NamedTuple):
    """What one multiprocessor has for all of its blocks together."""

    registers: int  # of 32 bits
    shared: int  # bytes of shared memory
    threads: int
    blocks: int


# by compute capability: the table of that name in the CUDA C++ programming guide
MULTIPROCESSORS = {
    (8, 0): Multiprocessor(65536, 164 * 1024, 2048, 32),
    (8, 6): Multiprocessor(65536, 100 * 1024, 1536, 16),
    (8, 9): Multiprocessor(65536, 100 * 1024, 1536, 24),
    (9, 0): Multiprocessor(65536, 228 * 1024, 2048, 32),
    (10, 0): Multiprocessor(65536, 228 * 1024, 2048, 32),
}


class Used(NamedTuple):
    registers: int  # of a thread, at most 255
    spilled: int  # bytes of a thread that are stored to memory and loaded again because registers ran out


def blocks_that_fit(registers: int, shared: int, threads: int = 128, of: Multiprocessor = MULTIPROCESSORS[9, 0]) -> int:
    """Blocks that one multiprocessor holds at the same time: the scarcest of registers, shared memory, threads and places.

    `registers` are a thread's, `shared` a block's bytes, `threads` a block's (a multiple of 32). 0 where not one fits.
    """
    a_warp = up_to(32 * registers, REGISTER_UNIT)
    a_block = up_to(shared, SHARED_UNIT) + RESERVED
    warps = of.registers // 4 // a_warp * 4  # a multiprocessor has four parts with a quarter of the registers each
    return min(warps // (threads // 32), of.shared // a_block, of.threads // threads, of.blocks)


def up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def compiled_resources(capability: tuple[int, int]) -> dict[str, Used]:
    """What each kernel of grouped_swiglu.cu takes, by names such as "up<bf16, 128>". About ten seconds of nvcc.

    Raises BuildError where there is no nvcc, and with what nvcc said where it fails.
    """
    options = [option for option in gpu_command(capability) if option not in ("-shared", "-Xcompiler", "-fPIC")]
    with tempfile.TemporaryDirectory() as folder:
        command = [*options, "-cubin", "-Xptxas", "-v", str(SOURCES[0]), "-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise BuildError(f"nvcc failed:\n{done.stderr[:2000]}")
    return report(done.stderr)


def report(text: str) -> dict[str, Used]:
    """The same from what `ptxas -v` printed."""
    found = {}
    for match in LINE.finditer(text):
        used = Used(int(match["registers"]), int(match["stores"]) + int(match["loads"]))
        found[_plain(match["rest"], int(match["length"]))] = used
    return found


def _plain(mangled: str, length: int) -> str:
    """The kernel's name and template arguments out of a C++ symbol: "2upI13__nv_bfloat16Li128EEv" is "up<bf16, 128>"."""
    name, rest = mangled[:length], mangled[length:]
    arguments = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "Lb0E": "false", "Lb1E": "true"}
    taken = []
    for part in re.findall(r"13__nv_bfloat16|6__half|Li\d+E|Lb[01]E", rest.partition("EEv")[0] + "E"):
        taken.append(arguments.get(part) or part[2:-1])
    return f"{name}<{', '.join(taken)}>" if taken else name
