"""The lab's pictures of what was measured after training (`measured` of a run): the layer-0 study, and domains."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures import style
from sigma_lite.figures.arms import ENDS, Results, above, arms, dress, percent_axis

NOT_MEASURED = "no run of this experiment carries this measurement"


def predicted_and_measured(results: Results) -> go.Figure:
    """Layer 0's measured deviation against the floor of a router of token identity, one point an arm and seed (log, %)."""
    title, fig = "Predicted and measured, held-out text", go.Figure()
    points = [
        (place, name, run, run["measured"][0]) for place, name, runs in arms(results) for run in runs if "measured" in run
    ]
    if not points:
        return style.note(title, NOT_MEASURED)
    for place, name, run, facts in points:
        floor = facts["floor"]
        fig.add_scatter(
            x=above([floor["bound"]]),
            y=above([facts["max_deviation"]]),
            name=name,
            mode="markers",
            marker=_marker(place, "circle") | {"size": 11},
            hovertemplate=f"{name}, seed {run['seed']}: floor %{{x:+.0f}} %, measured %{{y:+.0f}} %",
        )
    ends = above([0, max(max(p[3]["max_deviation"], p[3]["floor"]["bound"]) for p in points)])
    fig.add_scatter(x=ends, y=ends, mode="lines", line={"dash": "dash", "color": style.GREY}, name="measured = floor")
    percent_axis(fig, "floor of a router that sees the token alone (+1 %: none)", axis="xaxis")
    percent_axis(fig, "layer 0: most loaded expert, held-out text")
    caption = "Were the floor the limit, no point could lie below the dashed line; those below split frequent tokens."
    return dress(fig, title, "below the line: the router does better than token identity allows", caption, height=480)


def _marker(place: int, symbol: str | np.ndarray) -> dict:
    """Of the n-th arm: filled while colours last, then open, then open with a dot; `style.line_of` does it with dashes."""
    look = style.line_of(place)
    suffix = {"solid": "", "dash": "-open"}.get(look["dash"], "-open-dot")
    return {"color": look["color"], "symbol": np.char.add(symbol, suffix).tolist()}


def lumps_and_load(results: Results) -> go.Figure:
    """Every layer's measured deviation against that of its lumps thrown at random, one point a layer (log, %)."""
    title, fig = "Loads fall like lumps at random, held-out text", go.Figure()
    for place, name, runs in arms(results):
        layers = [(layer, facts) for run in runs for layer, facts in enumerate(run.get("measured", []))]
        if layers:
            lowest = [layer == 0 for layer, _ in layers]
            fig.add_scatter(
                x=above([facts["variance"]["max_at_random"] for _, facts in layers]),
                y=above([facts["max_deviation"] for _, facts in layers]),
                name=name,
                mode="markers",
                marker=_marker(place, np.where(lowest, "diamond", "circle")) | {"size": np.where(lowest, 11, 7)},
                customdata=[layer for layer, _ in layers],
                hovertemplate=f"{name}, layer %{{customdata}}: at random %{{x:+.0f}} %, measured %{{y:+.0f}} %",
            )
    if not fig.data:
        return style.note(title, NOT_MEASURED)
    ends = [min(t.x.min() for t in fig.data), max(t.x.max() for t in fig.data)]
    fig.add_scatter(x=ends, y=ends, mode="lines", line={"dash": "dash", "color": style.GREY}, name="as at random")
    percent_axis(fig, "its lumps thrown at experts at random: fullest expert", axis="xaxis")
    percent_axis(fig, "measured: most loaded expert, held-out text")
    caption = "Each token keeps how it spreads over experts; which experts is drawn. Diamonds: layer 0. " + ENDS
    return dress(fig, title, "on the line: the router packs no better than chance", caption, height=480)


def domain_expert_map(results: Results) -> go.Figure:
    """Domain x expert load in units of the uniform share, layer 0 (left) and the last layer, a row of panels an arm.

    Experts are sorted by the domain that uses them most, so that specialists stand in blocks.
    """
    title = "Which experts work for which domain, held-out text"
    drawn = [(name, runs[0]["measured"]) for _, name, runs in arms(results) if "measured" in runs[0]]
    if not drawn:
        return style.note(title, NOT_MEASURED)
    names = [f"{name}, {where}" for name, _ in drawn for where in ("layer 0", "last layer")]
    fig = make_subplots(len(drawn), 2, subplot_titles=names, vertical_spacing=0.07, horizontal_spacing=0.03)
    fig.update_annotations(font_size=12)
    for row, (_, facts) in enumerate(drawn, start=1):
        for col, layer in ((1, 0), (2, -1)):
            f_DE = np.array(facts["f"][layer])
            order = np.lexsort((-f_DE.max(0), f_DE.argmax(0)))
            fig.add_heatmap(
                z=f_DE.shape[1] * f_DE[:, order],
                y=facts["names"],
                customdata=np.tile(order, (len(f_DE), 1)),
                coloraxis="coloraxis",
                hovertemplate="%{y}, expert %{customdata}: %{z:.1f} times its share<extra></extra>",
                row=row,
                col=col,
            )
    fig.update_yaxes(showticklabels=False, col=2)
    fig.update_xaxes(showticklabels=False)
    fig.update_xaxes(title_text="experts", row=len(drawn))
    scale = {"cmin": 0, "cmax": 8, "colorscale": "Blues", "colorbar": {"title": {"text": "E f"}, "len": 0.5}}
    caption = (
        "Load within each domain in units of the uniform share (the colour ends at 8), each arm's first seed."
        " Experts are sorted by domain; blocks: specialists."
    )
    return dress(
        fig, title, "dark: an expert that a domain uses often", caption, height=170 * len(drawn) + 90, coloraxis=scale
    )


def information_by_layer(results: Results) -> go.Figure:
    """Share of the choice's entropy that token identity explains, by layer (excess over shuffled experts)."""
    title, fig = "What the choice of an expert tells of the token, held-out text", go.Figure()
    for place, name, runs in arms(results):
        rows = [[facts["information"]["token"]["share"] for facts in run["measured"]] for run in runs if "measured" in run]
        if rows:
            y = 100 * np.mean(rows, axis=0)
            fig.add_scatter(x=np.arange(len(y)), y=y, name=name, line=style.line_of(place), mode="lines+markers")
    if not fig.data:
        return style.note(title, NOT_MEASURED)
    fig.update_xaxes(title_text="layer", dtick=1)
    fig.update_yaxes(title_text="explained by the token (%)", rangemode="tozero")
    caption = (
        "Mutual information of expert and token over the expert's entropy, after subtracting what shuffled experts show."
    )
    return dress(fig, title, "100 %: the router looks the token up in a table", caption, height=420)
