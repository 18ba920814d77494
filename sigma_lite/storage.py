"""Files that are whole or absent: written beside their place, flushed to disk, then moved in one step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

RUN_LOCK = "run.lock"  # in a run's folder
REFERENCE = "reference"  # a name in place of a run's folder: the trained model that comes with this package


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


def writable(folder: str | Path) -> Path:
    """The folder, made where it was not there. Raises StorageError, with the fix, where nothing can be written into it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return Path(folder)


_held: dict[Path, int] = {}  # lock files that this process holds, and their descriptors
_no_locks: set[Path] = set()  # folders of which that was said


@contextlib.contextmanager
def exclusive(path: str | Path, *, waiting: str = "", refusal: str = "") -> Iterator[None]:
    """One process at a time inside the block. The system drops the lock when its holder ends, also by `kill -9`.

    Inside the block the same process may ask again. Raises StorageError when the lock file cannot be made.

    Args:
        path: an empty file that stays, unless its folder is made for it and nothing else comes into that.
        waiting: said once on stderr when another process is inside, which is then waited for; "": waited for in silence.
        refusal: instead of waiting, StorageError with this sentence.
    """
    path = Path(path)
    place = path.parent.resolve() / path.name
    if place in _held:
        yield
        return
    made = not path.parent.exists()
    descriptor = _held[place] = _entered(path, waiting, refusal)
    try:
        yield
    finally:
        if _held.get(place) == descriptor:  # a forked child holds nothing
            del _held[place]
            if made and os.listdir(path.parent) == [path.name]:
                with contextlib.suppress(OSError):
                    path.unlink()
                    path.parent.rmdir()
            os.close(descriptor)


def _entered(path: Path, waiting: str, refusal: str) -> int:
    """An open descriptor of the lock file at `path`, locked."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            while not _lock(descriptor, path):
                if refusal:
                    raise StorageError(refusal)
                if waiting:
                    print(f"sigma-lite: {waiting}", file=sys.stderr, flush=True)
                    waiting = ""
                time.sleep(0.1)
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one before has removed the file: this lock keeps nobody out


def _lock(descriptor: int, path: Path) -> bool:
    """Whether this process has the lock now. Where the system has no locks that is said, and nobody is kept out."""
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(descriptor, path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        _say_no_locks(path)
    return True


def _lock_on_windows(descriptor: int, path: Path) -> bool:
    try:
        import msvcrt
    except ImportError:
        _say_no_locks(path)
        return True
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True


def _say_no_locks(path: Path) -> None:
    if path.parent not in _no_locks:
        _no_locks.add(path.parent)
        print(f"sigma-lite: {path.parent} can have no locks: let one command at a time work in it", file=sys.stderr)


def _forget_locks() -> None:
    """A forked child, such as a data loader's worker, may outlive its parent: it must not hold the parent's locks."""
    for descriptor in _held.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def run_alone(run: str | Path, instead: str = "") -> contextlib.AbstractContextManager[None]:
    """The lock that every command takes that writes into a run's folder. StorageError while another one works there.

    Args:
        instead: what else a person can do than to wait.
    """
    instead = instead or "choose another trainer.default_root_dir"
    refusal = f"another command is at work in {run}: wait until it has ended, or {instead}"
    return exclusive(Path(run, RUN_LOCK), refusal=refusal)


def readable(text: str) -> str:
    """Text that can be written down: bytes of a name or an argument that this system could not read are read as UTF-8,
    or spelled out as \\xe9. The name of a file must be opened as it was, and shown like this."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair that stands for no byte
        return text.encode("utf-8", "backslashreplace").decode()


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


def model_folder(run: str | Path) -> Path:
    """The folder of a model; of the name "reference", where no such folder is here, that of the one in this package.

    Raises StorageError where this package came without it.
    """
    if Path(run) != Path(REFERENCE) or Path(run).exists():
        return Path(run)
    inside = Path(__file__).parent / REFERENCE
    if not (inside / "config.json").is_file():
        train, store = "`sigma-lite fit -c scaled_configs/reference.yaml`", "`python benchmarks/store_reference.py`"
        raise StorageError(
            f"this sigma_lite came without its model {REFERENCE!r}: {train} trains one, {store} puts it there"
        )
    return inside
