"""Apply the schedule. It decides nothing and remembers nothing: the step says it all, so resuming needs no state."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from sigma_lite.train.callbacks.diary import note


class SparsitySchedule(pl.Callback):
    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        """At the switch too a validation measures what its step's checkpoint is: the model that makes the next step."""
        if trainer.state.fn == "fit":  # otherwise loading the checkpoint has set K
            module.model.set_k(module.k_at(trainer.global_step))

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        before, now = module.k_at(max(step - 1, 0)), module.k_at(step)
        module.model.set_k(now)
        if now != before and batch_idx % trainer.accumulate_grad_batches == 0:
            note(trainer, "sparsity switch", f"experts per token {list(before)} -> {list(now)}")
