"""The chapters' look: the house's, with less room above a figure, since few of them have a subtitle."""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io as pio

from sigma_lite.figures.style import BLUE, GREEN, GREY, LIGHT, PINK
from sigma_lite.figures.style import SERIES as PALETTE
from sigma_lite.figures.style import VERMILLION as ORANGE

__all__ = ["BLUE", "CLEAR", "FAINT", "GREEN", "GREY", "NAME", "ORANGE", "PALETTE", "PINK", "template", "use"]

FAINT = "rgba(127,127,127,0.25)"
CLEAR = "rgba(0,0,0,0)"
NAME = "sigma"


def template() -> go.layout.Template:
    """A plotly template of 2 kB; plotly's own is three times that in every figure of a page. The book's pages replace it by
    that of their theme."""
    changes = {"margin": {"l": 60, "r": 20, "t": 76, "b": 50}, "hovermode": "closest"}
    return go.layout.Template(data=LIGHT.data, layout={**LIGHT.layout.to_plotly_json(), **changes})


def use() -> None:
    """Make it the default of this process."""
    pio.templates[NAME] = template()
    pio.templates.default = NAME
