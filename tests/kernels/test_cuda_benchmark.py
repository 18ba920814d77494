"""benchmarks/gpu.py without a GPU: it runs from end to end, refuses what is wrong, and knows the least time possible."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sigma_lite.kernels.loop import grouped_swiglu_loop

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import expert_cases as cases  # noqa: E402
import gpu  # noqa: E402  (a script beside the package)
import gpu_measure as measure  # noqa: E402


@pytest.mark.slow
def test_a_dry_run_checks_times_and_records(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--dry-run", "--no-compile", "--minutes", "60", "--out", out]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    record = json.loads(out.read_text("utf-8"))
    assert record["dry_run"] and set(record["ceilings"]) == {"matmul_flops", "copy_bytes"}
    for check in record["checks"].values():
        assert check["differs_by"]["grouped"] <= 1e-2 and "needs a GPU" in check["not_run"]["liger"]
    for backward in ("forward", "forward_backward"):
        ours = record[str(cases.DRY[0])][backward]["grouped"]
        assert 0 < ours["p10_ms"] <= ours["median_ms"] <= ours["p90_ms"] and ours["speed_over_grouped"] == 1
    assert record["steps_not_run"] == [] and record["facts"]["cuda_graph"]["grouped"]["why"] == "no GPU"


@pytest.fixture
def bench(tmp_path):
    options = type("Options", (), {"dry_run": True, "minutes": 60, "out": tmp_path / "gpu.json"})
    return gpu.Bench(options)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda y: y * 1.0001, "refused: y differs from the float64 loop by 1.0e-04"),
        (lambda y: y.masked_fill(torch.arange(len(y))[:, None] == 3, float("nan")), "refused: y differs .* by nan"),
        (lambda y: y.no_such_thing, "AttributeError"),
    ],
)
def test_a_wrong_variant_is_refused_and_not_timed(monkeypatch, bench, spoil, said):
    def variants(problem, device, slow):
        return {"grouped": grouped_swiglu_loop, "wrong": lambda *tensors: spoil(grouped_swiglu_loop(*tensors))}, {}

    monkeypatch.setattr(cases, "variants", variants)
    result = gpu.compare(bench, cases.DRY[1], slow=False)
    assert "wrong" not in result["forward"] and "grouped" in result["forward"]
    assert __import__("re").match(said, result["differs_by"]["wrong"])


def test_a_step_that_breaks_or_comes_too_late_leaves_the_others_results(bench):
    bench.step("first", lambda: 1)
    bench.step("broken", lambda: 1 / 0)
    bench.step("late", lambda: 2, keep=7200)
    record = json.loads(bench.out.read_text("utf-8"))
    assert record["first"] == 1 and record["broken"] == {"failed": "ZeroDivisionError: division by zero"}
    assert "late" not in record and record["steps_not_run"][0].startswith("late: ")


@pytest.mark.parametrize(
    ("T", "K", "forward", "both"),
    [(8192, 1, 0.176, 0.515), (32768, 1, 0.294, 0.881), (8192, 8, 0.587, 1.76), (32768, 8, 2.35, 7.05)],
)
def test_the_floor_is_the_roofline_of_the_sigma_layer(T, K, forward, both):
    """Milliseconds at 790 TFLOP/s and 4.3 TB/s, worked out by hand for d = 1536, f = 768, 96 experts, bf16."""
    shape = cases.SIGMA._replace(T=T, K=K)
    for backward, floor in ((False, forward), (True, both)):
        assert 1e3 * cases.floor_seconds(shape, 790e12, 4.3e12, backward) == pytest.approx(floor, rel=0.01)


@pytest.mark.parametrize("shape", [s for s in (*cases.SHAPES, *cases.GROWTH) if s.T <= 8192])
def test_every_token_chooses_distinct_experts_that_exist(shape):
    ids = cases.route(shape, torch.Generator().manual_seed(0))
    assert ids.shape == (shape.T, shape.K) and ids.min() >= 0 and ids.max() < shape.E
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    loads = torch.bincount(ids.flatten(), minlength=shape.E).float()
    if shape.routing == "balanced":
        assert loads.max() - loads.min() <= 1
    if shape.routing == "zipf":
        assert loads[0] / loads.mean() > 10


def test_the_ratio_of_a_variant_to_itself_is_one_and_of_a_slower_one_below():
    spent = [1.0, 1.1, 0.9, 1.05, 0.95] * 4
    assert measure.summary(spent, spent, floor_ms=0.5)["speed_over_grouped_95"] == [1.0, 1.0]
    slower = measure.summary([2 * s for s in spent], spent, floor_ms=0.5)
    assert slower["speed_over_grouped"] == 0.5 and slower["percent_of_floor"] == 25.0
