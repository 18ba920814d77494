"""Every chapter keeps to the template, says only what exists, and runs from top to bottom."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

import sigma_lite  # noqa: E402
from sigma_lite import teach  # noqa: E402
from sigma_lite.teach import exercises  # noqa: E402
from sigma_lite.teach.excerpt import excerpt  # noqa: E402
from sigma_lite.teach.session import CHAPTERS as BUDGETS  # noqa: E402
from sigma_lite.teach.source import find  # noqa: E402

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECTIONS = (
    "The question",
    "By hand",
    ("Naive", "Write"),
    "The package",
    "Play",
    "Experiment",
    "What you should see",
    "Exercises",
    "Recap",
)
FAST_SECONDS = 20  # of processor time, the chapter's own cells
STARTUP_SECONDS = 40  # kernel, torch and plotly
COLUMNS = 84  # of code that a page of the book shows without a scroll bar
READING_MINUTES = 45
STEP = re.compile(r"^### Step (\d+) · (.+)\n\n(\d+) min · difficulty (\d)/5 · importance (\d)/5$", re.M)
STUB = re.compile(r"def (\w+)\([^)]*\):\n(?:    .*\n){1,6}\n*teach\.check\.exercise\(\"(\w+)\", \1\)")
NEW = [path for path in CHAPTERS if "### Step 1 ·" in path.read_text("utf-8")]  # written on the path
chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
new = pytest.mark.parametrize("path", NEW, ids=lambda path: path.stem)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def test_every_number_is_taken_once_and_planned():
    """Planned chapters may be missing: their numbers are kept free, so that the others' do not move."""
    numbers = [int(path.name[:2]) for path in CHAPTERS]
    assert len(set(numbers)) == len(numbers) and set(numbers) <= set(BUDGETS)
    assert list(BUDGETS) == list(range(1, len(BUDGETS) + 1))


def test_the_table_of_contents_has_every_chapter_by_number_and_short_title():
    contents = (ROOT / "book" / "index.md").read_text("utf-8").partition(":caption: Chapters")[2].partition("```")[0]
    wanted = [f"{int(path.name[:2])} {BUDGETS[int(path.name[:2])].title} <../notebooks/{path.stem}>" for path in CHAPTERS]
    assert [line for line in contents.splitlines() if "notebooks/" in line] == wanted
    assert max(len(one.title) for one in BUDGETS.values()) <= 22, "the side bar is narrow"


def test_exercises_lie_in_the_file_of_their_chapter():
    for file in exercises.CHAPTERS:
        assert {e.chapter for e in file.EXERCISES} == {int(file.__name__[-2:])}, file.__name__


def dangling(text: str) -> list[str]:
    """Chapters that a text names and nobody plans, and links whose number is not that of the file behind them."""
    found = []
    for many, first, more in re.findall(r"\b[Cc]hapter(s?)\s+(\d+)((?:(?:, | and | to | or )\d+)*)", text):
        numbers = [first, *(re.findall(r"\d+", more) if many else [])]
        found += [number for number in numbers if int(number) not in BUDGETS]
    for words, number in re.findall(r"\[([^]]*)\]\([^)]*?(\d\d)_\w+\.ipynb\)", text):
        said = re.findall(r"^\d+$|^\d+ |(?<=hapter )\d+", words)
        found += [f"[{words}] leads to chapter {number}" for one in said if int(one) != int(number)]
    return found


def test_a_reference_to_a_chapter_leads_to_one():
    book = [*ROOT.glob("book/*.md"), *ROOT.glob("book/log/*.md")]
    pages = [ROOT / "README.md", *book, *ROOT.glob("sigma_lite/**/*.py"), *ROOT.glob("tests/**/*.py")]
    texts = {path: path.read_text("utf-8") for path in pages if path != Path(__file__)}
    texts |= {path: "\n\n".join(cell.source for cell in read(path).cells) for path in CHAPTERS}
    assert {path.name: found for path, text in texts.items() if (found := dangling(text))} == {}


def test_a_dangling_reference_is_found():
    assert dangling("as in chapter 23, and in chapters 3, 24 and 25") == ["23", "24", "25"]
    assert dangling("[chapter 6](05_collapse.ipynb), [6](../notebooks/05_collapse.ipynb)") != []
    assert dangling("chapter 22; chapters 8, 9 and 11; [chapter 5](05_collapse.ipynb); in chapter 3, 96 experts") == []


