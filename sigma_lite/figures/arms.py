"""What the lab's figures share: the arms of one experiment's results, each with its colour, its seeds and their mean.

`results` is what `sigma_lite.lab.read_results` returns. A curve is (x, y), two arrays of the same length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures import style

Results = Mapping
Curve = tuple[np.ndarray, np.ndarray]
PERCENTS = [value * 10**power for power in range(6) for value in (1, 2, 5)]


def arms(results: Results) -> list[tuple[int, str, list[dict]]]:
    """(place, name, runs) of every arm that has runs, one run a seed. The place fixes its colour."""
    found = [
        (place, name, [run for run in results["runs"] if run["arm"] == name]) for place, name in enumerate(results["arms"])
    ]
    return [arm for arm in found if arm[2]]


def draw_arm(fig: go.Figure, place: int, name: str, curves: Sequence[Curve], hover: str, row: int | None = None) -> None:
    """One arm: thin lines for its seeds where there are several, a thick one for their mean; the legend in row 1."""
    if not any(len(x) for x, _ in curves):
        return
    where = {"row": row, "col": 1} if row else {}
    line, shared = style.line_of(place), {"legendgroup": name, "name": name, **where}
    if len(curves) > 1:
        for x, y in curves:
            thin = {**line, "width": 1}
            fig.add_scatter(x=x, y=y, mode="lines", line=thin, opacity=0.45, showlegend=False, hoverinfo="skip", **shared)
    x, y = mean_of(curves)
    mode = "lines" if len(x) > 1 else "markers"
    thick, legend = {**line, "width": 2.5}, row in (None, 1)
    fig.add_scatter(x=x, y=y, mode=mode, line=thick, hovertemplate=hover, showlegend=legend, **shared)


def mean_of(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves at the x that all of them have."""
    common = sorted(set.intersection(*(set(np.asarray(x).tolist()) for x, _ in curves)))
    return np.array(common), np.mean([np.asarray(y)[np.isin(x, common)] for x, y in curves], axis=0)


def tokens_per_step(run: dict) -> float:
    return run["curve"]["tokens"][-1] / run["curve"]["step"][-1]


def percent_axis(fig: go.Figure, title: str, axis: str = "yaxis") -> None:
    """A log axis that reads +10 %, +20 %, +50 %, ... and always shows +20 to +100 %; what is drawn must be above 0."""
    letter, name = axis[0], axis.replace("axis", "")
    drawn = [trace for trace in fig.data if (trace[f"{letter}axis"] or letter) == name]
    # plotly.js cannot do this by itself: with autorangeoptions.include, a log axis cuts off what lies beyond
    low = min(20, *(float(np.min(trace[letter])) for trace in drawn))
    high = max(100, *(float(np.max(np.asarray(trace[letter]) + _upper_bar(trace[f"error_{letter}"]))) for trace in drawn))
    span = [float(np.log10(low)) - 0.06, float(np.log10(high)) + 0.06]
    ticks = {"tickvals": PERCENTS, "ticktext": [f"+{value:,} %" for value in PERCENTS]}
    fig.layout[axis].update(title_text=title, type="log", range=span, **ticks)


def _upper_bar(error: go.scatter.ErrorX | go.scatter.ErrorY) -> np.ndarray | float:
    return 0.0 if error.array is None else error.array


ENDS = "The axis ends at +1\u00a0%: what lies below is drawn there."


def above(values: Sequence[float], least: float = 1.0) -> np.ndarray:
    """Deviations as fractions -> percent for a log axis, which has no place for 0: at least `least` %."""
    return np.maximum(100 * np.asarray(values, dtype=float), least)


LEGEND_BELOW = {"legend": {"yref": "container", "y": 0, "yanchor": "bottom"}, "margin_b": 84}  # panels have titles above


def dress(fig: go.Figure, title: str, subtitle: str, caption: str, *, height: int = 380, **layout: object) -> go.Figure:
    """`style.dress` with a caption; a legend that does not fit in one line above the panels goes below them."""
    named = sum(len(trace.name or "") for trace in fig.data if getattr(trace, "showlegend", False) is not False)
    if named > 70 and "legend" not in layout:
        layout |= {**LEGEND_BELOW, "margin_b": 100 + 20 * (named // 90)}
        height += 60
    return style.dress(fig, title, subtitle, meta={"caption": caption}, hovermode="closest", height=height, **layout)
