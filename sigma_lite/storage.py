"""Files that are whole or absent: written beside their place, flushed to disk, then moved in one step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class StorageError(RuntimeError):
    """A file cannot be written, or is not what was written. The message names the file and the fix."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` only when the block ends well; until then `path` is untouched.

    A process killed inside the block leaves a `.partial` file, which the next write of the same path replaces.
    Raises StorageError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        move_into_place(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def move_into_place(partial: Path, path: Path) -> None:
    """Rename a file or folder in one step, and flush its folder: or a power cut could still bring the old names back."""
    os.replace(partial, path)
    with contextlib.suppress(OSError):  # some systems cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def cannot_write(path: str | Path, error: OSError) -> StorageError:
    """What the system said about writing `path`, with the fix."""
    path = Path(path)
    if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None)):  # Windows has no quota error
        folder = next(p for p in path.absolute().parents if p.exists())
        free = shutil.disk_usage(folder).free / 1e6
        fix = "free some space or choose another folder; nothing was changed"
        return StorageError(f"no room to write {path} ({free:.0f} MB free): {fix}")
    return StorageError(f"cannot write {path}: {error.strerror or error}; choose a folder that you may write to")


@contextlib.contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """One process at a time inside the block: a second one waits. The system drops the lock when its holder is killed.

    `path` is an empty file that stays. Raises StorageError when it cannot be made. Where there are no such locks
    (Windows, some network disks) nobody waits.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "wb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise cannot_write(path, error) from error
    with lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def readable(text: str) -> str:
    """A name or argument as text that can be encoded: bytes that this system could not read are read as UTF-8 or "�"."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def write_json(path: str | Path, content: object) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: BinaryIO) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
