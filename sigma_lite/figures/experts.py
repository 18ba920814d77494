"""Is the load balanced, and would the balance loss tell: curves over windows, one layer or all of them."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures import style
from sigma_lite.figures.series import Entries, dead, deep_layer, entropy, extremes, per_expert, per_layer, windows

NO_LOADS = "no load window recorded yet"
MOST_WINDOWS = 400  # windows drawn as a curve; a longer run shows that many, evenly spaced


def deviation_band(entries: Entries, layer: int = 0) -> go.Figure:
    """Load deviation of the most and of the least loaded expert over steps, any layer by menu (`layer` first).

    Deviation is E * f - 1, in percent: 0 balanced, -100 a dead expert, 100 (E - 1) when one expert gets every token.
    Drawn like figure 2a of Sigma-MoE-Tiny (2512.16248).
    """
    loads = windows(entries, MOST_WINDOWS)
    if not loads:
        return style.note("Load deviation", NO_LOADS)
    steps = [load["step"] for load in loads]
    highest_WL, lowest_WL = (
        100 * np.array(part) for part in zip(*(extremes(per_expert(load, "f")) for load in loads), strict=True)
    )
    n_layers, fig = highest_WL.shape[1], go.Figure()
    layer = range(n_layers)[layer]
    for each in range(n_layers):
        _band(fig, steps, highest_WL[:, each], lowest_WL[:, each], visible=each == layer)
    fig.add_hline(y=0, line_dash="dash")
    fig.update_xaxes(title_text="optimizer step")
    fig.update_yaxes(title_text="load deviation (% of the uniform share)", ticksuffix=" %")
    style.mark_switch(fig, entries)
    menu = _layer_menu(n_layers, active=layer, traces_each=2) if n_layers > 1 else []
    title = "Load deviation of the most and the least loaded expert"
    subtitle = f"layer {layer}; 0 = balanced" if n_layers == 1 else "0 = balanced, −100 % = an expert without a token"
    return style.dress(fig, title, subtitle, height=420, updatemenus=menu, hovermode="x unified")


def _band(fig: go.Figure, steps: list, highest: np.ndarray, lowest: np.ndarray, visible: bool) -> None:
    mode = "lines+markers" if len(steps) < 20 else "lines"
    shared = {"x": steps, "mode": mode, "visible": visible, "hovertemplate": "%{y:+.0f} %"}
    fig.add_scatter(**shared, y=lowest, name="least loaded expert", line_color=style.BLUE)
    fill = {"fill": "tonexty", "fillcolor": style.fade(style.GREY, 0.14)}
    fig.add_scatter(**shared, **fill, y=highest, name="most loaded expert", line_color=style.VERMILLION)


def _layer_menu(n_layers: int, active: int, traces_each: int) -> list[dict]:
    def only(layer: int) -> list[bool]:
        return [trace // traces_each == layer for trace in range(n_layers * traces_each)]

    buttons = [
        {"label": f"layer {layer}", "method": "restyle", "args": [{"visible": only(layer)}]} for layer in range(n_layers)
    ]
    place = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    return [{"type": "dropdown", "name": "layer", "active": active, "buttons": buttons, **place}]


def blind_spot(entry: dict) -> go.Figure:
    """Balance loss against the largest load deviation, one dot a layer, of one load entry.

    A layer at balance loss 1 with a large deviation sits in the blind spot: its probabilities are flat, so E * sum f P
    is 1 whatever its loads are (Sigma-MoE-Tiny, figure 2).
    """
    f_LE, lbl_WL = per_expert(entry, "f"), per_layer([entry], "lbl")
    if not f_LE.size or not lbl_WL.size:
        return style.note("Balance loss against load deviation", "this window holds no balance loss")
    n_layers = len(f_LE)
    middle = (min(0.9, np.nanmin(lbl_WL[0])) + max(1.2, np.nanmax(lbl_WL[0]))) / 2  # names point inwards: no edge cuts them
    fig = go.Figure(
        go.Scatter(
            x=lbl_WL[0],
            y=100 * extremes(f_LE)[0],
            customdata=np.arange(n_layers),
            mode="markers+text" if n_layers <= 12 else "markers",
            text=[f"layer {layer}" for layer in range(n_layers)],
            textposition=[
                ("middle", "bottom")[layer % 2] + (" left" if lbl > middle else " right")
                for layer, lbl in enumerate(lbl_WL[0])
            ],
            cliponaxis=False,
            marker={"size": 11, "color": [style.depth_colour(layer, n_layers) for layer in range(n_layers)]},
            hovertemplate="layer %{customdata}<br>balance loss %{x:.3f}<br>most loaded %{y:+.0f} %<extra></extra>",
        )
    )
    fig.add_vline(x=1)
    fig.update_xaxes(title_text="balance loss of the layer (1 = looks balanced)", autorangeoptions_include=[0.9, 1.2])
    fig.update_yaxes(title_text="deviation of the most loaded expert", ticksuffix=" %", autorangeoptions_include=[0, 100])
    title, subtitle = (
        "Balance loss against load deviation",
        f"window that ends at step {entry['step']:,}; one dot a layer",
    )
    return style.dress(fig, title, subtitle, hovermode="closest")


def balance_loss_by_layer(entries: Entries) -> go.Figure:
    """E * sum f P of each layer over steps: 1 balanced (or flat P), E when one sure expert gets everything."""
    loads = windows(entries, MOST_WINDOWS)
    title, subtitle = "Balance loss of each layer", "1 = balanced, or probabilities so flat that it cannot tell"
    values = per_layer(loads, "lbl")
    fig = _layer_curves(entries, loads, values, title, subtitle, "balance loss", floor=(1, "balanced"))
    return fig.update_yaxes(autorangeoptions_include=[0.95, 1.1])


def dead_experts(entries: Entries) -> go.Figure:
    """Experts that got no token in a window, for each layer over steps: 0..E."""
    loads = windows(entries, MOST_WINDOWS)
    counts = np.array([dead(per_expert(load, "f")) for load in loads])
    title, subtitle = "Dead experts of each layer", "experts without a token in a whole window"
    fig = _layer_curves(entries, loads, counts, title, subtitle, "dead experts (count)")
    most = np.nanmax(counts, initial=1)
    return fig.update_yaxes(dtick=1 if most <= 6 else None, autorangeoptions_include=[0, 1])


def load_entropy(entries: Entries) -> go.Figure:
    """Entropy of the share f for each layer over steps, in nats: log E when loads are equal, 0 after a collapse."""
    loads = windows(entries, MOST_WINDOWS)
    values = np.array([entropy(per_expert(load, "f")) for load in loads])
    title, subtitle = "Load entropy of each layer", "how evenly tokens are spread over experts"
    return _layer_curves(entries, loads, values, title, subtitle, "entropy of the share f (nats)", floor=_uniform(loads))


def router_entropy(entries: Entries) -> go.Figure:
    """Mean entropy of the router's probabilities over single tokens, in nats: log E undecided, 0 certain."""
    loads = windows(entries, MOST_WINDOWS)
    title, subtitle = "Router entropy of each layer", "how undecided the router is about one token"
    values = per_layer(loads, "router_entropy")
    return _layer_curves(entries, loads, values, title, subtitle, "router entropy (nats)", floor=_uniform(loads))


