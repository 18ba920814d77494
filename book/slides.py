"""Slides of each chapter, made from its executed notebook: build.py calls this. Nothing here is written for one chapter.

A heading begins a slide, and a figure has one of its own. A slide takes the first words of its text; the rest are notes for
who speaks (key N). Hints, solutions and the cells that show source are left out, so that a class can be asked first.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

HERE = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
WORDS = 60  # of text on a slide
LINES = 14  # of a printed output, or of a cell
LEFT_OUT = ("teach.solution(", "teach.setup(", "teach.reveal(")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="../_static/slides.css"><style>{code}</style></head>
<body>{body}
<script src="../_static/plotly.min.js"></script><script src="../_static/boot.js"></script>
<script>MathJax = {{svg: {{fontCache: "global"}}}}</script><script src="../_static/tex-svg.js"></script>
<script src="../_static/slides.js"></script></body></html>
"""
KEYS = "Keys: arrows or space go on and back, N shows the notes, Home and End; print the page for a handout."


@dataclass
class Slide:
    title: str
    parts: list[str] = field(default_factory=list)  # HTML
    notes: list[str] = field(default_factory=list)
    words: int = 0
    full: bool = False  # of a figure or a picture

    def add_text(self, block: str, folder: Path) -> None:
        """A paragraph, if there is room, and a formula always."""
        words = len(block.split())
        fits = not self.parts or self.words + words <= WORDS or block.startswith("$$")
        (self.parts if fits else self.notes).append(rendered(block, folder))
        self.words += words


def markdown() -> MarkdownIt:
    def formula(content: str, options: dict) -> str:
        text = html.escape(content.strip(), quote=False)
        return rf"\[{text}\]" if options["display_mode"] else rf"\({text}\)"

    return MarkdownIt("commonmark", {"html": True}).enable("table").use(dollarmath_plugin, renderer=formula)


def rendered(text: str, folder: Path) -> str:
    """HTML; pictures are put in, so that they take the page's colours, and chapters are linked to their slides."""

    def picture(match: re.Match) -> str:
        drawn = (folder / match[2]).read_text("utf-8")
        return f'<figure role="img" aria-label="{match[1]}">{drawn[drawn.index("<svg") :]}</figure>'

    made = re.sub(r"!\[([^]]*)\]\((pictures/[^)]+\.svg)\)", picture, text)
    made = made if made != text else markdown().render(text)
    return re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', made)


def outputs_of(cell: dict) -> Iterator[tuple[str, object]]:
    """("figure", spec), ("html", text) or ("text", text) of what a cell has left."""
    printed = ""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if PLOTLY in data:
            yield "figure", data[PLOTLY]
        elif "text/html" in data:
            yield "html", "".join(data["text/html"])
        else:
            printed += "".join(output.get("text", data.get("text/plain", "")))
    if printed.strip():
        yield "text", printed


def figure_html(spec: dict, name: str) -> str:
    """As boot.js of the book draws it."""
    layout = {**spec.get("layout", {}), "height": spec.get("layout", {}).get("height") or 450}
    config = {"responsive": True, "displayModeBar": False}
    body = json.dumps({"data": spec.get("data", []), "layout": layout, "config": config}).replace("<", "\\u003c")
    return (
        f'<div class="sigma-figure" id="{name}"></div>'
        f'<script type="application/json" data-plotly-for="{name}">{body}</script>'
    )


def code_html(source: str) -> str:
    return highlight(source, PythonLexer(), HtmlFormatter())


def slides(content: dict, folder: Path) -> list[Slide]:
    """Of one executed notebook, whose pictures are in `folder`."""
    first, *cells = content["cells"]
    title, _, rest = "".join(first["source"]).removeprefix("# ").partition("\n")
    facts, _, goals = rest.strip().partition("\n\n")
    made = [Slide(title, [rendered(goals, folder)], [rendered(facts, folder)])]
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            _add_markdown(made, source, folder)
        elif not any(name in source for name in LEFT_OUT):
            _add_code(made, cell, source, f"figure-{number}")
    return [slide for slide in made if slide.parts]


def _add_markdown(made: list[Slide], source: str, folder: Path) -> None:
    text = re.sub(r"<details>.*?</details>", "", source, flags=re.S)
    for part in re.split(r"^(?=#{2,3} )", text, flags=re.M):
        if part.startswith("#"):
            heading, _, part = part.partition("\n")
            made.append(Slide(heading.lstrip("# ")))
        for block in filter(str.strip, re.split(r"\n{2,}", part.strip())):
            if block.startswith("!["):
                made.append(Slide(made[-1].title, [rendered(block, folder)], full=True))
            else:
                _with_room(made).add_text(block, folder)


def _with_room(made: list[Slide]) -> Slide:
    """The last slide, or a new one behind a figure: a class looks before it reads."""
    if made[-1].full:
        made.append(Slide(made[-1].title))
    return made[-1]


def _add_code(made: list[Slide], cell: dict, source: str, name: str) -> None:
    """The stub of a step, a small cell that is done by hand, and what a cell has printed or drawn."""
    if "teach.check.exercise(" in source:
        _with_room(made).parts.append(code_html(source.partition("\n\n\nteach.check")[0]))
        return
    if "-hand" in cell["id"] and source.count("\n") < LINES:
        _with_room(made).parts.append(code_html(source))
    for place, (kind, what) in enumerate(outputs_of(cell)):
        if kind == "figure":
            made.append(Slide(made[-1].title, [figure_html(what, f"{name}-{place}")], full=True))
        elif kind == "html" and "sigma-source" not in what and "<details" not in what:
            _with_room(made).parts.append(what)
        elif kind == "text" and what.count("\n") <= LINES:
            _with_room(made).parts.append(f"<pre>{html.escape(what)}</pre>")


def page(name: str, made: list[Slide]) -> str:
    body = ""
    for number, slide in enumerate(made, 1):
        heading = "h1" if number == 1 else "h2"
        notes = f"<aside>{''.join(slide.notes)}</aside>" if slide.notes else ""
        title = rendered(slide.title, HERE).strip().removeprefix("<p>").removesuffix("</p>")
        foot = f'<footer><a href="index.html">chapter {int(name[:2])}</a> · {number} / {len(made)}</footer>'
        body += f"<section><{heading}>{title}</{heading}>{''.join(slide.parts)}{notes}{foot}</section>\n"
    title = f"{int(name[:2])} · {html.escape(made[0].title)}"
    return PAGE.format(title=title, code=HtmlFormatter().get_style_defs(), body=body)


def write_slides(notebooks: list[Path], out: Path) -> None:
    """One page for each executed notebook, and index.html that leads to them; `out` lies beside the book's _static."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    items = ""
    for path in notebooks:
        made = slides(json.loads(path.read_text("utf-8")), HERE.parent / "notebooks")
        (out / f"{path.stem}.html").write_text(page(path.stem, made), "utf-8")
        title = f"{int(path.stem[:2])} · {html.escape(made[0].title)}"
        items += f'<li><a href="{path.stem}.html">{title}</a>, {len(made)} slides</li>\n'
    body = f'<section class="list"><h1>Slides of the chapters</h1><p>{KEYS}</p><ul>{items}</ul></section>'
    (out / "index.html").write_text(PAGE.format(title="Slides of sigma_lite", code="", body=body), "utf-8")
