"""What a run's settings must be before any work starts, and when a checkpoint is of the same run."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sigma_lite.checkpoint import read_settings
from sigma_lite.config import require
from sigma_lite.identity import difference, doubt
from sigma_lite.runfile import SECTIONS, overrides
from sigma_lite.train import rules

ANOTHER_RUN = ": choose another trainer.default_root_dir, or delete that folder to start again"


def check(files: list[str], args: list[str]) -> None:
    """ConfigError for what cannot work, with the nearest key: jsonargparse would only say that one is not expected."""
    rules.check(files, overrides(args), to_the_end=args[:1] == ["fit"])


def require_same_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """ConfigError naming the first setting in which a checkpoint differs from this config.

    Places of files may differ; and rows.per_micro, which another device needs another of, unless the balance loss is one
    of each micro-batch: a step has the same rows.
    """
    saved, now = completed(read_settings(checkpoint)), json.loads(json.dumps(settings))
    own, own_now = (part.pop("custom_balance", None) for part in (saved, now))
    differs = difference(own, own_now)
    require(not differs, f"{checkpoint.parents[1]} holds a run with {differs}{ANOTHER_RUN}")
    if unsure := doubt(own, own_now):
        warnings.warn(f"{checkpoint.parents[1]}: {unsure}", stacklevel=2)
    saved, now = _flat(saved), _flat(now)
    free = {"corpus.dir"} if _of_a_micro_batch(settings) else {"corpus.dir", "rows.per_micro"}
    for name in sorted((saved.keys() | now.keys()) - free):
        differs = f"{name}={saved.get(name)}, this config says {now.get(name)}"
        require(saved.get(name) == now.get(name), f"{checkpoint.parents[1]} holds a run with {differs}{ANOTHER_RUN}")


def _of_a_micro_batch(settings: Mapping[str, Any]) -> bool:
    """Whether the balance loss depends on which rows are forwarded together; of a reader's own loss, nobody knows."""
    return settings["custom_balance"] is not None or settings["balance"]["loss"] in ("micro", "top1")


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the settings that did not exist yet when the checkpoint was written: their defaults mean the old behaviour."""
    classes = {name: cls for part in SECTIONS.values() for name, cls in part.items()}
    defaults = {name: json.loads(json.dumps(dataclasses.asdict(cls()))) for name, cls in classes.items()}
    return {name: {**defaults[name], **part} if name in defaults else part for name, part in saved.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"net": {"d_model": 128}} -> {"net.d_model": 128}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
