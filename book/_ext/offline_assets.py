"""Pages that ask nobody for anything: plotly.js comes from the plotly wheel, MathJax from a wheel, widgets stay home.

myst-nb does not know plotly's MIME type and would drop every figure; a renderer for it is the one thing it lacks.
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

PLOTLY_MIME = "application/vnd.plotly.v1+json"
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
MARK = "data-plotly-for"
number = itertools.count()


class PlotlyFigure:
    """A placeholder and the figure's JSON; boot.js draws the one from the other."""

    # figures first; a widget is dead without a kernel, so what it has beside its view (a figure, html) is shown instead
    mime_priority_overrides = [("html", PLOTLY_MIME, 1), ("html", WIDGET_MIME, None)]

    @staticmethod
    def handle_mime(renderer, data, inline):
        if data.mime_type != PLOTLY_MIME or inline:
            return None
        spec = data.content if isinstance(data.content, dict) else json.loads(data.content)
        height = spec.get("layout", {}).get("height") or 450
        figure = {"data": spec.get("data", []), "layout": {**spec.get("layout", {}), "height": height}}
        figure["config"] = {"responsive": True, "displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""}
        name = f"plotly-{next(number)}"
        body = json.dumps(figure, separators=(",", ":")).replace("<", "\\u003c")  # no text may end the script element
        html = (
            f'<div class="sigma-figure" id="{name}" style="min-height:{height}px"></div>'
            f'<script type="application/json" {MARK}="{name}">{body}</script>'
        )
        return [nodes.raw(text=html, format="html", classes=["output", "text_html"])]


def add_scripts(app, pagename, templatename, context, doctree) -> None:
    app.add_js_file("boot.js")
    if doctree is not None and any(MARK in node.astext() for node in doctree.findall(nodes.raw)):
        app.add_js_file("plotly.min.js", priority=400)  # before boot.js, and only on pages that have a figure


def copy_assets(app, exception) -> None:
    if exception or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    mathjax = next(f for f in importlib.metadata.files("sphinx-mathjax-offline") if str(f).endswith("/mathjax/tex-svg.js"))
    for source in (Path(plotly.__file__).parent / "package_data" / "plotly.min.js", Path(mathjax.locate())):
        if not (static / source.name).exists():
            shutil.copy2(source, static / source.name)


def setup(app):
    known = render.load_mime_renders
    render.load_mime_renders = lambda: [*known(), PlotlyFigure]  # an entry point would need an installed package
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", copy_assets)
    return {"parallel_read_safe": False, "parallel_write_safe": True, "version": "1"}
