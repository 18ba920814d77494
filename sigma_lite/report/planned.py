"""A run beside the plan that was made when it started: what was expected, what was measured, and how far apart they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sigma_lite.figures.series import Entries, column, known, last, of_kind, settings
from sigma_lite.report import markup
from sigma_lite.report.words import duration, k_text
from sigma_lite.scale.table import size_of

ABSENT = '<p class="absent">No plan was recorded with this run.</p>'
WAITED = ("data_seconds", "saving_seconds", "validation_seconds", "recording_seconds")
STAGES = {"initial": "before the switch", "target": "after the switch"}


class Row(NamedTuple):
    """One quantity: the range that was planned, lowest first, and what was measured."""

    what: str
    planned: tuple[float, float]
    measured: float
    written: Callable[[float], str]
    within: str = "within"  # the range; or what one says where one number was planned and it is this one


def comparison(entries: Entries) -> str:
    """The table as HTML, and what it is true of."""
    start = last(entries, "run")
    plan = start.get("plan")
    if not plan:
        return ABSENT
    if plan.get("refused"):
        return markup.paragraph(f"This run could not be planned: {plan['refused']}.")
    rows = [row for row in rows_of(entries, plan) if known(row.measured)]
    table = markup.table(
        ("", "planned", "measured", ""), [(r.what, _planned(r), r.written(r.measured), verdict(r)) for r in rows]
    )
    return markup.paragraph(_machine(plan, start)) + table + markup.paragraph(_meaning(plan))


def rows_of(entries: Entries, plan: dict) -> list[Row]:
    """Every quantity that the plan has; `measured` is NaN where the record does not say."""
    counted, total = last(entries, "run").get("parameters"), plan["total_params"]
    rows = [Row("parameters", (total, total), _number(counted), lambda n: f"{n:,.0f}", "the same")]
    two = plan["k"]["initial"] != plan["k"]["target"]
    for stage, when in STAGES.items() if two else [("target", "")]:
        rows += _speed(entries, plan, stage, f", {when} (K = {k_text(plan['k'][stage])})" if two else "")
    peak = max((entry["perf"].get("peak_memory", 0) for entry in _steps(entries) if "perf" in entry), default=0)
    largest = max(plan[stage]["peak_bytes"] for stage in STAGES)
    rows.append(Row("memory of a device", (largest, largest), peak or np.nan, size_of))
    return rows + _time(entries, plan)


def _speed(entries: Entries, plan: dict, stage: str, when: str) -> list[Row]:
    """Of all steps with the experts per token of this stage: the median."""
    planned, rows = plan[stage], settings(entries).get("rows") or {}
    speeds = column([entry for entry in _steps(entries) if entry.get("k") == plan["k"][stage]], "tokens_per_s")
    speed = float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else np.nan
    seconds = rows.get("per_step", np.nan) * rows.get("length", np.nan) / speed
    mfu = planned["mfu"][0] * planned["step_seconds"][0] / seconds  # it is the seconds that differ
    return [
        Row(f"seconds of a step{when}", _ordered(planned["step_seconds"]), seconds, lambda s: f"{s:.3g} s"),
        Row(f"tokens per second{when}", _ordered(planned["tokens_per_second"]), speed, lambda n: f"{n:,.0f}"),
        Row(f"MFU{when}", _ordered(planned["mfu"]), mfu, lambda share: f"{share:.1%}"),
    ]


def _time(entries: Entries, plan: dict) -> list[Row]:
    """Of the steps of a whole run; and with all that steps waited for, which no plan knows."""
    final, end = last(entries, "step"), (settings(entries).get("trainer") or {}).get("max_steps")
    seconds = _number(final.get("seconds"))
    if not plan["hours"] or final.get("step") != end:
        return []
    low, high = (hours * 3600 for hours in _ordered(plan["hours"]))
    rows = [Row("time of all steps", (low, high), seconds, duration)]
    waited = [_number((final.get("perf") or {}).get(name)) for name in WAITED]
    return [
        *rows,
        Row("time with waiting for data, saving, held-out text", (np.nan, np.nan), seconds + sum(waited), duration),
    ]


def verdict(row: Row) -> str:
    """Within the range, or how many times its nearer end."""
    low, high = row.planned
    if not known(low):
        return ""
    if low <= row.measured <= high:
        return row.within
    near = low if row.measured < low else high
    return f"{row.measured / near:.3g} times" + (
        " the lowest" if near is low and low < high else " the highest" * (low < high)
    )


def _planned(row: Row) -> str:
    low, high = row.planned
    if not known(low):
        return "not planned"
    return row.written(low) if low == high else f"{row.written(low)} to {row.written(high)}"


def _machine(plan: dict, start: dict) -> str:
    devices = f"{plan['devices']} device{'s' * (plan['devices'] != 1)}"
    how = ", which is the default: name yours by telemetry.cluster" if plan["by_default"] else ""
    problem = f" The layout is the planner's: {plan['layout_problem']}." if plan.get("layout_problem") else ""
    return (
        f"Planned for {plan['cluster']}, {devices}{how}. Measured on {start.get('device') or 'an unknown device'}.{problem}"
    )


def _meaning(plan: dict) -> str:
    memory = (
        "the growth of the process since before there was a model"
        if plan["kind"] == "cpu"
        else "the most that torch's allocator held on the fullest rank"
    )
    ranges = "Ranges are those of well-tuned and of ordinary code."
    guessed = f" Of {plan['guessed']}." if plan.get("guessed") else ""
    return f"{ranges} Memory as measured is {memory}. MFU is of the planned machine's peak.{guessed}"


def _steps(entries: Entries) -> Entries:
    return of_kind(entries, "step")


def _ordered(pair: Sequence[float]) -> tuple[float, float]:
    return min(pair), max(pair)


def _number(value: object) -> float:
    return float(value) if known(value) else np.nan
