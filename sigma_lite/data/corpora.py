"""Where text comes from: this Python's own standard library (its programs, all of it, or by domain), installed packages,
files, or Hugging Face datasets.

Every source gives its documents in an order that does not change, so that an interrupted `prepare` can continue.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sigma_lite.config import ConfigError, CorpusConfig, require
from sigma_lite.data import conversations, library, packages
from sigma_lite.data.chat import Turn
from sigma_lite.data.families import families
from sigma_lite.data.listing import leave_out, listing
from sigma_lite.data.tables import Column, NoRows, count_rows, reader, table_rows, text_of
from sigma_lite.data.unpack import open_unpacked, optional
from sigma_lite.storage import readable

BEGINNING = 1 << 16  # bytes in which a file that is no text shows a zero

Place = dict[str, Any]
"""Behind which document an interrupted reading goes on; whoever reads keeps it up to date. Plain values, but for `done`.

documents  how many were given so far
file       the last whole file of the listing that was read; undecodable: hashes of those that are no UTF-8
table      which table was being read, and its `row` and `byte`: see tables.Place
dataset    of `hf`: what datasets calls its state, or the function that tells it; row: the number of the last row
done       on the way in only: a function that lists (name, sha256) of the documents before
"""


class Document(NamedTuple):
    name: str  # path below the source's root, or file and row
    text: str
    key: str  # what the held-out split hashes: a file's name; a row's text, because row numbers shift
    turns: tuple[Turn, ...] = ()  # of a conversation, whose `text` is all that is said in it


def domain_of(config: CorpusConfig, name: str) -> str | None:
    """A document's domain: the first folder of its name. None for a file in no folder, and for sources without domains."""
    folder, slash, _ = name.partition("/")
    return folder if slash and config.source in ("domains", "files", "packages") else None


def interpreter() -> str:
    """The Python whose library is the corpus, such as 'CPython 3.11.7': published numbers must name it."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def is_heldout(document: Document, share: float) -> bool:
    """Whether a document is kept for validation: a property of the document alone, whatever else is in the corpus."""
    return split_position(document) < share


def split_position(document: Document) -> float:
    """The document's fixed place in [0, 1); those below `heldout` are held out.

    Any hash would do; with this one the library's largest file, 6 % of it and the only English prose
    (pydoc_data/topics.py), is trained on and does not fill half of the held-out text.
    """
    return int.from_bytes(hashlib.blake2b(document.key.encode()).digest()[:8], "big") / 2**64


def documents(config: CorpusConfig, skipped: Counter | None = None) -> Iterator[Document]:
    """All documents with text, part after part, always in the same order; `skipped` counts those left out, by reason.

    Raises ConfigError for a path that does not exist, a missing column, bad JSON, or a part without a document.
    """
    skipped = Counter() if skipped is None else skipped
    return itertools.chain.from_iterable(documents_of_part(config, part, skipped) for part in range(config.parts))


def documents_of_part(config: CorpusConfig, part: int, skipped: Counter, at: Place | None = None) -> Iterator[Document]:
    """Those of one of the `config.parts` slices, which share no document and no table file.

    Args:
        at: behind which document to begin; see Place. What was read before it is not read again.
    """
    at = {} if at is None else at
    sources = {"programs": _programs, "stdlib": _stdlib, "domains": _domains, "files": _files, "hf": _hugging_face}
    sources |= {"packages": _packages, "tasks": _tasks, "chat": _chat}
    count = at.get("documents", 0)
    source = sources[config.source](config, skipped, part, at)
    most = config.max_documents and config.max_documents // config.parts + (part < config.max_documents % config.parts)
    for document in itertools.islice((d for d in source if _usable(d, skipped)), most and most - count):
        at["documents"] = count = count + 1
        yield document
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items())) or "it is empty"
    where = config.path or config.dataset or ", ".join(config.tasks) or "the standard library"
    whose = f"part {part} of {config.parts} of the corpus {where}" if config.parts > 1 else f"the corpus {where}"
    fewer = "; set parts to a smaller number" if config.parts > 1 else ""
    require(count > 0, f"{whose} holds no document with text ({reasons}){fewer}")


def seen_so_far(config: CorpusConfig, part: int, at: Place) -> str | None:
    """What the files that were read up to `at` look like from outside (name, size, time of change), in one word.

    None where one cannot begin in the middle: what is made of this Python's library is made as a whole, and a part of
    whole files is found among all of them. A dataset of the hub tells nothing of this kind: "".
    """
    if config.source == "hf":
        return "" if "dataset" in at else None
    if config.source != "files" or not {"file", "table"} & at.keys():
        return None
    root, whole, tables = _listed(config, part)[:3]
    read = [*whole, *tables[: at["table"] + 1]] if "table" in at else whole[: at["file"] + 1]
    facts = ((_name(path, root), path.stat()) for path in read if path.exists())
    lines = (f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for name, stat in facts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _usable(document: Document, skipped: Counter) -> bool:
    if not document.text:
        leave_out(skipped, "empty", document.name)
        return False
    try:
        document.text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which is no text
        leave_out(skipped, "not UTF-8", document.name)
        return False
    return True


def expected(config: CorpusConfig) -> int | None:
    """About how many documents will come (for a progress bar), or None when only reading would tell."""
    if config.source in ("hf", "domains", "tasks"):
        return config.max_documents
    if config.source == "packages":
        return len(packages.chosen(config.packages, config.package_bytes).sources)
    library_files = config.source in ("stdlib", "programs")
    counts = [count_rows(path) for path in (library.paths() if library_files else listing(config).files)]
    rows = None if None in counts else sum(counts)
    return rows and min(rows, config.max_documents or rows)


# ------------------------------------------------------------------------------------------------- standard library


def _dealt(documents: Callable[[Counter], Iterator[Document]], config: CorpusConfig, skipped: Counter, part: int):
    """Every `parts`-th document of a source that each part must read as a whole; what it leaves out is counted once."""
    return itertools.islice(documents(Counter() if part else skipped), part, None, config.parts)


def _stdlib(config: CorpusConfig, skipped: Counter, part: int, at: Place) -> Iterator[Document]:
    return _dealt(_library, config, skipped, part)


def _programs(config: CorpusConfig, skipped: Counter, part: int, at: Place) -> Iterator[Document]:
    """The library's programs. Those that share much of their text are held out or trained on together (data/families.py)."""

    def all_programs(skipped: Counter) -> Iterator[Document]:
        modules = {module.name: module.text for module in _library(skipped) if module.text}
        programs = library.programs(modules)
        skipped["no program"] += len(modules) - len(programs)
        family = families(programs)
        yield from (Document(name, text, key=family[name]) for name, text in programs.items())

    return _dealt(all_programs, config, skipped, part)


