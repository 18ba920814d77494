"""The standard library's programs and the Python of installed packages: chosen by name, deduplicated, listed with licences.

A package's documents are its modules and the page that describes it. What is left out, and why:

tests                folders tests and test_*, files test_*, *_test.py and conftest.py; not counted
duplicate            the same text as a document before
generated            it says in its first 1,000 characters that a program wrote it: plotly's graph_objs, and the modelings
                     that transformers writes out of its modular ones
numbers              more than 15 % of its characters are digits
near-duplicate       over half of its telling lines, by characters, stand in documents before it: forks, copied classes
over package_bytes   the rest of a package that has more; a hash of the name decides which

What is left is held out or trained on by families (data/families.py). A module of the standard library keeps the key that it
has in `programs`: what is held out there is held out here, unless its family has grown.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from sigma_lite.data import library
from sigma_lite.data.families import families, telling_lines

STANDARD = "python"  # what the standard library is called among packages
BEGINNING = 1000  # characters
GENERATED = re.compile(
    r"\b(auto|automatically|machine)[ -]?generated|\bdo(n't| not) edit"
    r"|^\W*(this file (is|was) )?generated (by|from|using)\b",
    re.IGNORECASE | re.MULTILINE,
)
DIGITS, KNOWN = 0.15, 0.5
_TESTS = re.compile(r"(^|/)(tests?|test_[^/]*)/|(^|/)(test_[^/]*|[^/]*_test|conftest)\.py$")


class Source(NamedTuple):
    name: str  # its package first: "numpy/numpy/ma/core.py", "python/json/decoder.py", "numpy/README.md"
    key: str  # its family
    path: Path


class Chosen(NamedTuple):
    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...]  # (reason, name)


@cache  # `prepare` reads documents twice
def chosen(packages: tuple[str, ...], most: int | None) -> Chosen:
    """The documents of the standard library and of packages, in this order.

    Args:
        packages: names of distributions. One that is not installed is left out, with a warning.
        most: bytes of text of one package; the standard library is taken whole. None: every package is.
    """
    missing = [name for name in packages if not _files(name)]
    if missing:
        fix = "install them in the versions of constraints.txt for the same one (the manifest lists versions and hashes)"
        warnings.warn(f"not installed, so this is another corpus: {', '.join(missing)}; {fix}", stacklevel=2)
    sieve, texts, sources, left_out = _Sieve(), {}, [], [("package not installed", name) for name in missing]
    for candidates, limit in [(_library(), None), *((_files(name), most) for name in packages)]:
        own, size = [], 0
        for name, key, path in candidates:
            text = read(path)
            reason = "over package_bytes" if limit and size >= limit else sieve.refuses(text)
            if reason:
                left_out.append((reason, name))
            else:
                own.append(Source(name, key, path))
                texts[key], size = text, size + len(text.encode())
        sources += sorted(own)
    family = families({source.key: texts[source.key] for source in sources})
    return Chosen(tuple(source._replace(key=family[source.key]) for source in sources), tuple(left_out))


class _Sieve:
    """What has been read: it tells the reason why a text is not wanted, or "" and remembers it."""

    def __init__(self):
        self.texts: set[bytes] = set()
        self.lines: set[str] = set()

    def refuses(self, text: str) -> str:
        digest, telling = hashlib.sha256(text.encode()).digest(), telling_lines(text)
        known = sum(len(line) for line in telling & self.lines)
        if digest in self.texts or not text.strip():
            return "duplicate" if text.strip() else "empty"
        if GENERATED.search(text[:BEGINNING]):
            return "generated"
        if sum(map(text.count, "0123456789")) > DIGITS * len(text):
            return "numbers"
        if known > KNOWN * sum(map(len, telling)):
            return "near-duplicate"
        self.texts.add(digest)
        self.lines |= telling
        return ""


# ------------------------------------------------------------------------------------------------------------- files


def _library() -> list[tuple[str, str, Path]]:
    """(name, key, path) of the programs, and of the reference that `help()` shows."""
    modules = {path.relative_to(library.root()).as_posix(): path for path in library.paths()}
    found = [(f"{STANDARD}/{name}", name, path) for name, path in modules.items() if library.is_program(name)]
    reference = modules.get(library.REFERENCE)
    return found + [(f"{STANDARD}/reference.txt", library.REFERENCE, reference)] * (reference is not None)


def _files(package: str) -> list[tuple[str, str, Path]]:
    """(name, key, path) of a package's modules and of the file with its page, by a hash; [] for one that is not there."""
    try:
        found = metadata.distribution(package).files or ()
    except metadata.PackageNotFoundError:
        return []
    named = {}
    for file in found:
        if file.name == "METADATA" and file.parent.name.endswith(".dist-info"):
            named[f"{package}/README.md"] = Path(file.locate())
        elif file.suffix == ".py" and ".." not in file.parts and not _TESTS.search(file.as_posix()):
            named[f"{package}/{file.as_posix()}"] = Path(file.locate())
    there = [(name, name, path) for name, path in named.items() if path.is_file()]
    return sorted(there, key=lambda item: hashlib.blake2b(item[0].encode()).digest())


def read(path: Path) -> str:
    """The text of a module; of METADATA the page below its head; of the library's reference the pages it holds."""
    text = path.read_bytes().decode("utf-8", "replace")
    if path.name == "METADATA":
        return text.partition("\n\n")[2]
    if path.as_posix().endswith(library.REFERENCE):
        return "\n".join(ast.literal_eval(ast.parse(text).body[-1].value).values())
    return text


# ------------------------------------------------------------------------------------------------------------ record


def listed(packages: Iterable[str], documents: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each package: version, licence, and its documents' number, bytes and hash; {} for one that is not installed.

    Args:
        documents: facts of all documents of the corpus, see `Prepared.documents`.
    """
    found = {STANDARD: {"version": platform.python_version(), "licence": "PSF-2.0"}}
    found |= {name: _about(name) for name in packages}
    for facts in documents:
        own = found[facts["name"].partition("/")[0]]
        own["documents"], own["bytes"] = own.get("documents", 0) + 1, own.get("bytes", 0) + facts["bytes"]
        own["sha256"] = hashlib.sha256(f"{own.get('sha256', '')}{facts['name']}\0{facts['sha256']}".encode()).hexdigest()
    return found


def _about(package: str) -> dict[str, str]:
    try:
        about = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return {}
    classes = [name.split(" :: ")[-1] for name in about.get_all("Classifier") or () if name.startswith("License ::")]
    said = (
        about.get("License-Expression") or " / ".join(classes) or next(iter((about.get("License") or "").splitlines()), "")
    )
    return {"version": about["Version"], "licence": said or "unknown"}


def differences(was: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """In words, which packages of a corpus are missing here, or have another text."""
    for name in {**was, **now}:
        old, new = was.get(name, {}), now.get(name, {})
        if old.get("sha256") != new.get("sha256"):
            yield f"{name} {new.get('version', 'is missing')} (was {old.get('version', 'missing')})"
