"""Apply the schedule. It decides nothing and remembers nothing: the step says it all, so resuming needs no state."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from sigma_lite.train.callbacks.diary import note


class SparsitySchedule(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        before, now = module.model.k_per_layer, module.k_at(trainer.global_step)
        if now == before:
            return
        module.model.set_k(now)
        if trainer.global_step > 0:
            note(trainer, "sparsity switch", f"experts per token {list(before)} -> {list(now)}")
