"""Drawings as part of the page instead of files beside it, so that they take the page's ink in light and in dark.

Two directives for the first page: `live`, a figure over a record of results/ that is drawn when the book is built, and
`chapters`, a card for each notebook with its picture and its question.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.parsers.rst import Directive
from offline_assets import drawn

from sigma_lite import figures, record
from sigma_lite.report.markup import escape
from sigma_lite.teach.explore import Explore
from sigma_lite.teach.session import CHAPTERS

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"\]\((pictures/\w+\.svg)\)")


def inline(app, doctree) -> None:
    """Put every svg that a page names into the page; the copy in notebooks/ serves JupyterLab and GitHub."""
    for image in list(doctree.findall(nodes.image)):
        if image["uri"].endswith(".svg"):
            relative, path = app.env.relfn2path(image["uri"], app.env.docname)
            app.env.note_dependency(relative)
            image.replace_self(nodes.raw(text=region(Path(path), image.get("alt", "")), format="html"))


def region(path: Path, alt: str) -> str:
    """A drawing in the text; on a phone it is wider than the page, and a keyboard can move it."""
    text = picture(path).replace('role="img"', f'role="img" aria-label="{escape(alt)}"', 1)
    return f'<div class="sigma-picture" tabindex="0" role="region" aria-label="drawing">{text}</div>'


def picture(path: Path) -> str:
    """The drawing without its own colours of text: book.css has them."""
    return re.sub(r"<style>.*?</style>", "", path.read_text("utf-8"), flags=re.S)


def card(notebook: Path) -> str:
    """A chapter's picture, its short title, and its first heading: the question."""
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells]
    drawing = picture(notebook.parent / next(found[1] for cell in cells if (found := NAMED.search(cell))))
    drawing = re.sub(r"<title>.*?</title>", "", drawing, flags=re.S).replace('role="img"', 'aria-hidden="true"', 1)
    number, question = int(notebook.name[:2]), cells[0].splitlines()[0].removeprefix("# ")
    words = f"<b>{number} · {escape(CHAPTERS[number].title)}</b><span>{escape(question)}</span>"
    return f'<li><a href="../notebooks/{notebook.stem}.html">{drawing}{words}</a></li>'


class Live(Directive):
    """```{live} results/toy.jsonl```: share and probability of the lowest layer's experts, window after window."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        env.note_dependency(self.arguments[0])
        loads = {f"{e['step']:,}": e for e in record.read(ROOT / self.arguments[0]) if e["kind"] == "load"}
        moving = Explore(lambda step: figures.share_and_probability(loads[step]), "optimizer step", list(loads))
        return [drawn(moving.static().to_plotly_json())]


class Chapters(Directive):
    def run(self) -> list[nodes.Node]:
        found = sorted((ROOT / "notebooks").glob("*.ipynb"))
        for notebook in found:
            self.state.document.settings.env.note_dependency(str(notebook.relative_to(ROOT)))
        return [nodes.raw(text=f'<ul class="sigma-cards">{"".join(map(card, found))}</ul>', format="html")]


def setup(app):
    app.add_directive("live", Live)
    app.add_directive("chapters", Chapters)
    app.connect("doctree-read", inline, priority=400)  # before Sphinx collects images to copy
    return {"parallel_read_safe": False, "parallel_write_safe": True, "version": "1"}
