"""The lab's pictures of what training led to: held-out text, one point an arm and seed. Captions as in lab.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures import style
from sigma_lite.figures.arms import ENDS, LEGEND_BELOW, Results, above, arms, dress, percent_axis
from sigma_lite.figures.origin import marked, origins
from sigma_lite.figures.series import deep_layer

NO_RUNS = "no run of this experiment is finished"


def loss_against_balance(results: Results) -> go.Figure:
    """Held-out bits per byte against layer 0's largest held-out load deviation (log axis, %), one point a run."""
    title, fig = "Loss against balance, held-out text", go.Figure()
    for place, name, runs in arms(results):
        fig.add_scatter(
            x=above([run["heldout"]["max"][0] for run in runs]),
            y=[run["heldout"]["bits_per_byte"] for run in runs],
            customdata=[run["seed"] for run in runs],
            name=name,
            mode="markers",
            marker={"color": style.line_of(place)["color"], "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 11},
            hovertemplate="%{x:+.0f} %, %{y:.4f} bits per byte, seed %{customdata}",
        )
    if not fig.data:
        return style.note(title, NO_RUNS)
    percent_axis(fig, "layer 0: busiest expert on held-out text", axis="xaxis")
    fig.update_yaxes(title_text="held-out bits per byte")
    caption = "Down is a better model, left a more even layer 0. One point an arm and seed, both measured on held-out text."
    caption = f"{caption} {ENDS}"
    return dress(fig, title, "better: down and left", caption, height=460)


def deviation_by_layer(results: Results) -> go.Figure:
    """Largest held-out load deviation of each layer (log axis, %), mean over seeds with their range."""
    title, fig = "Load deviation of every layer, held-out text", go.Figure()
    for place, name, runs in arms(results):
        mean, bars = _mean_and_range([above(run["heldout"]["max"]) for run in runs])
        fig.add_scatter(x=np.arange(len(mean)), y=mean, error_y=bars, name=name, line=style.line_of(place))
    if not fig.data:
        return style.note(title, NO_RUNS)
    fig.update_traces(mode="lines+markers", hovertemplate="layer %{x}: %{y:+.0f} %")
    fig.update_xaxes(title_text="layer", dtick=1 if len(fig.data[0].x) <= 16 else 4)
    percent_axis(fig, "most loaded expert, held-out text")
    caption = "Deviation from the uniform share on held-out text; bars: range over seeds. Layer 0 is the lowest."
    caption = f"{caption} {ENDS}"
    return dress(fig, title, "0 % would be an even layer", caption, height=420)


def deviation_by_sparsity(results: Results) -> go.Figure:
    """Largest held-out load deviation (log axis, %) of layer 0 and a deep layer: over E at one K, over K at one E.

    K is layer 0's at the end. Which K and E are held fixed is read off the arms: the ones that most of them have.
    """
    title = "Load deviation by number of experts and of choices, held-out text"
    points = [(run, len(run["heldout"]["f"][0]), run["k"][1][0]) for _, _, runs in arms(results) for run in runs]
    if not points:
        return style.note(title, NO_RUNS)
    E, K = (Counter(point[i] for point in points).most_common(1)[0][0] for i in (1, 2))
    names = f"{K} expert{'s' * (K > 1)} per token", f"{E} experts"
    fig = make_subplots(1, 2, shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.05)
    fig.update_annotations(font_size=13)
    for col, fixed, axis in ((1, 2, 1), (2, 1, 2)):
        chosen = [(point[axis], point[0]) for point in points if point[fixed] == (E, K)[fixed - 1]]
        _by(fig, sorted(chosen, key=lambda pair: pair[0]), col)
    fig.update_xaxes(type="log")
    fig.update_xaxes(title_text="experts E", tickvals=sorted({point[1] for point in points}), col=1)
    fig.update_xaxes(title_text="experts per token K", tickvals=sorted({point[2] for point in points}), col=2)
    percent_axis(fig, "most loaded expert, held-out text")
    percent_axis(fig, "", axis="yaxis2")
    together = [fig.layout.yaxis.range, fig.layout.yaxis2.range]
    fig.update_yaxes(range=[min(low for low, _ in together), max(high for _, high in together)])
    caption = "Deviation from the uniform share on held-out text, mean over seeds; the dots are single runs."
    caption = f"{caption} {ENDS}"
    return dress(fig, title, "left: more experts; right: more of them per token", caption, height=470, **LEGEND_BELOW)


def final_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the final numbers, as text: mean over seeds, and their range in brackets.

    What `origins` says belongs under them; an arm marked † has a run by code that is in no commit.
    """
    rows = [
        [marked(name, runs), *(_cell([read(run) for run in runs], number, unit) for read, number, unit in COLUMNS.values())]
        for _, name, runs in arms(results)
    ]
    return ["arm", *COLUMNS], rows


def final_table(results: Results) -> go.Figure:
    """`final_rows` as a figure, for notebooks and files; a page has a table of its own."""
    title = "Final numbers, held-out text"
    head, rows = final_rows(results)
    if not rows:
        return style.note(title, NO_RUNS)
    look = {"align": "left", "fill_color": "rgba(0,0,0,0)", "line_color": style.fade(style.GREY, 0.3), "height": 26}
    columns = [list(column) for column in zip(*rows, strict=True)]
    table = go.Table(
        header={"values": [f"<b>{name}</b>" for name in head], **look},
        cells={"values": columns, **look},
        columnwidth=[max(map(len, [name, *column])) for name, column in zip(head, columns, strict=True)],
    )
    caption = " ".join([TABLE_SAYS, *origins(results)])
    return dress(go.Figure(table), title, TABLE_SAYS, caption, height=150 + 26 * len(rows), margin_l=16)


COLUMNS: dict[str, tuple[Callable[[dict], float], str, str]] = {  # name: (number of a run, how it is written, unit)
    "layer 0 max": (lambda run: 100 * run["heldout"]["max"][0], "{:+,.0f}", "\u00a0%"),
    "layer 0 min": (lambda run: 100 * run["heldout"]["min"][0], "{:+,.0f}", "\u00a0%"),
    "LBL layer 0": (lambda run: run["heldout"]["lbl"][0], "{:.3f}", ""),
    "dead experts": (lambda run: sum(run["heldout"]["dead"]), "{:.3g}", ""),
    "bits per byte": (lambda run: run["heldout"]["bits_per_byte"], "{:.4f}", ""),
    "seconds": (lambda run: run["seconds"], "{:,.0f}", ""),
}
TABLE_SAYS = "Held-out text; dead experts of all layers; seconds of training. Mean over seeds and, in brackets, their range."
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross", "star", "hexagon", "pentagon")


def _cell(values: Sequence[float], number: str, unit: str) -> str:
    mean, low, high = (number.format(edge(values)).replace("-", "−") for edge in (np.mean, min, max))
    return f"{mean}{unit}" if len(values) == 1 else f"{mean}{unit} ({low}\u00a0to\u00a0{high})"


def _mean_and_range(values_SL: Sequence[np.ndarray]) -> tuple[np.ndarray, dict | None]:
    """Mean over seeds, and error bars to the lowest and highest."""
    values = np.array(values_SL)
    mean = values.mean(0)
    bars = {"array": values.max(0) - mean, "arrayminus": mean - values.min(0), "thickness": 1.2, "width": 3}
    return mean, bars if len(values) > 1 else None


def _by(fig: go.Figure, chosen: list[tuple[int, dict]], col: int) -> None:
    """Layer 0 and a deep layer over the first item of each pair."""
    for name, colour, deep in (("layer 0", style.VERMILLION, False), ("deep layer", style.BLUE, True)):
        points: dict[int, list[float]] = {}
        for at, run in chosen:
            layers = run["heldout"]["max"]
            points.setdefault(at, []).append(float(above(layers[deep_layer(len(layers)) if deep else 0])))
        shared = {"name": name, "legendgroup": name, "row": 1, "col": col, "marker_color": colour}
        hover = "%{x}: %{y:+.0f} %"
        means = [np.mean(values) for values in points.values()]
        fig.add_scatter(x=list(points), y=means, line_color=colour, showlegend=col == 1, hovertemplate=hover, **shared)
        x, y = zip(*((at, value) for at, values in points.items() for value in values), strict=True)
        fig.add_scatter(x=x, y=y, mode="markers", showlegend=False, hoverinfo="skip", **shared)
