"""A checkpoint that stays on disk: its tensors are mapped into memory, and single experts are copied out of it.

Nothing is read before it is asked for. Pages that the system keeps of the file are the system's: it gives them up when
somebody needs the memory, so only what is copied out counts as held.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sigma_lite.checkpoint import REST, Box, DamagedCheckpoint, Sharded, can_be_mapped, read_checkpoint, read_pieces
from sigma_lite.config import require
from sigma_lite.storage import StorageError

OWNER = "/state_dict/model."  # where a run's checkpoint keeps the weights of its Transformer


class Mapped:
    """The weights of a run's model in one checkpoint, a file or the folder of several ranks.

    Args:
        bytes_per_second: read no faster than this, to see what a slower disk or link does; None: as fast as it goes.

    Raises: StorageError for a checkpoint that is missing or damaged; checksums are not compared, which would read it all.
    """

    def __init__(self, checkpoint: str | Path, bytes_per_second: float | None = None):
        rate = bytes_per_second
        require(rate is None or rate > 0, f"bytes_per_second={rate}: must be greater than 0, or None")
        self.path, self.bytes_per_second, self._overslept = Path(checkpoint), bytes_per_second, 0.0
        self.pieces: dict[str, list[tuple[Box, Tensor]]] = {}
        if not self.path.is_dir():
            for name, tensor in _mapped(self.path).items():
                self.pieces[name] = [(((0,) * tensor.dim(), tuple(tensor.shape)), tensor)]
            return
        for file, places in read_checkpoint(self.path / REST)["files"].items():
            tensors = {"/" + name.lstrip("/"): tensor for name, tensor in _mapped(self.path / file).items()}
            for name, box in places.items():
                self.pieces.setdefault(name, []).append((box, tensors[name]))

    @torch.inference_mode()  # or slots that were made in such a block could not be written
    def copy(self, name: str, expert: int, into: Tensor) -> int:
        """Expert `expert` of the stacked weight `name`, such as "blocks.0.moe.experts.w13", into a tensor; its bytes."""
        begun = time.perf_counter()
        for (first, extent), piece in self.pieces[OWNER + name]:
            if first[0] <= expert < first[0] + extent[0]:
                into[_box(first[1:], extent[1:])].copy_(piece[expert - first[0]])
        return self._throttled(begun, into)

    @torch.inference_mode()
    def copy_all(self, name: str, into: Tensor) -> int:
        """A whole weight, as `copy` one expert of it."""
        begun = time.perf_counter()
        for box, piece in self.pieces[OWNER + name]:
            into[_box(*box)].copy_(piece)
        return self._throttled(begun, into)

    def _throttled(self, begun: float, read: Tensor) -> int:
        """Bytes of what was read, not before they would have come."""
        size = read.numel() * read.element_size()
        if self.bytes_per_second:
            due = begun - self._overslept + size / self.bytes_per_second
            time.sleep(max(0.0, due - time.perf_counter()))
            self._overslept = time.perf_counter() - due  # the next read makes up for it
        return size

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a whole weight; None where the checkpoint has none of that name."""
        boxes = [box for box, _ in self.pieces.get(OWNER + name, [])]
        return tuple(max(first[d] + n[d] for first, n in boxes) for d in range(len(boxes[0][0]))) if boxes else None

    def others(self, left_out: set[str]) -> dict[str, Tensor]:
        """Copies of all weights and buffers but those named, as a state_dict."""
        if not self.path.is_dir():
            kept = {name.removeprefix(OWNER): name for name in self.pieces if name.startswith(OWNER)}
            return {mine: self.pieces[name][0][1].clone() for mine, name in kept.items() if mine not in left_out}

        def wanted(leaf: Sharded) -> Box | None:
            mine = leaf.name.startswith(OWNER) and leaf.name.removeprefix(OWNER) not in left_out
            return ((0,) * len(leaf.shape), leaf.shape) if mine else None

        state = read_pieces(self.path, wanted)["state_dict"]
        return {name.removeprefix("model."): value for name, value in state.items() if isinstance(value, Tensor)}


def _box(first: tuple[int, ...], extent: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(i, i + n) for i, n in zip(first, extent, strict=True))


def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a file as views into its mapping."""
    if not file.is_file():
        raise StorageError(f"checkpoint {file} does not exist: give a file of RUN/checkpoints")
    if not can_be_mapped(file):
        raise StorageError(f"{file} cannot be mapped, because its name is not UTF-8: rename the folder, or load it whole")
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  a file, not a dict
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpoint(f"checkpoint {file} is cut or altered ({error}): take the one before") from error
