"""The library of the running Python: its modules, and documents of four domains made of them without a download.

code      modules without docstrings, comments and empty lines
prose     the docstrings and comments of every module, and the language reference that `help()` shows
bytecode  the instructions of the modules that are not in `code`: a program is there in one form only
tables    Unicode's characters, what each byte stands for in each code page, HTML's entities; a row a line

With CPython 3.11 each has 1.1 to 1.5 million training tokens (vocabulary 2048). A document is named for its domain:
"prose/asyncio/tasks.txt".
"""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import os
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from html.entities import html5
from pathlib import Path
from types import CodeType

import numpy as np

from sigma_lite.data.kinds import COMMENT, DOCSTRING, WHITESPACE, byte_kinds

BYTECODE_SHARE = 0.25  # of modules: instructions are longer than the text they come from, so both domains weigh the same
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
REFERENCE = "pydoc_data/topics.py"  # a dict of texts


def root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def paths() -> list[Path]:
    """Modules without tests (not every distribution ships them) or descriptions of the machine that built Python."""
    found = []
    for folder, subfolders, names in os.walk(root()):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY and not name.startswith("test_")]
        modules = [name for name in names if name.endswith(".py") and not name.startswith(("test_", "_sysconfigdata"))]
        found += [Path(folder, name) for name in modules]
    return sorted(found, key=lambda path: path.relative_to(root()).as_posix())


# ----------------------------------------------------------------------------------------------------------- domains


def domains(modules: Mapping[str, str]) -> dict[str, Iterator[tuple[str, str, str]]]:
    """(name, text, key) of the documents of each domain; `modules` are the library's texts by path below its root.

    The key is the module's path in every domain, so that all that comes from one module is held out or trained on
    together: docstrings name the functions of the code, and a model that saw one would know half of the other.
    """
    own = programs(modules)
    return {
        "code": (_document("code", name, ".py", code_and_prose(own[name])[0]) for name in _share(own, 0)),
        "prose": _prose(own, modules.get(REFERENCE)),
        "bytecode": (_document("bytecode", name, ".txt", bytecode(own[name])) for name in _share(own, 1)),
        "tables": _tables(modules),
    }


def programs(modules: Mapping[str, str]) -> dict[str, str]:
    """The modules that somebody wrote as a program: without generated tables, and without the reference that is a text."""
    return {name: text for name, text in modules.items() if is_program(name)}


def is_program(module: str) -> bool:
    return not _is_table(module) and module != REFERENCE


def _document(domain: str, module: str, suffix: str, text: str) -> tuple[str, str, str]:
    """The suffix says whether kinds.py may read the text as Python."""
    return f"{domain}/{module.removesuffix('.py')}{suffix}", text, module


def _is_table(module: str) -> bool:
    return module.startswith("encodings/") or module == "html/entities.py"


def _share(programs: Mapping[str, str], as_bytecode: bool) -> list[str]:
    """The modules of `code`, or those of `bytecode`: by a hash of the name, not the one that holds documents out."""

    def place(name: str) -> float:
        return int.from_bytes(hashlib.blake2b(f"bytecode/{name}".encode()).digest()[:8], "big") / 2**64

    return [name for name in programs if (place(name) < BYTECODE_SHARE) == as_bytecode]


def _prose(programs: Mapping[str, str], reference: str | None) -> Iterator[tuple[str, str, str]]:
    for name, text in programs.items():
        yield _document("prose", name, ".txt", code_and_prose(text)[1])
    if reference is not None:
        topics = ast.literal_eval(ast.parse(reference).body[-1].value)
        yield _document("prose", REFERENCE, ".txt", "\n".join(topics.values()))


# ---------------------------------------------------------------------------------------------------- code and prose


@cache  # `prepare` reads documents twice, and two domains ask: 20 MB for the whole library
def code_and_prose(text: str) -> tuple[str, str]:
    """A module's program, and what it says in docstrings and comments; "" where there is none.

    Lines of the program that hold nothing else are dropped with them, and no line ends in a space.
    """
    data = text.encode()
    bytes_N, kinds_N = np.frombuffer(data, np.uint8), byte_kinds("module.py", text)
    said_N = np.isin(kinds_N, (DOCSTRING, COMMENT))
    ends_N = bytes_N == ord("\n")
    line_N = np.cumsum(ends_N) - ends_N
    lines_with_code = np.bincount(line_N, weights=~said_N & (kinds_N != WHITESPACE)) > 0
    program = bytes_N[lines_with_code[line_N] & ~said_N].tobytes().decode()
    code = "\n".join(line.rstrip() for line in program.split("\n"))
    return code, "\n\n".join(filter(None, map(_plain, _paragraphs(data, np.where(said_N, kinds_N, 0)))))


