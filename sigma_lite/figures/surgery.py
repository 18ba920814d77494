"""What operations on trained models are worth: loss against bytes, rankings of units, experts per token.

Facts are what benchmarks/compression.py and benchmarks/dense2moe.py write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sigma_lite.figures import style
from sigma_lite.figures.arms import dress

COSTS = {
    "bytes": ("bytes of all experts, as kept", "B"),
    "read": ("bytes of experts read for each token, over all layers", "B"),
    "flops": ("operations of a token's matrix products, forward, without attention's scores", "FLOP"),
}
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star", "hexagon")


def loss_against_bytes(facts: Mapping[str, Any], cost: str = "bytes") -> go.Figure:
    """Held-out bits per byte over what the experts take, a point for each way to compress, a colour for each kind (log).

    Args:
        cost: bytes (kept) | read (for each token, over all layers) | flops (of a token's matrix products, forward).
    """
    name, unit = COSTS[cost]
    title, fig = f"Loss against {'work' if cost == 'flops' else 'bytes'}, held-out text", go.Figure()
    kinds = list(dict.fromkeys(row["kind"] for row in facts["rows"]))
    for place, kind in enumerate(kinds):
        rows = sorted((row for row in facts["rows"] if row["kind"] == kind), key=lambda row: row[cost])
        colour = style.line_of(place)["color"]
        fig.add_scatter(
            x=[row[cost] for row in rows],
            y=[row["bits_per_byte"] for row in rows],
            customdata=[[row["name"]] for row in rows],
            name=kind,
            mode="lines+markers" if len(rows) > 1 else "markers",
            line={"color": colour, "width": 1},
            marker={"color": colour, "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 10},
            hovertemplate="%{customdata[0]}: %{y:.4f} bits per byte at %{x:.3s}" + unit,
        )
    whole = next(row for row in facts["rows"] if row["kind"] == "whole")
    style.level(fig, [row[cost] for row in facts["rows"]], whole["bits_per_byte"], "whole")
    fig.update_xaxes(title_text=name, type="log", dtick="D2", ticksuffix=unit, tickformat="~s")
    fig.update_yaxes(title_text="held-out bits per byte")
    caption = (
        f"Numbers of {facts['unit']}; routers, attention and embedding are in no bytes here, and in all operations."
        " Nothing is trained after the operation but where the name says so."
    )
    return dress(fig, title, "better: down and left", caption, height=520)


def split_order(facts: Mapping[str, Any]) -> go.Figure:
    """Bits per byte right after a split and after distillation, by the ranking of units: a point a seed."""
    title, fig = "What the ranking of units is worth, held-out text", go.Figure()
    stages = [(when, k) for when in ("after the split", "after distillation") for k in ("0", "2", "12")]
    ticks = [f"{when},<br>{'shared alone' if k == '0' else f'{k} of 12'}" for when, k in stages]
    for place, by in enumerate(dict.fromkeys(entry["by"] for entry in facts["splits"])):
        runs = [entry for entry in facts["splits"] if entry["by"] == by]
        values = np.array([[entry[when][k] for when, k in stages] for entry in runs])
        colour = style.line_of(place)["color"]
        mean = values.mean(0) - facts["dense"]
        fig.add_bar(x=ticks, y=mean, name=by, marker_color=style.fade(colour, 0.45), offsetgroup=by)
        for row in values:
            fig.add_scatter(
                x=ticks, y=row - facts["dense"], mode="markers", marker={"color": colour, "size": 6}, showlegend=False,
                offsetgroup=by, hovertemplate=f"{by}: %{{y:+.4f}}",
            )  # fmt: skip
    fig.update_layout(barmode="group", scattermode="group")
    fig.update_yaxes(title_text="bits per byte above the dense model")
    caption = f"Points are seeds, bars their mean; {facts['unit']}. The dense model has {facts['dense']:.4f}."
    return dress(fig, title, "lower is better", caption, height=460)


def experts_per_token(facts: Mapping[str, Any]) -> go.Figure:
    """Bits per byte over routed experts per token, of the run that recorded every K."""
    fig = go.Figure()
    curve = max((entry["after distillation"] for entry in facts["splits"]), key=len)
    x = sorted(map(int, curve))
    line = style.line_of(0)
    fig.add_scatter(x=x, y=[curve[str(k)] for k in x], name="split and distilled", line=line, mode="lines+markers")
    style.level(fig, x, facts["dense"], "the dense model")
    fig.update_xaxes(title_text="routed experts per token, beside the shared one", dtick=2)
    fig.update_yaxes(title_text="held-out bits per byte")
    caption = "One model: K is changed when it runs, no weight with it. It was distilled at K = 2 and at K = 0."
    return dress(fig, "Experts per token, chosen at run time", "held-out text", caption, height=380)
