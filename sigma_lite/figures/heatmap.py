"""Which expert gets what: the layer x expert heat map over windows, and share f beside probability P of one layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures import style
from sigma_lite.figures.experts import NO_LOADS
from sigma_lite.figures.series import Entries, deviation, per_expert, per_layer, windows


def load_heatmap(entries: Entries, most_windows: int = 60) -> go.Figure:
    """Load deviation of every expert of every layer, with a slider over windows and a switch between two orders.

    Order "by number" keeps experts in place, so that one can follow an expert; "by load" sorts each layer, so that one
    sees how uneven it is. At most `most_windows` evenly spaced windows are held. Values are whole percent: 0 balanced,
    -100 exactly for dead experts only.
    """
    loads = windows(entries, most_windows)
    if not loads:
        return style.note("Load of every expert", NO_LOADS)
    maps = [_percent(per_expert(load, "f")) for load in loads]
    pairs = [(z_LE, -np.sort(-z_LE, axis=-1)) for z_LE in maps]
    fig = go.Figure(
        data=[
            _heat(pairs[-1][0], "expert %{x}", visible=True),
            _heat(pairs[-1][1], "rank %{x} of its layer", visible=False),
        ],
        frames=[
            go.Frame(name=str(load["step"]), data=[{"type": "heatmap", "z": z} for z in pair], traces=[0, 1])
            for load, pair in zip(loads, pairs, strict=True)
        ],
    )
    n_layers = len(maps[0])
    fig.update_xaxes(title_text="expert", showgrid=False)
    fig.update_yaxes(title_text="layer", autorange="reversed", showgrid=False, tickformat="d", dtick=max(1, n_layers // 12))
    fig.update_layout(updatemenus=_orders(), sliders=[_slider(fig)])
    ticks = list(range(-100, style.HEAT_MAX + 1, 100))
    words = ["dead", "0", *(f"{tick:+d}" for tick in ticks[2:-1]), f"≥ {ticks[-1]:+d}"]
    bar = {"title_text": "load deviation (%)", "tickvals": ticks, "ticktext": words}
    fig.update_layout(coloraxis={"cmin": -100, "cmax": style.HEAT_MAX, "colorbar": bar})
    subtitle = "0 = balanced: the uniform share; dead experts are black (white on dark paper)"
    height = min(250 + 44 * n_layers, 250 + 352 + 4 * n_layers)
    return style.dress(fig, "Load of every expert", subtitle, height=height, hovermode="closest", margin_t=124)


def _percent(f_LE: np.ndarray) -> np.ndarray:
    """Load deviation in whole percent, int16 where it fits; only an expert without any token gets -100."""
    percent = np.round(100 * deviation(f_LE))
    percent = np.where(f_LE > 0, np.maximum(percent, -99), percent)
    fits = np.isfinite(percent).all() and percent.max() < 2**15
    return percent.astype(np.int16 if fits else np.float32)


def _heat(z_LE: np.ndarray, where: str, visible: bool) -> go.Heatmap:
    text = f"layer %{{y}}, {where}<br>load deviation %{{z:+d}} %<extra></extra>"
    return go.Heatmap(z=z_LE, coloraxis="coloraxis", hovertemplate=text, visible=visible, xgap=0.5, ygap=1)


def _orders() -> list[dict]:
    def show(by_number: bool) -> list[dict]:
        axis = "expert" if by_number else "experts of the layer, most loaded first"
        return [{"visible": [by_number, not by_number]}, {"xaxis.title.text": axis}]

    buttons = [
        {"label": "by number", "method": "update", "args": show(True)},
        {"label": "by load", "method": "update", "args": show(False)},
    ]
    place = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    return [{"type": "buttons", "name": "order", "direction": "right", "active": 0, "buttons": buttons, **place}]


def _slider(fig: go.Figure) -> dict:
    at_once = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"label": f"{int(f.name):,}", "method": "animate", "args": [[f.name], at_once]} for f in fig.frames]
    prefix = "window that ends at step "
    return {"steps": steps, "active": len(steps) - 1, "currentvalue": {"prefix": prefix}, "pad": {"t": 44}}


def share_and_probability(entry: dict, layer: int = 0, sort: bool = False) -> go.Figure:
    """Share f (bars) and mean probability P (dots) of each expert of one layer, of one load entry.

    The line at 1/E is balance. The title has the balance loss E * sum f P, which is 1 as soon as either of the two is
    flat (figures 2b and 2c of Sigma-MoE-Tiny). `sort` orders experts by share instead of by number.
    """
    f_LE, P_LE = per_expert(entry, "f"), per_expert(entry, "P")
    if not f_LE.size:
        return style.note("Share f and probability P", NO_LOADS)
    layer = range(len(f_LE))[layer]
    f_E, P_E = f_LE[layer], (P_LE[layer] if P_LE.size else np.full(f_LE.shape[1], np.nan))
    order = np.argsort(-f_E, kind="stable") if sort else np.arange(len(f_E))
    fig, place = go.Figure(), np.arange(len(f_E))
    hover = "expert %{customdata}: %{y:.4f}"
    shared = {"x": place, "customdata": order, "hovertemplate": hover}
    fig.add_bar(
        **shared, y=f_E[order], name="share f", marker={"color": style.fade(style.VERMILLION, 0.55), "line_width": 0}
    )
    dots = {"size": 5, "color": style.BLUE}
    fig.add_scatter(**shared, y=P_E[order], name="probability P", mode="markers", marker=dots)
    style.level(fig, np.array([-0.5, len(f_E) - 0.5]), 1 / len(f_E), f"uniform: 1/{len(f_E)}")
    lbl = per_layer([entry], "lbl")
    loss = f": balance loss {lbl[0, layer]:.2f}" if lbl.size and np.isfinite(lbl[0, layer]) else ""
    fig.update_xaxes(title_text="rank of the expert by share" if sort else "expert", showgrid=False)
    fig.update_xaxes(range=[-1, len(f_E)])
    fig.update_yaxes(title_text="fraction (sums to 1)", rangemode="tozero")
    subtitle = f"window that ends at step {entry['step']:,}"
    return style.dress(fig, f"Layer {layer}{loss}", subtitle, bargap=0.15, hovermode="x unified")
