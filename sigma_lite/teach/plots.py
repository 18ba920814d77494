"""Figures that chapters share, as pure functions: values in, plotly figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures.style import AMBER, BLUE, GREEN, GREY, PINK, VERMILLION, fade

Curve = tuple[Sequence[float], Sequence[float]]
MANY = (BLUE, VERMILLION, GREEN, PINK, AMBER, GREY, "#5b7f2b", "#7d5bbe", "#138585", "#b03a5b", "#7a7c16")
LETTERS = {"min_width": 640}  # pixels; the page of the book lets a narrower window scroll over the figure
MARKS = str.maketrans({"\n": "↵", " ": "·", "\t": "→", "\r": "␍"})


def lines(
    curves: Mapping[str, Curve], title: str, x: str, y: str, level: Mapping[str, float] | None = None, **layout: object
) -> go.Figure:
    """Named curves (x values, y values); `level` adds named dashed lines across the plot, such as a known limit."""
    figure = go.Figure()
    for name, (xs, ys) in curves.items():
        figure.add_scatter(x=list(xs), y=list(ys), name=name, mode="lines")
    ends = [f([v for xs, _ in curves.values() for v in xs]) for f in (min, max)]
    for name, value in (level or {}).items():
        figure.add_scatter(x=ends, y=[value] * 2, name=name, mode="lines", line={"dash": "dash", "color": GREY})
    return figure.update_layout(
        {"title": title, "xaxis_title": x, "yaxis_title": y, "height": 400, "showlegend": True, **layout}
    )


def heat(values: np.ndarray, title: str, x: str, y: str, *, low: float, high: float, names: Sequence[str] = ()) -> go.Figure:
    """A matrix as colours from nothing (`low`) to blue (`high`), the first row on top; `names` label both axes."""
    values = np.asarray(values, dtype=float)
    scale = (
        [[0, fade(BLUE, 0.0)], [1, fade(BLUE, 1.0)]] if low >= 0 else [[0, VERMILLION], [0.5, fade(GREY, 0.05)], [1, BLUE]]
    )
    figure = go.Figure(go.Heatmap(z=values.round(4).tolist(), zmin=low, zmax=high, colorscale=scale, xgap=1, ygap=1))
    ticks = {"tickvals": list(range(len(names))), "ticktext": list(names)} if names else {}
    figure.update_xaxes(title=x, **ticks)
    figure.update_yaxes(title=y, autorange="reversed", **ticks)
    return figure.update_layout(title=title, height=460)


def token_strip(pieces: Sequence[str], title: str, kinds: Sequence[str] | None = None, columns: int = 72) -> go.Figure:
    """Text cut into its tokens: a box as wide as each piece is long, broken into rows of about `columns` characters.

    Neighbours alternate between four colours, or, with `kinds` (one word per piece), each kind has its own colour.
    """
    rows, starts = places(pieces, columns)
    groups = [str(number % 4) for number in range(len(pieces))] if kinds is None else list(kinds)
    colours = dict(zip(dict.fromkeys(groups), MANY, strict=False))
    figure = go.Figure()
    for group, colour in colours.items():
        mine = [number for number, own in enumerate(groups) if own == group]
        figure.add_bar(
            x=[len(pieces[i]) for i in mine],
            base=[starts[i] for i in mine],
            y=[rows[i] for i in mine],
            text=[pieces[i].translate(MARKS) for i in mine],
            name=group,
            orientation="h",
            width=0.88,  # or plotly derives it from each trace's own rows
            marker={"color": fade(colour, 0.3), "line": {"color": colour, "width": 1}},
            textposition="inside",
            textangle=0,
            insidetextanchor="middle",
            textfont={"family": "ui-monospace, monospace", "size": 12},
            constraintext="none",
            hovertemplate="%{text}<extra></extra>",
        )
    figure.update_xaxes(visible=False, range=[-0.5, columns + 8])
    figure.update_yaxes(visible=False, range=[max(rows, default=0) + 0.6, -0.6])
    height = 110 + 30 * (max(rows, default=0) + 1)
    return figure.update_layout(title=title, barmode="overlay", height=height, showlegend=kinds is not None, meta=LETTERS)


def places(pieces: Sequence[str], columns: int) -> tuple[list[int], list[int]]:
    """Row and first column of each piece; a row ends after a line break, or where it is full."""
    rows, starts, row, column = [], [], 0, 0
    for piece in pieces:
        if column and column + len(piece) > columns:
            row, column = row + 1, 0
        rows.append(row)
        starts.append(column)
        column += len(piece)
        if "\n" in piece:
            row, column = row + 1, 0
    return rows, starts
