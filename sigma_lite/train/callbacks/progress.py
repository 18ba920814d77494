"""One line that says how far, how well and how long still."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from sigma_lite.train.callbacks.diary import completes_step

SHOWN = {"lm": "loss", "lbl": "LBL", "layer0_max_deviation": "layer 0 max", "heldout_bits_per_byte": "held-out b/B"}


class StepProgress(ProgressBar):
    """A tqdm bar over optimizer steps; where nobody watches (no terminal), a line every `log_every` seconds instead."""

    def __init__(self, log_every: float = 20.0):
        super().__init__()
        self.log_every = log_every
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            mininterval=0.2 if interactive else self.log_every,
            dynamic_ncols=interactive,
            disable=not self._enabled,
            smoothing=0.05,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if completes_step(trainer, batch_idx):
            values = trainer.progress_bar_metrics
            facts = {text: f"{float(values[name]):.3f}" for name, text in SHOWN.items() if name in values}
            self._bar.set_postfix({**facts, "K": _short(module.model.k_per_layer)}, refresh=False)
            self._bar.update()

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if self._bar:
            self._bar.close()

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._validation = tqdm(
            total=sum(trainer.num_val_batches), desc="held-out", unit="batch", leave=False, disable=not self._enabled
        )

    def on_validation_batch_end(self, *_: Any) -> None:
        self._validation.update()

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._validation.close()


def _short(k_per_layer: tuple[int, ...]) -> str:
    """[8, 6, 4, 2, 1, 1, 1, 1] -> 8 6 4 2 1..."""
    tail = len(k_per_layer)
    while tail > 1 and k_per_layer[tail - 2] == k_per_layer[-1]:
        tail -= 1
    return " ".join(map(str, k_per_layer[:tail])) + ("..." if tail < len(k_per_layer) else "")
