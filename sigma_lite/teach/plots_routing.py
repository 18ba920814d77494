"""The routing explorer as a plotly figure: a text coloured by the experts of one layer, and what one of them likes."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sigma_lite.figures.style import BLUE, GREY, fade
from sigma_lite.teach.plots import MARKS, places

BUSIEST = "busiest"  # the expert that reads most tokens of the text, in whichever layer
COLUMNS = 40  # characters in a row of the text, so that they can be read on a phone
ROW, FRAME = 34, 330  # pixels: of a row of text, and of the rest


def expert_colour(expert: int) -> str:
    """A hue for each expert, neighbours far apart; -1, for none, is grey. The page of `sigma-lite explore` has the same."""
    if expert < 0:
        return GREY
    red, green, blue = colorsys.hls_to_rgb(expert * 137.508 % 360 / 360, 0.5, 0.55)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def busiest(facts: Mapping[str, Any], layer: int) -> int:
    """The expert that is chosen first for most tokens of the text; the lowest number of several."""
    counts = Counter(own[0] for own in facts["experts"][layer] if own[0] >= 0)
    return min(counts, key=lambda expert: (-counts[expert], expert)) if counts else 0


def routed_text(facts: Mapping[str, Any], layer: int, expert: int | str = BUSIEST) -> go.Figure:
    """Every token in the colour of its first expert in `layer`, with its number; below, tokens and kinds of `expert`.

    Bars are slots, and shares of its slots; a blue line is the share of all slots, a dot marks what is more than chance.

    Args:
        facts: of serve/explore.py.
        expert: whose tokens have a dark edge; BUSIEST takes the one of this text and layer.
    """
    expert = busiest(facts, layer) if isinstance(expert, str) else expert
    words = [word.translate(MARKS) for word, _, _ in facts["tokens"]]
    rows, starts = places([word.ljust(2) for word, _, _ in facts["tokens"]], COLUMNS)  # room for an expert's number
    n_rows = max(rows) + 1
    height = ROW * n_rows + FRAME
    specs = [[{"colspan": 2}, None], [{}, {}]]
    share = ROW * n_rows / (height - 120)
    titles = ["", "favourite tokens", "kinds, %"]
    figure = make_subplots(
        2, 2, specs=specs, row_heights=[share, 1 - share], vertical_spacing=60 / height, subplot_titles=titles
    )
    _text(figure, facts, layer, expert, words, rows, starts)
    _liked(figure, facts["known"][layer][expert], expert_colour(expert))
    figure.update_xaxes(visible=False, range=[-0.5, COLUMNS + 4], row=1, col=1)
    figure.update_yaxes(visible=False, range=[n_rows - 0.4, -0.6], row=1, col=1)
    title = f"Layer {layer}, and its expert {expert}"
    return figure.update_layout(title=title, height=height, barmode="overlay", showlegend=False, hovermode="closest")


def _text(figure: go.Figure, facts: Mapping[str, Any], layer: int, expert: int, words, rows, starts) -> None:
    chosen = [own[0] for own in facts["experts"][layer]]
    own = [expert in experts for experts in facts["experts"][layer]]
    numbers = [f"<span style='font-size:9px'>{e if e >= 0 else '–'}</span>" for e in chosen]
    edges = {"color": [expert_colour(expert) if mine else GREY for mine in own], "width": [2.5 * mine for mine in own]}
    hover = [
        f"{word}<br>expert {', '.join(str(e) for e in experts if e >= 0) or 'none'}<br>{facts['kinds'][kind]}"
        for word, experts, (_, kind, _) in zip(words, facts["experts"][layer], facts["tokens"], strict=True)
    ]
    figure.add_bar(
        x=[max(len(word), 2) for word in words],
        base=starts,
        y=rows,
        text=[f"{word}<br>{number}" for word, number in zip(words, numbers, strict=True)],
        customdata=chosen,
        hovertext=hover,
        hoverinfo="text",
        orientation="h",
        width=0.92,
        marker={"color": [fade(expert_colour(e), 0.32) for e in chosen], "line": edges},
        textposition="inside",
        textangle=0,
        insidetextanchor="middle",
        textfont={"family": "ui-monospace, monospace", "size": 11},
        constraintext="none",
        row=1,
        col=1,
    )  # fmt: skip


def _liked(figure: go.Figure, known: Mapping[str, Any], colour: str) -> None:
    tokens, kinds = known["tokens"][::-1], known["kinds"][:6][::-1]
    names = [
        f"{word.translate(MARKS)}\u200b{number * chr(0x200B)}" for number, (word, _, _) in enumerate(tokens)
    ]  # all differ
    shares = [f"{100 * of_token:.0f} % of all its slots come here" for _, _, of_token in tokens]
    figure.add_bar(
        x=[n for _, n, _ in tokens], y=names, orientation="h", marker_color=fade(colour, 0.6), hovertext=shares,
        hovertemplate="%{y}: %{x}<br>%{hovertext}<extra></extra>", row=2, col=1,
    )  # fmt: skip
    words = [f"{kind}{' ●' if sure else ''}" for kind, _, _, sure in kinds]
    figure.add_bar(
        x=[100 * share for _, share, _, _ in kinds], y=words, orientation="h", marker_color=fade(colour, 0.6),
        hovertemplate="%{y}: %{x:.1f} %<extra></extra>", row=2, col=2,
    )  # fmt: skip
    figure.add_scatter(
        x=[100 * usual for _, _, usual, _ in kinds], y=words, mode="markers", hoverinfo="skip",
        marker={"symbol": "line-ns", "size": 14, "line": {"width": 2, "color": BLUE}}, row=2, col=2,
    )  # fmt: skip
    figure.update_xaxes(rangemode="tozero", row=2)
