"""Figures of the chapters on collapse and on the balance loss: loads in, plotly figure out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures.series import deviation
from sigma_lite.figures.style import HEAT_MAX, LIGHT, fade
from sigma_lite.teach.style import BLUE, GREY, ORANGE


def load_map(f_LE: Sequence[Sequence[float]], title: str, order: str = "by number") -> go.Figure:
    """Load deviation of every expert of every layer in whole percent, one row a layer; dead experts in black.

    Args:
        f_LE: load share of one window; each row sums to 1.
        order: "by number" keeps each expert in its column, "by load" sorts each layer.
    """
    percent_LE = np.round(100 * deviation(np.asarray(f_LE)))
    percent_LE = np.where(np.asarray(f_LE) > 0, np.maximum(percent_LE, -99), percent_LE)
    if order == "by load":
        percent_LE = -np.sort(-percent_LE, axis=1)
    ticks = [-100, 0, 100, 200, HEAT_MAX]
    bar = {"title": "deviation (%)", "tickvals": ticks, "ticktext": ["dead", "0", "+100", "+200", f"≥ +{HEAT_MAX}"]}
    figure = go.Figure(
        go.Heatmap(
            z=percent_LE.astype(int).tolist(), zmin=-100, zmax=HEAT_MAX, colorscale=LIGHT.layout.coloraxis.colorscale,
            colorbar={**bar, "thickness": 10, "outlinewidth": 0}, xgap=0.5, ygap=2,
            hovertemplate="layer %{y}, expert %{x}: %{z:+d} %<extra></extra>",
        )
    )  # fmt: skip
    busiest, dead = percent_LE.max(), int((np.asarray(f_LE) == 0).sum())
    figure.update_xaxes(title="expert" if order == "by number" else "experts, most loaded first", showgrid=False)
    figure.update_yaxes(title="layer", autorange="reversed", dtick=1, showgrid=False)
    return figure.update_layout(title=f"{title}: busiest {busiest:+.0f} %, {dead} dead", height=170 + 45 * len(percent_LE))


def balance_loss_figure(f_E: Sequence[float], P_E: Sequence[float], title: str = "") -> go.Figure:
    """Share f (bars) and mean probability P (dots) of each expert in units of 1/E, and the LBL that they make."""
    f_E, P_E = np.asarray(f_E, float), np.asarray(P_E, float)
    E = len(f_E)
    figure = go.Figure()
    figure.add_bar(x=list(range(E)), y=(E * f_E).round(4).tolist(), name="share f", marker_color=fade(ORANGE, 0.5))
    marker = {"size": 11 if E <= 16 else 5, "color": BLUE}
    figure.add_scatter(x=list(range(E)), y=(E * P_E).round(4).tolist(), mode="markers", name="probability P", marker=marker)
    figure.add_hline(y=1, line={"dash": "dot", "color": GREY})
    figure.update_xaxes(title="expert", dtick=1 if E <= 16 else None, showgrid=False)
    figure.update_yaxes(title="in units of 1/E", rangemode="tozero")
    loss = E * float(f_E @ P_E)
    text = f"{title}LBL {loss:.2f}, busiest expert {100 * (E * f_E.max() - 1):+.0f} %"
    return figure.update_layout(title=text, height=380)


def eight_experts(agreement: float, unequal_f: float, unequal_P: float) -> tuple[np.ndarray, np.ndarray]:
    """(f, P) of eight experts, with LBL = 1 + 0.375 * agreement * unequal_f * unequal_P exactly.

    Args:
        agreement: correlation of P with f over experts, -1..1.
        unequal_f: 0 all loads equal .. 1, where the busiest expert has 2.75 times its share and two have nothing.
        unequal_P: 0 flat .. 1, half as unequal as f at its worst.
    """
    busy_E = np.array([1.75, 0.75, 0.25, 0.0, -0.25, -0.5, -1.0, -1.0])  # sums to 0
    other_E = np.array([0.0, 1.0, -1.0, 1.0, -1.0, 1.0, 0.0, -1.0])
    other_E -= busy_E * (busy_E @ other_E) / (busy_E @ busy_E)  # at a right angle to it, and as long
    other_E *= np.sqrt((busy_E @ busy_E) / (other_E @ other_E))
    direction_E = agreement * busy_E + np.sqrt(1 - agreement**2) * other_E
    return (1 + unequal_f * busy_E) / 8, (1 + 0.5 * unequal_P * direction_E) / 8
