"""Checkpoints of many ranks: each writes the pieces that it holds, and any number of ranks may read them.

    step=000100.safetensors/
        rest.safetensors             everything that is not sharded, and which file holds which box of which tensor
        rank-0003-0001.safetensors   the pieces of rank 3, at most PART bytes a file

All files are of the format of sigma_lite/checkpoint.py: no pickle, a checksum in each. The folder is made under another
name and moved into place when it is whole, so a rank that is killed while it writes leaves the checkpoint before as the
newest. A reader asks for the box of each tensor that it needs, so the layout of the ranks that wrote does not matter.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from sigma_lite.checkpoint import (
    REST,
    SUFFIX,
    Box,
    Packed,
    Sharded,
    checkpoints,
    pack,
    read_checkpoint,
    read_pieces,
    remove,
    step_of,
    write_packed,
)
from sigma_lite.scale.shard import as_sharded_like
from sigma_lite.storage import StorageError, cannot_write, move_into_place

PART = 2 << 30  # bytes: a rank needs this much host memory besides, three times over, while it saves


def save_sharded(
    path: str | Path,
    checkpoint: Mapping[str, Any],
    in_background: Callable[[Callable[[], None]], None] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write nested dictionaries and lists with DTensors in them. Every rank calls this, on a disk that all ranks see.

    What is not a DTensor is written by the first rank. Raises StorageError, on all ranks, when one of them cannot write.

    Args:
        in_background: calls the writing later, such as a `Background`. Everything is copied first: as much host memory as a
            rank's weights and moments take.
        group: all ranks, on the CPU; with `in_background`, one that nothing else uses.
    """
    path, rank = Path(path), dist.get_rank()
    partial = path.with_name(path.name + ".partial")
    tensors: dict[str, DTensor] = {}
    tree = _without_shards(checkpoint, "", tensors)
    pieces: Iterable[Piece] = _pieces(rank, tensors)
    if in_background:
        pieces = list(pieces)

    def write() -> None:
        _together(lambda: _clear(partial) if rank == 0 else None, group)
        files: dict[str, Any] = {}
        for written in _together(lambda: _write(partial, pieces), group):
            files |= written
        _together(lambda: _finish(partial, path, {"tree": tree, "files": files}) if rank == 0 else None, group)

    in_background(write) if in_background else write()


def load_sharded(path: str | Path, like: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checkpoint, of one file or of many, with the tensors named in `like` laid out as those are.

    Sharded tensors that `like` does not name stay `Sharded`, and can be filled in later: see `as_laid_out`.
    """
    path = Path(path)
    if path.is_dir():
        tree = read_pieces(path, lambda leaf: box_of(like[leaf.name]) if leaf.name in like else None)
    else:
        tree = read_checkpoint(path)
    return as_laid_out(tree, "", like)


def whole_for_all(path: Path, group: dist.ProcessGroup | None = None) -> Path:
    """This folder, or the newest checkpoint before it of which all files are as they were written. All ranks call this.

    Each rank reads its share of the files. Raises StorageError, on all ranks, when none is whole.
    """
    while True:
        try:
            _together(lambda folder=path: _read_share(folder), group)
            return path
        except StorageError:
            before = [older for older in checkpoints(path.parents[1]) if step_of(older) < step_of(path)]
            if not before:
                raise
            if dist.get_rank() == 0:
                print(
                    f"sigma-lite: {path} is cut or altered, so {before[-1].name}, the one before, is taken", file=sys.stderr
                )
            path = before[-1]


def _read_share(path: Path) -> None:
    if not path.is_dir():
        read_checkpoint(path)
        return
    files = sorted(read_checkpoint(path / REST)["files"])
    for file in files[dist.get_rank() :: dist.get_world_size()]:
        read_checkpoint(path / file)


def as_laid_out(node: Any, where: str, like: Mapping[str, Tensor]) -> Any:
    """A tree whose tensors at the paths in `like`, whole or pieces, become DTensors as those are."""
    if isinstance(node, Tensor) and isinstance(like.get(where), DTensor):
        template, node = like[where], node.to(like[where].device)
        if node.shape != template.to_local().shape:
            return as_sharded_like(template, node)
        mesh, placements = template.device_mesh, template.placements
        return DTensor.from_local(node, mesh, placements, shape=template.shape, stride=template.stride())
    if isinstance(node, dict):
        return {key: as_laid_out(child, f"{where}/{key}", like) for key, child in node.items()}
    if isinstance(node, (list, tuple)) and not isinstance(node, Sharded):
        return type(node)(as_laid_out(child, f"{where}/{i}", like) for i, child in enumerate(node))
    return node


def box_of(tensor: Tensor) -> Box:
    """Which part of the whole tensor lies on this rank. Each dimension is cut at most once, as torch.chunk would."""
    first, extent = [0] * tensor.dim(), tuple(tensor.shape)
    if isinstance(tensor, DTensor):
        extent = tuple(tensor.to_local().shape)
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                size, ranks = tensor.shape[placement.dim], tensor.device_mesh.size(axis)
                piece = -(-size // ranks)
                first[placement.dim] = min(piece * tensor.device_mesh.get_local_rank(axis), size)
    return tuple(first), extent


# ------------------------------------------------------------------------------------------------------------ saving


def _without_shards(node: Any, where: str, tensors: dict[str, DTensor]) -> Any:
    """A copy with a `Sharded` in the place of each DTensor, which is put into `tensors` under its path."""
    if isinstance(node, DTensor):
        tensors[where] = node
        return Sharded(where, tuple(node.shape), str(node.dtype).removeprefix("torch."))
    if isinstance(node, Tensor):
        return node.detach().cpu().clone()
    if isinstance(node, dict):
        return {key: _without_shards(child, f"{where}/{key}", tensors) for key, child in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_without_shards(child, f"{where}/{i}", tensors) for i, child in enumerate(node))
    return node


class Piece(NamedTuple):
    file: str
    boxes: dict[str, Box]
    packed: Packed


def _pieces(rank: int, tensors: dict[str, DTensor]) -> Iterator[Piece]:
    """This rank's files, each copied when it is asked for."""
    for part, names in enumerate(_parts(tensors)):
        boxes = {name: box_of(tensors[name]) for name in names}
        yield Piece(f"rank-{rank:04d}-{part:04d}{SUFFIX}", boxes, pack({name: tensors[name].to_local() for name in names}))


def _write(folder: Path, pieces: Iterable[Piece]) -> dict[str, dict[str, Box]]:
    """Write this rank's files; returns the boxes in each."""
    files = {}
    for piece in pieces:
        write_packed(folder / piece.file, piece.packed)
        files[piece.file] = piece.boxes
    return files


def _parts(tensors: dict[str, DTensor]) -> Iterator[list[str]]:
    names, size = [], 0
    for name, tensor in tensors.items():
        local = tensor.to_local()
        if names and size + local.nbytes > PART:
            yield names
            names, size = [], 0
        names, size = [*names, name], size + local.nbytes
    yield names


def _clear(partial: Path) -> None:
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a kill may have left
        partial.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(partial, error) from error


def _finish(partial: Path, path: Path, rest: dict[str, Any]) -> None:
    write_packed(partial / REST, pack(rest))
    try:
        remove(path)
        move_into_place(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def _together(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """What `work` returns on every rank, once all have done it; raises StorageError on all when it did on one."""
    try:
        mine = (work(), None)
    except StorageError as error:
        mine = (None, str(error))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine, group)
    for _, error in every:
        if error:
            raise StorageError(error)
    return [found for found, _ in every]
