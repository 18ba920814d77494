"""Checkpoints that cannot run code: one safetensors file, tensors as tensors and everything else as JSON in its header.

A pickle can execute anything when it is opened, and a training run opens files that others made. The file is written
whole or not at all, and carries a checksum of its tensors, so a cut or altered file is refused with its name.

Several ranks write a folder instead, of the same name and of such files: `rest` with all that is not sharded, and files
with pieces of tensors. A reader may cut the tensors another way: see scale/sharded_checkpoint.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from sigma_lite.storage import StorageError, atomic_write

SUFFIX = ".safetensors"
REST = f"rest{SUFFIX}"  # in the folder of a sharded checkpoint
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(first index, extent) along each dimension: a piece of a tensor."""


class DamagedCheckpoint(StorageError):
    """A checkpoint that is not what was written."""


class Sharded(NamedTuple):
    """In a checkpoint's tree: a tensor of which other files hold the pieces."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # such as "float32"


class Packed(NamedTuple):
    """A checkpoint as it will be written: a copy, so training may go on with the original."""

    tree: str
    tensors: dict[str, Tensor]


def pack(checkpoint: dict[str, Any]) -> Packed:
    """Copy nested dictionaries, lists and tuples of tensors and plain values; anything else is a TypeError."""
    tensors: dict[str, Tensor] = {}
    return Packed(json.dumps(_pack(checkpoint, "", tensors)), tensors)


def write_packed(path: str | Path, packed: Packed) -> None:
    tree, tensors = packed
    with atomic_write(path) as file:
        file.write(save(tensors, {"tree": tree, "sha256": _digest(tensors, tree)}))


def write_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    write_packed(path, pack(checkpoint))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `write_checkpoint` was given, or all ranks together, on the CPU; tensors in one piece.

    Raises StorageError for a missing, cut or altered file.
    """
    path = Path(path)
    if path.is_dir():
        return read_pieces(path, lambda leaf: ((0,) * len(leaf.shape), leaf.shape))
    header = _header(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read checkpoint {path}: {error.strerror}") from error
    try:
        tensors = load(content)
    except Exception as error:  # safetensors raises a type of its own for anything malformed
        raise _damaged(path) from error
    if _digest(tensors, header["tree"]) != header["sha256"]:
        raise _damaged(path)
    return _tree(path, header, tensors)


def read_pieces(folder: Path, wanted: Callable[[Sharded], Box | None]) -> dict[str, Any]:
    """A sharded checkpoint with one box of each sharded tensor; where `wanted` says None, its `Sharded` stays.

    Opens only the files that hold something of these boxes. Raises StorageError when one is missing, cut or altered.
    """
    rest = read_checkpoint(folder / REST)
    boxes = {leaf.name: wanted(leaf) for leaf in leaves(rest["tree"])}
    dtypes = {leaf.name: getattr(torch, leaf.dtype) for leaf in leaves(rest["tree"])}
    targets = {name: torch.empty(box[1], dtype=dtypes[name]) for name, box in boxes.items() if box}
    missing = {name: target.numel() for name, target in targets.items()}
    for file, places in rest["files"].items():
        overlaps = {name: _overlap(places[name], boxes[name]) for name in places.keys() & targets.keys()}
        overlaps = {name: both for name, both in overlaps.items() if both}
        pieces = read_checkpoint(folder / file) if overlaps else {}
        for name, (from_piece, into_box) in overlaps.items():
            targets[name][into_box] = pieces[name][from_piece]
            missing[name] -= targets[name][into_box].numel()
    if any(missing.values()):
        raise _damaged(folder)
    return fill(rest["tree"], targets)


def _overlap(piece: Box, box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The common part, as indices into the piece and into the box; None where there is none."""
    (p, p_extent), (b, b_extent) = piece, box
    first = tuple(map(max, p, b))
    last = tuple(min(i + n, j + m) for i, n, j, m in zip(p, p_extent, b, b_extent, strict=True))
    if any(i >= j for i, j in zip(first, last, strict=True)):
        return None
    return tuple(tuple(slice(i - o, j - o) for i, j, o in zip(first, last, origin, strict=True)) for origin in (p, b))


def leaves(node: Any) -> Iterator[Sharded]:
    """All tensors of a tree that lie in pieces."""
    if isinstance(node, Sharded):
        yield node
    elif isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            yield from leaves(child)


def fill(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree with tensors, by name, in the place of `Sharded` leaves."""
    if isinstance(node, Sharded):
        return tensors.get(node.name, node)
    if isinstance(node, dict):
        return {key: fill(child, tensors) for key, child in node.items()}
    return type(node)(fill(child, tensors) for child in node) if isinstance(node, (list, tuple)) else node


def read_plain(path: str | Path) -> dict[str, Any]:
    """A checkpoint without its tensors: plain values, and in the place of each tensor its name, or a `Sharded`."""
    path = Path(path)
    file = path / REST if path.is_dir() else path
    checkpoint = _tree(file, _header(file), {})
    try:
        return checkpoint["tree"] if path.is_dir() else checkpoint
    except (KeyError, TypeError) as error:
        raise _damaged(path) from error


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint: net, sparsity, balance, optim, corpus, rows, trainer."""
    try:
        return json.loads(read_plain(path)["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(Path(path)) from error


def digest_of(path: str | Path) -> str:
    """The checksum that a checkpoint carries: of its tensors, or of its list of them, and of everything else."""
    path = Path(path)
    return _header(path / REST if path.is_dir() else path)["sha256"]


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The checkpoint with the highest step in RUN/checkpoints, or None."""
    return max(checkpoints(run_dir), key=step_of, default=None)


def newest_whole(run_dir: str | Path, say: Callable[[str], object] | None = None, last: int | None = None) -> Path | None:
    """The newest checkpoint that is as it was written, None where a run has none at all; newer ones are named.

    A file is read and its checksum compared. Of a folder, the files' sizes are: it is read by all ranks together.
    Raises DamagedCheckpoint when there are some, and none is whole.

    Args:
        say: takes the sentence about damaged ones; default: standard error.
        last: of the checkpoints up to this step; default: of all.
    """
    damaged: list[tuple[Path, DamagedCheckpoint]] = []
    for path in reversed([path for path in checkpoints(run_dir) if last is None or step_of(path) <= last]):
        try:
            check_whole(path)
        except DamagedCheckpoint as error:
            damaged.append((path, error))
            continue
        if damaged:
            names = " and ".join(str(newer) for newer, _ in damaged)
            (say or _say)(f"{names}: cut or altered, so {path.name}, the one before, is taken")
        return path
    if damaged:
        raise damaged[0][1]
    return None


def _say(sentence: str) -> None:
    print(f"sigma-lite: {sentence}", file=sys.stderr, flush=True)


def check_whole(path: Path) -> None:
    """Raises DamagedCheckpoint for one that is not as it was written, as far as `newest_whole` says."""
    if path.is_dir() and not (path / REST).is_file():
        raise _damaged(path)
    read_settings(path)
    if not path.is_dir():
        _check_digest(path)
        return
    for file in read_checkpoint(path / REST)["files"]:
        if not (path / file).is_file() or (path / file).stat().st_size != _expected_size(path / file):
            raise _damaged(path)


def _check_digest(path: Path) -> None:
    """As `read_checkpoint` does, but of the mapped file: a model may be larger than the memory."""
    if not can_be_mapped(path):
        read_checkpoint(path)
        return
    header = _header(path)
    try:
        with safe_open(path, "pt") as file:
            digest = _digest({name: file.get_tensor(name) for name in file.keys()}, header["tree"])  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error
    if digest != header["sha256"]:
        raise _damaged(path)


def can_be_mapped(path: Path) -> bool:
    """Whether safetensors can open a file by this name: it takes UTF-8 only."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _expected_size(path: Path) -> int:
    """Bytes that a safetensors file must have: length of the header, header, tensors."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error


def checkpoints(run_dir: str | Path) -> list[Path]:
    """All checkpoints of a run, the oldest first."""
    found = Path(run_dir, "checkpoints").glob(f"step=*{SUFFIX}")
    return sorted((path for path in found if path.name[5 : -len(SUFFIX)].isdigit()), key=step_of)


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir, "checkpoints", f"step={step:06d}{SUFFIX}")


def remove(path: str | Path) -> None:
    """Delete a checkpoint, if there is one."""
    path = Path(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def step_of(path: Path) -> int:
    return int(path.name.removesuffix(SUFFIX).removeprefix("step="))


def _header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors."""
    if not path.is_file():
        raise StorageError(f"checkpoint {path} does not exist: give a file of RUN/checkpoints, or leave the option out")
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            metadata = json.loads(file.read(min(length, 100_000_000)))["__metadata__"]
        return {"tree": str(metadata["tree"]), "sha256": metadata["sha256"]}
    except OSError as error:
        raise StorageError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error


def _tree(path: Path, header: dict[str, str], tensors: dict[str, Tensor]) -> Any:
    try:
        return _unpack(json.loads(header["tree"]), tensors)
    except (ValueError, TypeError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"checkpoint {path} is cut or altered: delete it, and the run continues from the one before")


def _digest(tensors: dict[str, Tensor], tree: str) -> str:
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _pack(node: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON, with tagged lists for what JSON lacks: tensors, tuples, and dictionaries whose keys are not text."""
    if isinstance(node, Sharded):
        return {"sharded": list(node)}
    if isinstance(node, Tensor):
        if where in tensors:
            raise TypeError(f"two checkpoint entries are called {where}: a key holds / or is a number beside its text")
        tensors[where] = node.detach().cpu().contiguous().clone()  # clone: tied weights must not share storage
        return {"tensor": where}
    if isinstance(node, dict):
        return {"dict": [[_pack(k, where, tensors), _pack(v, f"{where}/{k}", tensors)] for k, v in node.items()]}
    if isinstance(node, (list, tuple)):
        tag = "tuple" if isinstance(node, tuple) else "list"
        return {tag: [_pack(v, f"{where}/{i}", tensors) for i, v in enumerate(node)]}
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"checkpoint entry {where} is a {type(node).__name__}: only tensors and plain values can be saved")


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((tag, value),) = node.items()
    if tag == "tensor":
        return tensors.get(value, value)
    if tag == "sharded":
        name, shape, dtype = value
        return Sharded(name, tuple(shape), dtype)
    if tag == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in value}
    return (tuple if tag == "tuple" else list)(_unpack(v, tensors) for v in value)
