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
from sigma_lite.lightning_keys import require_end_is_saved
from sigma_lite.scale.background import Background
from sigma_lite.storage import StorageError
from sigma_lite.train.callbacks.diary import completes_step
from sigma_lite.train.callbacks.stop import Stopped, asked_to_stop


class Save(Checkpoint):
    """Write RUN/checkpoints/step=N.safetensors every `every` optimizer steps and keep the newest `keep`.

    A step's checkpoint is the last thing that happens in it, after its diary entries and its validation: whatever a
    kill takes away comes after the newest checkpoint, and is done again.

    Args:
        every: optimizer steps; must divide trainer.max_steps, so that the last step is saved.
        keep: how many to keep, at least 2: one more than the one being written.
        milestones: optimizer steps that are saved and kept besides, for other runs to branch from.
        beside: write while training goes on. It costs a copy of weights and moments in host memory, and until a file is
            whole a kill loses the steps since the one before; so it is for models whose writing takes longer than a step.
    """

    def __init__(self, every: int = 100, keep: int = 2, milestones: tuple[int, ...] = (), beside: bool = False):
        require(every >= 1, f"save.every={every}: must be at least 1 optimizer step")
        require(keep >= 2, f"save.keep={keep}: keep at least 2, so that a damaged one is not the only one")
        self.every, self.keep, self.milestones = every, keep, frozenset(milestones)
        self.beside, self.writer = beside, Background()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            require_end_is_saved(self.every, trainer.max_steps)

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
        if completes_step(trainer, batch_idx) and not validation_follows(trainer, batch_idx):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit":
            self.save(trainer)

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.writer.wait()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        """What is being written is finished first; what goes wrong with it is less than what has gone wrong."""
        with contextlib.suppress(Exception):
            self.writer.wait()

    def save(self, trainer: pl.Trainer) -> None:
        """Write this step's checkpoint if it is due, then remove the oldest. Raises Stopped if a signal asked for it."""
        step = trainer.global_step
        asked = asked_to_stop(trainer)
        if not asked and (step == 0 or (step % self.every and step not in self.milestones)):
            return
        self.writer.wait()  # for the checkpoint before, whose errors show here
        beside = (lambda write: self.writer(lambda: self._finish(trainer, write))) if self.beside else None
        trainer.save_checkpoint(checkpoint_path(trainer.default_root_dir, step), storage_options=beside)
        if not self.beside:
            self._remove_oldest(trainer)
        if asked:
            self.writer.wait()
            raise Stopped(asked)

    def _finish(self, trainer: pl.Trainer, write: Callable[[], None]) -> None:
        write()
        self._remove_oldest(trainer)

    def _remove_oldest(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            for old in checkpoints(trainer.default_root_dir)[: -self.keep]:
                if step_of(old) not in self.milestones:
                    remove(old)


def validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation comes right after this micro-batch."""
    return trainer.enable_validation and (batch_idx + 1) % trainer.val_check_batch == 0
