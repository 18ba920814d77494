"""Slides come from the chapter and give nothing away: a class is asked first."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("mdit_py_plugins", reason="the book's packages make the slides")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book"))
import slides as made_by  # noqa: E402

from sigma_lite.teach import exercises  # noqa: E402

CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURE = {"data": [{"name": "</script>"}], "layout": {"height": 300}}


def text(source: str) -> dict:
    return {"cell_type": "markdown", "source": source, "id": "a"}


def code(source: str, *outputs: dict, name: str = "a") -> dict:
    return {"cell_type": "code", "source": source, "outputs": list(outputs), "id": name}


def shown(*cells: dict) -> list[made_by.Slide]:
    return made_by.slides({"cells": [text("# Why?\n\n**needs:** nothing\n\n1. *say* it"), *cells]}, ROOT / "notebooks")


def test_a_heading_begins_a_slide_and_one_without_content_is_none():
    found = shown(text("## One\n\nbody"), text("## Empty\n\n### Two\n\nmore"), text("and more"))
    assert [slide.title for slide in found] == ["Why?", "One", "Two"]
    assert "say" in found[0].parts[0] and "nothing" in found[0].notes[0]
    assert [len(slide.parts) for slide in found[1:]] == [1, 2]


def test_a_picture_comes_after_the_guess():
    asked = {"output_type": "display_data", "data": {"text/html": "<fieldset>guess</fieldset>"}}
    found = shown(
        text("## The question\n\nHow many?"), code("guess", asked), text("![it](pictures/06_blind_spot.svg)\n\nSo many.")
    )
    assert ["guess" in "".join(slide.parts) for slide in found] == [False, True, False, False]
    assert "<svg" in found[2].parts[0] and "So many." in found[3].parts[0]


def test_a_long_text_goes_on_in_the_notes_but_its_formula_stays():
    long = "word " * (made_by.WORDS - 5)
    (slide,) = shown(text(f"## One\n\n{long}\n\nthis is one paragraph too many\n\n$$x < 1$$"))[1:]
    assert "too many" in slide.notes[0] and len(slide.notes) == 1
    assert r"\[x &lt; 1\]" in slide.parts[1]


def test_hints_solutions_and_sources_are_left_out():
    hint = "### Step 1 · it\n\nWrite it.\n\n<details><summary>help</summary>\n\nthe answer\n\n</details>"
    stub = 'def f(x):\n    ...\n\n\nteach.check.exercise("load_share", f)'
    fold = {"output_type": "display_data", "data": {"text/html": "<details>the answer</details>"}}
    source = {"output_type": "display_data", "data": {"text/html": '<div class="sigma-source">the answer</div>'}}
    late = {"output_type": "stream", "text": "nothing there yet"}
    found = shown(text(hint), code(stub, late), code('teach.solution("load_share")', fold), code("teach.show('a')", source))
    page = made_by.page("06_x", found)
    assert "the answer" not in page and "teach.check" not in page and "nothing there yet" not in page
    assert "Write it." in page and "def" in page


def test_a_figure_has_its_own_slide_and_a_small_cell_by_hand_its_code():
    figure = {"output_type": "display_data", "data": {made_by.PLOTLY: FIGURE, "text/plain": "Figure"}}
    printed = {"output_type": "stream", "text": "1 < 2\n"}
    found = shown(text("## By hand"), code("print(1)", printed, name="ch06-hand"), code("draw()", figure, printed))
    assert [slide.title for slide in found] == ["Why?", "By hand", "By hand", "By hand"], (
        "what it printed comes after a look"
    )
    assert "print" in found[1].parts[0] and "1 &lt; 2" in found[1].parts[1]
    body = re.search(r"data-plotly-for=\"[^\"]+\">(.*?)</script>", found[2].parts[0])[1]
    assert json.loads(body)["data"] == FIGURE["data"]


def words(part: str) -> int:
    """Of a slide's text; a drawing's numbers are looked at, not read."""
    return len(re.sub("<[^>]*>", " ", re.sub("<svg.*?</svg>", " ", part, flags=re.S)).split())


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_has_slides(path):
    content = json.loads(path.read_text("utf-8"))
    found = made_by.slides(content, path.parent)
    page = made_by.page(path.stem, found)
    titles = [slide.title for slide in found]
    for step in exercises.ALL.values():
        assert step.chapter != int(path.name[:2]) or any(title.endswith(f"· {step.asks}") for title in titles), step.name
    assert "<svg" in page and "<details" not in page and page.count("<section>") == len(found)
    assert not re.search(r"""(?:src|srcset)=["']https?:|<link[^>]+https?:""", page), "it asks the network"
    crowded = [slide.title for slide in found if sum(map(words, slide.parts)) > 260]
    assert crowded == []


def test_the_first_page_leads_to_each(tmp_path):
    made_by.write_slides(CHAPTERS[:2], tmp_path / "slides")
    index = (tmp_path / "slides" / "index.html").read_text("utf-8")
    for path in CHAPTERS[:2]:
        assert f'href="{path.stem}.html"' in index and (tmp_path / "slides" / f"{path.stem}.html").is_file()