def _packages(config: CorpusConfig, skipped: Counter, part: int, at: Place) -> Iterator[Document]:
    """The library's programs and those of the packages that `packages` names (data/packages.py)."""

    def all_packages(skipped: Counter) -> Iterator[Document]:
        found = packages.chosen(config.packages, config.package_bytes)
        for reason, name in found.left_out:
            leave_out(skipped, reason, name)
        yield from (Document(own.name, packages.read(own.path), own.key) for own in found.sources)

    return _dealt(all_packages, config, skipped, part)


def _library(skipped: Counter) -> Iterator[Document]:
    root, paths = library.root(), library.paths()
    require(bool(paths), f"this Python keeps no .py files in {root}: use corpus source 'files' with a path")
    return _whole_files(root, paths, skipped, {})


def _domains(config: CorpusConfig, skipped: Counter, part: int, at: Place) -> Iterator[Document]:
    """Domain after domain, so that few rows hold two; `max_documents` is shared out evenly among them."""

    def all_domains(skipped: Counter) -> Iterator[Document]:
        made = library.domains({module.name: module.text for module in _library(skipped)})
        share = config.max_documents and -(-config.max_documents // len(made))
        seen = {""}
        for documents in made.values():
            yield from itertools.islice(_new(documents, seen, skipped), share)

    return _dealt(all_domains, config, skipped, part)


def _new(documents: Iterator[tuple[str, str, str]], seen: set[str], skipped: Counter) -> Iterator[Document]:
    """Texts not seen before: two modules may say nothing but the same licence."""
    for name, text, key in documents:
        if text in seen:
            leave_out(skipped, "duplicate" if text else "empty", name)
        else:
            seen.add(text)
            yield Document(name, text, key)


def _whole_files(root: Path, paths: list[Path], skipped: Counter, at: Place) -> Iterator[Document]:
    """One document a file; the same text a second time is left out, or it could be trained on and held out at once."""
    done = at.pop("done", tuple)
    seen: set[str] = {*(sha256 for _, sha256 in done()), *at.get("undecodable", ())}
    for number, path in itertools.islice(enumerate(paths), at.get("file", -1) + 1, None):
        at["file"] = number
        name, content = _name(path, root), _read(path)
        digest = hashlib.sha256(content).hexdigest()
        if b"\0" in content:
            leave_out(skipped, "binary", name)
        elif content and digest in seen:
            leave_out(skipped, "duplicate", name)
        else:
            seen.add(digest)
            try:
                yield Document(name, content.decode(), key=name)
            except UnicodeDecodeError:
                at.setdefault("undecodable", []).append(digest)
                leave_out(skipped, "not UTF-8", name)


def _name(path: Path, root: Path) -> str:
    return readable(path.relative_to(root).as_posix())


def _read(path: Path) -> bytes:
    """All of a file; of one that begins like no text, such as an archive, only the beginning."""
    try:
        with open_unpacked(path) as file:
            beginning = file.read(BEGINNING)
            return beginning if b"\0" in beginning else beginning + file.read()
    except OSError as error:
        fix = "make it readable, copy it again, or move it out of the corpus"
        raise ConfigError(f"cannot read {path} of the corpus ({error.strerror or error}): {fix}") from error


# ------------------------------------------------------------------------------------------------------------- files


def _files(config: CorpusConfig, skipped: Counter, part: int, at: Place) -> Iterator[Document]:
    """Whole files are dealt out one by one, so that copies are found in all parts; tables by file: nobody reads all."""
    root, whole, tables, left_out = _listed(config, part)
    for reason, name in left_out if part == 0 and not at.get("documents") else ():
        leave_out(skipped, reason, name)
    if "table" not in at:
        own = at if config.parts == 1 else {}  # of dealt files nobody can tell which were read
        yield from _dealt(lambda skipped: _whole_files(root, whole, skipped, own), config, skipped, part)
    for index in range(at.get("table", 0), len(tables)):
        name = _name(tables[index], root)
        if index != at.get("table"):
            at["table"], at["row"] = index, 0
            at.pop("byte", None)
        try:
            for number, text in table_rows(tables[index], Column.of(config), at):
                yield Document(f"{name}:{number}", text, key=text)
        except NoRows as reason:
            leave_out(skipped, str(reason), name)


def _listed(config: CorpusConfig, part: int) -> tuple[Path, list[Path], list[Path], list[tuple[str, str]]]:
    """(root, all whole files, this part's tables, what is no document)."""
    root, files, left_out = listing(config)
    whole, tables = ([f for f in files if (reader(f) is not None) == table] for table in (False, True))
    return root, whole, tables[part :: config.parts], left_out


# ------------------------------------------------------------------------------------------------------ conversations


def _tasks(config: CorpusConfig, skipped: Counter, part: int, at: Place) -> Iterator[Document]:
    """Problems with their answers. A problem is on the side of the split on which `eval` has it."""
    return _dealt(lambda skipped: _talks(conversations.of_tasks(config), skipped), config, skipped, part)


def _chat(config: CorpusConfig, skipped: Counter, part: int, at: Place) -> Iterator[Document]:
    """Lines of messages. What the user says decides the side of the split, whatever the answer is."""
    root, files, left_out = listing(config)

    def all_lines(skipped: Counter) -> Iterator[Document]:
        for reason, name in left_out:
            leave_out(skipped, reason, name)
        return _talks(conversations.of_files(config, root, files, skipped), skipped)

    return _dealt(all_lines, config, skipped, part)


def _talks(found: Iterator[conversations.Talk], skipped: Counter) -> Iterator[Document]:
    """Each conversation once."""
    seen = set()
    for name, turns, key in found:
        if turns in seen:
            leave_out(skipped, "duplicate", name)
            continue
        seen.add(turns)
        yield Document(name, "".join(t.said + t.thought + t.answer for t in turns), key, turns)


# ------------------------------------------------------------------------------------------------------ Hugging Face


def _hugging_face(config: CorpusConfig, skipped: Counter, part: int, at: Place) -> Iterator[Document]:
    """The rows of this part's share of the dataset's files."""
    datasets = optional("datasets", "corpus source 'hf'", "datasets")
    try:
        rows = datasets.load_dataset(config.dataset, config.subset, split=config.split, streaming=True)
    except Exception as error:  # a wrong name, split or subset, or no network: each has a class of its own
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"dataset {config.dataset!r} (split {config.split!r}) cannot be opened: {reason}") from error
    require(
        config.parts <= rows.num_shards,
        f"parts={config.parts}: dataset {config.dataset!r} has {rows.num_shards} file(s); set parts to that or less",
    )
    name = f"{config.dataset}:{part}" if config.parts > 1 else config.dataset
    own = rows.shard(config.parts, part)
    if "dataset" in at:
        own.load_state_dict(at["dataset"])
    at["dataset"] = own.state_dict  # asked when the place is written down: it would take longer than the row
    for number, row in enumerate(_watched(own, config.dataset), start=at.get("row", 0) + 1):
        at["row"] = number
        text = text_of(row, Column.of(config), f"{name} row {number}")
        yield Document(f"{name}:{number}", text, key=text)


def _watched(rows, name: str) -> Iterator[dict]:
    try:
        yield from rows
    except Exception as error:  # a lost connection has as many classes as there are file systems
        raise ConfigError(f"dataset {name!r} broke off ({error}): run `sigma-lite prepare` again to continue") from error
