"""The package's own source on the page, so that what a chapter shows can never differ from what runs."""

from __future__ import annotations

import difflib
import html
import importlib
import inspect
import os
import re
import textwrap
from types import ModuleType

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import PythonLexer
from pygments.style import Style
from pygments.token import Comment, Keyword, Name, Number, Operator, String

import sigma_lite
from sigma_lite.config import ConfigError
from sigma_lite.teach.exercises.exercise import Exercise

# Each kind of word by three names: the book's style sheet has its colour, else JupyterLab's theme, else this one on white.
COLOURS = {
    "comment": "#5b646c", "keyword": "#7a35ab", "def": "#1a69a3",
    "number": "#0d6a6a", "string": "#00704f", "builtin": "#8a4b10",
}  # fmt: skip


def _ink(kind: str) -> str:
    return f"var(--code-{kind}, var(--jp-mirror-editor-{kind}-color, {COLOURS[kind]}))"


# JupyterLab with MyST hides the triangle of a fold
SUMMARY = '<summary style="color:var(--link, var(--jp-content-link-color, #1a69a3));cursor:pointer">'


class _BothThemes(Style):
    """Plain names keep the page's own colour."""

    styles = {
        Comment: f"italic {COLOURS['comment']}",
        Keyword: f"bold {COLOURS['keyword']}",
        Name.Function: COLOURS["def"],
        Name.Class: f"bold {COLOURS['def']}",
        Name.Decorator: COLOURS["number"],
        Number: COLOURS["number"],
        String: COLOURS["string"],
        Operator.Word: f"bold {COLOURS['keyword']}",
        Name.Builtin: COLOURS["builtin"],
    }


class Source:
    """Source with its true line numbers; `repr` is plain text, a notebook shows it coloured."""

    lexer = PythonLexer()

    def __init__(self, name: str):
        self.name, self.object = name, find(name)
        if isinstance(self.object, ModuleType):
            self.text, self.first = inspect.getsource(self.object), 1
        else:
            lines, self.first = inspect.getsourcelines(inspect.unwrap(self.object))
            self.text = textwrap.dedent("".join(lines))
        package = os.path.dirname(os.path.dirname(os.path.abspath(sigma_lite.__file__)))
        self.file = os.path.relpath(inspect.getsourcefile(inspect.unwrap(self.object)), package).replace(os.sep, "/")

    def numbered(self) -> str:
        lines = self.text.splitlines()
        width = len(str(self.first + len(lines)))
        return "\n".join(f"{number:{width}} {line}" for number, line in enumerate(lines, start=self.first))

    def __repr__(self) -> str:
        return f"{self.file}\n{self.numbered()}"

    def _repr_html_(self) -> str:
        return f'<div class="sigma-source"><code>{self.file}</code>{self.coloured()}</div>'

    def coloured(self) -> str:
        return coloured(self.text, self.first, self.lexer)


class Folds:
    """Three steps towards a solution, each opened by a click: the idea, the shapes, the source."""

    def __init__(self, name: str):
        self.source = Source(name)
        self.idea, _, self.shapes = (inspect.getdoc(self.source.object) or "").partition("\n\n")

    def __repr__(self) -> str:
        return f"reveal({self.source.name!r}): shown in JupyterLab and in the book"

    def _repr_html_(self) -> str:
        folds = [
            ("the idea", _prose(self.idea or "no words beyond the name")),
            ("the shapes", _prose(self.shapes or str(inspect.signature(self.source.object)))),
            (f"the source: {self.source.file}", self.source.coloured()),
        ]
        return "".join(_fold(title, body) for title, body in folds)


class Steps:
    """The folds below an exercise: the idea, what the check calls it with, a plain solution, the package's source."""

    def __init__(self, exercise: Exercise):
        self.exercise = exercise

    def __repr__(self) -> str:
        return f"solution({self.exercise.name!r}): shown in JupyterLab and in the book"

    def _repr_html_(self) -> str:
        asked = self.exercise
        parts = [("hint: the idea", _prose(asked.hint)), ("hint: what the check calls it with", _prose(asked.described()))]
        if asked.also:
            parts.append(("one solution", coloured(asked.solved())))
        if asked.source:
            package = _of_package(asked.source)
            parts.append((f"the package's: {package.file}", package.coloured()))
        return "".join(_fold(title, body) for title, body in parts)


def _of_package(name: str) -> Source:
    """As `show` takes it, or FILE#NAME for a definition in C++, such as "kernels/cuda/tile.cuh#swizzle"."""
    if "#" not in name:
        return Source(name)
    from sigma_lite.teach.excerpt import excerpt  # it builds on this file

    return excerpt(*name.split("#"))


def _prose(text: str) -> str:
    return f'<p style="white-space:pre-wrap;margin:0.4em 1em">{html.escape(text)}</p>'


def _fold(title: str, body: str) -> str:
    return f"<details>{SUMMARY}{title}</summary>{body}</details>"


def coloured(text: str, first: int = 0, lexer: Lexer = PythonLexer()) -> str:  # noqa: B008  it keeps no state
    """Source as HTML, with line numbers from `first` on; without where it is 0."""
    formatter = HtmlFormatter(
        style=_BothThemes, noclasses=True, nobackground=True, linenos="inline" if first else False, linenostart=first or 1,
        linespans="line", cssstyles="max-height:34em;overflow:auto", prestyles="margin:0;line-height:1.35",
    )  # fmt: skip
    page = re.sub(r'<span id="line-\d+">', '<span class="sigma-code-line">', highlight(text, lexer, formatter))
    for kind, colour in COLOURS.items():
        page = re.sub(f"color: {colour}", f"color: {_ink(kind)}", page, flags=re.I)
    # pygments writes the line numbers black on white, whatever the style says
    plain = '<span style="color: inherit; background-color: transparent'
    return page.replace(plain, f'<span class="sigma-line" style="color: {_ink("comment")}')


def show(name: str) -> Source:
    """The source of a module, class or function below sigma_lite: "model.router", "model.router.Router.forward"."""
    return Source(name)


def reveal(name: str) -> Folds:
    """A function of the package folded away: idea and shapes are its docstring, the last fold its source."""
    return Folds(name)


def find(name: str) -> object:
    """The object behind a dotted name below sigma_lite. Raises ConfigError that names the nearest one."""
    found, parts = sigma_lite, name.split(".")
    for position, part in enumerate(parts):
        path = ".".join(["sigma_lite", *parts[: position + 1]])
        if isinstance(found, ModuleType) and hasattr(found, "__path__") and importlib.util.find_spec(path):
            found = importlib.import_module(path)
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            near = difflib.get_close_matches(part, dir(found), n=1, cutoff=0.4)
            raise ConfigError(f"sigma_lite.{name} does not exist" + (f"; did you mean {near[0]!r}?" if near else ""))
    return found
