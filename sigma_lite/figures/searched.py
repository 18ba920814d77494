"""What a search over balance losses found: fitness in the order of evaluation, and loss against evenness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures import style
from sigma_lite.figures.arms import dress

MAKERS = {"founder": style.VERMILLION, "mutation": style.BLUE, "crossover": style.GREEN, "hook": style.PINK}
LONGEST = 90  # characters of an expression that a label shows


class Tried(NamedTuple):
    """One expression of a search: means over its seeds; less is better in each number."""

    number: int  # in the order of evaluation
    by: str  # one of MAKERS
    text: str
    fitness: float
    bits: float  # per byte of held-out text
    deviation: float  # of the loads, 0 .. 2


def fitness_in_order(tried: Sequence[Tried], mean: float, floor: float) -> go.Figure:
    """Fitness against number, the best so far as a line.

    Args:
        mean, floor: the founder's fitness over many seeds, and how far below it a fitness is still its noise.
    """
    title, fig = "Fitness of each expression", go.Figure()
    if not tried:
        return style.note(title, "no expression has trained yet")
    numbers, fitness = [one.number for one in tried], np.array([one.fitness for one in tried])
    _points(fig, tried, "fitness", x="number", y="fitness")
    best = {"color": style.GREY, "shape": "hv", "width": 2}
    fig.add_scatter(
        x=numbers, y=np.minimum.accumulate(fitness), name="best so far", mode="lines", line=best, hoverinfo="skip"
    )
    fig.add_hrect(y0=mean - floor, y1=mean + floor, fillcolor=style.GREY, opacity=0.15, line_width=0)
    low, high = min(float(fitness.min()), mean - floor), mean + 4 * floor
    fig.update_yaxes(title_text="fitness", range=[low - 0.2 * floor, high])
    fig.update_xaxes(title_text="expressions evaluated")
    above = int((fitness > high).sum())
    caption = "Grey band: what the founder's own seeds do to a mean over the search's seeds. What lies in it is nothing."
    caption += f" {above} expressions lie above the picture." if above else ""
    return dress(fig, title, "better: down", caption, height=440)


def loss_against_deviation(tried: Sequence[Tried]) -> go.Figure:
    """Held-out bits per byte against the deviation of loads: what the two parts of the fitness trade."""
    title, fig = "Loss against evenness", go.Figure()
    if not tried:
        return style.note(title, "no expression has trained yet")
    _points(fig, tried, "bits per byte", x="deviation", y="bits")
    fig.update_xaxes(title_text="deviation of loads (0 even, 2 all in one expert)")
    fig.update_yaxes(title_text="held-out bits per byte")
    return dress(fig, title, "better: down and left", "Means over the search's seeds, held-out text.", height=440)


def _points(fig: go.Figure, tried: Sequence[Tried], says: str, *, x: str, y: str) -> None:
    for by, colour in MAKERS.items():
        if of := [one for one in tried if one.by == by]:
            first = by == "founder"
            fig.add_scatter(
                x=[getattr(one, x) for one in of],
                y=[getattr(one, y) for one in of],
                name=by,
                mode="markers",
                marker={"color": colour, "size": 13 if first else 6, "symbol": "star" if first else "circle"},
                opacity=1.0 if first else 0.7,
                text=[f"#{one.number} {_short(one.text)}" for one in of],
                hovertemplate=f"%{{text}}: %{{y:.4f}} {says}",
            )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
