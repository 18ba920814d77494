"""What a kernel takes of a multiprocessor: nvcc's report is read right, and the count of blocks is NVIDIA's own."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sigma_lite.kernels.compiler import BuildError
from sigma_lite.kernels.cuda import build, resources

HEADER = "cuda_occupancy.h"
RECORD = Path(__file__).parents[2] / "results/bench/cuda-nvcc13.json"
REPORT = """
ptxas info    : Compiling entry function '_Z2upI13__nv_bfloat16Li128EEv5Layer' for 'sm_90'
ptxas info    : Function properties for _Z2upI13__nv_bfloat16Li128EEv5Layer
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 228 registers, used 1 barriers
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function '_Z8to_slotsI6__halfLi32ELb0EEv5LayerPKT_iS3_PKfPS1_' for 'sm_90'
ptxas info    : Function properties for _Z8to_slotsI6__halfLi32ELb0EEv5LayerPKT_iS3_PKfPS1_
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 118 registers, used 1 barriers, 608 bytes cmem[0]
ptxas info    : Compiling entry function '_Z11scan_counts4Plan' for 'sm_90'
ptxas info    : Function properties for _Z11scan_counts4Plan
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers
"""


def test_the_report_of_ptxas_is_read():
    assert resources.report(REPORT) == {
        "up<bf16, 128>": (228, 0),
        "to_slots<fp16, 32, false>": (118, 20),
        "scan_counts": (30, 0),
    }


def test_blocks_by_hand():
    """228 registers come as 232, and 128 threads with 232 fit twice into 65536. 74752 bytes fit three times into 233472."""
    assert resources.blocks_that_fit(228, 3 * 256 * 128) == 2
    assert resources.blocks_that_fit(32, 3 * (64 + 128) * 128) == 3
    assert resources.blocks_that_fit(16, 0, 1024) == 2 and resources.blocks_that_fit(8, 0, 32) == 32
    assert resources.blocks_that_fit(255, 0, 1024) == 0, "more registers than there are"


def header() -> Path | None:
    """NVIDIA's occupancy calculator: one header, which comes with the CUDA toolkit and with Triton."""
    spec = importlib.util.find_spec("triton")
    homes = [Path(spec.origin).parent / "backends/nvidia/include"] if spec and spec.origin else []
    return next((home for home in [*homes, Path("/usr/local/cuda/include")] if (home / HEADER).exists()), None)


CALCULATOR = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
    cudaOccDeviceProp p;
    int registers, shared, threads;
    p.warpSize = 32, p.maxThreadsPerBlock = 1024, p.numSms = 100, p.reservedSharedMemPerBlock = 1024;
    while (scanf("%d %d %d %zu %d %d %d", &p.computeMajor, &p.computeMinor, &p.regsPerMultiprocessor,
                 &p.sharedMemPerMultiprocessor, &registers, &shared, &threads) == 7) {
        scanf("%d", &p.maxThreadsPerMultiprocessor);
        p.regsPerBlock = p.regsPerMultiprocessor, p.sharedMemPerBlock = 48 * 1024;
        p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - 1024;
        cudaOccFuncAttributes f = {};
        f.maxThreadsPerBlock = 1024, f.numRegs = registers, f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        f.maxDynamicSharedSizeBytes = p.sharedMemPerBlockOptin;
        cudaOccDeviceState state = {};
        cudaOccResult result;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &f, &state, threads, shared)) return 1;
        printf("%d\\n", result.activeBlocksPerMultiprocessor);
    }
}
"""


@pytest.mark.skipif(header() is None or shutil.which("g++") is None, reason="needs g++ and NVIDIA's cuda_occupancy.h")
def test_equals_the_calculator_of_nvidia(tmp_path):
    (tmp_path / "main.cpp").write_text(CALCULATOR)
    compile_it = ["g++", "-w", "-I", header(), tmp_path / "main.cpp", "-o", tmp_path / "calculator"]
    subprocess.run(compile_it, check=True)
    cases = list(
        itertools.product(
            resources.MULTIPROCESSORS.items(),
            (16, 40, 112, 158, 161, 168, 170, 228, 255),
            (0, 1000, 9_000, 36_864, 49_152, 73_728, 98_304),
            (32, 96, 128, 256, 512),
        )
    )
    lines = [f"{c[0]} {c[1]} {m.registers} {m.shared} {r} {s} {t} {m.threads}" for (c, m), r, s, t in cases]
    done = subprocess.run([tmp_path / "calculator"], input="\n".join(lines), capture_output=True, text=True, check=True)
    theirs = [int(line) for line in done.stdout.split()]
    ours = [resources.blocks_that_fit(r, s, t, m) for (_, m), r, s, t in cases]
    assert len(theirs) == len(cases) and [c for c, a, b in zip(cases, ours, theirs, strict=True) if a != b] == []


def recorded() -> dict:
    return json.loads(RECORD.read_text("utf-8"))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_as_many_blocks_fit_as_the_source_orders(capability):
    """launch_bounds: 2 blocks of 128 rows, 3 of fewer; with the registers recorded and the slices that build.py takes."""
    kernels = recorded()["registers and spilled bytes of a thread"]["{}.{}".format(*capability)]
    assert len(kernels) == 31 and all(spilled == 0 for _, spilled in kernels.values())
    for rows, wanted in ((32, 3), (64, 3), (128, 2)):
        for name in ("up<bf16, {}>", "to_slots<bf16, {}, true>", "to_slots<bf16, {}, false>", "hidden_gradient<bf16, {}>"):
            shared = build.stages(capability) * (rows + 128) * 64 * 2
            registers, _ = kernels[name.format(rows)]
            fit = resources.blocks_that_fit(registers, shared, 128, resources.MULTIPROCESSORS[capability])
            assert fit >= wanted, name.format(rows)


def test_without_nvcc_it_says_so(without_nvcc):
    with pytest.raises(BuildError, match="found no nvcc"):
        resources.compiled_resources((9, 0))


@pytest.mark.slow
def test_nvcc_says_what_is_recorded():
    try:
        build.find_nvcc()
    except BuildError:
        pytest.skip("needs nvcc")
    from sigma_lite.teach.cuda_lab import nvcc_release

    if nvcc_release() != recorded()["nvcc"]:
        pytest.skip("another nvcc than the recorded one")
    made = resources.compiled_resources((9, 0))
    kept = recorded()["registers and spilled bytes of a thread"]["9.0"]
    assert {name: list(used) for name, used in made.items()} == kept
