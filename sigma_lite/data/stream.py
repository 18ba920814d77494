"""Token files as one long array, read without loading them; and the check that they are what was written."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np

from sigma_lite.storage import StorageError, atomic_write, sha256_of

ALWAYS_HASHED = 64_000_000  # bytes; a smaller file is hashed at every start, which costs a fraction of a second


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Two bytes a token while they suffice."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_array(path: Path, parts: Iterable[np.ndarray]) -> dict:
    """Write arrays one after the other as raw little-endian numbers; return {"file", "bytes", "sha256"}."""
    return _write(path, (part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes() for part in parts))


def write_lines(path: Path, rows: Iterable[dict]) -> dict:
    """Write one JSON object a line; return {"file", "bytes", "sha256"}."""
    return _write(path, (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def _write(path: Path, parts: Iterable[bytes]) -> dict:
    digest, size = hashlib.sha256(), 0
    with atomic_write(path) as file:
        for data in parts:
            file.write(data)
            digest.update(data)
            size += len(data)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def check_file(folder: Path, entry: dict, full: bool = False) -> None:
    """Compare a file with its entry {"file", "bytes", "sha256"}: the size always, the hash if small or `full`.

    Raises StorageError naming the file and the fix.
    """
    path, again = folder / entry["file"], "run `sigma-lite prepare` to build it again"
    if not path.is_file():
        raise StorageError(f"{path} is missing: {again}")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise StorageError(f"{path} has {size} bytes, {entry['bytes']} were written: delete it and {again}")
    if (full or size < ALWAYS_HASHED) and sha256_of(path) != entry["sha256"]:
        raise StorageError(f"{path} was altered after it was written (its sha256 differs): delete it and {again}")


NO_DOMAIN = -1  # the number of "none", and of a row in which two domains meet


class Domains:
    """Who owns the tokens of a stream: stretches (domain or None, tokens), one after the other.

    Args:
        names: of all domains of the corpus; a domain's number is its place here.
    """

    def __init__(self, names: Sequence[str], stretches: Iterable[tuple[str | None, int]]):
        self.names = tuple(names)
        number = {None: NO_DOMAIN, **{name: i for i, name in enumerate(self.names)}}
        runs = [(number[name], sum(n for _, n in group)) for name, group in groupby(stretches, key=lambda s: s[0])]
        self.ids_R = np.array([*(i for i, _ in runs), NO_DOMAIN], np.int64)  # what follows the last token has none
        self.ends_R = np.array([*np.cumsum([n for _, n in runs]), np.iinfo(np.int64).max], np.int64)

    def of(self, first_N: np.ndarray, last_N: np.ndarray) -> np.ndarray:
        """Number of the domain that owns all of tokens first..last, int64 [N]; NO_DOMAIN where two stretches meet."""
        run_N = np.searchsorted(self.ends_R, first_N, side="right")
        return np.where(last_N < self.ends_R[run_N], self.ids_R[run_N], NO_DOMAIN)

    def tokens(self) -> dict[str, int]:
        """Tokens of each domain, by name; those of none are left out."""
        sizes_R = np.diff(self.ends_R[:-1], prepend=0)
        return {name: int(sizes_R[self.ids_R[:-1] == i].sum()) for i, name in enumerate(self.names)}


class TokenStream:
    """Several files of token ids and of token kinds, read as one array each. Files are opened when first read.

    `domains` says where each domain lies; None when that was not recorded. `end_of_text` is the id that begins a document.
    """

    def __init__(
        self,
        ids: Sequence[Path],
        kinds: Sequence[Path],
        lengths: Sequence[int],
        dtype: np.dtype | type,
        domains: Domains | None = None,
        end_of_text: int = 0,
    ):
        self.domains, self.end_of_text = domains, end_of_text
        self.ids, self.kinds, self.dtype = list(ids), list(kinds), np.dtype(dtype).newbyteorder("<")
        self.ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, kinds uint8) of tokens start..stop-1, cut at the end of the stream."""
        stop = min(stop, len(self))
        ids, kinds = [np.empty(0, self.dtype)], [np.empty(0, np.uint8)]
        while start < stop:
            part = bisect_right(self.ends, start)
            first = self.ends[part - 1] if part else 0
            end = min(stop, self.ends[part])
            ids.append(self._maps[part][0][start - first : end - first])
            kinds.append(self._maps[part][1][start - first : end - first])
            start = end
        return np.concatenate(ids), np.concatenate(kinds)

    @cached_property
    def _maps(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(_map(i, self.dtype), _map(k, np.dtype(np.uint8))) for i, k in zip(self.ids, self.kinds, strict=True)]

    def __getstate__(self) -> dict:  # a worker process opens the files itself: a copied map would hold all tokens
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # an empty file cannot be mapped