def _uniform(loads: Entries) -> tuple[float, str] | None:
    n_experts = per_expert(loads[0], "f").shape[1] if loads else 0
    return (float(np.log(n_experts)), f"log {n_experts}") if n_experts > 1 else None


def _layer_curves(entries, loads, values_WL, title: str, subtitle: str, unit: str, floor=None) -> go.Figure:
    """One curve a layer, warm for low layers and cool for deep ones; `floor` is a reference line and its name."""
    if not loads or not np.asarray(values_WL).size:
        return style.note(title, NO_LOADS)
    steps, n_layers, fig = [load["step"] for load in loads], values_WL.shape[1], go.Figure()
    few, deep = n_layers <= 8, deep_layer(n_layers)
    for layer in range(n_layers):
        width = 2 if few or layer in (0, deep) else 1
        fig.add_scatter(
            x=steps,
            y=values_WL[:, layer],
            name=f"layer {layer}",
            mode="lines" if len(steps) > 1 else "markers",
            line={"color": style.depth_colour(layer, n_layers), "width": width},
            showlegend=few or layer in (0, n_layers // 2, n_layers - 1),
            hovertemplate="%{y:.4~g}" if few else f"layer {layer}: %{{y:.4~g}}<br>step %{{x:,.0f}}<extra></extra>",
        )
    if floor:
        style.level(fig, np.array(steps), *floor)
    fig.update_xaxes(title_text="optimizer step")
    fig.update_yaxes(title_text=unit)
    style.mark_switch(fig, entries)
    return style.dress(fig, title, subtitle, hovermode="x unified" if few else "closest")
