"""Tokens and seconds, summed over restarts."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl


class Throughput(pl.Callback):
    """`tokens` trained on over all ranks, `seconds` spent in training steps, and `tokens_per_s` of the last step."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.tokens_per_s = 0, 0.0, 0.0
        self._before = 0, 0.0  # tokens and seconds at the start of this step
        self._started = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._before = self.tokens, self.seconds
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += time.perf_counter() - self._started
        self.tokens += batch.ids_BS.numel() * trainer.world_size
        tokens, seconds = self._before
        self.tokens_per_s = (self.tokens - tokens) / (self.seconds - seconds)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds = state["tokens"], state["seconds"]
