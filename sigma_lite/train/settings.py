"""What a run's settings must be before any work starts, and when a checkpoint is of the same run."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from sigma_lite.balance.balancer import same_balancer
from sigma_lite.checkpoint import read_settings
from sigma_lite.config import nearest, plain_path, require
from sigma_lite.runfile import SECTIONS, load_run, overrides, read_yaml
from sigma_lite.train.callbacks.save import Save
from sigma_lite.train.callbacks.spike_guard import SpikeGuard

FIXED = {  # keys of Lightning's trainer that would break a run into other steps, and where their meaning has its place here
    "accumulate_grad_batches": "it is data.rows.per_step / (per_micro * ranks)",
    "check_val_every_n_epoch": "set val_check_interval, in optimizer steps",
    "limit_train_batches": "set max_steps",
    "overfit_batches": "set max_steps, and prepare a smaller corpus",
    "fast_dev_run": "set max_steps=1",
    "use_distributed_sampler": "the data module gives every rank its own rows",
}


def check(files: list[str], args: list[str]) -> None:
    """ConfigError for what cannot work, with the nearest key: jsonargparse would only say that one is not expected."""
    over = overrides(args)
    load_run(files, over)
    for part in (*map(read_yaml, files), over):
        for section, cls in {"trainer": pl.Trainer, "save": Save, "spike_guard": SpikeGuard}.items():
            given, names = part.get(section) or {}, inspect.signature(cls).parameters
            require(isinstance(given, Mapping), f"{section} must be a group of keys, not {given!r}")
            for key in given:
                require(key in names, f"unknown key {section}.{key}; {nearest(key, names)}")
        trainer = part.get("trainer") or {}
        for key in trainer:
            require(key not in FIXED, f"trainer.{key}={trainer[key]} cannot be chosen: leave it out; {FIXED.get(key)}")
        interval = trainer.get("val_check_interval")
        whole = interval is None or (type(interval) is int and interval > 0)
        require(whole, f"trainer.val_check_interval={interval}: give a whole number of optimizer steps, at least 1")


def require_same_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """ConfigError naming the first setting in which a checkpoint differs from this config.

    Places of files may differ; and rows.per_micro, which another device needs another of, unless the balance loss is one
    of each micro-batch: a step has the same rows.
    """
    saved, now = _flat(completed(read_settings(checkpoint))), _flat(json.loads(json.dumps(settings)))
    if same_balancer(saved.get("custom_balance"), now.get("custom_balance")):
        saved["custom_balance"] = now.get("custom_balance")
    if saved.get("corpus.path") is not None:
        saved["corpus.path"] = plain_path(saved["corpus.path"], "corpus.path")  # ~ was once written down as it stood
    free = {"corpus.dir"} if _of_a_micro_batch(settings) else {"corpus.dir", "rows.per_micro"}
    for name in sorted((saved.keys() | now.keys()) - free):
        require(
            saved.get(name) == now.get(name),
            f"{checkpoint.parents[1]} holds a run with {name}={saved.get(name)}, this config says {now.get(name)}: choose"
            " another trainer.default_root_dir, or delete that folder to start again",
        )


def _of_a_micro_batch(settings: Mapping[str, Any]) -> bool:
    """Whether the balance loss depends on which rows are forwarded together; of a reader's own loss, nobody knows."""
    return settings["custom_balance"] is not None or settings["balance"]["loss"] in ("micro", "top1")


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings younger than the checkpoint at their defaults, which always mean what was before them."""
    classes = {name: cls for part in SECTIONS.values() for name, cls in part.items()}
    defaults = {name: json.loads(json.dumps(dataclasses.asdict(cls()))) for name, cls in classes.items()}
    return {name: {**defaults[name], **part} if name in defaults else part for name, part in saved.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"net": {"d_model": 128}} -> {"net.d_model": 128}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
