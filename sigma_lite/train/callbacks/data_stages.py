"""Say when the data changes: the event of a step that begins another mixture or batch size. The rows' order decides both.

Also when a run of conversations or rewards goes on from a checkpoint of before its tokens were weighed as balance/pooled.py
says, and what fills rows up was left out: from there on its objective is another one.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from sigma_lite.train.callbacks.diary import note


class DataStages(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        data, step = trainer.datamodule, trainer.global_step
        order = getattr(data, "order", None)
        if order is None or batch_idx % trainer.accumulate_grad_batches:
            return
        if data.unequal and data.weighed_otherwise:
            data.weighed_otherwise = False
            now = "losses are means over a step's tokens, not over means of micro-batches, and leave out what fills rows up"
            note(trainer, "objective", f"from here on {now}")
        if step > order.begun.step and order.shares(step) != order.shares(step - 1):
            shares = zip(data.prepared.sources, order.shares(step - 1), order.shares(step), strict=True)
            note(trainer, "mixture", ", ".join(f"{name} {was:.4g} -> {now:.4g}" for name, was, now in shares))
        if step > 0 and data.rows.at(step) != data.rows.at(step - 1):
            note(trainer, "batch size", f"rows per step {data.rows.at(step - 1)} -> {data.rows.at(step)}")
