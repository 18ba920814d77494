"""Which files a path names: a file, a folder with all below it, or a glob; each file once, however many links lead to it."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sigma_lite.config import ConfigError, CorpusConfig, require
from sigma_lite.storage import readable


class Skipped(Counter):
    """How many documents were left out, by reason; and the first one of each reason, to look at."""

    def __init__(self, *args: object):
        super().__init__(*args)
        self.first: dict[str, str] = {}

    def add(self, other: Skipped) -> None:
        self.update(other)
        self.first = other.first | self.first

    def sentence(self) -> str:
        """Such as "2 duplicate (b.txt, ...), 1 not UTF-8 (c.txt)"."""
        parts = []
        for reason, number in sorted(self.items()):
            first = self.first.get(reason)
            parts.append(f"{number} {reason}" + (f" ({first}{', ...' if number > 1 else ''})" if first else ""))
        return ", ".join(parts)


def leave_out(skipped: Counter, reason: str, name: str) -> None:
    skipped[reason] += 1
    if isinstance(skipped, Skipped):
        skipped.first.setdefault(reason, name)


class Listing(NamedTuple):
    root: Path  # names of documents are paths below it
    files: list[Path]  # sorted by name
    left_out: list[tuple[str, str]]  # (reason, name) of what is no document


def listing(config: CorpusConfig) -> Listing:
    """The files of `config.path`, without hidden ones and what `prepare` wrote into `config.dir`.

    A part of the path that is there as it is written, such as "books [2024]", is that folder; only what is not there is a
    pattern. Links are followed. Raises ConfigError for a path that is not there, and for a folder that cannot be read.
    """
    path = Path(config.path)
    if path.is_file():
        return Listing(path.parent, [path], [])
    root, pattern = Path(), list(path.parts)
    while pattern and (not glob.has_magic(pattern[0]) or os.path.lexists(root / pattern[0])):
        root /= pattern.pop(0)
    search = _Search(root, Path(config.dir))
    files = sorted(search.files(pattern or ["**", "*"]), key=lambda file: file.as_posix())
    if not files and (pattern or not root.is_dir()):
        require(not search.folders, f"corpus path {path} matches only folders: write {path / '**'} for the files in them")
        raise ConfigError(f"corpus path {path} does not exist (looked from {os.getcwd()}): give a file, folder or glob")
    return Listing(root, files, sorted(search.left_out))


class _Search:
    """One walk below `root` that never enters `own`. What it meets and leaves out is kept in `left_out`."""

    def __init__(self, root: Path, own: Path):
        self.root, self.own = root, _identity(own)
        self.left_out: list[tuple[str, str]] = []
        self.folders = 0  # matched, where a file was wanted

    def files(self, pattern: Sequence[str]) -> list[Path]:
        """Each file that matches, once: by its own name where it has one here, or else by that of the first link."""
        files, seen = [], set()
        for path in sorted(set(self._matches(self.root, pattern)), key=lambda p: (p.is_symlink(), p.as_posix())):
            try:
                facts = path.stat()
            except OSError:
                self._leave_out("a broken link", path)
                continue
            again = _key(path, facts) in seen and (path.is_symlink() or facts.st_nlink > 1)
            if stat.S_ISDIR(facts.st_mode):
                self.folders += 1
            elif again or not stat.S_ISREG(facts.st_mode):
                self._leave_out("duplicate" if again else "not a file", path)
            else:
                seen.add(_key(path, facts))
                files.append(path)
        return files

    def _matches(self, folder: Path, pattern: Sequence[str]) -> Iterator[Path]:
        part, *rest = pattern
        if part == "**":
            for below in self._below(folder):
                yield from self._matches(below, rest or ["*"])
            return
        for entry in _entries(folder) if _identity(folder) != self.own else ():
            path = folder / entry.name
            if _is_hidden(entry.name) and not part.startswith("."):
                if not rest and entry.name != "__pycache__":
                    self._leave_out("hidden", path)
            elif fnmatch.fnmatchcase(entry.name, part) or fnmatch.fnmatchcase(entry.name, part.replace("[", "[[]")):
                yield from self._matches(path, rest) if rest else [path]

    def _below(self, top: Path) -> Iterator[Path]:
        """`top` and every folder below it once: links last, so that a folder in sight of its own name is called by it."""
        seen, todo, links = {self.own}, [top], []
        while todo or links:
            folder = (todo or links).pop()
            if (identity := _identity(folder)) in seen:  # a link that leads back
                continue
            seen.add(identity)
            yield folder
            for entry in reversed(_entries(folder)):
                if not _is_hidden(entry.name) and _is_folder(entry):
                    (links if entry.is_symlink() else todo).append(folder / entry.name)

    def _leave_out(self, reason: str, path: Path) -> None:
        self.left_out.append((reason, readable(path.relative_to(self.root).as_posix())))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        fix = "make it readable, or move it out of the corpus"
        raise ConfigError(f"cannot read the folder {folder} of the corpus ({error.strerror}): {fix}") from error


def _identity(path: Path) -> object:
    """The same for all names of a file or folder; None where there is none."""
    try:
        return _key(path, path.stat())
    except OSError:
        return None


def _key(path: Path, facts: os.stat_result) -> object:
    return (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(path)  # some systems number no files
