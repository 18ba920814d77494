"""When checkpoints are written, and how many are kept."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from sigma_lite.checkpoint import checkpoint_path, checkpoints, remove, step_of
from sigma_lite.config import require
from sigma_lite.lightning_keys import require_end_is_saved, require_kept
from sigma_lite.scale.background import Background
from sigma_lite.storage import StorageError
from sigma_lite.train.callbacks.diary import completes_step, note
from sigma_lite.train.callbacks.stop import Stopped, asked_to_stop
from sigma_lite.train.callbacks.throughput import lap


class Save(Checkpoint):
    """Write RUN/checkpoints/step=N.safetensors every `every` optimizer steps and keep the newest `keep`.

    A step's checkpoint is the last thing that happens in it, after its diary entries and its validation: whatever a
    kill takes away comes after the newest checkpoint, and is done again.

    Args:
        every: optimizer steps; must divide trainer.max_steps, so that the last step is saved.
        keep: how many to keep, at least 2: one more than the one being written.
        milestones: optimizer steps that are saved and kept besides, for other runs to branch from.
        in_background: write while training goes on. It costs a copy of weights and moments in host memory, and until a
            file is whole a kill loses the steps since the one before: it is for models whose writing takes longer than a
            step.
    """

    def __init__(self, every: int = 100, keep: int = 2, milestones: tuple[int, ...] = (), in_background: bool = False):
        require_kept(every, keep)
        self.every, self.keep, self.milestones = every, keep, frozenset(milestones)
        for step in self.milestones:
            require(step >= 1, f"save.milestones: {step} is no optimizer step; the first is 1")
        self.in_background, self.writer = in_background, Background()
        self.ending = False  # something asked in the middle of a step to end the fit
        self.saved = 0  # the step of the newest checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            require_end_is_saved(self.every, trainer.max_steps)
        last = trainer.max_steps
        late = [step for step in self.milestones if stage == "fit" and step > last]
        require(not late, f"save.milestones={late} lie beyond trainer.max_steps={last}, so they would never be saved")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Better to say now that the disk is too small than at the first checkpoint."""
        weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
        folder = Path(trainer.default_root_dir).absolute()
        more = max(1, self.keep + 1 - len(checkpoints(folder)))  # a run that is continued has some already
        needed = more * 3 * weights  # weights and Adam's two moments
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
        if free < needed:
            raise StorageError(
                f"{more} checkpoint{'s need' if more > 1 else ' needs'} {needed / 1e6:.0f} MB in {folder},"
                f" {free / 1e6:.0f} MB are free:"
                " free some space or choose another trainer.default_root_dir"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Whatever ends the fit early (max_time, another callback) sets `should_stop`; it waits for the end of the step."""
        lap(trainer, "recording")  # this is the last callback
        if not completes_step(trainer, batch_idx):
            self.ending, trainer.should_stop = self.ending or trainer.should_stop, False
            return
        trainer.should_stop, self.ending = trainer.should_stop or self.ending, False
        if not validation_follows(trainer, batch_idx):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit":
            self.save(trainer)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.saved, self.ending = trainer.global_step, False

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Where Lightning has ended the fit in another way than by a step that is saved."""
        if trainer.global_step > self.saved:
            self._write(trainer)

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.writer.wait()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """What is being written is finished first; what goes wrong with it is less than what has gone wrong."""
        with contextlib.suppress(Exception):
            self.writer.wait()

    def save(self, trainer: pl.Trainer) -> None:
        """Write this step's checkpoint if it is due, then remove the oldest. Raises Stopped if the run is to end here."""
        step = trainer.global_step
        asked, early = asked_to_stop(trainer), ends_early(trainer)
        if not asked and not early and (step == 0 or (step % self.every and step not in self.milestones)):
            return
        self._write(trainer)
        if asked or early:
            self.writer.wait()
            note(trainer, "stopped", Stopped(asked).args[0])
            raise Stopped(asked)

    def _write(self, trainer: pl.Trainer) -> None:
        lap(trainer, "recording")
        self.saved = step = trainer.global_step
        self.writer.wait()  # for the checkpoint before, whose errors show here
        in_background = (lambda write: self.writer(lambda: self._finish(trainer, write))) if self.in_background else None
        trainer.save_checkpoint(checkpoint_path(trainer.default_root_dir, step), storage_options=in_background)
        if not self.in_background:
            self._remove_oldest(trainer)
        lap(trainer, "saving")

    def _finish(self, trainer: pl.Trainer, write: Callable[[], None]) -> None:
        write()
        self._remove_oldest(trainer)

    def _remove_oldest(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            for old in checkpoints(trainer.default_root_dir)[: -self.keep]:
                if step_of(old) not in self.milestones:
                    remove(old)


def ends_early(trainer: pl.Trainer) -> bool:
    """Whether Lightning would end the fit now, before its last step."""
    return trainer.should_stop and trainer.global_step < trainer.max_steps and trainer.fit_loop._can_stop_early


def validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation comes right after this micro-batch."""
    return trainer.enable_validation and (batch_idx + 1) % trainer.val_check_batch == 0
