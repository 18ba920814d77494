"""How every figure looks: palette, two templates (light for notebooks and print, dark for the report), shared parts.

Colours come from the Okabe-Ito set, moved in lightness so that each has a contrast of 3:1 or more on both papers and
stays distinct under the common kinds of colour blindness (tests/test_figures.py measures both).
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures.series import Entries, switch_steps

BLUE, VERMILLION, GREEN, PINK, AMBER, GREY = "#1f78b8", "#d55e00", "#009b72", "#c2649a", "#a87b00", "#7d858c"
SERIES = (BLUE, VERMILLION, GREEN, PINK, AMBER, GREY)
DASHES = ("solid", "dash", "dot", "dashdot")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
LIGHT_PAPER, DARK_PAPER = "#ffffff", "#14171b"
HEAT_MAX = 300  # load deviation in % at which the heat map's colour ends; fixed, so that two runs can be compared


def fade(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _heat_scale(dead: str, low: str, below: str, balanced: str, above: str, high: str) -> list:
    """Colours over -100..HEAT_MAX %. Dead experts leave the scale: exactly -100 % has a colour of its own."""
    span = 100 + HEAT_MAX
    stops = [(-100, dead), (-99.5, dead), (-99.5, low), (-50, below), (0, balanced), (100, above), (HEAT_MAX, high)]
    return [[(at + 100) / span, colour] for at, colour in stops]


def _template(ink: str, muted: str, grid: str, paper: str, heat: list) -> go.layout.Template:
    axis = {"gridcolor": grid, "linecolor": grid, "zeroline": False, "automargin": True}
    axis |= {"title": {"standoff": 8, "font": {"size": 13}}, "tickfont": {"size": 12}}
    # plotly would choose an ink for the colour of a box as if nothing shone through it: dark on dark
    inside = {"bar": [{"insidetextfont": {"color": ink}}], "heatmap": [{"textfont": {"color": ink}}]}
    return go.layout.Template(
        data=inside,
        layout={
            "font": {"family": FONT, "size": 13, "color": ink},
            "paper_bgcolor": paper,
            "plot_bgcolor": paper,
            "colorway": SERIES,
            "xaxis": {**axis, "ticks": "outside", "tickcolor": grid},
            "yaxis": axis,
            "title": {
                "x": 0,
                "xref": "paper",
                "y": 1,
                "yanchor": "top",
                "pad": {"t": 14},
                "font": {"size": 17},
                "subtitle": {"font": {"color": muted, "size": 12}},
            },
            "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": muted, "activecolor": ink},
            "hoverlabel": {"bgcolor": paper, "bordercolor": grid, "font": {"color": ink}, "align": "left"},
            "hovermode": "x",
            "margin": {"l": 64, "r": 28, "t": 112, "b": 52},
            "shapedefaults": {"line": {"color": muted, "width": 1, "dash": "dot"}},
            "annotationdefaults": {
                "showarrow": False,
                "font": {"color": muted, "size": 12},
            },
            "coloraxis": {
                "colorscale": heat,
                "colorbar": {
                    "outlinewidth": 0,
                    "thickness": 10,
                    "x": 1.01,
                    "tickfont": {"size": 11},
                    "title": {"side": "right", "font": {"size": 12}},
                },
            },
        },
    )


LIGHT = _template(
    ink="#1c2126",
    muted="#5b646c",
    grid="#e3e6e9",
    paper=LIGHT_PAPER,
    heat=_heat_scale("#000000", "#0b4f8a", "#7db5de", "#f4f4f2", "#f0a35e", "#8a2d00"),
)
DARK = _template(
    ink="#e4e7ea",
    muted="#9aa4ad",
    grid="#2c3239",
    paper=DARK_PAPER,
    heat=_heat_scale("#ffffff", "#6db6f2", "#2b5f8c", "#23282e", "#b0560f", "#ffb36b"),
)


def dress(fig: go.Figure, title: str, subtitle: str = "", *, height: int = 380, **layout: object) -> go.Figure:
    """Give a figure the house's look, a title (what is drawn) and a subtitle (how to read it)."""
    fig.update_layout(template=LIGHT, title={"text": title, "subtitle": {"text": subtitle}}, height=height)
    return fig.update_layout(**layout)


def note(title: str, text: str) -> go.Figure:
    """A figure without data that says why."""
    fig = go.Figure().add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper")
    return dress(fig, title, height=200, xaxis_visible=False, yaxis_visible=False)


def depth_colour(layer: int, n_layers: int) -> str:
    """Vermillion for layer 0, blue for the last: warm is low, cool is deep; equal contrast all the way."""
    at = layer / max(n_layers - 1, 1)
    ends = [np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (VERMILLION, BLUE)]
    mixed = np.sqrt((1 - at) * ends[0] ** 2 + at * ends[1] ** 2)  # mixed as light, not as numbers: no dark middle
    return "#" + "".join(f"{round(float(c)):02x}" for c in mixed)


def line_of(place: int) -> dict:
    """The line of the n-th run or arm. Colour first, then dash: line 7 is told from line 1 without colour."""
    n_colours = len(SERIES)
    return {"color": SERIES[place % n_colours], "dash": DASHES[place // n_colours % len(DASHES)], "width": 2}


def mark_switch(fig: go.Figure, entries: Entries) -> go.Figure:
    """A dotted line through all rows at the step at which experts per token changed, named above them."""
    steps = switch_steps(entries)
    lift = 16 if fig.layout.annotations else 0  # over the titles of rows
    for step in steps:
        fig.add_shape(type="line", x0=step, x1=step, xref="x", y0=0, y1=1, yref="paper")
        fig.add_annotation(text="sparsity switch", x=step, xref="x", y=1, yref="paper", yanchor="bottom", yshift=lift)
    return fig.update_layout(legend_y=1.09) if steps else fig


def level(fig: go.Figure, x: np.ndarray, value: float, name: str, *, dash: str = "dash", **where: int) -> go.Figure:
    """A horizontal reference line over the range of x; a trace, so that the axis makes room for it."""
    ends = [float(np.min(x)), float(np.max(x))]
    line = {"color": GREY, "width": 1.5, "dash": dash}
    trace = go.Scatter(x=ends, y=[value] * 2, name=name, mode="lines", line=line, hoverinfo="skip")
    return fig.add_trace(trace, row=where.get("row"), col=where.get("col"))
