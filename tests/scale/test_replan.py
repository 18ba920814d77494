"""A run whose experts move between ranks every few steps is the run of one device, also when it is killed and goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launch import curve, die, done, fit, furthest

from sigma_lite import record
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint
from sigma_lite.train.callbacks.diary import Diary

pytestmark = pytest.mark.slow
MOVING = {"strategy": {"replan_every": 3, "copies": 1}}
SETTINGS = {"trainer__max_steps": 12, "trainer__val_check_interval": 6}


def placements(run: str | Path) -> list[tuple[int, str]]:
    return [(e["step"], e["why"]) for e in record.read(Path(run, "record.jsonl"), "event") if e["what"] == "experts placed"]


@pytest.fixture(scope="module")
def runs(corpus_and_data, tmp_path_factory) -> Path:
    """A folder with the run on `one` device and the `whole` run on four. Do not write into it."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(corpus_and_data, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done(fit(1, trainer__default_root_dir="one", **SETTINGS))
        done(fit(4, 4, trainer__default_root_dir="whole", **MOVING, **SETTINGS))
    return folder


def test_moving_experts_change_nothing(runs):
    """Losses, norms and weights of one device to 1e-5. Planned every 3 steps, and by step 6, the first of new K."""
    assert furthest(newest_checkpoint(runs / "whole"), newest_checkpoint(runs / "one")) < 1e-5
    for a, b in zip(curve(runs / "whole"), curve(runs / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert [step for step, _ in placements(runs / "whole")] == [2, 5, 6, 9]


def test_a_kill_between_two_plans_loses_nothing(runs, place):
    """Bitwise the same run as without: the placement and the counts since it are in the checkpoint."""

    def trap(rank: int) -> None:
        original, seen = Diary.on_train_batch_end, []

        def trapped(*args, **kwargs):
            seen.append(1)
            if rank == 1 and len(seen) == 5:
                die()
            return original(*args, **kwargs)

        Diary.on_train_batch_end = trapped

    codes = fit(4, 4, trap, timeout_s=60, **MOVING, **SETTINGS)
    assert any(code < 0 for code in codes), codes
    done(fit(4, 4, **MOVING, **SETTINGS))
    assert furthest(newest_checkpoint("run"), newest_checkpoint(runs / "whole")) == 0
    assert curve(Path("run")) == curve(runs / "whole") and placements("run") == placements(runs / "whole")
    saved = read_checkpoint(newest_checkpoint("run"))["callbacks"]["Replan"]
    assert saved["placement"].shape == (2, 12) and saved["ranks"] == 4


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_run_with_moved_experts_goes_on_elsewhere(runs, place, ranks):
    """From 4 ranks with copies on 2 ranks, and on one device without any: no weight knows where its expert computed."""
    shutil.copytree(runs / "whole", "run")
    shutil.rmtree(newest_checkpoint("run"))
    done(fit(ranks, ranks, **(MOVING if ranks > 1 else {}), **SETTINGS))
    assert furthest(newest_checkpoint("run"), newest_checkpoint(runs / "one")) < 1e-5
    assert len(curve(Path("run"))) == 12
