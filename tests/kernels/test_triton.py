"""The Triton kernels equal the float64 loop, run by Triton's interpreter on a CPU; the host code around them never waits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sigma_lite.kernels import choose_backend, explain_backend, grouped_swiglu, triton_check
from sigma_lite.kernels.triton_check import INSTALLED, TOLERANCE, trial, triton_obstacle
from sigma_lite.kernels.triton_tiles import TILES, TILES_FP32, rows_per_tile, tile

needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed: make test installs it where it exists")
KINDS = ("balanced", "multinomial", "zipf", "one expert")
FP32 = [f"{kind} 19 {K} float32" for kind in KINDS for K in (1, 2)] + ["zipf 1 1 float32", "zipf 19 4 float32"]
HALF = ["multinomial 19 1 bfloat16", "zipf 19 2 bfloat16", "zipf 19 1 float16"]


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """What tests/kernels/triton_cases.py measured, in a process where the interpreter runs the kernels."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_cases.py")],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "85"},  # freed memory is poisoned: nobody may rely on it
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("case", [*FP32, *HALF, "tiles of 32 rows, float32", "tiles of 128 rows, bfloat16"])
def test_every_output_and_gradient_equals_the_float64_loop(interpreted, case):
    tolerance = TOLERANCE[getattr(torch, case.split()[-1])]
    for name, error in interpreted["errors"][case].items():
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.slow
@needs_triton
def test_an_expert_without_tokens_gets_exactly_zero_gradient(interpreted):
    assert interpreted["idle experts"] == [0, 0]
    assert interpreted["no tokens"] == [[0, 48], 0, 0]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("law", ["same bits", "expanded gradient", "compiled", "operators"])
def test_law(interpreted, law):
    """Twice the same input, a gradient of stride 0, torch.compile, and torch's own checks of the operators."""
    assert interpreted[law] is True


@pytest.mark.slow
@needs_triton
def test_the_plan_is_the_stable_sort_cut_into_tiles(interpreted):
    assert len(interpreted["plans"]) == 6 and all(interpreted["plans"].values())


@needs_triton
@pytest.mark.parametrize(("K", "most"), [(1, 10), (8, 12)])
def test_few_launches_and_no_wait_for_the_device(K, most):
    """On the meta device there are no values: host code that asked for one would raise. So it can be captured in a graph."""
    from sigma_lite.kernels.triton_grouped import backward_with, forward_with

    launched = []

    class Count:
        shared = 232448

        def __call__(self, kernel, programs, *args, **constants):
            launched.append(kernel.__name__)

    with torch.device("meta"):
        x, gates, ids = torch.empty(8192, 128), torch.empty(8192, K), torch.empty(8192, K, dtype=torch.int64)
        w13, w2 = torch.empty(96, 128, 128), torch.empty(96, 128, 64)
        y, *kept = forward_with(Count(), x, ids, gates, w13, w2)
        assert len(launched) <= 7
        dx, dgates, dw13, dw2 = backward_with(Count(), y, *kept, x, gates, w13, w2)
    assert len(launched) <= most
    assert [t.shape for t in (y, dx, dgates, dw13, dw2)] == [t.shape for t in (x, x, gates, w13, w2)]


@pytest.mark.parametrize("mean", [0, 5, 9, 10, 22, 23, 49, 50, 85, 3000])
def test_a_tile_holds_a_usual_expert_if_any_does(mean):
    rows = rows_per_tile(96 * mean, 96, torch.bfloat16)
    assert rows == next((size for size in (16, 32, 64) if mean + 2 * mean**0.5 <= size), 128)


@pytest.mark.parametrize("shared", [101376, 166912, 232448])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_slices_in_flight_fit_into_shared_memory(shared, dtype):
    for kernel, entries in (TILES_FP32 if dtype == torch.float32 else TILES).items():
        for key in entries:
            c = tile(kernel, key, (128, 1536, 1536), dtype, shared)
            columns = c["BN"] * (2 if kernel == "swiglu_forward" else 1)
            assert c["num_stages"] >= 2
            assert c["num_stages"] * (c["BM"] + columns) * c["BK"] * dtype.itemsize <= shared


def test_the_rules_are_named(monkeypatch):
    x, w13, odd = torch.zeros(3, 16), torch.zeros(4, 32, 16), torch.zeros(4, 24, 16)
    monkeypatch.setattr(triton_check, "INSTALLED", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_obstacle(x.double(), w13) == "float64, and its kernels take float32, float16 and bfloat16"
    assert triton_obstacle(x, odd) == "F=12 is not a multiple of 16, the least width of a tile"
    with pytest.raises(
        ValueError, match="'triton' cannot run this: x is on cpu: move it to a GPU, or set TRITON_INTERPRET=1"
    ):
        grouped_swiglu(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), w13, torch.zeros(4, 16, 16), "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert explain_backend(x, w13, "triton") == "triton: asked for by argument"
    assert choose_backend(x, w13)[0] != "triton"  # interpreted it is slow
    monkeypatch.setattr(triton_check, "INSTALLED", False)
    assert triton_obstacle(x, w13) == "triton is not installed: pip install 'sigma-lite[kernels]'"


def test_kernels_that_fail_their_trial_are_not_used(monkeypatch):
    """One wrong gradient, one NaN, or a compiler that gives up: the device is named, once, and the answer is no."""
    trial.cache_clear()
    wrong = {"y": 1e-7, "dx": 0.3, "dw2": float("nan")}
    monkeypatch.setattr("sigma_lite.kernels.trial.trial_errors", lambda *_, **__: wrong)
    with pytest.warns(
        UserWarning, match="fail their trial on cpu in torch.float32 at D=16, F=16: .* in dx by 3.0e-01, dw2 by nan"
    ):
        assert "differ" in trial(torch.device("cpu"), torch.float32, 16, 16, 16)

    def no_compiler(*_, **__):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("sigma_lite.kernels.trial.trial_errors", no_compiler)
    with pytest.warns(UserWarning, match="they do not run, RuntimeError: no C compiler"):
        assert trial(torch.device("cpu"), torch.float16, 16, 16, 16)
    trial.cache_clear()
