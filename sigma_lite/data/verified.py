"""Checksums of token files too large to be hashed at every start: compared once, and that is written down.

RUN after RUN reads the same shards, so DATA/verified.json keeps which of them were found whole: sha256, size and time of
change. A file that was written since is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from sigma_lite.data.shards import Prepared, entries
from sigma_lite.data.stream import ALWAYS_HASHED
from sigma_lite.storage import StorageError, write_json

RECORD = "verified.json"


def unverified(prepared: Prepared) -> list[dict]:
    """Entries {"file", "bytes", "sha256"} of the large files of which nobody has written down that they are whole."""
    seen = _record(prepared.dir)
    large = [entry for entry in entries(prepared.manifest) if entry["bytes"] >= ALWAYS_HASHED]
    return [entry for entry in large if seen.get(entry["file"]) != _mark(prepared.dir, entry)]


def verify(folder: Path, files: list[dict], stopped: Callable[[], bool] = lambda: False) -> None:
    """Hash files one after the other and write down each that is whole; ends at once when `stopped` says so.

    Raises StorageError naming the first file that is not what was written. A folder that cannot be written keeps no
    record, and is read again at the next start.
    """
    for entry in files:
        mark = _mark(folder, entry)
        found = _sha256(folder / entry["file"], stopped)
        if found is None:
            return
        if found != entry["sha256"]:
            raise StorageError(
                f"{folder / entry['file']} was altered after it was written (its sha256 differs): delete it and run"
                " `sigma-lite prepare` to build it again; this run has read it, so begin it anew"
            )
        with contextlib.suppress(StorageError):
            write_json(folder / RECORD, _record(folder) | {entry["file"]: mark})


def _record(folder: Path) -> dict:
    try:
        found = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _mark(folder: Path, entry: dict) -> list:
    status = (folder / entry["file"]).stat()
    return [entry["sha256"], status.st_size, status.st_mtime_ns]


def _sha256(path: Path, stopped: Callable[[], bool]) -> str | None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            if stopped():
                return None
            digest.update(chunk)
    return digest.hexdigest()
