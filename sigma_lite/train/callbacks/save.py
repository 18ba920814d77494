"""When checkpoints are written, and how many are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from sigma_lite.checkpoint import SUFFIX
from sigma_lite.config import require
from sigma_lite.storage import StorageError


class Save(ModelCheckpoint):
    """Write RUN/checkpoints/step=N.safetensors every `every` optimizer steps and keep the newest `keep`.

    Args:
        every: optimizer steps; must divide trainer.max_steps, so that the last step is saved.
        keep: how many to keep, at least 2: one more than the one being written.
    """

    FILE_EXTENSION = SUFFIX

    def __init__(self, every: int = 100, keep: int = 2):
        require(every >= 1, f"save.every={every}: must be at least 1 optimizer step")
        require(keep >= 2, f"save.keep={keep}: keep at least 2, so that a damaged one is not the only one")
        super().__init__(
            filename="{step:06d}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every,
            enable_version_counter=False,
        )
        self.every, self.keep = every, keep

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            last = trainer.max_steps
            require(
                last % self.every == 0,
                f"save.every={self.every} does not divide trainer.max_steps={last}, so the end would not be saved;"
                f" try save.every={next(n for n in range(self.every, 0, -1) if last % n == 0)}",
            )
            self.dirpath = str(Path(trainer.default_root_dir, "checkpoints").absolute())
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Better to say now that the disk is too small than at the first checkpoint."""
        weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
        needed = (self.keep + 1) * 3 * weights  # weights and Adam's two moments
        free = shutil.disk_usage(self.dirpath if Path(self.dirpath).exists() else trainer.default_root_dir).free
        if free < needed:
            raise StorageError(
                f"{self.keep + 1} checkpoints need {needed / 1e6:.0f} MB in {self.dirpath}, {free / 1e6:.0f} MB are free:"
                " free some space or choose another trainer.default_root_dir"
            )
        super().on_train_start(trainer, pl_module)
