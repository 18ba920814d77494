"""The lab's pictures of training: one experiment's results in, a figure out. What was measured at the end: lab_final.py.

Thin lines are single seeds, thick ones their mean. Each figure carries its caption in `layout.meta["caption"]`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures import style
from sigma_lite.figures.arms import LEGEND_BELOW, Curve, Results, above, arms, draw_arm, dress, percent_axis, tokens_per_step
from sigma_lite.figures.series import deep_layer

NO_WINDOWS = "no run of this experiment has recorded a load window"


def layer0_deviation(results: Results) -> go.Figure:
    """Load deviation E f - 1 of layer 0's most (above, log axis) and least loaded expert over training tokens, in %.

    Figure 2a of Sigma-MoE-Tiny (2512.16248). 0: balanced; -100: an expert without a token in the window; 100 (E - 1):
    one expert gets everything.
    """
    title = f"Load deviation in layer 0{_window(results)}"
    fig = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.07, row_heights=[0.64, 0.36])
    for place, name, runs in arms(results):
        draw_arm(fig, place, name, [_windows(run, "max", above) for run in runs], "%{y:+.0f} %", row=1)
        draw_arm(fig, place, name, [_windows(run, "min", _percent) for run in runs], "%{y:+.0f} %", row=2)
    if not fig.data:
        return style.note(title, NO_WINDOWS)
    percent_axis(fig, "most loaded expert")
    fig.update_yaxes(title_text="least loaded", range=[-106, 6], tickvals=[-100, -50, 0], row=2)
    fig.update_yaxes(ticktext=["−100 %", "−50 %", "0 %"], row=2)
    caption = (
        "Windows of training tokens; 0 is the uniform share 1/E. The upper axis is logarithmic and ends at +1\u00a0%."
        " Figure 2a of the Sigma-MoE-Tiny report."
    )
    return _over_tokens(fig, title, "against the uniform share; −100 %: an expert without a token", caption, 520, rows=2)


def bias_spread(results: Results) -> go.Figure:
    """Largest minus smallest bias of layer 0's experts over training tokens, in units of the score; scores lie in 0..1.

    Sigma-MoE-Tiny (2512.16248) says that biases come to dominate scores; its figure 3 draws the loads. Arms
    without a bias are left out; the legend says when an arm's mean passes 1.
    """
    title, fig, last = "Spread of the loss-free bias in layer 0", go.Figure(), 0.0
    for place, name, runs in arms(results):
        curves = [_windows(run, "bias_spread") for run in runs]
        draw_arm(fig, place, name, curves, "%{y:.2f} after %{x:.3s} tokens")
        last = max(last, *(x.max(initial=0) for x, _ in curves))
    if not fig.data:
        return style.note(title, "no arm of this experiment has moved a bias")
    fig.for_each_trace(lambda trace: trace.update(name=trace.name + _passes_1(trace)), selector={"showlegend": True})
    style.level(fig, np.array([0, last]), 1.0, "1: as wide as the scores")
    fig.update_yaxes(title_text="max − min bias (units of the score)", rangemode="tozero")
    caption = (
        "Router scores lie between 0 and 1: two experts whose biases differ by more than 1 are ranked without regard to the"
        " token. Moved by u a step it cannot pass 1 + 2u."
    )
    return _over_tokens(fig, title, "above 1 the bias alone can decide", caption, 400)


def learning_curves(results: Results) -> go.Figure:
    """Language-model loss over training tokens in nats per token; below it each arm minus the first one, seed by seed.

    Dotted lines mark where experts per token were switched. The axes leave out the fall of the first 10 %.
    """
    title, found = "Language-model loss", arms(results)
    if not found:
        return style.note(title, "no run of this experiment is finished")
    _, reference, runs = found[0]
    first = {run["seed"]: _loss(run) for run in runs}
    rows = 2 if len(found) > 1 else 1
    fig = make_subplots(rows=rows, shared_xaxes=True, vertical_spacing=0.07)
    for place, name, runs in found:
        draw_arm(fig, place, name, [_loss(run) for run in runs], "%{y:.4f} nats", row=1)
        if rows == 2:
            apart = [_minus(_loss(run), first[run["seed"]]) for run in runs if run["seed"] in first]
            draw_arm(fig, place, name, apart, "%{y:+.4f} nats", row=2)
        _mark_switches(fig, place, runs)
    fig.update_yaxes(title_text="loss (nats per token)", row=1)
    for row in range(1, rows + 1):
        fig.update_yaxes(range=_without_the_fall(fig, "y" if row == 1 else f"y{row}"), row=row)
    if rows == 2:
        fig.update_yaxes(title_text="difference<br>(nats per token)", row=2)
    caption = "Training loss; a point is the mean of 1 % of the steps. Dotted lines: experts per token are switched."
    caption += " The axes leave out the fall of each curve's first tenth."
    alone = sorted({run["seed"] for _, _, runs in found for run in runs} - first.keys())
    if alone:
        caption += f" Seeds {', '.join(map(str, alone))} have no run of {reference!r} and so no difference."
    subtitle = f"below: minus {reference}, seed by seed" if rows == 2 else "lower is better"
    return _over_tokens(fig, title, subtitle, caption, 380 + 160 * (rows - 1), rows=rows)


def load_and_probability(results: Results) -> go.Figure:
    """Share f (bars) and mean probability P (dots) of each expert in units of 1/E, sorted by f, on held-out text.

    One row an arm (its first seed), layer 0 beside a deep layer, with the layer's E sum f P in the title: it is 1 as
    soon as either is flat. Figures 2b and 2c of Sigma-MoE-Tiny.
    """
    title = "Share f and probability P of every expert, held-out text"
    found = [(name, runs[0]["heldout"]) for _, name, runs in arms(results)]
    if not found:
        return style.note(title, "no run of this experiment is finished")
    panels = [(name, held, layer) for name, held in found for layer in (0, deep_layer(len(held["f"])))]
    names = [f"{name}: layer {layer}, LBL {held['lbl'][layer]:.2f}" for name, held, layer in panels]
    space = 0.3 / len(found)
    fig = make_subplots(len(found), 2, subplot_titles=names, vertical_spacing=space, horizontal_spacing=0.09)
    fig.update_annotations(font_size=12)
    for place, (_, held, layer) in enumerate(panels):
        where = {"row": 1 + place // 2, "col": 1 + place % 2}
        _shares(fig, held["f"][layer], held["P"][layer], legend=place == 0, **where)
    fig.update_xaxes(title_text="expert, by share", showgrid=False, row=len(found))
    fig.update_yaxes(rangemode="tozero")
    fig.update_yaxes(title_text="units of 1/E", col=1)
    caption = (
        "Held-out text after training, each arm's first seed; the line is the uniform share. LBL is E · Σ f P of the layer:"
        " 1 when either f or P is flat. Figures 2b and 2c of the Sigma-MoE-Tiny report."
    )
    subtitle = "sorted by share; 1 is the uniform share 1/E"
    return dress(fig, title, subtitle, caption, height=150 + 210 * len(found), bargap=0.1, **LEGEND_BELOW)


# -------------------------------------------------------------------------------------------------------------- parts


def _window(results: Results) -> str:
    """How many tokens a load was counted over: a load without its window is a number without its unit."""
    sizes = {tokens for run in results["runs"] for tokens in run["load"]["window_tokens"]}
    return f", windows of {max(sizes) / 1000:,.0f}k tokens" if sizes else ""


def _percent(fractions: list[float]) -> np.ndarray:
    return 100 * np.asarray(fractions, dtype=float)


def _windows(run: dict, name: str, scale: Callable = np.asarray) -> Curve:
    """Layer 0 of a series over windows, at the tokens at which each ended; windows without a value are left out."""
    load = run["load"]
    points = [(step, row[0]) for step, row in zip(load["step"], load.get(name) or [], strict=False) if row is not None]
    x, y = (np.array([point[i] for point in points], dtype=float) for i in (0, 1))
    return x * tokens_per_step(run), scale(y)


def _loss(run: dict) -> Curve:
    return np.array(run["curve"]["tokens"], dtype=float), np.array(run["curve"]["lm"], dtype=float)


def _minus(curve: Curve, other: Curve) -> Curve:
    common, mine, its = np.intersect1d(curve[0], other[0], return_indices=True)
    return common, curve[1][mine] - other[1][its]


def _passes_1(trace: go.Scatter) -> str:
    beyond = np.flatnonzero(np.asarray(trace.y) > 1)
    return f" (passes 1 at {np.asarray(trace.x)[beyond[0]] / 1e6:.3g} M tokens)" if len(beyond) else ""


def _mark_switches(fig: go.Figure, place: int, runs: list[dict]) -> None:
    steps = {event["step"] for run in runs for event in run["events"] if "sparsity" in str(event.get("what"))}
    for step in sorted(steps):
        line = {"color": style.line_of(place)["color"], "width": 1, "dash": "dot"}
        fig.add_vline(x=step * tokens_per_step(runs[0]), line=line)


def _without_the_fall(fig: go.Figure, axis: str) -> list[float]:
    """A range for all that is drawn on an axis after the first tenth of each curve."""
    values = np.concatenate([trace.y[len(trace.y) // 10 :] for trace in fig.data if (trace.yaxis or "y") == axis])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.06 * (high - low) or 0.01
    return [low - margin, high + margin]


def _shares(fig: go.Figure, f_E: list[float], P_E: list[float], legend: bool, **where: int) -> None:
    order = np.argsort(-np.asarray(f_E), kind="stable")
    shared = {"x": np.arange(len(order)), "customdata": order, "showlegend": legend, **where}
    shared["hovertemplate"] = "expert %{customdata}: %{y:.2f}"
    bars = {"color": style.fade(style.VERMILLION, 0.55), "line_width": 0}
    dots = {"size": 4, "color": style.BLUE}
    fig.add_bar(y=len(order) * np.asarray(f_E)[order], name="share f", marker=bars, **shared)
    fig.add_scatter(y=len(order) * np.asarray(P_E)[order], name="probability P", mode="markers", marker=dots, **shared)
    fig.add_hline(y=1, **where)
    fig.update_xaxes(range=[-1, len(order)], **where)


def _over_tokens(fig: go.Figure, title: str, subtitle: str, caption: str, height: int, rows: int = 1) -> go.Figure:
    fig.update_xaxes(tickformat="~s", rangemode="tozero")
    fig.update_xaxes(title_text="training tokens", **({"row": rows} if rows > 1 else {}))
    return dress(fig, title, subtitle, caption, height=height)
