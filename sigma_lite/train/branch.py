"""Begin a run from a step of another one: how the report converts a checkpoint to its target sparsity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from sigma_lite import record
from sigma_lite.checkpoint import checkpoint_path, newest_checkpoint, read_checkpoint, write_checkpoint
from sigma_lite.config import SparsityConfig, require
from sigma_lite.storage import atomic_write


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
    before = [e for e in record.read(parent / "record.jsonl") if e["step"] <= step and e["kind"] != "sample"]
    with atomic_write(run / "record.jsonl") as file:
        file.writelines(record.line(entry) for entry in before)
    write_checkpoint(checkpoint_path(run, step), checkpoint)
