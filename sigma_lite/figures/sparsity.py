"""How sparse the model is at each step: experts per token in each layer, and the parameters that one token uses."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures import style
from sigma_lite.figures.learning import NO_STEPS
from sigma_lite.figures.series import Entries, column, last, of_kind, per_layer


def experts_per_token(entries: Entries) -> go.Figure:
    """K of every layer over steps; layers that share a schedule share a line. Range: 1..E."""
    records = [entry for entry in of_kind(entries, "step") if entry.get("k")]
    if not records:
        return style.note("Experts per token", NO_STEPS)
    k_NL = per_layer(records, "k")
    keep = _corners(k_NL)
    steps, k_NL, fig = column(records, "step")[keep], k_NL[keep], go.Figure()
    schedules: dict[tuple, list[int]] = {}
    for layer, k_N in enumerate(k_NL.T):
        schedules.setdefault(tuple(k_N), []).append(layer)
    for place, (k_N, layers) in enumerate(schedules.items()):
        colour = style.depth_colour(place, len(schedules))
        fig.add_scatter(x=steps, y=k_N, name=_ranges(layers), line={"color": colour, "shape": "hv"}, mode=_mode(steps))
    fig.update_traces(hovertemplate="K = %{y:.0f}")
    fig.update_xaxes(title_text="optimizer step")
    fig.update_yaxes(title_text="experts per token, K", rangemode="tozero", dtick=max(1, round(k_NL.max() / 8)))
    style.mark_switch(fig, entries)
    return style.dress(fig, "Experts per token", "layers with the same schedule share a line", showlegend=True)


def active_parameters(entries: Entries, with_total: bool = False) -> go.Figure:
    """Non-embedding parameters that one token passes through, over steps; `with_total` adds all, on a log axis."""
    records = of_kind(entries, "step")
    active = column(records, "active_params")
    if not np.isfinite(active).any():
        return style.note("Active parameters", NO_STEPS)
    steps, keep, fig = column(records, "step"), _corners(active[:, None]), go.Figure()
    line = {"color": style.BLUE, "shape": "hv"}
    fig.add_scatter(x=steps[keep], y=active[keep], name="active for one token", line=line, mode=_mode(steps))
    total = (last(entries, "run").get("ledger") or {}).get("non_embedding")
    if with_total and total:
        style.level(fig, steps, total, f"all: {total:,}")
    fig.update_traces(hovertemplate="%{y:,.0f} parameters<br>step %{x:,.0f}<extra></extra>", selector={"mode": "lines"})
    fig.update_xaxes(title_text="optimizer step")
    axis = {"type": "log", "dtick": 1} if with_total and total else {"rangemode": "tozero"}
    fig.update_yaxes(title_text="non-embedding parameters", tickformat="~s", **axis)
    style.mark_switch(fig, entries)
    return style.dress(fig, "Active parameters", "what one token passes through, embeddings left out", hovermode="closest")


def _corners(values_NL: np.ndarray) -> np.ndarray:
    """Indices of both ends and of every step at which a row changes: a staircase needs no more."""
    same = (values_NL[1:] == values_NL[:-1]) | (np.isnan(values_NL[1:]) & np.isnan(values_NL[:-1]))
    changes = 1 + np.flatnonzero(~same.all(-1))
    return np.unique(np.concatenate([[0], changes - 1, changes, [len(values_NL) - 1]])).astype(int)


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> "layers 0–2, 5"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    text = ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def _mode(steps: np.ndarray) -> str:
    return "lines" if len(steps) > 1 else "markers"
