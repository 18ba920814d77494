"""One look for every figure of the book. Each colour has contrast above 4 on white and on the dark page alike, and the
paper is transparent, so that one recorded figure serves both themes."""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io as pio

BLUE, ORANGE, GREEN, PURPLE, RED = "#1d79ce", "#c05a10", "#148943", "#9d59c8", "#d63f51"
TEAL, BROWN, PINK, OLIVE, GREY = "#138585", "#9b6f3b", "#ce3c94", "#7a7c16", "#6f7982"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, BROWN, PINK, OLIVE, GREY)
FAINT = "rgba(127,127,127,0.25)"
CLEAR = "rgba(0,0,0,0)"
NAME = "sigma"


def template() -> go.layout.Template:
    """A plotly template of 1 kB; plotly's own is six times that in every figure of a page."""
    axis = {"gridcolor": FAINT, "zerolinecolor": FAINT, "linecolor": GREY, "ticks": "outside", "tickcolor": FAINT, "automargin": True}
    return go.layout.Template(
        layout={
            "colorway": PALETTE,
            "font": {"color": GREY, "size": 13},
            "paper_bgcolor": CLEAR,
            "plot_bgcolor": CLEAR,
            "margin": {"l": 60, "r": 20, "t": 60, "b": 50},
            "title": {"x": 0.0, "xref": "paper", "xanchor": "left", "font": {"size": 15}},
            "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1.0, "xanchor": "right"},
            "xaxis": axis,
            "yaxis": axis,
            "colorscale": {"sequential": "Viridis", "diverging": "RdBu"},
        }
    )


def use() -> None:
    """Make it the default of this process."""
    pio.templates[NAME] = template()
    pio.templates.default = NAME
