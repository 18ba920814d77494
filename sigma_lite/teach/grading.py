"""A student's notebook, judged: only the cells that hold exercises are run, with what they need from the cells above.

    python -m sigma_lite.teach.grading NOTEBOOK ANSWERS [HIDDEN]

runs one notebook and writes to the file ANSWERS a line of JSON for each exercise when its cell begins, and one when it is
judged: what had not begun when a process ended is nobody's mistake. command.py starts such a process for each notebook, so
that an endless loop or an exit ends nothing but that process. It is no sandbox: a student's code may do what you may do.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sigma_lite.config import ConfigError, nearest, require
from sigma_lite.teach import check, exercises
from sigma_lite.teach.limit import TooLong, within

CHECK = re.compile(r"\bcheck\.exercise\(\s*[\"'](\w+)[\"']")
CELL_SECONDS = 30.0


@dataclass(frozen=True)
class Step:
    """One exercise of one notebook."""

    name: str
    chapter: int
    kind: str  # passed, mistake, wrong, not tried, not graded
    says: str = ""


def code_cells(notebook: Path) -> list[str]:
    """Source of the code cells, without lines for IPython. Raises ConfigError with what is wrong with the file."""
    try:
        content = json.loads(notebook.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"it cannot be read as a notebook: {error}") from error
    require(isinstance(content, dict) and isinstance(content.get("cells"), list), "it has no cells: is it a notebook?")
    sources = ("".join(cell.get("source", "")) for cell in content["cells"] if cell.get("cell_type") == "code")
    return ["\n".join("" if re.match(r"\s*[%!]", line) else line for line in one.splitlines()) for one in sources]


def asked(cells: list[str]) -> list[str]:
    """The exercises that a notebook checks, in order."""
    return list(dict.fromkeys(name for cell in cells for name in CHECK.findall(cell) if name in exercises.ALL))


def read_hidden(path: Path) -> dict[str, list[tuple]]:
    """`CASES = {exercise: [arguments, ...]}` of a Python file. Raises ConfigError if it names no exercise, or fits none."""
    require(path.is_file(), f"--hidden {path} does not exist")
    try:
        cases = runpy.run_path(str(path)).get("CASES")
    except (Exception, SystemExit) as error:  # whatever a teacher's own file raises
        raise ConfigError(f"--hidden {path} cannot be run: {type(error).__name__}: {error}") from error
    require(isinstance(cases, Mapping), f"{path} defines no CASES = {{exercise: [(argument, ...), ...]}}")
    for name, inputs in cases.items():
        require(name in exercises.ALL, f"{path}: there is no exercise {name!r}; {nearest(name, exercises.ALL)}")
        known = exercises.find(name)
        for case in inputs:
            wrong = known._problem(known.solution, case) if isinstance(case, tuple) else "a case is a tuple of arguments"
            require(not wrong, f"{path}: the package's own solution of {name!r} cannot take {case!r}: {wrong}")
    return dict(cases)


def judge(name: str, mine: object, hidden: Mapping[str, list[tuple]]) -> Step:
    """By the cases that the student sees, then by hidden ones, whose inputs are not told."""
    known = exercises.find(name)
    verdict = known.judge(mine)
    if verdict.kind == "passed" and hidden.get(name):
        unseen = known.judge(mine, known.named(hidden[name]))
        says = unseen.says if unseen.kind == "mistake" else "right on the cases that you see, wrong on a hidden one"
        verdict = unseen._replace(says="" if unseen.kind == "passed" else says)
    return Step(name, known.chapter, *verdict)


def run(
    cells: list[str],
    hidden: Mapping[str, list[tuple]],
    found: dict[str, Step],
    say: Callable[[Step], None] = lambda step: None,
    begins: Callable[[str], None] = lambda name: None,
) -> None:
    """Fill in `found`; a cell that cannot run fails its own exercise and no other one."""
    names: dict[str, object] = {"__name__": "__main__"}
    check.exercise = lambda name, mine: found.__setitem__(name, judge(name, mine, hidden))
    for cell in cells:
        here = [name for name in CHECK.findall(cell) if name in exercises.ALL]
        if not here:
            _prepare(cell, names)
            continue
        for name in here:
            found.pop(name, None)  # the last cell that checks an exercise counts
            begins(name)
        broken = _run_cell(cell, names)
        for name in here:
            if name not in found:
                kind = "wrong" if broken else "not tried"
                found[name] = Step(name, exercises.find(name).chapter, kind, broken or "its check was not reached")
            say(found[name])


def _prepare(cell: str, names: dict[str, object]) -> None:
    """Imports, functions, classes and plain numbers of a cell without exercises, but none of its work."""
    try:
        statements = ast.parse(cell).body
    except SyntaxError:
        return
    for statement in statements:
        if isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) or _is_plain(statement):
            _run_cell(ast.unparse(statement), names)


def _is_plain(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Assign):
        return False
    try:
        ast.literal_eval(statement.value)
    except ValueError:
        return False
    return True


def _run_cell(cell: str, names: dict[str, object]) -> str:
    """ "" or the sentence about what stopped it."""
    try:
        with within(CELL_SECONDS):
            exec(compile(cell, "<cell>", "exec"), names)
    except SyntaxError as error:
        return f"its cell is not Python: {error.msg}, line {error.lineno}"
    except TooLong:
        return f"its cell has not ended after {CELL_SECONDS:g} seconds: is there a loop that never stops?"
    except (Exception, SystemExit) as error:
        return f"its cell stops before the check: {type(error).__name__}: {error}"
    return ""


def main(notebook: str, answers: str, hidden: str = "") -> None:
    cases = read_hidden(Path(hidden)) if hidden else {}
    with open(answers, "w", encoding="utf-8") as file:

        def write(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

        run(
            code_cells(Path(notebook)),
            cases,
            {},
            say=lambda step: write(asdict(step)),
            begins=lambda name: write({"begun": name}),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
