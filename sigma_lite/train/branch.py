"""Go on from another run's step with other settings: what of its checkpoint and of its diary a branch takes over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sigma_lite import record
from sigma_lite.checkpoint import checkpoint_path, newest_checkpoint, read_checkpoint, write_checkpoint
from sigma_lite.config import OptimConfig, SparsityConfig, require
from sigma_lite.runfile import from_mapping
from sigma_lite.storage import atomic_write
from sigma_lite.train.optim import parameter_groups
from sigma_lite.train.settings import flat, is_place

if TYPE_CHECKING:
    from sigma_lite.train.module import SigmaLit


class Branch:
    """How a checkpoint of step `step` is read by a run with other settings. The file stays as it is.

    Weights, moments, counters and loads are taken over; rates, decay and betas are those of this run. The routers' bias is
    part of the weights: without it tokens would go to other experts at once. So it is kept, also where nothing moves it any
    more, as at the end of DeepSeek-V3's training (2412.19437); an event says so. What else balanced the experts, such as a
    momentum, is begun anew where another kind does. Rows are those that this run's data gives to its step; with a mixture
    each source goes on behind what the parent had read of the same text.

    Args:
        saved: settings of the run that wrote it, completed.
        now: this run's.
    """

    def __init__(self, step: int, saved: Mapping[str, Any], now: Mapping[str, Any]):
        self.step, self.optim = step, from_mapping(OptimConfig, saved["optim"], "optim")
        self.changed = {name: [was, new] for name, (was, new) in _pairs(flat(saved), flat(now)).items() if was != new}
        rows = {name for name in self.changed if name.startswith(("corpus.", "rows.", "mixture."))}
        self.other_rows = any(not (name == "rows.per_micro" or is_place(name)) for name in rows)
        self.other_balance = bool({"balance.loss", "balance.bias"} & self.changed.keys())
        self.other_balance |= saved.get("custom_balance") != now.get("custom_balance")

    def adapt_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take out what is not to be restored, before anything is."""
        for schedule in checkpoint["lr_schedulers"]:
            for name in ("base_lrs", "_last_lr"):
                schedule.pop(name, None)
        # The end of a shorter run is not the end of this one: Lightning would count a second epoch.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        if self.other_rows:
            checkpoint["TokenDataModule"]["branched"] = True
        if self.other_balance:
            checkpoint["balancer"] = {}

    def adapt_optimizer(self, optimizer: torch.optim.Optimizer, module: SigmaLit) -> None:
        """Have this optimizer read a state as written under the settings before: moments by name, options of its own."""

        def reads(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups = optimizer.state_dict()["param_groups"]
            for group in groups:
                group["lr"] = group["initial_lr"] * module.rate_factor(self.step)
            was, now = (names_in_order(module.model, optim) for optim in (self.optim, module.optim))
            state = {now.index(was[place]): entries for place, entries in state_dict["state"].items()}
            return {**state_dict, "state": dict(sorted(state.items())), "param_groups": groups}

        optimizer.register_load_state_dict_pre_hook(reads)


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    plain = json.loads(json.dumps([one, other]))  # tuples are lists in what was saved
    return {name: tuple(side.get(name) for side in plain) for name in sorted(one.keys() | other.keys())}


def names_in_order(model: torch.nn.Module, optim: OptimConfig) -> list[str]:
    """Names of all parameters in the order in which the optimizer counts them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in parameter_groups(model, optim) for parameter in group["params"]]


def copy_diary(parent: Path, step: int, run: Path) -> None:
    """The parent's diary up to a step as the beginning of this run's, so that its curves are whole."""
    before = [e for e in record.read(parent / "record.jsonl") if e["step"] <= step and e["kind"] != "sample"]
    with atomic_write(run / "record.jsonl") as file:
        file.writelines(record.line(entry) for entry in before)


def branch(parent: str | Path, step: int, run: str | Path, sparsity: SparsityConfig) -> None:
    """Copy a checkpoint and the diary up to it into RUN, for a run that differs in its sparsity schedule only.

    `fit` then continues it, and refuses it should anything else differ. A run that has begun is left alone.

    Raises: ConfigError when the parent keeps no checkpoint of that step.
    """
    parent, run = Path(parent), Path(run)
    if newest_checkpoint(run) is not None:
        return
    source = checkpoint_path(parent, step)
    require(source.exists(), f"{source} does not exist: train {parent} with save.milestones=[{step}]")
    checkpoint = read_checkpoint(source)
    settings = json.loads(checkpoint["settings"])
    settings["sparsity"] = dataclasses.asdict(sparsity)
    checkpoint["settings"] = json.dumps(settings)
    copy_diary(parent, step, run)
    write_checkpoint(checkpoint_path(run, step), checkpoint)
