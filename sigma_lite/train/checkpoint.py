"""Lightning's checkpoints in our file format: it would pickle them. Weights that are no numbers are never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch import Tensor

from sigma_lite.balance.pooled import sum_over_ranks
from sigma_lite.checkpoint import pack, read_checkpoint, remove, write_packed
from sigma_lite.config import require


class SafeCheckpointIO(CheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Callable | None = None) -> None:
        """Copy now, then write; `storage_options` is what calls the writing, such as a `Background`."""
        packed = pack(checkpoint)
        (storage_options or _now)(lambda: write_packed(path, packed))

    def load_checkpoint(self, path: _PATH, map_location: Any | None = None, **_: Any) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: _PATH) -> None:
        remove(path)


def _now(job: Callable[[], object]) -> None:
    job()


def require_finite(checkpoint: dict[str, Any], device: torch.device) -> None:
    """ConfigError naming the first weight or moment that holds NaN or infinity. Every rank calls this, and all raise alike.

    One pass over what is about to be written, and one exchange.
    """
    parts = {name: checkpoint[name] for name in ("state_dict", "optimizer_states") if name in checkpoint}
    named = [(name, tensor) for name, tensor in _tensors(parts, "") if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return
    finite = torch.stack([torch.stack(tensor.aminmax()).isfinite().all().to(device) for _, tensor in named])
    bad = [name for (name, _), fine in zip(named, finite.tolist(), strict=True) if not fine]
    everywhere = int(sum_over_ranks(torch.tensor(len(bad), device=device)))
    first = bad[0] if bad else "one of another rank"
    require(
        everywhere == 0,
        f"after step {checkpoint['global_step']} {everywhere} tensor(s) of the model and its optimizer hold NaN or infinity"
        f" ({first}), so no checkpoint is written, and the one before stays the newest: lower optim.lr, or look at the data",
    )


def _tensors(node: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a tree with their paths; of sharded ones (DTensor) what lies on this rank."""
    if isinstance(node, Tensor):
        yield where, node.to_local() if hasattr(node, "to_local") else node
    elif isinstance(node, (dict, list, tuple)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _tensors(child, f"{where}/{key}" if where else str(key))
