"""The lab's pictures of training: one experiment's results in, a figure out. Arms keep their colour in all of them.

`results` is what `sigma_lite.lab.read_results` returns. Thin lines are single seeds, thick ones their mean. Each figure
carries its caption in `layout.meta["caption"]`. What was measured after training is in lab_final.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures import style
from sigma_lite.figures.series import deep_layer

Results = Mapping
Curve = tuple[np.ndarray, np.ndarray]
NO_WINDOWS = "no run of this experiment has recorded a load window"
PERCENTS = [value * 10**power for power in range(5) for value in (1, 3)]


def arms(results: Results) -> list[tuple[int, str, list[dict]]]:
    """(place, name, runs) of every arm that has runs, one run a seed. The place fixes its colour."""
    found = [
        (place, name, [run for run in results["runs"] if run["arm"] == name])
        for place, name in enumerate(results["arms"])
    ]
    return [arm for arm in found if arm[2]]


def layer0_deviation(results: Results) -> go.Figure:
    """Load deviation E f - 1 of layer 0's most (above, log axis) and least loaded expert over training tokens, in %.

    Figures 2a and 3a of Sigma-MoE-Tiny (2512.16248). 0: balanced; -100: an expert without a token in the window;
    100 (E - 1): one expert gets everything.
    """
    title = "Load deviation in layer 0"
    fig = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.07, row_heights=[0.64, 0.36])
    for row, end in enumerate(("max", "min"), start=1):
        for place, name, runs in arms(results):
            curves = [_windows(run, end, lambda layers: 100 * layers[0]) for run in runs]
            draw_arm(fig, place, name, _above_one(curves) if end == "max" else curves, "%{y:+.0f} %", row)
    if not fig.data:
        return style.note(title, NO_WINDOWS)
    percent_axis(fig, "most loaded", row=1)
    fig.update_yaxes(title_text="least loaded", ticksuffix=" %", range=[-104, 4], row=2)
    caption = (
        "Training windows; 0 % is the uniform share 1/E. The upper axis is logarithmic, and a deviation below +1 % is drawn"
        " there. Figure 2a of the Sigma-MoE-Tiny report."
    )
    subtitle = "deviation from the uniform share; above: most loaded expert, below: least loaded"
    return _over_tokens(fig, title, subtitle, caption, height=520, rows=2)


def bias_spread(results: Results) -> go.Figure:
    """Largest minus smallest bias of layer 0's experts over training tokens. Scores lie in 0..1: above 1, bias rules.

    Figure 3b of Sigma-MoE-Tiny. Arms without a bias are left out.
    """
    title, fig, ends = "Spread of the loss-free bias in layer 0", go.Figure(), []
    for place, name, runs in arms(results):
        curves = [curve for run in runs if len((curve := _windows(run, "bias_spread", lambda layers: layers[0]))[0])]
        draw_arm(fig, place, name + _crossing(curves), curves, "%{y:.2f}")
        ends += [x for x, _ in curves]
    if not fig.data:
        return style.note(title, "no arm of this experiment has moved a bias")
    style.level(fig, np.concatenate(ends), 1.0, "1: as wide as the scores")
    fig.update_yaxes(title_text="max − min bias (units of the score)", rangemode="tozero")
    caption = (
        "Router scores lie between 0 and 1. Two experts whose biases differ by more than 1 are ranked without regard to the"
        " token. Figure 3 of the Sigma-MoE-Tiny report."
    )
    return _over_tokens(fig, title, "above 1 the bias alone can decide", caption, height=400)


def learning_curves(results: Results) -> go.Figure:
    """Language-model loss over training tokens (nats per token), and below it each arm minus the first one.

    Dotted lines mark the steps at which experts per token were switched.
    """
    title, found = "Language-model loss", arms(results)
    if not found:
        return style.note(title, "no run of this experiment has recorded a step")
    both = len(found) > 1
    fig = make_subplots(rows=1 + both, shared_xaxes=True, vertical_spacing=0.07)
    curves = {name: [_lm(run) for run in runs] for _, name, runs in found}
    first = mean_of(curves[found[0][1]])
    for place, name, runs in found:
        draw_arm(fig, place, name, curves[name], "%{y:.4f} nats")
        if both:
            apart = [_minus(curve, first) for curve in curves[name]]
            draw_arm(fig, place, name, apart, "%{y:+.4f} nats", row=2)
        _mark_switches(fig, place, runs)
    fig.update_yaxes(title_text="nats per token", row=1)
    if both:
        fig.update_yaxes(title_text=f"minus {found[0][1]}", zeroline=True, row=2)
        tail = first[1][len(first[1]) // 10 :]  # the fall at the start would flatten everything that follows
        fig.update_yaxes(range=[tail.min() - 0.2, tail.max() + 0.2], row=1)
        fig.update_yaxes(range=_inner([t.y for t in fig.data if t.yaxis == "y2"]), row=2)
    caption = "Training loss, each point the mean of 1 % of the steps; dotted: a switch of experts per token."
    subtitle = "above: the loss; below: the difference to the first arm" if both else "lower is better"
    return _over_tokens(fig, title, subtitle, caption, height=560 if both else 400, rows=1 + both)


def load_and_probability(results: Results) -> go.Figure:
    """Share f (bars) and mean probability P (dots) of each expert in units of 1/E, sorted by f, of the last window.

    One row an arm (its first seed), layer 0 and a deep layer beside each other, with the layer's E sum f P in the
    title: it is 1 as soon as either is flat. Figures 2b and 2c of Sigma-MoE-Tiny.
    """
    title = "Share f and probability P of every expert"
    found = [(name, runs[0]) for _, name, runs in arms(results) if runs[0]["last"]]
    if not found:
        return style.note(title, NO_WINDOWS)
    panels = [(name, run, layer) for name, run in found for layer in (0, deep_layer(len(run["last"]["f"])))]
    names = [f"{name}: layer {layer}, LBL {run['load']['lbl'][-1][layer]:.2f}" for name, run, layer in panels]
    fig = make_subplots(
        rows=len(found), cols=2, subplot_titles=names, vertical_spacing=0.3 / len(found), horizontal_spacing=0.09
    )
    fig.update_annotations(font_size=12)
    for place, (_, run, layer) in enumerate(panels):
        _shares(fig, run["last"]["f"][layer], run["last"]["P"][layer], place)
    fig.update_xaxes(showgrid=False)
    fig.update_xaxes(title_text="expert, by share", row=len(found))
    fig.update_yaxes(rangemode="tozero")
    fig.update_yaxes(title_text="units of 1/E", col=1)
    caption = (
        "The last training window of each arm's first seed; the line is the uniform share. LBL is E · Σ f P over that"
        " window: 1 when either f or P is flat. Figures 2b and 2c of the Sigma-MoE-Tiny report."
    )
    height = 110 + 210 * len(found)
    return _dress(fig, title, "sorted by share; 1 = the uniform share 1/E", caption, height=height, bargap=0.1)


# ------------------------------------------------------------------------------------------------------------- shared


def draw_arm(fig: go.Figure, place: int, name: str, curves: Sequence[Curve], hover: str, row: int = 1) -> None:
    """One arm: thin lines for its seeds where there are several, a thick one for their mean. Legend in row 1 only."""
    if not curves or not any(len(x) for x, _ in curves):
        return
    where = {"row": row, "col": 1} if fig._has_subplots() else {}
    line = style.line_of(place)
    shared = {"legendgroup": name, "name": name, "mode": "lines"}
    if len(curves) > 1:
        for x, y in curves:
            thin = {**line, "width": 1}
            fig.add_scatter(x=x, y=y, line=thin, opacity=0.45, showlegend=False, hoverinfo="skip", **shared, **where)
    x, y = mean_of(curves)
    if len(x) == 1:
        shared["mode"] = "markers"
    fig.add_scatter(x=x, y=y, line={**line, "width": 2.5}, hovertemplate=hover, showlegend=row == 1, **shared, **where)


def mean_of(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves where all of them have a point."""
    common = sorted(set.intersection(*(set(x.tolist()) for x, _ in curves)))
    return np.array(common), np.array([y[np.isin(x, common)] for x, y in curves]).mean(0)


def percent_axis(fig: go.Figure, title: str, **where: int) -> None:
    """A log axis that reads +10 %, +30 %, +100 %, ..."""
    ticks = [f"+{value:,} %" for value in PERCENTS]
    fig.update_yaxes(title_text=title, type="log", tickvals=PERCENTS, ticktext=ticks, **where)


def _dress(fig: go.Figure, title: str, subtitle: str, caption: str, **layout: object) -> go.Figure:
    return style.dress(fig, title, subtitle, meta={"caption": caption}, **layout)
