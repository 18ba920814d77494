"""Lightning's checkpoints in our file format: it would pickle them."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from sigma_lite.checkpoint import read_checkpoint, remove, write_checkpoint


class SafeCheckpointIO(CheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        write_checkpoint(path, checkpoint)

    def load_checkpoint(self, path: _PATH, map_location: Any | None = None, **_: Any) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: _PATH) -> None:
        remove(path)
