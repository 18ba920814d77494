"""What experts know, from entries that `sigma-lite eval` wrote: costs by mark, who serves what, what each is worth."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures import style
from sigma_lite.figures.style import BLUE, GREY, VERMILLION, depth_colour, fade

NOT_EVALUATED = "not evaluated yet: `sigma-lite eval RUN {}`"
MOST = 3  # log2 of the lift at which the colour ends: 8 times as often as elsewhere
MARKS = ("kind", "domain")


def costs(entry: dict) -> go.Figure:
    """Bits per byte of the tokens of each kind (left) and domain (right), of one `heldout` entry."""
    title = "What held-out text costs"
    found = {mark: entry.get("by", {}).get(mark) for mark in MARKS}
    found = {mark: by for mark, by in found.items() if by}
    if not found:
        return style.note(title, NOT_EVALUATED.format("heldout"))
    fig = make_subplots(1, len(found), subplot_titles=[f"by {mark}" for mark in found], horizontal_spacing=0.2)
    rows = 1
    for col, by in enumerate(found.values(), start=1):
        known = {name: own for name, own in by.items() if own.get("bits_per_byte") is not None}
        names, rows = sorted(known, key=lambda name: known[name]["bits_per_byte"]), max(rows, len(known))
        all_nats = sum(own["nats_per_token"] * own["tokens"] for own in by.values())
        share = [100 * known[name]["nats_per_token"] * known[name]["tokens"] / all_nats for name in names]
        text = "%{y}: %{x:.3f} bits per byte<br>%{customdata:.1f} % of the whole cost<extra></extra>"
        bits = [known[name]["bits_per_byte"] for name in names]
        bars = {"orientation": "h", "marker_color": fade(VERMILLION, 0.6), "showlegend": False}
        fig.add_bar(x=bits, y=names, customdata=share, hovertemplate=text, row=1, col=col, **bars)
        fig.add_vline(x=entry["bits_per_byte"], line={"color": BLUE, "dash": "dash"}, row=1, col=col)
    fig.update_xaxes(title_text="bits per byte", rangemode="tozero")
    fig.update_yaxes(title_text="")
    subtitle = f"dashed: {entry['bits_per_byte']:.4f}, all of it"
    return style.dress(fig, title, subtitle, height=190 + 24 * rows, hovermode="closest")


def specialised(entry: dict) -> go.Figure:
    """How much more often each expert serves each kind or domain than all experts do, log2; dots: more than chance.

    One layer and mark at a time, by menu, of one `specialisation` entry. Experts stand sorted by what they serve; those
    without a token are left out.
    """
    title, layers = "Who serves what", entry.get("layers") or []
    if not layers:
        return style.note(title, NOT_EVALUATED.format("specialisation"))
    fig, names = go.Figure(), []
    for layer, marks in enumerate(layers):
        for mark, found in marks.items():
            fig.add_trace(_lift(found, entry["names"][mark], visible=not names))
            names.append(f"layer {layer}, {mark}s")
    show = [{"visible": [other == place for other in range(len(names))]} for place in range(len(names))]
    buttons = [{"label": name, "method": "restyle", "args": [one]} for name, one in zip(names, show, strict=True)]
    menu = {"type": "dropdown", "name": "show", "active": 0, "buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02}
    fig.update_xaxes(title_text="experts, sorted by what they serve", showticklabels=False, showgrid=False)
    fig.update_yaxes(title_text="", showgrid=False, autorange="reversed")
    ticks = list(range(-MOST, MOST + 1))
    bar = {"title_text": "times as often", "tickvals": ticks, "ticktext": [f"{2.0**t:g}" for t in ticks]}
    scale = [[0, BLUE], [0.5, fade(GREY, 0.06)], [1, VERMILLION]]
    fig.update_layout(coloraxis={"cmin": -MOST, "cmax": MOST, "colorscale": scale, "colorbar": bar}, updatemenus=[menu])
    subtitle = "● more than chance, measured by dealing rows' labels to other rows; experts that serve none are left out"
    return style.dress(fig, title, subtitle, height=420, hovermode="closest")


def _lift(found: dict, names: list[str], visible: bool) -> go.Heatmap:
    counts_EG = np.array(found["counts"], float)
    used_G = counts_EG.sum(0) > 0
    share_EG = counts_EG / np.maximum(counts_EG.sum(1, keepdims=True), 1)
    usual_G = counts_EG.sum(0) / max(counts_EG.sum(), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift_EG = np.clip(np.log2(share_EG / usual_G), -MOST, MOST)
    sure = {(expert, label): z for expert, label, _, z in found["pairs"]}
    best_E = np.nan_to_num(lift_EG[:, used_G], nan=-MOST).argmax(1)
    order = np.lexsort((-np.nan_to_num(lift_EG[:, used_G].max(1), nan=-MOST), best_E))
    order = order[counts_EG.sum(1)[order] > 0]
    labels = np.flatnonzero(used_G).tolist()
    text = [["●" if (int(e), g) in sure else "" for e in order] for g in labels]
    slots = [[[int(e), int(counts_EG[e, g]), 100 * share_EG[e, g], 100 * usual_G[g]] for e in order] for g in labels]
    hover = "expert %{customdata[0]}, %{y}: %{customdata[1]:,} slots<br>%{customdata[2]:.1f} % of its own,"
    return go.Heatmap(
        z=lift_EG[order][:, used_G].T,
        y=[names[g] for g in labels],
        text=text,
        customdata=slots,
        texttemplate="%{text}",
        textfont={"size": 9},
        coloraxis="coloraxis",
        hovertemplate=hover + " %{customdata[3]:.1f} % of all<extra></extra>",
        visible=visible,
        xgap=0.5,
        ygap=1,
    )


def information(entry: dict) -> go.Figure:
    """What the choice of an expert says of a token's kind and domain, by layer, beside chance; of `specialisation`."""
    title, layers = "How much an expert's number says", entry.get("layers") or []
    if not layers:
        return style.note(title, NOT_EVALUATED.format("specialisation"))
    fig = go.Figure()
    for mark, colour in zip(layers[0], (VERMILLION, BLUE), strict=False):
        own = [layer[mark] for layer in layers]
        share = {what: [100 * one[what] / (one["entropy"] or 1) for one in own] for what in ("bits", "chance")}
        text = [f"{one['bits']:.2f} of {one['entropy']:.2f} bits, p = {one['p']:.3f}" for one in own]
        hover = "%{text}"
        fig.add_scatter(y=share["bits"], name=mark, mode="lines+markers", line_color=colour, text=text, hovertemplate=hover)
        line = {"color": colour, "dash": "dot"}
        fig.add_scatter(y=share["chance"], name=f"{mark}, by chance", mode="lines", line=line, hovertemplate="%{y:.1f} %")
    fig.update_xaxes(title_text="layer", dtick=max(1, len(layers) // 12))
    fig.update_yaxes(title_text="% of the labels' entropy", rangemode="tozero", ticksuffix=" %")
    return style.dress(fig, title, "mutual information of expert and label", hovermode="x unified")


def worth(entry: dict) -> go.Figure:
    """Rise of the loss without each expert, largest first, a line a layer; of one `ablation` entry."""
    title, rises = "What an expert is worth", entry.get("rise") or []
    if not rises:
        return style.note(title, NOT_EVALUATED.format("ablation"))
    fig = go.Figure()
    for layer, rise in enumerate(rises):
        order = np.argsort(-np.array(rise), kind="stable")
        said = [[int(e), entry["tokens"][layer][e], _of_own(entry["on_own"][layer][e])] for e in order]
        text = "expert %{customdata[0]}: %{y:+.4f}; %{customdata[1]:,} tokens, %{customdata[2]}"
        line = {"color": depth_colour(layer, len(rises)), "width": 2}
        y = [rise[e] for e in order]
        fig.add_scatter(y=y, customdata=said, name=f"layer {layer}", mode="lines", line=line, hovertemplate=text)
    fig.update_xaxes(title_text="experts of the layer, the most missed first")
    fig.update_yaxes(title_text="rise of the loss (nats per token)")
    subtitle = "one expert is taken out, and its tokens go to the next best; below 0 the model is better without it"
    return style.dress(fig, title, subtitle, hovermode="x unified")


def _of_own(rise: float | None) -> str:
    return "none of its own" if rise is None else f"{rise:+.3f} on its own"
