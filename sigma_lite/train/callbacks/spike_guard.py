"""Refuse a step whose gradient is not a number or far outside what is usual: one bad batch must not cost a run."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch

from sigma_lite.config import ConfigError, require
from sigma_lite.train.callbacks.diary import note

FLOOR = 0.25
"""Least deviation of the log norm that the guard assumes: norms of one run differ by such factors for harmless reasons."""


class SpikeGuard(pl.Callback):
    """Compare each step's gradient norm with the running mean and deviation of its logarithm.

    A norm within the clip limit is never refused, for it is as small as one asked for; nor is one below e^(threshold / 4) =
    7.4 times the usual, however little the norm has varied, for clipping takes care of it. A refused norm enters the
    statistics with a quarter of an ordinary one's weight: one bad batch hardly moves them, and a level that lasts is
    accepted after a few steps instead of ending the run.

    A change of the experts per token makes another model with another usual norm: the statistics begin anew there.
    The norm is the same number on all ranks, so all ranks decide alike. A skipped step leaves weights and optimizer state
    as they were, and is recorded as an event.

    Args:
        threshold: how many standard deviations above the mean are a spike; at least 3.
        patience: this many steps in a row whose norm is no number stop the run with an error: it is not one bad batch.
        memory: steps over which the statistics fade; nothing but NaN is refused in the first `memory` steps.
    """

    def __init__(self, threshold: float = 8.0, patience: int = 5, memory: int = 100):
        require(threshold >= 3, f"spike_guard.threshold={threshold}: below 3 ordinary noise is refused; try 8")
        require(patience >= 1 and memory >= 2, f"spike_guard needs patience >= 1 and memory >= 2, not {patience}, {memory}")
        self.threshold, self.patience, self.memory = threshold, patience, memory
        self.mean, self.variance, self.seen, self.skipped = 0.0, 0.0, 0, 0

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        step = trainer.global_step
        if step > 0 and module.k_at(step) != module.k_at(step - 1):
            self.seen = 0
        norm = float(module.gradient_norm())
        reason = self.judge(norm, clip=trainer.gradient_clip_val or 0.0)
        if not reason:
            self.skipped = 0
            return
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        note(trainer, "step skipped", reason)
        if self.skipped >= self.patience:
            raise ConfigError(
                f"{self.skipped} steps in a row refused at step {trainer.global_step} ({reason}): lower optim.lr, or look at"
                f" the data{_or_capacity(trainer.strategy)}; the last checkpoint is whole"
            )
        optimizer.zero_grad(set_to_none=True)  # AdamW passes over parameters without a gradient
        module.pooled.reset()  # and a balancer's bias over steps without loads

    def judge(self, norm: float, clip: float = 0.0) -> str:
        """Why this norm is refused, or "" where it is not; it enters the statistics either way, if it is a number and not 0.

        A step of rewards whose groups are all dead has no gradient at all, which says nothing of the usual norm.

        Args:
            norm: of the whole gradient before clipping.
            clip: the limit that clipping brings it down to, 0 for none.
        """
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        if norm == 0:
            return ""
        log = math.log(norm + 1e-12)
        reach = self.threshold * max(math.sqrt(self.variance), FLOOR)
        if self.seen < self.memory or log <= self.mean + reach or norm <= clip:
            self._learn(log, weight=1.0)
            return ""
        limit = max(math.exp(self.mean + reach), clip)
        self._learn(min(log, self.mean + 2 * reach), weight=0.25)
        return f"gradient norm {norm:.3g} is above {limit:.3g}"

    def _learn(self, log: float, weight: float) -> None:
        self.seen += 1
        share = weight / min(self.seen, self.memory)
        self.mean += share * (log - self.mean)
        self.variance += share * ((log - self.mean) ** 2 - self.variance)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("mean", "variance", "seen", "skipped")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _or_capacity(strategy: Any) -> str:
    """Messages of equal size make a step whose rows do not fit NaN (scale/padded.py): the fix for that; "" without them."""
    capacity = getattr(strategy, "travel", {}).get("capacity")
    if capacity is None:
        return ""
    fits = f"{strategy.expert_parallel} always fits, null pads nothing"
    return f", or rows did not fit: trainer.strategy has capacity={capacity}, which may be too small; {fits}"
