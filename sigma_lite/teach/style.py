"""The book's look: the house's colours on transparent paper, so that one recorded figure serves light and dark pages."""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io as pio

from sigma_lite.figures.style import BLUE, FONT, GREEN, GREY, PINK
from sigma_lite.figures.style import SERIES as PALETTE
from sigma_lite.figures.style import VERMILLION as ORANGE

__all__ = ["BLUE", "CLEAR", "FAINT", "GREEN", "GREY", "INK", "NAME", "ORANGE", "PALETTE", "PINK", "template", "use"]

INK = "#6f7982"  # contrast 4.4 on white and 4.2 on #121212
FAINT = "rgba(127,127,127,0.25)"
CLEAR = "rgba(0,0,0,0)"
NAME = "sigma"


def template() -> go.layout.Template:
    """A plotly template of 1 kB; plotly's own is six times that in every figure of a page."""
    axis = {"gridcolor": FAINT, "zerolinecolor": FAINT, "linecolor": FAINT, "ticks": "outside", "tickcolor": FAINT}
    axis |= {"automargin": True}
    return go.layout.Template(
        layout={
            "colorway": PALETTE,
            "font": {"family": FONT, "color": INK, "size": 13},
            "paper_bgcolor": CLEAR,
            "plot_bgcolor": CLEAR,
            "margin": {"l": 60, "r": 20, "t": 70, "b": 50},
            "title": {"x": 0.0, "xref": "paper", "xanchor": "left", "yanchor": "top", "y": 0.97, "font": {"size": 15}},
            "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0.0, "xanchor": "left"},
            "modebar": {"bgcolor": CLEAR, "color": INK},
            "xaxis": axis,
            "yaxis": axis,
        }
    )


def use() -> None:
    """Make it the default of this process."""
    pio.templates[NAME] = template()
    pio.templates.default = NAME
