"""Figures of the chapter on progressive sparsification: a schedule in, plotly figure out."""

from __future__ import annotations

import plotly.graph_objects as go

from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.config import ModelConfig
from sigma_lite.figures.style import BLUE, GREY, fade


def active(switch_at: float, head: str, preset: str = "sigma_moe_tiny") -> go.Figure:
    """Active parameters, in billions, over a run whose first layers begin with `head` and switch to one expert.

    Args:
        switch_at: share of the run at which every layer is set to one expert, 0..1.
        head: experts per token of the first layers, as text: "8 8 4".
        preset: of ModelConfig.

    Raises: ConfigError when an entry is not in 1..E.
    """
    net = ModelConfig.preset(preset)
    first = k_per_layer(0, switch_step=1, n_layers=net.n_layers, head=[int(k) for k in head.split()])
    early, late = (net.ledger(k).active / 1e9 for k in (first, (1,) * net.n_layers))
    more = switch_at * (early / late - 1)
    figure = go.Figure()
    figure.add_scatter(
        x=[0, switch_at, switch_at, 1], y=[early, early, late, late], mode="lines", name="this schedule",
        line={"color": BLUE}, fill="tozeroy", fillcolor=fade(BLUE, 0.2), hovertemplate="%{y:.3f} B",
    )  # fmt: skip
    one = {"x": [0, 1], "y": [late, late], "line": {"color": GREY, "dash": "dash"}}
    figure.add_scatter(**one, mode="lines", name="K = 1 from the start", hovertemplate="%{y:.3f} B")
    figure.update_xaxes(title_text="share of training", range=[0, 1])
    figure.update_yaxes(title_text="active parameters (billions)", range=[0, 1])
    title = f"{sum(first)} experts per token, then {net.n_layers}: {early:.3f} B → {late:.3f} B, {more:+.1%} work"
    return figure.update_layout(title=title, height=400)
