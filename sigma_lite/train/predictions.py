"""RUN/predictions.safetensors: what the model made of every held-out token."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from sigma_lite.config import require
from sigma_lite.storage import atomic_write


def write_predictions(path: Path, parts: list[dict[str, Tensor]], n_rows: int) -> None:
    """One file, written by the first of the ranks: the first `n_rows` rows of all batches. The ranks must all call this.

    Args:
        parts: of each of this rank's batches, in order: {name: tensor [rows, ...]}.
        n_rows: how many there really are; on several ranks some of the last batches only keep step.

    Raises: ConfigError when a cost is no number.
    """
    parts = in_order(parts)
    bad = sum(int((~part["nats"].isfinite()).any(-1).sum()) for part in parts)
    require(
        bad == 0,
        f"{bad} of {n_rows} held-out rows cost NaN or infinity: the model's weights or logits hold such, so {path.name} is"
        " not written; use an earlier checkpoint",
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        whole = {name: torch.cat([part[name] for part in parts])[:n_rows].contiguous() for name in parts[0]}
        with atomic_write(path) as file:
            file.write(save(whole))


def in_order(parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Every rank's batches in the order of their rows: batch b of rank r of R is number b R + r (HeldoutSampler)."""
    if not dist.is_initialized():
        return parts
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, parts)
    return [part for batches in zip(*every, strict=True) for part in batches]
