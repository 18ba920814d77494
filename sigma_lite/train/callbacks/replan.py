"""Let experts compute where the loads of the last steps say: the callback behind the strategy's `replan_every`."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from sigma_lite.reading import imported
from sigma_lite.scale.placement import identity, near_home, waiting
from sigma_lite.train.callbacks.diary import note


class Replan(pl.Callback):
    """Adds up each step's counts, which are pooled over ranks, and plans from them.

    All ranks have the same counts and so the same plan; the host asks for numbers once in `every` steps. Each plan is an
    `event` of the run's record: what the fullest ranks had, and what they would have had by the plan.

    At a switch of sparsity the loads change at once. Counts of the old K are then forgotten, and the first step with the
    new one is planned from alone: it is noisier than a window, and much nearer to what comes than the window before.

    Args:
        every: optimizer steps between two plans.
    """

    def __init__(self, every: int):
        self.every, self.steps, self.ranks = every, 0, 0
        self.counts_LE: Tensor | None = None
        self.k: tuple[int, ...] | None = None  # experts per token of the counts, layer by layer
        self.experts_LP: np.ndarray | None = None  # None: where they are stored

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        fits = self.experts_LP is not None and self.experts_LP.shape == (module.net.n_layers, _spots(trainer, module))
        if not fits or self.ranks != trainer.strategy.expert_parallel:
            self.experts_LP = None  # of a run on other ranks: planned anew
        self.ranks = trainer.strategy.expert_parallel
        trainer.strategy.place(self.experts_LP)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        counts_LE = module.pooled.counts_LE
        if counts_LE is None:
            return  # the step was refused
        k = module.k_at(trainer.global_step)
        switched, self.k = self.k not in (None, k), k
        if switched:
            self.counts_LE = None
        self.counts_LE = counts_LE if self.counts_LE is None else self.counts_LE.to(counts_LE.device) + counts_LE
        self.steps += 1
        if self.steps < self.every and not switched:
            return
        self._plan(trainer, module)
        self.counts_LE, self.steps = None, 0

    def _plan(self, trainer: pl.Trainer, module: Any) -> None:
        loads_LE, R, E = self.counts_LE.double().cpu().numpy(), self.ranks, module.net.n_experts
        before = identity(loads_LE, R, E) if self.experts_LP is None else self.experts_LP
        planned = imported(trainer.strategy.planner, "planner")(loads_LE, R, _spots(trainer, module))
        self.experts_LP = near_home(np.asarray(planned), E, R)
        trainer.strategy.place(self.experts_LP)
        had, has = waiting(before, loads_LE, R), waiting(self.experts_LP, loads_LE, R)
        note(trainer, "experts placed", f"fullest ranks had {had:.3f} times an even share of rows, by the plan {has:.3f}")

    def state_dict(self) -> dict[str, Any]:
        found = {"counts": self.counts_LE, "placement": self.experts_LP}
        kept = {name: torch.as_tensor(value).cpu() for name, value in found.items() if value is not None}
        return {"steps": self.steps, "ranks": self.ranks, "k": list(self.k or ()), **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.ranks, self.counts_LE = state["steps"], state["ranks"], state.get("counts")
        self.k = tuple(state["k"]) if state.get("k") else None  # checkpoints of before have none
        self.experts_LP = state["placement"].numpy() if "placement" in state else None


def _spots(trainer: pl.Trainer, module: Any) -> int:
    return module.net.n_experts + trainer.strategy.copies * trainer.strategy.expert_parallel
