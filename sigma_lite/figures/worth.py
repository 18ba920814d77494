"""Is it worth it? Held-out bits per byte of several models against what each of them cost."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures import style
from sigma_lite.figures.arms import Results, arms, draw_arm, dress

COSTS = {  # name in a run's scores: title of its axis
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "seconds on one core",
}


def bits_against(results: Results) -> go.Figure:
    """Held-out bits per byte over training tokens, training FLOPs and, where somebody has added them, seconds: a panel each.

    A point is a validation of a run. Only the last one of a run has seen the whole fall of its learning rate: compare ends
    with ends.
    """
    title, found = "Bits per byte against cost, held-out text", arms(results)
    scored = [(place, name, [run for run in runs if "scores" in run]) for place, name, runs in found]
    scored = [arm for arm in scored if arm[2]]
    if not scored:
        return style.note(title, "no run of this experiment has recorded its validations")
    costs = [cost for cost in COSTS if all(cost in run["scores"] for _, _, runs in scored for run in runs)]
    fig = make_subplots(1, len(costs), shared_yaxes=True, horizontal_spacing=0.04)
    for column, cost in enumerate(costs, start=1):
        for place, name, runs in scored:
            curves = [(np.array(run["scores"][cost], float), np.array(run["scores"]["bits_per_byte"])) for run in runs]
            one = go.Figure()
            draw_arm(one, place, name, curves, "%{y:.4f} bits per byte at %{x:.4s}")
            for trace in one.data:
                trace.update(showlegend=bool(trace.showlegend is not False and column == 1), mode="lines+markers")
                fig.add_trace(trace, 1, column)
        fig.update_xaxes(title_text=COSTS[cost], tickformat="~s", rangemode="tozero", row=1, col=column)
    ends = [run["scores"]["bits_per_byte"] for _, _, runs in scored for run in runs]
    low, second = min(min(bits) for bits in ends), max(bits[min(1, len(bits) - 1)] for bits in ends)
    fig.update_yaxes(range=[low - 0.02, second + 0.05])
    fig.update_yaxes(title_text="held-out bits per byte", row=1, col=1)
    caption = (
        "Thin lines are single seeds, thick ones their mean. Compare ends with ends: only there has each model seen the"
        " whole fall of its learning rate."
    )
    return dress(fig, title, "lower is better; the same curves over each cost", caption, height=440)
