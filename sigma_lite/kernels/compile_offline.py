"""Compile the Triton kernels for a GPU that this machine does not have, and read what came out.

Triton brings its own assembler: a laptop can see which tensor-core instruction a kernel uses, how many registers it
takes, and whether any of them spilled to memory. Nothing is run, so nothing is said about speed.

    python -m sigma_lite.kernels.compile_offline [--arch sm_90] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

# Bytes of shared memory that one program may have (CUDA C programming guide, "compute capabilities").
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {v: k for k, v in DTYPES.items()} | {torch.int32: "i32", torch.int64: "i64"}
INSTRUCTIONS = {  # what to look for in PTX
    "wgmma": r"wgmma\.mma_async\.sync",  # Hopper: four warps multiply 64 x N x 16 from shared memory
    "mma.sync": r"\bmma\.sync",  # Ampere and later: one warp, 16 x 8 x 16 from registers
    "tcgen05": r"tcgen05\.mma",  # Blackwell: one thread starts it, the sum is in tensor memory
    "fma.f32": r"fma\.rn\.f32",  # no tensor core
    "cp.async": r"cp\.async\.c[ag]\.shared",  # memory to shared memory behind the computation's back
}


class Layer(NamedTuple):
    """Sizes of the expert layer whose kernels are compiled; by default one layer of Sigma-MoE-Tiny (2512.16248)."""

    E: int = 96
    D: int = 1536
    F: int = 768
    T: int = 32768
    K: int = 1


class Compiled(NamedTuple):
    ptx: str  # NVIDIA's portable assembly
    sass: str  # what the chip executes
    registers: int  # per thread, at most 255
    spills: int  # loads and stores in SASS of registers that did not fit
    shared_bytes: int  # per program
    instructions: dict[str, int]  # occurrences in PTX, not executions; names as in INSTRUCTIONS


@functools.cache
def compiled(kernel_name: str, arch: str = "sm_90", dtype: str = "bf16", layer: Layer = Layer()) -> Compiled:  # noqa: B008
    """`kernel_name` is one of `kernel_names(layer)`, compiled with the tile and constants of a real launch.

    Raises: ValueError for an unknown kernel, arch or dtype.
    """
    for what, name, known in (("arch", arch, SHARED), ("dtype", dtype, DTYPES)):
        if name not in known:
            raise ValueError(f"{what} {name!r} is not known: choose {', '.join(known)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _in_another_process(kernel_name, arch, dtype, layer)
    launches = _launches(arch, dtype, layer)
    if kernel_name not in launches:
        raise ValueError(f"kernel {kernel_name!r} is not launched for {layer}: choose {', '.join(launches)}")
    return _compile(*launches[kernel_name], int(arch.removeprefix("sm_")))


def kernel_names(layer: Layer = Layer()) -> list[str]:  # noqa: B008
    """Every launch of one forward and backward pass, in order; the second launch of a kernel is called NAME_2."""
    return list(_launches("sm_90", "bf16", layer))


class _Recorder:
    """Stands where kernels/triton_tiles.py's Launcher does, and notes."""

    def __init__(self, shared: int):
        self.shared, self.seen = shared, {}

    def __call__(self, kernel, programs: int, *args, **constants) -> None:
        name = kernel.__name__
        self.seen[f"{name}_2" if name in self.seen else name] = (kernel, args, constants)


def _launches(arch: str, dtype: str, layer: Layer) -> dict:
    """Run the host code on the meta device, where tensors have shapes and no data."""
    from sigma_lite.kernels.triton_grouped import backward_with, forward_with

    record, (E, D, F, T, K) = _Recorder(SHARED[arch]), layer
    with torch.device("meta"):
        x, w13, w2 = (torch.empty(shape, dtype=DTYPES[dtype]) for shape in ((T, D), (E, 2 * F, D), (E, D, F)))
        ids, gates = torch.empty(T, K, dtype=torch.int64), torch.empty(T, K)
        y, *kept = forward_with(record, x, ids, gates, w13, w2)
        backward_with(record, y, *kept, x, gates, w13, w2)
    return record.seen


def _compile(kernel, args: tuple, constants: dict, capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif value == 1:  # as at a real launch: 1 is compiled in, and multiples of 16 are known to be
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    sass, usage = _cuobjdump(result.asm["cubin"], "-sass"), _cuobjdump(result.asm["cubin"], "-res-usage")
    ptx = result.asm["ptx"]
    return Compiled(
        ptx=ptx,
        sass=sass,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=result.metadata.shared,
        instructions={name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
    )


def _cuobjdump(cubin: bytes, flag: str) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([knobs.nvidia.cuobjdump.path, flag, path], capture_output=True, text=True, check=True).stdout


def _in_another_process(*request) -> Compiled:
    """Where the interpreter has taken the kernels over, they can no longer be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sigma_lite.kernels.compile_offline", "--json", json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return Compiled(**json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90", choices=SHARED)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.json:
        *names, layer = json.loads(args.json)
        print(json.dumps(compiled(*names, Layer(*layer))._asdict()))
        return
    print(f"{args.arch}, {args.dtype}, {Layer()}\n{'kernel':20} registers spills  shared  instructions")
    for name in kernel_names():
        c = compiled(name, args.arch, args.dtype)
        used = ", ".join(f"{n} {i}" for i, n in c.instructions.items() if n)
        print(f"{name:20} {c.registers:9} {c.spills:6} {c.shared_bytes:7}  {used}")


if __name__ == "__main__":
    main()
