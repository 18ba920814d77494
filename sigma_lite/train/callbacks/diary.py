"""Write what happens into RUN/record.jsonl, from which the report and every figure are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from sigma_lite.balance.metrics import rounded
from sigma_lite.balance.pooled import max_over_ranks
from sigma_lite.record import Record
from sigma_lite.train.callbacks import names
from sigma_lite.train.callbacks.throughput import Throughput
from sigma_lite.train.memory import Peak


class Diary(pl.Callback):
    """One `step` entry an optimizer step, one `validation` entry a validation, and others' notes; loggers are told too.

    Args:
        facts: returns the facts of this start (command, versions, config, ...) for the `run` entry.
    """

    def __init__(self, facts: Callable[[], Mapping[str, Any]] = dict):
        self.facts = facts
        self.record: Record | None = None  # on the first rank, while it trains
        self.peak: Peak | None = None  # of memory, where somebody measures it
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.told_by_lightning = False if stage == "fit" else None  # or loggers would get the same under two names
        for logger in trainer.loggers if stage == "fit" and trainer.is_global_zero else ():
            logger.log_hyperparams(pl_module.run_settings or pl_module.settings())

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self.record = Record(Path(trainer.default_root_dir, "record.jsonl"), trainer.global_step)
            self.record.write("run", trainer.global_step, **self.facts())

    def write(self, trainer: pl.Trainer, kind: str, **facts: Any) -> None:
        """An entry of the diary at this step, and the same to loggers under their names."""
        if self.record:
            self.record.write(kind, trainer.global_step, **facts)
            names.publish(trainer, trainer.global_step, names.OF[kind](facts))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, term in {**outputs["terms"], "lbl": outputs["lbl"], **outputs.get("rewards", {})}.items():
            self._sums[name] = self._sums.get(name, 0) + term
        self._micro_batches += 1
        if not completes_step(trainer, batch_idx):
            return
        terms = torch.stack(list(self._sums.values())) / self._micro_batches
        terms = trainer.strategy.reduce(terms, reduce_op="mean")
        values = dict(zip(self._sums, terms.tolist(), strict=True))
        self._sums, self._micro_batches = {}, 0
        told = names.due(trainer, trainer.global_step)
        peak = int(max_over_ranks(torch.tensor(self.peak.bytes(), device=module.device))) if told and self.peak else 0
        if self.record:
            entry = self._step(trainer, module, values, peak)
            self.record.write("step", trainer.global_step, **entry)
            if told:
                speed = next(c for c in trainer.callbacks if isinstance(c, Throughput))
                names.publish(trainer, trainer.global_step, names.of_step(entry, speed.since_last(trainer, module)))

    def _step(self, trainer: pl.Trainer, module: Any, means: dict[str, float], peak: int) -> dict[str, Any]:
        weights = module.objective.term_weights
        terms = {name: means[name] for name in weights}
        weighted = {name: weight * terms[name] for name, weight in weights.items()}
        k = module.model.k_per_layer
        speed = next(c for c in trainer.callbacks if isinstance(c, Throughput))
        more = {"mfu": speed.mfu and round(speed.mfu, 5), "peak_memory": peak or None}
        rewards = {name: mean for name, mean in means.items() if name not in weights and name != "lbl"}
        return {
            "tokens": speed.tokens,
            "terms": terms,
            "weighted": weighted,
            "loss": sum(weighted.values()),
            "lbl": means["lbl"],
            **({"rewards": rewards} if rewards else {}),
            "lr": module.optim.lr * module.rate_factor(trainer.global_step - 1),
            "grad_norm": module.grad_norm,
            "k": list(k),
            "active_params": module.shape.ledger(k).active,
            "tokens_per_s": round(speed.tokens_per_s, 1),
            "seconds": round(speed.seconds, 2),
            "perf": {
                **{f"{kind}_seconds": round(spent, 3) for kind, spent in speed.waited.items()},
                **{name: value for name, value in more.items() if value is not None},
            },
            **_read_in(trainer),
        }

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        facts = heldout_facts(module)  # on every rank: it sums over them
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.write(trainer, "validation", **facts)


def heldout_facts(module: Any) -> dict[str, Any]:
    """bits_per_byte, nats_per_token, f and P [L][E] and lbl [L] of the validation that has just ended.

    Of a mixture also `sources`: bits_per_byte and nats_per_token of each one's held-out text.
    """
    values = {name: float(value) for name, value in module.heldout_bits.compute().items()}
    load = module.heldout_load.load()
    each = {name: {what: float(v) for what, v in bits.compute().items()} for name, bits in module.heldout_of.items()}
    return {
        **values,
        **({"sources": each} if each else {}),
        **{name: rounded(load[name]) for name in ("f", "P", "lbl")},
    }


def _read_in(trainer: pl.Trainer) -> dict[str, Any]:
    """Rows and passes of each source in the step that has just ended."""
    reads = getattr(trainer.datamodule, "read_in", None)
    return reads(trainer.global_step - 1) if reads else {}


def completes_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """True for the micro-batch after which the optimizer has stepped."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def note(trainer: pl.Trainer, what: str, why: str) -> None:
    """Add an `event` to the run's record, if it keeps one."""
    for callback in trainer.callbacks:
        if isinstance(callback, Diary) and callback.record:
            callback.record.write("event", trainer.global_step, what=what, why=why)
