"""A mixture with a stage and a ramp on several ranks, and continued on another number of them: the same rows and weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from launch import curve, done, fit, furthest
from test_parallel_runs import keep_rows

from sigma_lite import record
from sigma_lite.checkpoint import checkpoints, newest_checkpoint, remove, step_of

pytestmark = pytest.mark.slow
SOURCES = {"code": {"source": "files", "path": "text"}, "prose": {"source": "files", "path": "prose"}}
STAGES = [{"at_step": 5, "weights": {"code": 1, "prose": 3}}]


def settings(ranks: int) -> dict:
    return {
        "data__corpus": {"dir": "mix", "heldout": 0.2},
        "data__mixture": {"sources": SOURCES, "weights": {"code": 3, "prose": 1}, "stages": STAGES},
        "data__rows": {"length": 32, "per_step": 8, "per_micro": 4 // ranks, "ramp": [[0, 4], [7, 8]]},
        "save__milestones": [4, 6, 8],
    }


def run(ranks: int, **changes) -> list[list]:
    """The rows of each step that was made, over all ranks."""
    for old in Path().glob("rows-*"):
        old.unlink()
    done(fit(ranks, 1, keep_rows, **settings(ranks) | changes))
    steps = sorted({int(path.name.split("-")[1]) for path in Path().glob("rows-*")})
    return [torch.cat([torch.load(f"rows-{step}-{rank}") for rank in range(ranks)]).tolist() for step in steps]


@pytest.fixture
def corpora(place) -> Path:
    Path("prose").mkdir()
    for n in range(12):
        Path(f"prose/p{n}.txt").write_text("".join(f"Chapter {n} says {i} things to the reader.\n" for i in range(15)))
    return place


def test_other_ranks_read_the_same_rows_and_end_with_the_same_weights(corpora):
    """Kept are each step's last micro-batch of every rank. Checkpoints of one are continued on two, and the other way."""
    one = run(1, trainer__default_root_dir="1")
    two = run(2, trainer__default_root_dir="2")
    assert one == two and [len(rows) for rows in one] == [4] * 12
    assert furthest(newest_checkpoint("1"), newest_checkpoint("2")) < 1e-5
    for was, now, step in ((1, 2, 4), (2, 1, 6), (1, 2, 8)):  # before the stage, behind it, behind the ramp
        shutil.copytree(str(was), "run")
        for path in checkpoints("run"):
            if step_of(path) > step:
                remove(path)
        assert run(now) == one[step:], (was, now, step)
        assert furthest(newest_checkpoint("run"), newest_checkpoint("1")) < 1e-5
        for a, b in zip(curve(Path("run")), curve(Path("1")), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        for kind, name in (("step", "rows"), ("step", "passes"), ("step", "tokens")):
            found = ([e[name] for e in record.read(f"{path}/record.jsonl", kind)] for path in ("run", "1"))
            assert next(found) == next(found)
        held = [[e["sources"] for e in record.read(f"{path}/record.jsonl", "validation")] for path in ("run", "1")]
        for a, b in zip(*held, strict=True):
            assert all(a[n]["bits_per_byte"] == pytest.approx(b[n]["bits_per_byte"], rel=1e-5) for n in SOURCES)
        shutil.rmtree("run")
