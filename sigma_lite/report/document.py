"""What every page of ours is: one HTML file with numbered figures, in light and dark, that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template

import plotly.graph_objects as go
import plotly.offline

from sigma_lite import __version__
from sigma_lite.figures import style
from sigma_lite.report import markup


@dataclass(frozen=True)
class Plot:
    name: str  # letters and dashes
    figure: go.Figure
    caption: str


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    text: str
    parts: tuple  # each: HTML text, one Plot, or a pair of Plots side by side


def document(*, kind: str, title: str, lead: str, head: str, sections: Sequence[Section], footer: str) -> str:
    """The page as text. `head` and `footer` are HTML; kind, title and lead are plain. The scripts are allowed by hash."""
    boot, plotly = page_part("plots.js") + page_part("page.js"), plotly_js()
    return Template(page_part("page.html")).substitute(
        hashes=f"{markup.script_hash(plotly)} {markup.script_hash(boot)}",
        version=markup.escape(__version__),
        kind=markup.escape(kind),
        title=markup.escape(title),
        css=page_part("page.css") + page_part("plots.css"),
        lead=markup.escape(lead),
        head=head,
        nav=" ".join(f'<a href="#{section.name}">{markup.escape(section.title)}</a>' for section in sections),
        sections=numbered(sections),
        footer=footer,
        themes=markup.data("themes", {"light": _theme(style.LIGHT), "dark": _theme(style.DARK)}),
        plotly=plotly,
        boot=boot,
    )


def numbered(sections: Sequence[Section]) -> str:
    """Sections one after the other; figures that have data are numbered through the page."""
    number, pieces = 0, []
    for section in sections:
        pieces.append(f'<section id="{section.name}"><h2>{markup.escape(section.title)}</h2>')
        pieces += [markup.paragraph(section.text)] if section.text else []
        for part in section.parts:
            plots = [part] if isinstance(part, Plot) else part
            if isinstance(part, str):
                pieces.append(part)
                continue
            drawings = []
            for plot in plots:
                number += bool(plot.figure.data)
                drawings.append(markup.figure(plot.figure, plot.name, number, plot.caption))
            pieces.append(drawings[0] if len(drawings) == 1 else f'<div class="pair">{"".join(drawings)}</div>')
        pieces.append("</section>")
    return "\n".join(pieces)


def plotly_js() -> str:
    """plotly.js from the installed plotly wheel, with the line ends that a browser hashes."""
    return plotly.offline.get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")


def page_part(name: str) -> str:
    """A file of this folder that goes into a page."""
    return resources.files("sigma_lite.report").joinpath(name).read_text("utf-8")


def _theme(template: go.layout.Template) -> dict:
    return template.to_plotly_json()
