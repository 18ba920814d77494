"""When checkpoints are written, and how many are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from sigma_lite.checkpoint import checkpoint_path, checkpoints, remove, step_of
from sigma_lite.config import require
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
    """

    def __init__(self, every: int = 100, keep: int = 2, milestones: tuple[int, ...] = ()):
        require(every >= 1, f"save.every={every}: must be at least 1 optimizer step")
        require(keep >= 2, f"save.keep={keep}: keep at least 2, so that a damaged one is not the only one")
        self.every, self.keep, self.milestones = every, keep, frozenset(milestones)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        last = trainer.max_steps
        require(
            stage != "fit" or last % self.every == 0,
            f"save.every={self.every} does not divide trainer.max_steps={last}, so the end would not be saved;"
            f" try save.every={next((n for n in range(self.every, 0, -1) if last % n == 0), 1)}",
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Better to say now that the disk is too small than at the first checkpoint."""
        weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
        needed = (self.keep + 1) * 3 * weights  # weights and Adam's two moments
        folder = Path(trainer.default_root_dir).absolute()
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
        if free < needed:
            raise StorageError(
                f"{self.keep + 1} checkpoints need {needed / 1e6:.0f} MB in {folder}, {free / 1e6:.0f} MB are free:"
                " free some space or choose another trainer.default_root_dir"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if completes_step(trainer, batch_idx) and not validation_follows(trainer, batch_idx):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit":
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write this step's checkpoint if it is due, then remove the oldest. Raises Stopped if a signal asked for it."""
        run_dir, step = trainer.default_root_dir, trainer.global_step
        asked = asked_to_stop(trainer)
        if not asked and (step == 0 or (step % self.every and step not in self.milestones)):
            return
        trainer.save_checkpoint(checkpoint_path(run_dir, step))
        if trainer.is_global_zero:
            for old in checkpoints(run_dir)[: -self.keep]:
                if step_of(old) not in self.milestones:
                    remove(old)
        if asked:
            raise Stopped(asked)


def validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation comes right after this micro-batch."""
    return trainer.enable_validation and (batch_idx + 1) % trainer.val_check_batch == 0
