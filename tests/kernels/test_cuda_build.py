"""The .cu compiles for each GPU generation without spilling a register, and what cannot be compiled is said with the fix."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sigma_lite.kernels.compiler import BuildError
from sigma_lite.kernels.cuda import build

KERNELS = {"up": 3, "to_slots": 6, "hidden_gradient": 3, "weight_gradient": 2}  # versions of each per dtype


def has_nvcc() -> bool:
    try:
        return bool(build.find_nvcc())
    except BuildError:
        return False


def cuobjdump() -> str | None:
    """On PATH, or the one that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    shipped = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else Path("none")
    return shutil.which("cuobjdump") or (str(shipped) if shipped.exists() else None)


@pytest.mark.slow
@pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_compiles_without_spills_to_tensor_core_instructions(tmp_path, capability):
    cubin = tmp_path / "kernel.cubin"
    options = [o for o in build.gpu_command(capability) if o not in ("-shared", "-Xcompiler", "-fPIC")]
    source = str(build.SOURCES[0])
    report = subprocess.run([*options, "-cubin", "-Xptxas", "-v", source, "-o", cubin], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr)
    assert len(spills) == 2 * sum(KERNELS.values()) + 3  # two dtypes, and the plan's three
    assert set(spills) == {("0", "0", "0")}
    if cuobjdump() is None:
        pytest.skip("compiled; no cuobjdump to look at the instructions with")
    code = subprocess.run([cuobjdump(), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for kernel in re.split(r"Function : ", code)[1:]:
        name = kernel.split("\n", 1)[0]
        multiplies = any(re.search(rf"\d{k}I", name) for k in KERNELS)
        number = r"\.BF16 " if "bfloat16" in name else " "
        for instruction in (rf"HMMA\.16816\.F32{number}", r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M"):
            assert bool(re.search(instruction, kernel)) == multiplies, f"{name}: {instruction}"


def test_a_missing_compiler_is_named_with_the_fix(without_nvcc, monkeypatch):
    with pytest.raises(BuildError, match="found no nvcc on PATH or in CUDA_HOME: install the CUDA toolkit"):
        build.gpu_command((9, 0))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"needs a C\+\+ compiler: install g\+\+ or set CXX"):
        build.emulator_command()
    with pytest.raises(BuildError, match=r"needs compute capability 8.0, this GPU has 7.5"):
        build.gpu_command((7, 5))
