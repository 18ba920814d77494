"""`save.in_background`: a checkpoint is written while training goes on, and is what it would have been without."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from launch import curve, done, fit, furthest

from sigma_lite import cli
from sigma_lite.checkpoint import checkpoints, newest_checkpoint, step_of
from sigma_lite.scale import sharded_checkpoint
from sigma_lite.scale.background import Background
from sigma_lite.storage import StorageError
from sigma_lite.train import checkpoint as one_file
from sigma_lite.train.callbacks.diary import Diary


def test_jobs_come_one_after_another_and_errors_are_raised_later():
    seen, gate, background = [], threading.Event(), Background()
    background(lambda: (gate.wait(600), seen.append("first")))
    assert not seen, "the caller goes on"
    threading.Timer(0.1, gate.set).start()
    background(lambda: seen.append("second") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background(lambda: seen.append("never"))
    background.wait()
    assert seen == ["first", "second"]


def only_after_another_step(module):
    """A trap: no file is written before the next optimizer step has ended, so writing inside the step would never end."""

    def trap(rank: int) -> None:
        write, record, steps = module.write_packed, Diary.on_train_batch_end, []

        def later(path, packed):
            (saved,) = map(int, re.findall(r"step=(\d+)", str(path)))
            patience = time.monotonic() + 300
            while max(steps, default=0) <= saved < 12:  # after the last step there is none
                if time.monotonic() > patience:
                    raise StorageError("no step was taken while a checkpoint waited to be written")
                time.sleep(0.01)
            write(path, packed)

        def counted(self, trainer, *args):
            record(self, trainer, *args)
            steps.append(trainer.global_step)

        module.write_packed, Diary.on_train_batch_end = later, counted

    return trap


def test_training_goes_on_while_one_file_is_written(place, finished, monkeypatch):
    for owner, name in ((one_file, "write_packed"), (Diary, "on_train_batch_end")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back
    only_after_another_step(one_file)(0)
    cli.main(["fit", "-c", str(tiny.write_config(place, save__in_background=True))])
    assert furthest(newest_checkpoint("run"), newest_checkpoint(finished / "run")) == 0
    assert [step_of(path) for path in checkpoints("run")] == [10, 12]


@pytest.mark.slow
def test_training_goes_on_while_ranks_write(place):
    done(fit(2, 2, trainer__default_root_dir="whole"))
    done(fit(2, 2, only_after_another_step(sharded_checkpoint), save__in_background=True))
    assert furthest(newest_checkpoint("run"), newest_checkpoint("whole")) == 0
    assert curve(Path("run")) == curve(Path("whole"))
    assert [step_of(path) for path in checkpoints("run")] == [10, 12]


def test_a_copy_is_written_not_what_it_became(tmp_path):
    """Weights move on between the copy and the writing."""
    weight, jobs = torch.zeros(3), []
    one_file.SafeCheckpointIO().save_checkpoint({"w": weight}, tmp_path / "c", jobs.append)
    weight += 1
    assert not (tmp_path / "c").exists()
    jobs[0]()
    assert torch.equal(one_file.SafeCheckpointIO().load_checkpoint(tmp_path / "c")["w"], torch.zeros(3))
