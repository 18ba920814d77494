"""Ranks that share out experts speak with one voice, and each expert's gradient is that of one device."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launch import done, fit

from sigma_lite import record

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from test_telemetry import LOGGER, OFTEN, OTHERS, pattern, table, told

pytestmark = pytest.mark.slow
R, STEPS, L = 2, 12, 2


@pytest.fixture
def told_by(place, monkeypatch):
    """Runs the tiny config on so many ranks; returns what its logger was told."""
    (place / "strangers.py").write_text(LOGGER)
    monkeypatch.syspath_prepend(str(place))

    def run(ranks: int, expert_ranks: int) -> list[tuple[str, int, dict]]:
        file = f"{ranks}x{expert_ranks}.jsonl"
        logger = {"class_path": "strangers.Lines", "init_args": {"file": file}}
        often = {**OFTEN, "trainer__logger": logger, "trainer__default_root_dir": f"run{ranks}x{expert_ranks}"}
        done(fit(ranks, expert_ranks, **often))
        return told(file)

    return run


def test_only_the_first_rank_speaks_and_says_all_that_the_table_has(told_by):
    lines = told_by(R, R)
    assert {rank for rank, *_ in lines} == {"0"}
    assert len(lines) == len({(step, *sorted(found)) for _, step, found in lines}), "nothing is told twice"
    of_others = {name for name in table() if name.startswith(OTHERS)}
    assert {pattern(name) for *_, found in lines for name in found} == table() - of_others
    steps = {e["step"]: e for e in record.read("run2x2/record.jsonl", "step")}
    for _, step, found in lines:
        rows = [found[name] for name in sorted(found) if name.startswith("moe/expert_rank_")]
        if rows:
            assert len(rows) == R and sum(rows) == 256 * sum(steps[step]["k"]), "every token's choices, in every layer"
            assert 1 <= found["moe/fullest_rank"] <= R
    assert json.loads(Path("run2x2/record.jsonl").read_text("utf-8").splitlines()[0])["plan"]["devices"] == R


@pytest.mark.parametrize("layout", [(2, 1), (2, 2), (4, 2)])
def test_norms_of_experts_are_those_of_one_device(told_by, layout):
    told_by(1, 1)
    told_by(*layout)
    alone, shared = (record.read(f"run{name}/record.jsonl", "experts") for name in ("1x1", f"{layout[0]}x{layout[1]}"))
    assert [entry["step"] for entry in alone] == [entry["step"] for entry in shared] == [4, 8, 12]
    for a, b in zip(alone, shared, strict=True):
        for one, other in zip(a["grad_norm"], b["grad_norm"], strict=True):
            assert other == pytest.approx(one, rel=2e-3, abs=1e-7)  # four digits are written
