"""The law of training speed against published runs: what was fitted is met, what was not is predicted within the spread."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import median

import pytest

from sigma_lite.record import read
from sigma_lite.runfile import load_run
from sigma_lite.scale.cost import CRAFT
from sigma_lite.scale.forecast import forecast

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published():
    spec = importlib.util.spec_from_file_location("plan_mfu", ROOT / "benchmarks" / "plan_mfu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_mfu"] = module  # a dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


def test_the_levels_of_craft_are_the_fitted_ones(published):
    for used, fitted in zip(CRAFT["gpu"], published.fit(), strict=True):
        assert used == pytest.approx(fitted, abs=0.01)


def test_our_flops_are_those_of_the_published_ratios(published):
    """Published TFLOP/s over published tokens/s are FLOPs of a token: an independent count of two models."""
    for net, run in ((published.QWEN_30B, published.FITTED[0]), (published.QWEN_235B, published.PREDICTED[2])):
        assert published.counted(net) == pytest.approx(run.flops, rel=0.01)


def test_the_fitted_runs_are_met(published):
    for run, craft in zip(published.FITTED, CRAFT["gpu"], strict=True):
        assert published.tflops(run, craft) == pytest.approx(run.tflops, rel=0.02)


def test_most_published_runs_lie_in_the_planned_range(published):
    """None of these was fitted, and no row of the rule is missing: seven of fifteen mixtures lie outside, all four dense
    runs inside. A change that moves the law shows here."""
    outside = {}
    for run in published.PREDICTED:
        slow, fast = published.spread(run)
        if not slow <= run.tflops <= fast:
            outside[run.name, run.system] = run.tflops / (fast if run.tflops > fast else slow)
    assert outside == pytest.approx({
        ("GPT-OSS-120B, 64 GPUs [25.11]", "H100"): 0.96,
        ("Qwen3-235B-A22B, 256 GPUs [5728]", "H100"): 1.04,
        ("DeepSeek-V3, 1024 GPUs [25.09]", "H100"): 1.10,
        ("GPT-OSS-120B, 64 GPUs [25.11]", "B200"): 0.62,
        ("GPT-OSS-120B, 64 GPUs [26.02]", "B300"): 0.83,
        ("Qwen3-235B-A22B, 256 GPUs [25.11]", "GB300"): 1.07,
        ("DeepSeek-V3, 256 GPUs [25.11]", "GB300"): 1.10,
    }, abs=0.01)  # fmt: skip
    for gpus, speed in published.DENSE.values():
        slow, fast = published.dense_spread(gpus)
        assert slow < speed < fast


@pytest.mark.parametrize(("run", "overlays"), [("toy", ()), ("toy_dense", ("overlays/dense.yaml",))])
def test_the_recorded_runs_lie_in_their_range(run, overlays):
    """The toy's own range was set around it; that of its dense twin was not. Medians: the machine did other work too."""
    config = load_run([ROOT / "scaled_configs" / name for name in ("toy.yaml", *overlays)])
    facts = forecast(config, "cpu-core")
    steps = [entry for entry in read(ROOT / "results" / f"{run}.jsonl") if entry["kind"] == "step"]
    for stage, chosen in (
        ("initial", [s for s in steps if s["step"] <= config.sparsity.switch_step]),
        ("target", [s for s in steps if s["step"] > config.sparsity.switch_step]),
    ):
        if chosen:
            fast, slow = facts[stage]["tokens_per_second"]
            assert slow < median(s["tokens_per_s"] for s in chosen) < fast
