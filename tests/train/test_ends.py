"""A fit that is ended early: saved, not called finished, and continued to the same weights as one that never ended."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
from test_resume import diary, same
from tiny import child, ending

from sigma_lite import cli, record
from sigma_lite.checkpoint import checkpoints, newest_checkpoint, read_checkpoint, step_of
from sigma_lite.config import CorpusConfig, RowsConfig
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.callbacks.progress import StepProgress
from sigma_lite.train.module import SigmaLit

ENDED = "sigma-lite: stopped at step 5 of 12; the same command continues from run/checkpoints/step=000005.safetensors"


def command(*more: str) -> int:
    return tiny.refused(cli.main, "fit", "-c", "tiny.yaml", *more)


def labels(kind: str) -> list[int]:
    return [entry["step"] for entry in record.read("run/record.jsonl", kind)]


@pytest.fixture
def ask(monkeypatch):
    """ask(n): after the n-th micro-batch of the next fit some callback sets `should_stop`, as max_time does."""

    def set_at(number: int) -> None:
        seen, original = [], StepProgress.on_train_batch_end

        def asks(self, trainer, *args):
            original(self, trainer, *args)
            seen.append(1)
            trainer.should_stop = trainer.should_stop or len(seen) == number

        monkeypatch.setattr(StepProgress, "on_train_batch_end", asks)

    return set_at


@pytest.mark.parametrize("micro_batch", [9, 10])
def test_an_early_end_is_no_end(place, finished, ask, capsys, micro_batch):
    """Asked for after the first or the second micro-batch of step 5: saved once the step is whole, then gone on with."""
    ask(micro_batch)
    assert command() == 0
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1] == ENDED and "held-out" not in said.out
    assert labels("step") == [1, 2, 3, 4, 5] and labels("validation") == [4] and not labels("sample")
    assert [e["what"] for e in record.read("run/record.jsonl", "event")] == ["stopped"]
    assert not Path("run/report.html").exists()
    ask(99)
    assert command() == 0
    assert labels("sample") == [12] and labels("validation") == [4, 8, 12]
    same(read_checkpoint(newest_checkpoint("run")), read_checkpoint(newest_checkpoint(finished / "run")))
    assert diary(Path("run")) == diary(finished / "run")


def test_a_time_limit_is_of_one_start(place, capsys, monkeypatch):
    """Its clock is not carried on: the same command, with the limit in it, goes on instead of stopping at once."""
    clock = [0.0]
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time.monotonic", lambda: clock[0])
    original = SigmaLit.training_step

    def a_second(self, *args):
        clock[0] += 1
        return original(self, *args)

    monkeypatch.setattr(SigmaLit, "training_step", a_second)
    for step in (5, 10, 12):
        assert command("--trainer.max_time={seconds: 9}") == 0
        assert step_of(newest_checkpoint("run")) == step
        assert labels("sample") == ([12] if step == 12 else [])


def test_early_stopping_saves_where_it_stopped(place, capsys):
    stop = "lightning.pytorch.callbacks.EarlyStopping"
    args = {"monitor": "heldout_bits_per_byte", "patience": 1, "min_delta": 100}
    tiny.write_config(place, trainer__callbacks=[{"class_path": stop, "init_args": args}], save__every=12)
    assert command() == 0
    assert "stopped at step 8 of 12" in capsys.readouterr().err
    assert [step_of(path) for path in checkpoints("run")] == [8] and not labels("sample")


def test_a_limit_before_the_first_step(place, capsys):
    assert command("--trainer.max_time={seconds: 0}") == 0
    assert "stopped before a step of 12 was saved" in capsys.readouterr().err
    assert not labels("sample") and not labels("validation")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_step_saves_that_step(place, number):
    def trap():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        original = SigmaLit.training_step

        def training_step(self, batch, batch_idx):
            if batch_idx == 8:  # the first micro-batch of step 5
                os.kill(os.getpid(), number)
            return original(self, batch, batch_idx)

        SigmaLit.training_step = training_step

    assert ending(child(["fit", "-c", "tiny.yaml"], trap), 130) == 130
    assert Path("child.log").read_text("utf-8").splitlines()[-1] == ENDED


def test_a_second_interrupt_stops_at_once(place):
    def trap():
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def training_step(self, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")

        SigmaLit.training_step = training_step

    assert ending(child(["fit", "-c", "tiny.yaml"], trap), 130) == 130
    log = Path("child.log").read_text("utf-8")
    assert "went on" not in log and "Ctrl-C again stops at once" in log and newest_checkpoint("run") is None


def test_lightning_ending_without_being_asked_is_saved_too(place, capsys, monkeypatch):
    """max_epochs, or data that ends: whatever brings Lightning to the end of its loop before max_steps."""

    def leave(self, batch, batch_idx):
        return -1 if batch_idx == 6 else None  # what ends an epoch

    monkeypatch.setattr(SigmaLit, "on_train_batch_start", leave)
    assert command("--trainer.max_epochs=1", "--save.every=12") == 0
    assert "stopped at step 3 of 12" in capsys.readouterr().err
    assert [step_of(path) for path in checkpoints("run")] == [3] and not labels("sample")


def test_a_finished_run_without_its_diary(place, finished, capsys):
    shutil.copytree(finished / "run", "run")
    Path("run/record.jsonl").unlink()
    for _ in range(2):
        assert command() == 0
        out = capsys.readouterr().out
        assert "held-out" in out and "report        not drawn" in out
    assert labels("validation") == [12] and labels("sample") == [12]


def test_checkpoints_that_are_gone_are_said(place, finished, capsys):
    """The run begins anew, and its diary with it: not without a word."""
    shutil.copytree(finished / "run", "run")
    shutil.rmtree("run/checkpoints")
    assert command("--trainer.max_time={seconds: 0}") == 0
    assert "has a diary up to step 12, but no checkpoint" in capsys.readouterr().out


def test_a_killed_first_step_is_not_a_finished_run(place):
    def trap():
        Diary.on_train_batch_end = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    assert ending(child(["fit", "-c", "tiny.yaml"], trap)) == -signal.SIGKILL
    assert command("--trainer.max_time={seconds: 0}") == 0
    assert not labels("sample")


def test_workers_leave_ctrl_c_to_the_run(place):
    """A terminal sends it to them as well: the step still gets all its rows."""
    data = TokenDataModule(CorpusConfig(dir="prepared"), RowsConfig(length=32, per_step=8, per_micro=1), num_workers=1)
    data.setup()
    batches = iter(data.val_dataloader())
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGINT)
    assert sum(1 for _ in batches) == len(data.val_dataloader()) - 1 > 10


@pytest.mark.parametrize(("option", "said"), [
    ("--data.num_workers=-1", "data.num_workers=-1: give a whole number"),
    ("--seed_everything=-1", "seed_everything=-1"),
    ("--trainer.max_epochs=0", "trainer.max_epochs=0: nothing would be trained"),
    ("--trainer.max_time={seconds: -5}", "trainer.max_time.seconds=-5: must be 0 or more"),
])  # fmt: skip
def test_ends_that_cannot_be(place, capsys, option, said):
    assert command(option) == 2
    assert said in capsys.readouterr().err
