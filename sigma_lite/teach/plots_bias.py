"""Figures of the chapter on loss-free balance: scores and a bias in, plotly figure out."""

from __future__ import annotations

import plotly.graph_objects as go
from torch import Tensor

from sigma_lite.balance.dual import ascend, choose
from sigma_lite.figures.style import BLUE, VERMILLION


def race(updates: int, rate: float, factor: float, logits_TE: Tensor) -> go.Figure:
    """Score plus bias of each expert (5 % to 95 % of tokens, dot: median) after some sign updates, and its load; K = 1.

    Args:
        updates: of the bias, from 0.
        rate: u, in units of the score.
        factor: on the logits, before the sigmoid: how far scores differ.
    """
    (T, E), score_TE = logits_TE.shape, (factor * logits_TE).double().sigmoid()
    path = ascend(score_TE, 1, updates, "sign", rate)
    low, middle, high = (score_TE.quantile(q, dim=0) + path.price for q in (0.05, 0.5, 0.95))
    loads = choose(score_TE, path.price, 1).loads
    experts, figure = list(range(E)), go.Figure()
    arms = {
        "array": _rounded(high - middle),
        "arrayminus": _rounded(middle - low),
        "color": BLUE,
        "thickness": 2,
        "width": 5,
    }
    figure.add_scatter(
        x=experts, y=_rounded(middle), error_y=arms, mode="markers", name="score + bias", marker={"color": BLUE, "size": 7},
        hovertemplate="expert %{x}: median %{y:.2f}",
    )  # fmt: skip
    figure.add_bar(
        x=experts, y=loads.tolist(), name="load", yaxis="y2", marker={"color": VERMILLION, "opacity": 0.35},
        hovertemplate="expert %{x}: %{y} tokens",
    )  # fmt: skip
    fullest = f"fullest {int(loads.max())} tokens (fair: {T / E:g})"
    figure.update_layout(
        title=f"{updates} updates of {rate:g}: {fullest}, spread {path.spread[-1]:.2f}",
        height=440,
        xaxis={"title": "expert", "dtick": 1},
        yaxis={"title": "score + bias", "domain": [0.38, 1]},
        yaxis2={"title": "tokens", "domain": [0, 0.28], "anchor": "x", "range": [0, T / 2]},
    )
    return figure


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
