"""Pages that ask nobody for anything: plotly.js comes from the plotly wheel, MathJax from a wheel, widgets stay home.

myst-nb does not know plotly's MIME type and would drop every figure; a renderer for it is the one thing it lacks. Figures
look and behave as those of the report: its script (sigma_lite/report/plots.js) and its two themes draw them.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import shutil
from pathlib import Path

import myst_nb.core.render as render
import plotly
from docutils import nodes

from sigma_lite.figures import style
from sigma_lite.report import markup
from sigma_lite.report.document import page_part
from sigma_lite.teach.explore import SLIDER_ROOM

PLOTLY_MIME = "application/vnd.plotly.v1+json"
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
MARK = 'class="sigma-figure"'
TITLE_ROOM = 30  # pixels of a notebook's figure that its title takes; on the page the title is text
number = itertools.count()


class PlotlyFigure:
    """The figure's title as text, a place for the drawing, and its JSON; plots.js draws the one from the other."""

    # figures first; a widget is dead without a kernel, so what it has beside its view (a figure, html) is shown instead
    mime_priority_overrides = [("html", PLOTLY_MIME, 1), ("html", WIDGET_MIME, None)]

    @staticmethod
    def handle_mime(renderer, data, inline):
        if data.mime_type != PLOTLY_MIME or inline:
            return None
        spec = data.content if isinstance(data.content, dict) else json.loads(data.content)
        return [drawn(spec)]


def drawn(spec: dict) -> nodes.raw:
    """A figure of plotly.js as a node of the page."""
    name, layout = f"plotly-{next(number)}", dict(spec.get("layout", {}))
    title = layout.pop("title", None) or {}
    title = {"text": title} if isinstance(title, str) else title
    words, how = title.get("text") or "", (title.get("subtitle") or {}).get("text") or ""
    margin = {**layout.get("template", {}).get("layout", {}).get("margin", {}), **layout.get("margin", {})}
    height = layout.pop("height", None) or 450
    if layout.get("sliders"):  # plots.js puts them above the drawing, where a keyboard reaches them
        height, margin["b"] = height - SLIDER_ROOM, margin["b"] - SLIDER_ROOM
    layout |= {"margin": {**margin, "t": 44}, "hovermode": layout.get("hovermode", "closest")}
    layout.pop("template", None)  # the page has its own, for each theme
    content = {"data": spec.get("data", []), "layout": layout, "frames": spec.get("frames") or []}
    caption = f'<span class="title">{markup.escape(words)}</span> <span class="subtitle">{markup.escape(how)}</span>'
    place = f'data-figure="{name}" role="group" aria-label="{markup.escape(words)}"'
    html = (
        f'<figure {MARK}><figcaption aria-live="polite">{caption}</figcaption>'
        f'<div class="plot" {place} style="height:{height - TITLE_ROOM}px"></div></figure>'
        + markup.data(f"data-{name}", markup.plain(content))
    )
    return nodes.raw(text=html, format="html", classes=["output", "text_html"])


def add_scripts(app, pagename, templatename, context, doctree) -> None:
    app.add_js_file("boot.js")
    if doctree is not None and any(MARK in node.astext() for node in doctree.findall(nodes.raw)):
        app.add_js_file("plotly.min.js", priority=400)  # before boot.js, and only on pages that have a figure
        app.add_js_file("plots.js", priority=410)


def copy_assets(app, exception) -> None:
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    mathjax = next(f for f in importlib.metadata.files("sphinx-mathjax-offline") if str(f).endswith("/mathjax/tex-svg.js"))
    for source in (Path(plotly.__file__).parent / "package_data" / "plotly.min.js", Path(mathjax.locate())):
        if not (static / source.name).exists():
            shutil.copy2(source, static / source.name)
    themes = {"light": style.LIGHT.to_plotly_json(), "dark": style.DARK.to_plotly_json()}
    script = f"const SIGMA_THEMES = {json.dumps(themes)};\n{page_part('plots.js')}"
    (static / "plots.js").write_text(script, "utf-8")
    (static / "plots.css").write_text(page_part("plots.css"), "utf-8")


def setup(app):
    known = render.load_mime_renders
    render.load_mime_renders = lambda: [*known(), PlotlyFigure]  # an entry point would need an installed package
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", copy_assets)
    return {"parallel_read_safe": False, "parallel_write_safe": True, "version": "1"}
