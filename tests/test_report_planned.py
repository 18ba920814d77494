"""The report beside the plan: the record's numbers against what was planned, in words that follow from them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import synthetic_run

from sigma_lite.report import planned
from sigma_lite.report.sections import sections_of
from sigma_lite.runfile import RunConfig, load_run
from sigma_lite.scale.expected import expected
from sigma_lite.scale.forecast import forecast

ROOT = Path(__file__).parents[1] / "scaled_configs"
PLAN = {
    "cluster": "cpu-core", "by_default": False, "kind": "cpu", "devices": 1, "peak_tflops": 0.072, "layout_problem": "",
    "total_params": 100, "k": {"initial": [8, 6, 4, 2], "target": [1, 1, 1, 1]},
    "initial": {"step_seconds": [0.5, 1.0], "tokens_per_second": [16384, 8192], "mfu": [0.6, 0.3], "peak_bytes": 2**30},
    "target": {"step_seconds": [0.2, 0.35], "tokens_per_second": [40960, 20480], "mfu": [0.5, 0.25], "peak_bytes": 2**29},
    "hours": [0.1, 0.3],
}  # fmt: skip


def run(plan: dict | None = PLAN, parameters: int = 100) -> list[dict]:
    """The made-up run of 1,000 steps of 8,192 tokens: 0.91 s a step, and a plan."""
    entries = copy.deepcopy(synthetic_run.entries())
    entries[0] |= {"plan": plan, "parameters": parameters}
    for entry in entries:
        if entry["kind"] == "step":
            waited = {f"{kind}_seconds": 0.001 * entry["step"] for kind in ("data", "saving", "validation", "recording")}
            entry |= {"tokens_per_s": 8192 / 0.91, "perf": {**waited, "peak_memory": 3 * 2**29}}
    return entries


def rows(entries: list[dict], plan: dict = PLAN) -> dict[str, planned.Row]:
    return {row.what.partition(" (")[0]: row for row in planned.rows_of(entries, plan)}


def test_what_was_measured_stands_beside_what_was_planned():
    found = rows(run())
    says = {what: planned.verdict(row) for what, row in found.items()}
    assert says["parameters"] == "the same"
    assert found["seconds of a step, before the switch"].measured == pytest.approx(0.91)
    assert says["seconds of a step, before the switch"] == "within"
    assert says["seconds of a step, after the switch"] == "2.6 times the highest"
    assert says["tokens per second, after the switch"] == "0.44 times the lowest"
    assert found["MFU, before the switch"].measured == pytest.approx(0.6 * 0.5 / 0.91)
    assert says["memory of a device"] == "1.5 times", "one number was planned, for the fuller stage"
    assert found["time of all steps"].measured == pytest.approx(910) and says["time of all steps"] == "within"
    waiting = found["time with waiting for data, saving, held-out text"]
    assert waiting.measured == pytest.approx(914) and planned.verdict(waiting) == ""


def test_a_run_that_has_not_ended_has_no_time_to_compare():
    unfinished = [entry for entry in run() if entry["step"] < 900]
    assert "time of all steps" not in rows(unfinished) and "seconds of a step, after the switch" in rows(unfinished)


def test_other_parameters_than_planned_are_named():
    assert planned.verdict(rows(run(parameters=150))["parameters"]) == "1.5 times"


def test_the_page_holds_it_and_older_records_say_that_they_have_none():
    def text(entries: list[dict]) -> str:
        (section,) = [section for section in sections_of(entries) if section.name == "planned"]
        return section.parts[0]

    page = text(run())
    for words in (
        "Planned for cpu-core, 1 device.",
        "seconds of a step, after the switch (K = 1)",
        "0.2 s to 0.35 s",
        "0.91 s",
    ):
        assert words in page
    assert "nan" not in page.lower()
    assert text(synthetic_run.entries()) == planned.ABSENT
    assert "could not be planned: your &lt;router&gt;" in text(run({"refused": "your <router>"}))
    nothing_yet = [entry for entry in run() if entry["kind"] == "run"]
    assert "seconds of a step" not in text(nothing_yet) and "parameters" in text(nothing_yet)


def test_the_plan_that_is_kept_is_the_planners_and_names_the_machine_at_hand():
    toy = load_run([ROOT / "toy.yaml"], fit=True)
    facts, kept = forecast(toy, "cpu-core"), expected(toy, "cpu-core")
    assert kept["initial"]["step_seconds"] == facts["initial"]["step_seconds"] and kept["hours"] == facts["run"]["hours"]
    assert kept["k"] == {"initial": [8, 6, 4, 2], "target": [1, 1, 1, 1]} and not kept["by_default"]
    assert expected(toy)["cluster"] == "laptop" and expected(toy)["by_default"]
    gpu = load_run([ROOT / "gpu_80gb.yaml"], fit=True)
    assert expected(gpu, None, "NVIDIA H200")["cluster"] == "h200-node" and expected(gpu)["cluster"] == "h100"
    assert expected(gpu, None, "NVIDIA H200")["devices"] == 1 and math.isfinite(expected(gpu)["target"]["mfu"][0])


def test_what_cannot_be_planned_is_trained_all_the_same():
    own = RunConfig(parts={"router": {"class_path": "mine.Router"}})
    assert "model.parts.router=mine.Router cannot be imported" in expected(own)["refused"]
    ours = expected(RunConfig(parts={"router": "sigma_lite.model.router.Router"}))
    assert "Of model.parts.router: parameters are counted, the rest is a guess" in planned.comparison(run(ours))
