"""One line that says how far, how well and how long still."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from sigma_lite.train.callbacks.diary import completes_step

SHOWN = {
    "lm": "loss",
    "reward": "reward",
    "balance": "balance",  # of a loss of your own; the LBL is measured whatever is trained
    "lbl": "LBL",
    "layer0_max_deviation": "layer 0 max",
    "heldout_bits_per_byte": "held-out b/B",
}


class StepProgress(ProgressBar):
    """A tqdm bar over optimizer steps; where nobody watches (no terminal), a line every `log_every` seconds instead."""

    def __init__(self, log_every: float = 20.0):
        super().__init__()
        self.log_every = log_every
        self._bar: tqdm | None = None  # over steps
        self._inner: tqdm | None = None  # over held-out batches
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        watched = sys.stderr.isatty()
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            file=sys.stderr if watched else _Lines(),
            mininterval=0.2 if watched else self.log_every,
            dynamic_ncols=watched,
            disable=not self._enabled,
            smoothing=0.05,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if completes_step(trainer, batch_idx):
            values = trainer.progress_bar_metrics
            facts = {text: f"{float(values[name]):.3f}" for name, text in SHOWN.items() if name in values}
            self._bar.set_postfix({**facts, "K": _short(module.model.k_per_layer)}, refresh=False)
            self._bar.update()

    def on_train_end(self, *_: Any) -> None:
        self._bar.close()

    def on_exception(self, *_: Any) -> None:
        for bar in (self._inner, self._bar):
            if bar is not None:
                bar.close()

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._open(sum(trainer.num_val_batches))

    def on_test_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._open(sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._open(sum(trainer.num_predict_batches))

    def _open(self, batches: int) -> None:
        """A bar that goes away again; in a file it would only break up the other lines."""
        show = self._enabled and sys.stderr.isatty()
        self._inner = tqdm(total=batches, desc="held-out", unit="batch", leave=False, disable=not show, dynamic_ncols=True)

    def on_validation_batch_end(self, *_: Any) -> None:
        self._inner.update()

    def on_validation_end(self, *_: Any) -> None:
        self._inner.close()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end


class _Lines:
    """A stream for tqdm that keeps each state of the bar as a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def _short(k_per_layer: tuple[int, ...]) -> str:
    """[8, 6, 4, 2, 1, 1, 1, 1] -> 8 6 4 2 1..."""
    tail = len(k_per_layer)
    while tail > 1 and k_per_layer[tail - 2] == k_per_layer[-1]:
        tail -= 1
    return " ".join(map(str, k_per_layer[:tail])) + ("..." if tail < len(k_per_layer) else "")