def test_the_book_writes_the_number_before_the_title_and_hides_calls_of_folds(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.setattr(sys, "path", [str(ROOT / "book" / "_ext"), *sys.path])
    from executed_notebooks import numbered, quiet

    content = {"cells": [{"source": ["# A title\n", "# not this"]}, {"source": "# nor this"}]}
    assert numbered(content, 20)["cells"] == [{"source": ["# 20 · A title\n", "# not this"]}, {"source": "# nor this"}]
    cells = [{"source": source, "metadata": {}} for source in ('teach.solution("x")', "x = 1")]
    hidden, shown = quiet({"cells": cells})["cells"]
    assert hidden["metadata"] == {"tags": ["remove-input"]} and shown["metadata"] == {}


@chapter
def test_no_outputs_and_stable_ids(path):
    cells = read(path).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")
    ids = [cell.id for cell in cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"ch\d\d-[\w-]+", name) for name in ids), "random ids make every change a conflict"


@chapter
def test_sizes(path):
    lines = sorted(len(source.splitlines()) for source in code(path))
    assert 18 <= len(lines) <= 50
    assert statistics.median(lines) <= 6
    assert lines[int(0.9 * len(lines))] <= 18 and lines[-1] <= 25
    assert 1200 <= len(re.findall(r"\w+", prose(path))) <= (2800 if path in NEW else 2200)


