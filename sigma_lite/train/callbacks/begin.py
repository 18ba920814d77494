"""Carry out what train/start.py has found: weights, the diary and checkpoints that a run begins with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from sigma_lite.balance.balancer import moves_after_a_step
from sigma_lite.balance.bias import spread
from sigma_lite.checkpoint import Sharded, read_plain, step_of
from sigma_lite.config import require
from sigma_lite.data.tokenizer import FILE
from sigma_lite.scale.sharded_checkpoint import load_sharded
from sigma_lite.storage import atomic_write, move_into_place
from sigma_lite.train.branch import copy_diary
from sigma_lite.train.callbacks.diary import note
from sigma_lite.train.start import Start, require_tokenizer


class Begin(pl.Callback):
    """Stands before the diary's callback, which cuts the diary off behind the step that is gone on from."""

    def __init__(self) -> None:
        self.start, self._said = Start(), True

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        start = self.start
        if start.how in ("branch_from", "init_from"):
            require_tokenizer(start.checkpoint, trainer.datamodule.prepared.manifest["tokenizer"]["sha256"])
        if start.how == "init_from":
            start.parent |= take_weights(module, start.checkpoint, start.new_weights == "begin")

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Files last, when nothing can be refused any more; a kill in between leaves what the same command goes on from."""
        start, run = self.start, Path(trainer.default_root_dir)
        self._said = start.how in ("new", "resume")
        if not trainer.is_global_zero:
            return
        if start.how == "branch_from":
            copy_diary(start.checkpoint.parents[1], trainer.global_step, run)
        if start.aside:
            set_aside(run, start.aside)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if not self._said:
            self._said = True
            # Lightning's count for loggers: it would lag one behind where the parent ended with a validation of its own.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            what, why = description(self.start, trainer.max_steps)
            note(trainer, what, why + frozen_bias(self.start, module))


def frozen_bias(start: Start, module: Any) -> str:
    """The end of the event, where the parent's balancer has left a bias that this run's does not move; "" elsewhere."""
    if moves_after_a_step(module.objective.balancer) or start.how == "extend":
        return ""
    widest = float(spread(module.model.bias_LE).max())
    return f"; the routers' bias is kept, and nothing moves it: up to {widest:.3g} between experts" if widest else ""


def description(start: Start, end: int) -> tuple[str, str]:
    """What and why of the event that says where a run comes from."""
    if start.how == "extend":
        behind = f"; what lay behind is in ended-at-{step_of(start.aside[-1]):06d}" if start.aside else ""
        return "extended", f"from step {step_of(start.checkpoint)}, to {end} steps{behind}"
    parent = start.parent or {}
    where = f"step {parent['step']} of {parent['run']}"
    if start.how == "branch_from":
        changed = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in parent["changed"].items())
        return "branched", f"from {where}: {changed or 'nothing changed'}"
    kinds = {"begin anew": parent.get("new", []), "stay behind": parent.get("left", [])}
    return "weights taken", f"from {where}" + "".join(
        f"; {', '.join(names)} {what}" for what, names in kinds.items() if names
    )


def take_weights(module: Any, checkpoint: Path, new: bool) -> dict[str, list[str]]:
    """Copy a checkpoint's weights into this model, however it is laid out; names of those that begin anew or stay behind.

    Args:
        new: whether there may be such.

    Raises: ConfigError naming them where there may not.
    """
    own, there = module.state_dict(), read_plain(checkpoint)["state_dict"]
    whole = [name for name in own if not isinstance(leaf := there.get(name), Sharded) or leaf.shape == own[name].shape]
    found = load_sharded(checkpoint, {f"/state_dict/{name}": own[name] for name in whole})["state_dict"]
    fits = {name: w for name, w in found.items() if name in own and isinstance(w, Tensor) and w.shape == own[name].shape}
    named = {"new": sorted(own.keys() - fits.keys()), "left": sorted(found.keys() - fits.keys())}
    shown = {what: _shown(names, own, found) for what, names in named.items() if names}
    says = {"new": "this model has others", "left": "this model has no place for"}
    sentence = "; ".join(f"{says[what]}: {names}" for what, names in shown.items())
    require(
        new or not sentence,
        f"init_from={checkpoint}: {sentence}. Add --new_weights=begin to have those of this model begin anew",
    )
    module.load_state_dict(fits, strict=False)
    return named


def _shown(names: list[str], own: dict[str, Any], found: dict[str, Any]) -> str:
    def one(name: str) -> str:
        was, now = (list(side[name].shape) if name in side else None for side in (found, own))
        return f"{name} {was if now is None else now}" + (f", there {was}" if was and now else "")

    return ", ".join(map(one, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def set_aside(run: Path, behind: tuple[Path, ...]) -> None:
    """Move checkpoints, the oldest first, into RUN/ended-at-STEP, with a copy of the diary: a run's folder itself."""
    folder = run / f"ended-at-{step_of(behind[-1]):06d}"
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("record.jsonl", FILE):
        if (run / name).is_file() and not (folder / name).exists():
            with atomic_write(folder / name) as file, open(run / name, "rb") as source:
                shutil.copyfileobj(source, file)
    for path in behind:
        move_into_place(path, folder / "checkpoints" / path.name)
