"""What may happen to one of several ranks: each time all of them end, say why, and lose nothing."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from launch import curve, die, done, endings, fit, furthest, start, weights

from sigma_lite import record
from sigma_lite.checkpoint import REST, checkpoints, newest_checkpoint, step_of
from sigma_lite.scale import sharded_checkpoint
from sigma_lite.storage import StorageError
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.module import SigmaLit

pytestmark = pytest.mark.slow
LOST = {"timeout_s": 60}  # one that is killed before they have met is waited for so long
KILLS = int(os.environ.get("SIGMA_LITE_KILLS", "2"))  # random moments at which a rank is killed


def before(owner, name: str, on_rank: int, times: int = 1):
    """A trap: kill one rank at the `times`-th call of owner.name, before it runs."""

    def trap(rank: int) -> None:
        original, seen = getattr(owner, name), []

        def trapped(*args, **kwargs):
            seen.append(1)
            if rank == on_rank and len(seen) == times:
                die()
            return original(*args, **kwargs)

        setattr(owner, name, trapped)

    return trap


KILLED = {  # where: (trap, step of the newest checkpoint afterwards)
    "one rank while it writes its pieces of the second checkpoint": (
        before(sharded_checkpoint, "write_packed", on_rank=1, times=2),
        2,
    ),
    "the first rank before the checkpoint is moved into place": (
        before(sharded_checkpoint, "move_into_place", on_rank=0, times=2),
        4,
    ),
    "one rank between two steps": (before(Diary, "on_train_batch_end", on_rank=1, times=3), 6),
}


def ended_by_a_kill(codes: list[int], newest: int, where: str) -> None:
    assert sorted(codes) == [-signal.SIGKILL, 2], (where, codes, Path("child.log").read_text("utf-8"))
    assert "another rank has ended or does not answer" in Path("child.log").read_text("utf-8"), where
    assert step_of(newest_checkpoint("run")) == newest, where


def nothing_was_lost(last: int) -> None:
    assert furthest(newest_checkpoint("run"), newest_checkpoint("whole")) == 0
    assert curve(Path("run")) == curve(Path("whole"))
    assert [step_of(path) for path in checkpoints("run")] == [last - 2, last], "the last two are kept"
    assert not [path for path in Path("run/checkpoints").iterdir() if "partial" in path.name]


def test_ranks_killed_at_chosen_moments_lose_nothing(place):
    """The others say so and end, the checkpoint before is the newest, and the same command goes on."""
    settings = {"trainer__val_check_interval": 6}
    done(fit(2, 2, trainer__default_root_dir="whole", **settings))
    for where, (trap, step) in KILLED.items():
        ended_by_a_kill(fit(2, 2, trap, **LOST, **settings), step, where)
    done(fit(2, 2, **settings))
    nothing_was_lost(12)


@pytest.mark.parametrize("beside", [False, True])
def test_ranks_killed_at_random_moments_lose_nothing(place, beside):
    """SIGMA_LITE_KILLS times, every second one aimed at a save. What a kill inside one leaves behind proves that it was."""
    last, chance, inside = 6 * (KILLS + 2), random.Random(time.time_ns()), 0
    settings = {"trainer__max_steps": last, "trainer__val_check_interval": 6}
    done(fit(2, 2, trainer__default_root_dir="whole", **settings))
    for n in range(KILLS):
        victim, number = chance.randrange(2), chance.randint(1, 3)
        trap = in_a_save(victim, number, chance.uniform(0, 0.02)) if n % 2 else timed(victim, chance.uniform(0, 3))
        begun = time.time() - 0.01
        codes = fit(2, 2, trap, save__in_background=beside, **LOST, **settings)
        assert codes[victim] == -signal.SIGKILL, (codes, Path("child.log").read_text("utf-8"))
        newest = newest_checkpoint("run")
        assert newest is None or step_of(newest) < last, "the run had ended before it could be killed"
        inside += any("partial" in p.name and p.stat().st_mtime > begun for p in Path("run").glob("checkpoints/*"))
        print(f"kill {n}: rank {victim}, newest {newest and step_of(newest)}, inside a save so far: {inside}")
    assert inside >= KILLS // 4, "too few kills fell into a save"
    done(fit(2, 2, save__in_background=beside, **settings))
    nothing_was_lost(last)


def timed(victim: int, seconds: float):
    """A trap: that rank is killed so long after its start, or in its sixth step, because a fast machine would be done."""

    def trap(rank: int) -> None:
        if rank == victim:
            threading.Timer(seconds, die).start()
            before(Diary, "on_train_batch_end", victim, times=6)(rank)

    return trap


def in_a_save(victim: int, number: int, seconds: float):
    """A trap: that rank is killed so long after the `number`-th checkpoint's folder has been begun."""

    def trap(rank: int) -> None:
        original, seen = sharded_checkpoint._together, []

        def together(*args):
            found = original(*args)
            seen.append(1)
            if rank == victim and len(seen) == 3 * number - 2:  # the first of a save's three
                threading.Timer(seconds, die).start()
            return found

        sharded_checkpoint._together = together

    return trap


