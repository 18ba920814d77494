"""Lightning's checkpoints in our file format: it would pickle them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from sigma_lite.checkpoint import pack, read_checkpoint, remove, write_packed


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
