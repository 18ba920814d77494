"""Pool every layer's routing over a window of tokens, then record it: the data of the load plots."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from sigma_lite.balance.exact import whole
from sigma_lite.balance.metrics import ExpertLoad, rounded
from sigma_lite.balance.pooled import max_over_ranks, sum_over_ranks
from sigma_lite.model import NamedRouting, Routing, of_experts, of_others
from sigma_lite.train.callbacks.diary import Diary, completes_step


class LoadRecorder(pl.Callback):
    """After each optimizer step that completes a window, write a `load` entry and log layer 0 and dead experts.

    A change of the experts per token ends a window early: a step with K = 8 has eight times the slots of one with K = 1, so
    a window over both would show the loads of before as those of after.
    """

    def __init__(self) -> None:
        self.window: ExpertLoad | None = None  # of this rank
        self.logits_L: Tensor | None = None  # the largest absolute logit of each router in the window, on this rank
        self.others: dict[str, ExpertLoad] = {}  # windows of what is no expert, by name: "layer 0 queries"

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        if self.window is None:
            self.window = ExpertLoad(module.net.n_layers, module.net.n_experts)
        for window in (self.window, *self.others.values()):
            window.to(module.device)
        if self.logits_L is None:
            self.logits_L = torch.zeros(module.net.n_layers)
        self.logits_L = self.logits_L.to(module.device)
        if not trainer.is_global_zero:
            for window in (self.window, *self.others.values()):
                window.reset()  # a checkpoint holds the sum over ranks, which the first one goes on with

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        experts = of_experts(outputs["routings"])
        self.window.update(experts)
        for other in of_others(outputs["routings"]):
            self._window_of(other, module.device).update([other])
        if len(experts[0].ids):  # rewards have micro-batches from which nothing is learned
            self.logits_L = torch.maximum(self.logits_L, largest_logits(experts))
        if not completes_step(trainer, batch_idx):
            return
        step, k = trainer.global_step, module.k_at(trainer.global_step - 1)
        tokens = int(sum_over_ranks(self.window.tokens))  # ranks learn from unequal numbers, and must end a window together
        if tokens < module.balance.window_tokens and module.k_at(step) == k:
            return
        load, logits_L = self.window.load(), max_over_ranks(self.logits_L)
        module.log("layer0_max_deviation", load["max_deviation"][0], prog_bar=True, logger=module.told_by_lightning)
        module.log("dead_experts", load["dead"].sum(), logger=module.told_by_lightning)
        bias = {"bias": rounded(module.model.bias_LE)} if module.model.bias_LE.any() else {}
        loads = {name: window.load() for name, window in self.others.items()}
        others = {"others": {name: _first(load) for name, load in loads.items()}} if loads else {}
        for diary in trainer.callbacks:
            if isinstance(diary, Diary) and diary.record:
                facts = {name: rounded(load[name]) for name in ("f", "P", "lbl", "router_entropy")}
                facts["logit_max"] = rounded(logits_L)
                diary.write(trainer, "load", tokens=tokens, k=list(k), **facts, **bias, **others)
        for window in (self.window, *self.others.values()):
            window.reset()
        self.logits_L = torch.zeros_like(self.logits_L)

    def _window_of(self, routing: NamedRouting, device: torch.device) -> ExpertLoad:
        if routing.name not in self.others:
            self.others[routing.name] = ExpertLoad(1, routing.probs.shape[1]).to(device)
        return self.others[routing.name]

    def state_dict(self) -> dict[str, Any]:
        if self.window is None:
            return {}
        others = {"others": {name: _sums(window) for name, window in self.others.items()}} if self.others else {}
        return {"window": _sums(self.window), "logits": max_over_ranks(self.logits_L).cpu(), **others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.logits_L = state.get("logits")  # checkpoints of before had none
        self.window = _window(state["window"])
        self.others = {name: _window(sums) for name, sums in state.get("others", {}).items()}


def _sums(window: ExpertLoad) -> dict[str, Tensor]:
    """Over all ranks."""
    return {name: sum_over_ranks(getattr(window, name)).cpu() for name in window._defaults}


def _window(sums: dict[str, Tensor]) -> ExpertLoad:
    window = ExpertLoad(*sums["counts_LE"].shape)
    for name, value in sums.items():
        setattr(window, name, whole(value) if value.is_floating_point() else value)  # older: float64 sums
    window._update_count = 1  # torchmetrics warns about computing what was never updated
    return window


def _first(load: dict[str, Tensor]) -> dict[str, Any]:
    """f and P [its number] and lbl of a window over one routing."""
    return {name: rounded(load[name])[0] for name in ("f", "P", "lbl")}


@torch.no_grad()
def largest_logits(routings: list[Routing]) -> Tensor:
    """Absolute, of each router, fp32 [L]. A logit of -inf stands for an expert that a layer does not have: left out."""
    present = [r.logits.masked_fill(r.logits == -torch.inf, 0.0) for r in routings]
    ends = [torch.aminmax(logits) for logits in present]  # a norm of order infinity takes 20 times as long on a CPU
    return torch.stack([torch.maximum(end.max, -end.min) for end in ends]).float()