def _paragraphs(data: bytes, kinds_N: np.ndarray) -> list[str]:
    """Each docstring, and each block of comments: those with a line's end and indentation between them are one."""
    edges = [0, *(np.flatnonzero(np.diff(kinds_N)) + 1).tolist(), len(data)]
    paragraphs, comment_end = [], None
    for start, end in zip(edges, edges[1:], strict=False):
        words = data[start:end].decode() if kinds_N[start : start + 1].any() else ""
        if words.startswith("#") and kinds_N[start] == COMMENT:
            between = data[comment_end:start] if comment_end is not None else b"x"
            if between.strip() or between.count(b"\n") != 1:
                paragraphs.append(words)
            else:
                paragraphs[-1] += "\n" + words
            comment_end = end
        elif words:
            paragraphs.append(words)
            comment_end = None
    return paragraphs


def _plain(paragraph: str) -> str:
    """The words of a docstring or of comments without quotes, marks and indentation; "" for rulers of dashes."""
    if paragraph.startswith("#"):
        lines = (line.lstrip("#:! ").rstrip("# ") for line in paragraph.split("\n"))
        return "\n".join(line for line in lines if any(map(str.isalpha, line)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the module's own odd escapes
        return inspect.cleandoc(ast.literal_eval(paragraph)).strip()


# ---------------------------------------------------------------------------------------------------------- bytecode


@cache
def bytecode(text: str) -> str:
    """A module's instructions, one a line, without docstrings; "" for what does not compile. Nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            todo = [compile(text, "module", "exec", dont_inherit=True, optimize=2)]
    except (SyntaxError, ValueError):
        return ""
    lines = []
    while todo:
        code = todo.pop()
        lines.append(f"\n{code.co_name}:")
        for step in dis.get_instructions(code):
            operand = _constant(step.argval) if step.opcode in dis.hasconst else step.argrepr
            lines.append(f"{step.opname} {operand}".rstrip())
        todo += [inner for inner in reversed(code.co_consts) if isinstance(inner, CodeType)]
    return "\n".join(lines).lstrip() + "\n"


def _constant(value: object) -> str:
    """As repr, but the same in every process: a code object's shows its address, a set's follows random hashes."""
    if isinstance(value, CodeType):
        return f"<code {value.co_name}>"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(_constant, value))) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))}{',' * (len(value) == 1)})"
    return repr(value)


# ------------------------------------------------------------------------------------------------------------ tables


def _tables(modules: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name, text in modules.items():
        if name.startswith("encodings/") and "charmap_decode" in text:
            yield _document("tables", name, ".txt", _code_page(Path(name).stem))
    if "html/entities.py" in modules:
        rows = (f"{entity[:-1]};{_characters(text)}" for entity, text in html5.items() if entity.endswith(";"))
        yield _document("tables", "html/entities.py", ".txt", "\n".join(rows) + "\n")
    for first in range(0, 0x110000, 256):
        rows = [row for point in range(first, first + 256) if (row := _properties(chr(point)))]
        if rows:
            yield f"tables/unicode/{first:06X}.txt", "\n".join(rows) + "\n", f"unicode/{first:06X}"


def _code_page(encoding: str) -> str:
    rows = ((byte, bytes([byte]).decode(encoding, "ignore")) for byte in range(256))
    return "".join(f"{byte:02X};{_characters(text)}\n" for byte, text in rows if text)


def _characters(text: str) -> str:
    return ";".join(f"{ord(character):04X};{unicodedata.name(character, '')}" for character in text)


def _properties(character: str) -> str:
    """One line of Unicode's table in the order of its own UnicodeData.txt; "" without a name that says something."""
    name, number = unicodedata.name(character, ""), f"{ord(character):04X}"
    if not name or name.endswith(f"-{number}") or name.startswith("HANGUL SYLLABLE"):  # numbered, or spelled out
        return ""
    facts = (unicodedata.category, unicodedata.combining, unicodedata.bidirectional, unicodedata.decomposition)
    cases = (f"{ord(other):04X}" if len(other) == 1 else "" for other in (character.upper(), character.lower()))
    return ";".join([number, name, *(str(fact(character)) for fact in facts), *cases])