def test_one_rank_sees_nan(place):
    """Its gradient reaches every rank, so all refuse the step together, and the run goes on."""

    def trap(rank: int) -> None:
        original = SigmaLit.training_step

        def training_step(self, batch, batch_idx):
            found = original(self, batch, batch_idx)
            bad = rank == 1 and self.trainer.global_step == 3
            return {**found, "loss": found["loss"] * (math.nan if bad else 1)}

        SigmaLit.training_step = training_step

    done(fit(2, 2, trap, trainer__val_check_interval=12))
    events = [e for e in record.read("run/record.jsonl", "event") if e["what"] == "step skipped"]
    assert [(e["step"], e["why"]) for e in events] == [(3, "gradient norm is nan")]
    assert all(torch.isfinite(value).all() for value in weights(newest_checkpoint("run")).values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_polite_kill_of_one_rank_stops_all_with_a_checkpoint(place, monkeypatch, number):
    """In the middle of step 5 rank 1 is asked to stop: all save step 5 and end; SIGUSR1 under SLURM queues the job again."""
    command = Path("bin/scontrol")
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "$@" >> scontrol.log\n')
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{command.parent.absolute()}:{os.environ['PATH']}")

    def trap(rank: int) -> None:
        os.environ["SLURM_JOB_ID"] = "77"
        original = SigmaLit.training_step

        def training_step(self, batch, batch_idx):
            if rank == 1 and self.trainer.global_step == 4:
                os.kill(os.getpid(), number)
            return original(self, batch, batch_idx)

        SigmaLit.training_step = training_step

    assert fit(2, 2, trap) == [130, 130], Path("child.log").read_text("utf-8")
    assert "stopped at step 5 of 12; the same command continues" in Path("child.log").read_text("utf-8")
    assert step_of(newest_checkpoint("run")) == 5
    asked = Path("scontrol.log").read_text("utf-8") if Path("scontrol.log").exists() else ""
    assert asked == ("requeue 77\n" if number == signal.SIGUSR1 else "")


def test_a_rank_that_never_comes(place):
    pids = start(2, 2, lambda rank: die() if rank == 1 else None, timeout_s=2)
    assert endings(pids) == [2, -signal.SIGKILL]
    said = Path("child.log").read_text("utf-8").strip().splitlines()[-1]
    assert said.startswith("sigma-lite: rank 0 of 2 did not meet the others at 127.0.0.1:") and "within 2 s" in said


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_on_one_rank_ends_all(place, beside):
    """All ranks give up with the same sentence; the checkpoint before stays the newest."""

    def trap(rank: int) -> None:
        original, seen = sharded_checkpoint.write_packed, []

        def write(path, packed):
            seen.append(path)
            if rank == 1 and len(seen) == 2:
                raise StorageError(f"no room to write {path}")
            original(path, packed)

        sharded_checkpoint.write_packed = write

    assert fit(2, 2, trap, save__in_background=beside) == [2, 2], Path("child.log").read_text("utf-8")
    lines = [line for line in Path("child.log").read_text("utf-8").splitlines() if line.startswith("sigma-lite:")]
    assert len(lines) == 2 and all("no room to write" in line for line in lines)
    assert step_of(newest_checkpoint("run")) == 2 and (newest_checkpoint("run") / REST).is_file()


@pytest.mark.parametrize(("changes", "said"), [
    ({"strategy": {"expert_parallel": 3}}, "expert_parallel=3 does not divide the 2 rank(s)"),
    ({"trainer__precision": "bf16-true"}, "choose 32-true or bf16-mixed"),
])  # fmt: skip
def test_settings_that_cannot_work(place, changes, said):
    assert fit(2, 2, **changes) == [2, 2]
    assert said in Path("child.log").read_text("utf-8")


def test_ranks_agree_on_the_checkpoint_before_a_damaged_one(place):
    """A bit in a piece that one of two ranks reads: both go on from the folder before, and the run ends as it would have."""
    done(fit(2, 2))
    newest = newest_checkpoint("run")
    expected = {name: value.clone() for name, value in weights(newest).items()}
    shutil.rmtree(newest)
    older = newest_checkpoint("run")
    newer = Path(shutil.copytree(older, older.with_name("step=000011.safetensors")))
    piece = sorted(newer.glob("rank-*"))[-1]
    content = bytearray(piece.read_bytes())
    content[-50] ^= 1
    piece.write_bytes(content)
    done(fit(2, 2))
    assert Path("child.log").read_text("utf-8").count("step=000010.safetensors, the one before, is taken") == 1
    assert all(torch.equal(value, expected[name]) for name, value in weights(newest_checkpoint("run")).items())
