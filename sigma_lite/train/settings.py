"""When a checkpoint is of the same run. What settings may be at all is in runfile.py and lightning_keys.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sigma_lite.balance.balancer import same_balancer
from sigma_lite.checkpoint import read_settings
from sigma_lite.config import require
from sigma_lite.runfile import SECTIONS


def require_same_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """ConfigError naming the first setting in which a checkpoint differs from this config.

    Places of files may differ; and rows.per_micro, which another device needs another of, unless the balance loss is one
    of each micro-batch: a step has the same rows.
    """
    saved, now = _flat(completed(read_settings(checkpoint))), _flat(json.loads(json.dumps(settings)))
    if same_balancer(saved.get("custom_balance"), now.get("custom_balance")):
        saved["custom_balance"] = now.get("custom_balance")
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