@chapter
def test_code_fits_the_page(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    wide = [f"{cell.id}: {line}" for cell in cells for line in cell.source.splitlines() if len(line) > COLUMNS]
    assert not wide, "\n".join([f"more than {COLUMNS} columns:", *wide])


@chapter
def test_sections_in_order(path):
    headings = re.findall(r"^## (.+)$", prose(path), flags=re.M)
    places = [next((i for i, heading in enumerate(headings) if heading.startswith(name)), None) for name in SECTIONS]
    assert None not in places, f"missing {SECTIONS[places.index(None)]!r} among {headings}"
    assert places == sorted(places)


@chapter
def test_first_cells(path):
    first, setup = read(path).cells[:2]
    assert first.source.startswith("# ")
    for word in (r"\*\*(Builds|Reads):", r"\*\*needs:", r"reading\** \d+ min", r"(?:exercises|steps)\** \d+ min"):
        assert re.search(word, first.source, flags=re.I), word
    assert len(re.findall(r"^(?:-|\d\.) \*\w+\*", first.source, flags=re.M)) == 3, "three goals, each with its verb"
    lines = [line for line in setup.source.splitlines() if line]
    assert lines[:2] == ["import torch", "from sigma_lite import teach"] and len(lines) == 3
    number, version = re.fullmatch(r'teach\.setup\(chapter=(\d+), version="([\d.]+)"\)', lines[2]).groups()
    assert int(number) == int(path.name[:2])
    assert all(cell.id.startswith(f"ch{path.name[:2]}-") for cell in read(path).cells)
    assert version == ".".join(sigma_lite.__version__.split(".")[:2])


@chapter
def test_has_its_parts(path):
    text, cells = prose(path), "\n".join(code(path))
    old = () if path in NEW else ("teach.check.same(", "teach.reveal(")
    for part in ("teach.predict(", ".compare(", "teach.show(", "teach.Explore(", *old):
        assert part in cells, part
    assert re.search(r"wrong plot|WRONG", text), "what does a wrong plot look like?"
    assert path in NEW or 4 <= len(re.findall(r"^```\{exercise\}|^\*\*\d · ", text, flags=re.M)) <= 6
    assert "| name in" in text
    pictures = re.findall(r"!\[[^\]]+\]\((pictures/[^)]+\.svg)\)", text)
    assert len(pictures) >= 3 and all((path.parent / picture).is_file() for picture in pictures)


def reading_minutes(path: Path) -> float:
    """120 words, 8 lines of code of the page or 12 of a listing a minute: a student, in a second language."""
    shown = [teach.show(name) for name in re.findall(r'teach\.show\("([^"]+)"', "\n".join(code(path)))]
    shown += [excerpt(*where) for where in re.findall(r'excerpt\("([^"]+)", "([^"]+)"\)', "\n".join(code(path)))]
    listings = sum(len(source.text.splitlines()) for source in shown)
    lines = sum(bool(line.strip()) for source in code(path) for line in source.splitlines())
    return len(re.findall(r"\w+", prose(path))) / 120 + lines / 8 + listings / 12


@chapter
def test_the_minutes_that_it_claims_are_honest(path):
    claimed = int(re.search(r"reading\** (\d+) min", read(path).cells[0].source)[1])
    assert abs(claimed - (minutes := reading_minutes(path))) <= 4, f"it takes {minutes:.0f} minutes"
    assert minutes <= READING_MINUTES
    if path in NEW:
        steps = sum(e.minutes for e in exercises.ALL.values() if e.chapter == int(path.name[:2]))
        assert f"**steps** {steps} min" in read(path).cells[0].source


@new
def test_steps_lie_on_the_path(path):
    """Text with title, minutes and marks as in the registry; then a short stub with its check; then folds."""
    cells, steps = read(path).cells, []
    for place, cell in enumerate(cells):
        for number, title, *facts in STEP.findall(cell.source):
            stub, folds = (cell.source for cell in cells[place + 1 : place + 3])
            found = STUB.search(stub)
            assert found, f"{cells[place + 1].id}: a def with a body of at most 6 lines, then its check"
            known = exercises.find(found[2])
            assert [title, *map(int, facts)] == [known.asks, known.minutes, known.difficulty, known.importance]
            assert folds.rstrip(";") == f'teach.solution("{known.name}")' and known.also
            steps.append(int(number))
    assert steps == list(range(1, len(steps) + 1)) and 6 <= len(steps) <= 8


@new
def test_what_follows_the_steps(path):
    text, own = prose(path), {e.name for e in exercises.ALL.values() if e.chapter == int(path.name[:2])}
    used = re.findall(r'teach\.mine\("(\w+)"\)', "\n".join(code(path)))
    assert len(set(used) & own) >= 2, "what comes after the steps runs on the reader's functions"
    assert len(re.findall(r"<summary[^>]*>help: ", text)) >= 3
    for kind in ("Break it", "Predict", "Open"):
        assert re.search(rf"^### {kind} · .+\n\n\d+ min · difficulty \d/5$", text, flags=re.M), kind


@new
def test_folds_quote_the_checker_as_it_counts(path):
    """ "item 1 of 2" is the first one."""
    assert re.findall(r"\bitem \d+\b(?! of \d)", prose(path)) == []


@new
def test_the_guess_comes_before_what_gives_it_away(path):
    cells = read(path).cells
    guess = next(i for i, cell in enumerate(cells) if "teach.predict(" in cell.source)
    picture = next(i for i, cell in enumerate(cells) if "](pictures/" in cell.source)
    assert guess < picture and cells[0].source.splitlines()[0].endswith("?"), "a title that asks, a picture after the guess"


@chapter
def test_asks_nothing_of_the_network_or_the_shell(path):
    for source in code(path):
        assert not re.search(r"^\s*[!%]", source, flags=re.M)
        assert not re.search(r"urlopen|requests|urlretrieve|load_dataset|from_pretrained|subprocess|lightning", source)


@chapter
def test_every_name_of_the_package_exists(path):
    """Of imports, `teach.show` and `teach.reveal`, attributes of teach, and files that the prose names."""
    tree = ast.parse("\n".join(code(path)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sigma_lite"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("teach."):
            find(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("teach.show", "teach.reveal"):
            find(node.args[0].value)
    for file in re.findall(r"`((?:data|model|balance|train|kernels|serve|report)/[\w/]+\.py)`", prose(path)):
        assert (ROOT / "sigma_lite" / file).is_file(), file


@chapter
def test_exercises_are_those_of_the_registry(path):
    asked = set(re.findall(r'check\.exercise\(\s*"([^"]+)"', "\n".join(code(path))))
    assert asked == {e.name for e in exercises.ALL.values() if e.chapter == int(path.name[:2])}
    assert len(asked) >= 2


@chapter
def test_links_lead_to_chapters(path):
    for target in re.findall(r"\]\(([^)#:]+\.ipynb)\)", prose(path)):
        assert (path.parent / target).is_file(), target


@pytest.mark.notebook
@pytest.mark.slow
@chapter
def test_runs_from_top_to_bottom(path, monkeypatch):
    """With three training steps: nothing is claimed but that it runs, quickly, and leaves its figures behind."""
    pytest.importorskip("nbclient")
    monkeypatch.setattr(sys, "path", [str(ROOT / "book" / "_ext"), *sys.path])
    from executed_notebooks import execute

    run = execute(path, fast=True)
    assert run.seconds < FAST_SECONDS + STARTUP_SECONDS
    kinds = [kind for cell in read(run.path).cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert kinds.count("application/vnd.plotly.v1+json") >= 3
    assert "application/vnd.jupyter.widget-view+json" in kinds


@pytest.mark.notebook
@pytest.mark.slow
@new
def test_what_follows_runs_on_what_readers_write(path, monkeypatch):
    """With the plain solution of every step in the place of the package's function; three training steps."""
    pio = pytest.importorskip("plotly.io")
    monkeypatch.setenv("SIGMA_FAST", "1")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(teach.check, "exercise", lambda *_: None)
    monkeypatch.setattr(teach.check, "passed", {e.name: e.also for e in exercises.ALL.values() if e.also})
    look, names = (pio.templates.default, pio.renderers.default), {"__name__": "__main__"}
    try:
        for source in code(path):
            exec(compile(source, path.stem, "exec"), names)
    finally:
        pio.templates.default, pio.renderers.default = look
