"""A clock that never stands still while a run trains: each moment belongs to a step, or to what steps wait for."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl

from sigma_lite.scale.traffic import flops_per_token

WAITING = ("data", "saving", "validation", "recording")
"""What steps wait for. recording: callbacks after a step, the diary and loggers among them; data: the next rows."""


class Throughput(pl.Callback):
    """`tokens` trained on over all ranks, `seconds` spent in training steps, and `tokens_per_s` of the last step.

    `waited` are the seconds spent otherwise, by kind; with `seconds` they add up to all the time since the first batch was
    asked for. All are summed over restarts. It comes before the others that do their work after a step.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds, self.tokens_per_s = 0, 0.0, 0.0
        self.waited = dict.fromkeys(WAITING, 0.0)
        self.flops, self.peak_flops = 0.0, None  # the model's, since this start; and of one device in a second
        self.mfu: float | None = None  # of the last step
        self.steps = 0  # since this start
        self._lap: float | None = None  # nothing is timed without training
        self._before = 0, 0.0, 0.0  # tokens, seconds and FLOPs at the start of this step
        self._taken = self._sums()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:  # a run that goes on is told no start of its epoch
        self.flops, self.steps, self._lap = 0.0, 0, time.perf_counter()
        self._taken = self._sums()

    def lap(self, kind: str) -> None:
        """The time since the last lap was of this kind."""
        if self._lap is None:
            return
        now = time.perf_counter()
        if kind == "step":
            self.seconds += now - self._lap
        else:
            self.waited[kind] += now - self._lap
        self._lap = now

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.lap("data")
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._before = self.tokens, self.seconds, self.flops

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.lap("step")
        tokens = outputs["tokens"] * trainer.world_size
        self.tokens += tokens
        if self.peak_flops:
            self.flops += tokens * flops_per_token(module.net, module.model.k_per_layer, batch.ids_BS.shape[1]).training
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.tokens, self.steps = round(self.tokens), self.steps + 1  # a mean over micro-batches need not be whole
        tokens, seconds, flops = self._before
        self.tokens_per_s = (self.tokens - tokens) / (self.seconds - seconds)
        self.mfu = self._share_of_peak(trainer, module, self.flops - flops, self.seconds - seconds)

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.lap("recording")

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.lap("validation")

    def since_last(self, trainer: pl.Trainer, module: Any) -> dict[str, float]:
        """Means over the steps since this was last asked; a start forgets when that was."""
        now, before = self._sums(), self._taken
        tokens, steps, seconds, flops, *waited = (a - b for a, b in zip(now, before, strict=True))
        self._taken = now
        mfu = self._share_of_peak(trainer, module, flops, seconds)
        return {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_overall": tokens / (seconds + sum(waited)),
            "step_seconds": seconds / steps,
            **{f"{kind}_seconds": spent / steps for kind, spent in zip(WAITING, waited, strict=True)},
            **({} if mfu is None else {"mfu": mfu}),
        }

    def _sums(self) -> tuple[float, ...]:
        return self.tokens, self.steps, self.seconds, self.flops, *(self.waited[kind] for kind in WAITING)

    def _share_of_peak(self, trainer: pl.Trainer, module: Any, flops: float, seconds: float) -> float | None:
        """MFU; None where a device's peak is not known, or a part of the reader's own does work that nobody has counted."""
        if not self.peak_flops or module.parts.custom:
            return None
        return flops / (seconds * trainer.world_size * self.peak_flops)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds, "waited": dict(self.waited)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.waited |= state.get("waited", {})  # checkpoints of before had none


def lap(trainer: pl.Trainer, kind: str) -> None:
    """Tell the run's clock, if it has one, what the time since the last lap was spent on."""
    for callback in trainer.callbacks:
        if isinstance(callback, Throughput):
            callback.lap(kind)
