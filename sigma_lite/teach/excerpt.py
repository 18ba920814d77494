"""One function out of a source file, read as text: C++ has no inspect, and a Triton kernel need not be imported."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from pygments.lexers import CudaLexer, PythonLexer

import sigma_lite
from sigma_lite.config import require
from sigma_lite.teach.source import SUMMARY, Source

# at the start of a line, types and qualifiers, but no parenthesis and no dot: a definition or a declaration, not a call;
# or a struct
DEFINED = r"^(?P<indent>\s*)(?:[\w:<>,&*\[\]@\" ]+[\s&*])?(?:__launch_bounds__\(.*\) )?(?P<name>\w+)(?:\(| \{$)"


class Excerpt(Source):
    """A definition with the comment above it, shown like all source; with a title it is folded away under it."""

    def __init__(self, file: str, name: str, fold: str = ""):
        lines = (Path(sigma_lite.__file__).parent / file).read_text("utf-8").splitlines()
        self.lexer = PythonLexer() if file.endswith(".py") else CudaLexer()
        self.name, self.file, self.fold = name, f"sigma_lite/{file}", fold
        first, last = _python(lines, name) if file.endswith(".py") else _c(lines, name)
        require(last > 0, f"{self.file} defines no {name!r}; did you mean {_nearest(lines, name)!r}?")
        indent = min(len(line) - len(line.lstrip()) for line in lines[first:last] if line.strip())
        self.text, self.first = "\n".join(line[indent:] for line in lines[first:last]), first + 1

    def __repr__(self) -> str:
        return f"{self.fold}: shown in JupyterLab and in the book" if self.fold else super().__repr__()

    def _repr_html_(self) -> str:
        shown = super()._repr_html_()
        return f"<details>{SUMMARY}{self.fold}</summary>{shown}</details>" if self.fold else shown


def excerpt(file: str, name: str, fold: str = "") -> Excerpt:
    """Function `name` of `file` below sigma_lite, such as ("kernels/cuda/tile.cuh", "swizzle"), with its line numbers.

    Raises: ConfigError that names the nearest definition.
    """
    return Excerpt(file, name, fold)


def _python(lines: list[str], name: str) -> tuple[int, int]:
    start = next((i for i, line in enumerate(lines) if re.match(rf"def {name}\(", line)), None)
    if start is None:
        return 0, 0
    end = next((i for i in range(start + 1, len(lines)) if re.match(r"[^\s)]", lines[i])), len(lines))
    while not lines[end - 1].strip():
        end -= 1
    return _top(lines, start), end


def _c(lines: list[str], name: str) -> tuple[int, int]:
    for start, line in enumerate(lines):
        found = re.match(DEFINED, line)
        if not found or found["name"] != name or not _opens_a_body(lines[start:]):
            continue
        depth, opened = 0, False
        for end, inside in enumerate(lines[start:], start + 1):
            depth += inside.count("{") - inside.count("}")
            opened = opened or "{" in inside
            if opened and depth == 0:
                return _top(lines, start), end
    return 0, 0


def _opens_a_body(lines: list[str]) -> bool:
    """Is there a brace before the first semicolon? Otherwise it is a call or a declaration."""
    found = re.search(r"[{;]", "\n".join(lines))
    return found is not None and found[0] == "{"


def _top(lines: list[str], start: int) -> int:
    """Comment, decorator and template line belong to what follows them without an empty line."""
    while start and lines[start - 1].strip():
        start -= 1
    return start


def _nearest(lines: list[str], name: str) -> str:
    names = [found["name"] for line in lines if (found := re.match(DEFINED, line))]
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0)), "")
