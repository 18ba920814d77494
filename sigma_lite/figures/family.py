"""Balance against loss, an arm a point, with its interval and what is noise: the family's picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures import style
from sigma_lite.figures.arms import ENDS, above, dress, percent_axis
from sigma_lite.figures.lab_final import SYMBOLS


class Point(NamedTuple):
    """An arm: deviations as fractions, one a seed; its difference from the baseline and the ends of the interval, in %."""

    name: str
    deviations: Sequence[float]
    difference: float
    low: float  # -inf for one seed
    high: float


def balance_against_loss(points: Sequence[Point], noise: float, baseline: str) -> go.Figure:
    """Difference in bits per byte from the baseline against layer 0's held-out deviation (log axis, %).

    Args:
        noise: half the height of the band within which a difference is nothing, in %; NaN where that is not known.
        baseline: the name of what is compared with.
    """
    title, fig = "Balance against loss, held-out text", go.Figure()
    if not points:
        return style.note(title, "no arm has a seed in common with the baseline")
    places = above([np.mean(point.deviations) for point in points])
    middle = float(np.sqrt(places.min() * places.max()))  # of the log axis
    for place, (point, at) in enumerate(zip(points, places.tolist(), strict=True)):
        ends = above([min(point.deviations), max(point.deviations)])
        known = np.isfinite([point.low, point.high]).all()
        bars = {"thickness": 1.2, "width": 3}
        fig.add_scatter(
            x=[at],
            y=[point.difference],
            error_x={"array": [ends[1] - at], "arrayminus": [at - ends[0]], **bars} if len(point.deviations) > 1 else None,
            error_y={"array": [point.high - point.difference], "arrayminus": [point.difference - point.low], **bars}
            if known
            else None,
            name=f"{place + 1} {point.name}",
            mode="markers+text",
            text=[str(place + 1)],
            textposition="top right" if at < middle else "top left",  # inwards: a phone's plot ends soon after a point
            textfont={"color": style.line_of(place)["color"], "size": 11},
            cliponaxis=False,
            marker={"color": style.line_of(place)["color"], "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 11},
            hovertemplate=f"{point.name}: %{{x:+.0f}} %, %{{y:+.2f}} % bits per byte",
        )
    if np.isfinite(noise):
        fig.add_hrect(y0=-noise, y1=noise, fillcolor=style.GREY, opacity=0.15, line_width=0)
    percent_axis(fig, "layer 0: busiest expert on held-out text", axis="xaxis")
    fig.update_yaxes(title_text=f"bits per byte against {baseline} (%)", zeroline=True)
    caption = (
        "Numbers: places by loss, from the best. Down is a better model, left a more even layer 0. Bars: 95 % interval of"
        " the paired difference, and the range of the deviation over seeds. What lies inside the grey band is noise of"
        f" seeds. {ENDS}"
    )
    height = max(620, 80 + 20 * len(points))  # the legend has two columns, and plotly cuts it at half the height
    return dress(fig, title, "better: down and left", caption, height=height)
