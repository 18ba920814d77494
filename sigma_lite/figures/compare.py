"""Several runs in one figure: MoE against dense, the arms of a lab, seeds."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures import style
from sigma_lite.figures.experts import MOST_WINDOWS, NO_LOADS
from sigma_lite.figures.learning import halflife_of
from sigma_lite.figures.series import Entries, column, ema, extremes, of_kind, per_expert, thin, tokens_at, windows


def compare(records: dict[str, Entries]) -> go.Figure:
    """Held-out bits per byte (above) and training loss (below) of several runs over training tokens.

    `records` maps a name for the legend to the entries of a run. The loss is the moving average in nats per token.
    Tokens are the shared axis because runs may differ in tokens per step.
    """
    fig = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.07)
    for place, (name, entries) in enumerate(records.items()):
        shared = {"name": name, "legendgroup": name, "line": style.line_of(place)}
        held_out, steps = of_kind(entries, "validation"), of_kind(entries, "step")
        x, y = tokens_at(entries, column(held_out, "step")), column(held_out, "bits_per_byte")
        fig.add_scatter(x=x, y=y, mode="lines+markers", showlegend=len(x) > 0, row=1, col=1, **shared)
        at = column(steps, "step")
        smooth = ema(at, column(steps, "terms", "lm"), halflife_of(at))
        keep = thin(smooth)
        x = column(steps, "tokens")[keep]
        fig.add_scatter(x=x, y=smooth[keep], mode="lines", showlegend=not len(held_out), row=2, col=1, **shared)
    if not any(trace.x is not None and len(trace.x) for trace in fig.data):
        return style.note("Runs compared", "none of these runs has recorded a step yet")
    fig.update_traces(hovertemplate="%{y:.4f} after %{x:.4s} tokens")
    fig.update_yaxes(title_text="held-out<br>bits per byte", row=1, col=1)
    fig.update_yaxes(title_text="training loss, average<br>(nats per token)", row=2, col=1)
    fig.update_xaxes(tickformat="~s", rangemode="tozero")
    fig.update_xaxes(title_text="training tokens", row=2, col=1)
    return style.dress(fig, "Runs compared", "lower is better", height=560, hovermode="closest")


def compare_deviation(records: dict[str, Entries], layer: int = 0) -> go.Figure:
    """Load deviation of the most (full line) and least loaded expert (thin line) of one layer, several runs over steps.

    The four arms of figure 2a and figure 3 of Sigma-MoE-Tiny in one picture. Percent: 0 balanced, -100 dead.
    """
    sizes = [load.get("tokens") or 0 for entries in records.values() for load in windows(entries)]
    title = f"Load deviation in layer {layer}" + (f", windows of {max(sizes) / 1000:,.0f}k tokens" if any(sizes) else "")
    fig = go.Figure()
    for place, (name, entries) in enumerate(records.items()):
        loads = [load for load in windows(entries, MOST_WINDOWS) if layer < len(load["f"])]
        steps = [load["step"] for load in loads]
        edges = np.array([extremes(per_expert(load, "f")[layer]) for load in loads]).reshape(-1, 2)
        for edge, (what, width) in enumerate((("most loaded", 2), ("least loaded", 1))):
            fig.add_scatter(
                x=steps,
                y=100 * edges[:, edge],
                name=name,
                legendgroup=name,
                showlegend=edge == 0 and bool(steps),
                mode="lines",
                line={**style.line_of(place), "width": width},
                hovertemplate=f"{what} %{{y:+.0f}} %",
            )
    if not any(len(trace.x or ()) for trace in fig.data):
        return style.note(title, NO_LOADS)
    fig.add_hline(y=0, line_dash="dash")
    fig.update_xaxes(title_text="optimizer step")
    fig.update_yaxes(title_text="load deviation (% of the uniform share)", ticksuffix=" %")
    return style.dress(fig, title, "thick: most loaded expert; thin: least loaded", height=420, hovermode="closest")
