"""Chapters: numbers in sentences are computed by the page, a name means one thing, figures of loads name their window."""

from __future__ import annotations

import ast
import re
import symtable
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)

# a paragraph that speaks of runs made before the page is read: recorded in results/, or on the author's machine
CLAIM = re.compile(
    r"\b[Rr]ecorded\b|\b[Oo]ur (?:own |trial )?(?:runs?|trials?)\b|\bseeds? \d|\b[Ii]n a trial\b|\*\*(?:Live|Recorded)"
)
MEASURED = re.compile(r"\d[\d.,]*\s*(?:%|nats?\b|bits?\b)|(?<![\w.])\d+\.\d+")
SETTING = re.compile(r"(?:temperature|weight|u =|rate|lr=|At|at) ?0\.\d+|\d+(?:\.\d+)? million|\d+ % interval|\bat \d+ %")
OTHERS = re.compile(r"\breport\b|\breport's\b|\bpaper'?s?\b|arxiv\.org")  # numbers of a publication, which do not change


def cells(path: Path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def typed_in(text: str) -> list[str]:
    """Sentences about earlier runs that hold a measured number, instead of pointing at one that a cell prints."""
    found = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(("|", "$$", "```")) or not CLAIM.search(paragraph):
            continue
        for sentence in re.split(r"(?<=[.!?;:])\s+", paragraph.replace("\n", " ")):
            if not OTHERS.search(sentence) and MEASURED.search(SETTING.sub("", sentence)):
                found.append(sentence)
    return found


def of_loops(tree: ast.Module) -> set[str]:
    """Names that a `for` on the cell's top level binds; comprehensions and functions keep theirs to themselves."""
    todo, found = list(tree.body), set()
    while todo:
        statement = todo.pop()
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            continue
        if isinstance(statement, ast.For):
            found |= {node.id for node in ast.walk(statement.target) if isinstance(node, ast.Name)}
        for part in ("body", "orelse", "finalbody"):
            todo += getattr(statement, part, [])
    return found


class Apart(ast.NodeTransformer):
    """Comprehensions in functions of their own: from Python 3.12 on their names count as the surrounding scope's."""

    def visit_comprehension_of_any_kind(self, node: ast.expr) -> ast.expr:
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        return ast.Call(ast.Lambda(nothing, self.generic_visit(node)), [], [])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_of_any_kind


def scope(code: str) -> tuple[set[str], set[str]]:
    """(names that a statement binds on the top level, global names that it reads, inside of functions too)."""
    table = symtable.symtable(ast.unparse(Apart().visit(ast.parse(code))), "cell", "exec")
    names = table.get_symbols()
    bound = {name.get_name() for name in names if name.is_assigned() or name.is_imported()}
    read, inner = {name.get_name() for name in names if name.is_referenced()}, list(table.get_children())
    while inner:
        child = inner.pop()
        read |= {name.get_name() for name in child.get_symbols() if name.is_referenced() and name.is_global()}
        inner += child.get_children()
    return bound, read


def leaked(sources: list[str]) -> list[tuple[int, str]]:
    """(cell, name): the cell reads a name that was last bound by a loop of an earlier cell, so it means its last turn."""
    found, looped = [], set()
    for number, source in enumerate(sources):
        tree, here = ast.parse(source), set()
        for statement in tree.body:
            bound, read = scope(ast.unparse(statement))
            binds_first = isinstance(statement, (ast.For, ast.With, ast.FunctionDef, ast.ClassDef))
            found += [(number, name) for name in read & looped - here - (bound if binds_first else set())]
            here |= bound
        looped = (looped - here) | of_loops(tree)
    return found


@chapter
def test_a_measured_number_in_a_sentence_is_one_that_the_page_computes(path):
    assert [s for cell in cells(path, "markdown") for s in typed_in(cell.source)] == []


@chapter
def test_no_cell_reads_a_name_that_a_loop_of_an_earlier_cell_left_behind(path):
    """Chapter 6 once drew the last arm of a loop where its text spoke of the first: both were called `run`."""
    assert leaked([cell.source for cell in cells(path, "code")]) == []


@chapter
def test_every_plot_of_loads_names_the_tokens_that_it_counts_over(path):
    """In the title, or as an axis of steps whose window the title of `compare_deviation` and of the lab's figures carry."""
    for cell in cells(path, "code"):
        loads = re.search(
            r'["\'](?:times a fair share|experts? (?:without a token|of \d+)|experts without a token.*)["\']', cell.source
        )
        if loads and "teach.plots.lines" in cell.source:
            assert re.search(r"window|held-out|in one step|all tokens of a step", cell.source), cell.id


def test_these_tests_can_fail():
    assert leaked(["run = 1", "for run in (2, 3):\n    print(run)", "print(run)"]) == [(2, "run")]
    assert leaked(["for x in 'ab': pass", "def f():\n    return x"]) == [(1, "x")]
    assert leaked(["for x in 'ab': pass", "x = 1\nprint(x)", "print(x)"]) == []
    assert leaked(["for x in 'ab': pass", "for x in 'cd':\n    print(x)", "[x for x in 'ef']"]) == []
    assert typed_in("**Recorded.** Layer 0 lies between −16 and +22 % in all three seeds.")
    assert typed_in("In our run the loss ended at 5.7.") and typed_in("Our trial runs gave 0.25 to 0.29 for micro.")
    assert not typed_in("**Recorded.** At temperature 0.1 it is as the cell above prints; the report has 30 %.")
    assert not typed_in("In the report it is 0.16 points. A softmax of 0.5 is no claim about runs.")
