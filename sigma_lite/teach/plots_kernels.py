"""Figures of the chapter on the grouped matmul: tiles and their rows, roofs of a processor, walls of a training step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from sigma_lite.config import ModelConfig, require
from sigma_lite.figures.style import fade
from sigma_lite.teach.style import BLUE, FAINT, GREEN, GREY, ORANGE, PINK

PEAK = 790e12  # FLOP/s, bf16: what a large matmul reaches on an H200. A stated ceiling, like the next one
BANDWIDTH = 4.3e12  # bytes/s of its memory
LINKS = {"NVLink 350 GB/s": 350e9, "InfiniBand 50 GB/s": 50e9}  # assumed achieved rates, per GPU
ROUTINGS = ("balanced", "multinomial", "zipf")


def loads(routing: str, n_experts: int, tokens_per_expert: int) -> np.ndarray:
    """Tokens of each expert: all equal, drawn with equal probabilities, or drawn with probabilities 1, 1/2, 1/3, ..."""
    require(routing in ROUTINGS, f"routing {routing!r}: choose {', '.join(ROUTINGS)}")
    if routing == "balanced":
        return np.full(n_experts, tokens_per_expert)
    weights = np.ones(n_experts) if routing == "multinomial" else 1 / np.arange(1, n_experts + 1)
    return np.random.default_rng(12).multinomial(n_experts * tokens_per_expert, weights / weights.sum())


def useful_rows(counts_E: np.ndarray, rows: int) -> float:
    """Share of the rows of all tiles that hold a token, when no tile serves two experts."""
    return float(counts_E.sum() / (np.ceil(counts_E / rows) * rows).sum())


def tile_painter(rows: int, routing: str, tokens_per_expert: int, n_experts: int = 96) -> go.Figure:
    """Each expert's rows as a bar cut into tiles of `rows` rows; the empty rest of its last tile on top."""
    counts_E = loads(routing, n_experts, tokens_per_expert)
    empty_E = np.ceil(counts_E / rows) * rows - counts_E
    figure, x = go.Figure(), list(range(n_experts))
    figure.add_bar(x=x, y=counts_E.tolist(), name="rows with a token", marker_color=fade(BLUE, 0.6))
    figure.add_bar(x=x, y=empty_E.astype(int).tolist(), name="rows multiplied for nothing", marker_color=fade(ORANGE, 0.6))
    top = float((counts_E + empty_E).max())
    step = rows * max(1, int(np.ceil(top / rows / 24)))  # not more lines than can be told apart
    figure.update_yaxes(title="rows; a line at each end of a tile" if step == rows else "rows", dtick=step, range=[0, top])
    figure.update_xaxes(title="expert", showgrid=False)
    tiles = int(np.ceil(counts_E / rows).sum())
    title = f"{tiles} tiles of {rows} rows: {useful_rows(counts_E, rows):.0%} useful"
    return figure.update_layout(title=title, barmode="stack", bargap=0.15, height=420)


def roofline(roofs: Mapping[str, tuple[float, float, int]], tokens: Sequence[int] = (21, 85, 341)) -> go.Figure:
    """FLOP/s that a processor can reach over FLOP per byte (Williams et al. 2009); marks: so many tokens an expert.

    Args:
        roofs: name -> (FLOP/s of a large matmul, bytes/s of memory, bytes of a number).
        tokens: an expert's matrices [F, D] are read once and multiplied by so many rows: 2 FLOP a row and number.
    """
    figure, intensity = go.Figure(), np.geomspace(1, 4096, 97)
    for (name, (peak, bandwidth, size)), color in zip(roofs.items(), (BLUE, ORANGE, GREEN), strict=False):
        line, marker = {"color": color}, {"color": color, "size": 9}
        roof = np.minimum(peak, bandwidth * intensity).tolist()
        figure.add_scatter(x=intensity.tolist(), y=roof, name=name, mode="lines", line=line)
        marks = [2 * t / size for t in tokens]
        reached = [min(peak, bandwidth * x) for x in marks]
        text = [str(t) for t in tokens]
        look = {"mode": "markers+text", "text": text, "textposition": "bottom right", "showlegend": False}
        figure.add_scatter(x=marks, y=reached, name=f"{name}, tokens an expert", marker=marker, **look)
    figure.update_xaxes(type="log", title="FLOP per byte of weights; at the marks: tokens an expert", dtick=1)
    figure.update_yaxes(type="log", title="FLOP/s, at most", dtick=1, exponentformat="power")
    even = ", ".join(f"{name}: {peak / bandwidth * size / 2:.0f}" for name, (peak, bandwidth, size) in roofs.items())
    return figure.update_layout(title=f"Tokens an expert at which the roof bends: {even}", height=400)


def walls(tokens, k: int = 1, gpus: int = 1, link: float = LINKS["NVLink 350 GB/s"]) -> dict[str, np.ndarray]:
    """Least seconds that each resource needs for one training step of Sigma-MoE-Tiny on `tokens` tokens in all.

    FLOPs: 6 for each active parameter and token. Weights: the bf16 experts are read forward and backward, their gradient
    is written once. Optimizer: AdamW reads four fp32 numbers for each parameter and writes three, 28 bytes. Expert
    parallelism: a token's vector goes out and comes back, forward and backward, for each layer and choice. All of it is
    divided among the GPUs.
    """
    tokens, net = np.asarray(tokens, float), replace(ModelConfig.preset("sigma_moe_tiny"), top_k=k)
    ledger = net.ledger()
    sent = 4 * 2 * net.d_model * net.n_layers * k * (gpus - 1) / gpus  # bytes a token
    once = np.ones_like(tokens) / gpus
    return {
        "FLOPs": 6 * ledger.active * tokens / PEAK / gpus,
        "expert weights": 3 * 2 * ledger.experts / BANDWIDTH * once,
        "AdamW": 28 * ledger.total / BANDWIDTH * once,
        "expert parallelism": sent * tokens / gpus / link,
    }


def walls_figure(k: int, gpus: int, link: str) -> go.Figure:
    """`walls` over tokens per step; the title tells where FLOPs become dearer than weights, and than AdamW."""
    tokens = np.geomspace(1e3, 1e7, 41)
    figure = go.Figure()
    for (name, seconds), color in zip(walls(tokens, k, gpus, LINKS[link]).items(), (BLUE, GREEN, ORANGE, PINK), strict=True):
        shown = seconds.tolist() if seconds.any() else [None] * len(tokens)  # nothing to pay has no place on a log axis
        figure.add_scatter(x=tokens.round().tolist(), y=shown, name=name, mode="lines", line={"color": color})
    figure.update_xaxes(type="log", title="tokens per step")
    figure.update_yaxes(type="log", title="seconds per step, at least", range=[-5, 2], exponentformat="power")
    one = walls(1.0, k, gpus)
    pays = (float(one[name] / one["FLOPs"]) for name in ("expert weights", "AdamW"))
    note = f"ceilings: {PEAK / 1e12:.0f} TFLOP/s bf16, {BANDWIDTH / 1e12:.1f} TB/s, {link}; computed, not measured"
    figure.add_annotation(text=note, xref="paper", yref="paper", x=1, y=0.02, xanchor="right", showarrow=False)
    title = "FLOPs pass the weights at {:,.0f} tokens a step, AdamW at {:,.0f}".format(*pays)
    return figure.update_layout(title=title, height=430)


def growth(milliseconds: Mapping[str, Mapping[int, float]]) -> go.Figure:
    """Time over the number of experts on log axes, one curve a backend; the title tells by what factor each one grew."""
    figure = go.Figure()
    for (name, times), color in zip(milliseconds.items(), (ORANGE, GREEN, BLUE, PINK), strict=False):
        figure.add_scatter(x=list(times), y=list(times.values()), name=name, mode="lines+markers", line={"color": color})
    experts = list(next(iter(milliseconds.values())))
    figure.update_xaxes(
        type="log", title="experts; tokens and work per token stay the same", tickvals=experts, ticktext=experts
    )
    figure.update_yaxes(type="log", title="ms of CPU time", dtick=1)
    grew = ", ".join(f"{name} {times[experts[-1]] / times[experts[0]]:.1f}x" for name, times in milliseconds.items())
    return figure.update_layout(title=f"{experts[0]} to {experts[-1]} experts: {grew}", height=400)


def recorded_experts(path: Path) -> go.Figure:
    """`make bench`, recorded: how many times as long as ours each variant takes, with its 95 % interval, layer by layer."""
    facts = json.loads(path.read_text("utf-8"))
    figure = go.Figure()
    others = [name for name in next(iter(facts["results"].values())) if name != "ours"]
    for name, color in zip(others, (GREEN, GREY, BLUE, ORANGE), strict=False):
        rows = [result[name] for result in facts["results"].values()]
        ratios = [row["times_ours"] for row in rows]
        high = [row["times_ours_95"][1] - ratio for row, ratio in zip(rows, ratios, strict=True)]
        low = [ratio - row["times_ours_95"][0] for row, ratio in zip(rows, ratios, strict=True)]
        spread = {"array": high, "arrayminus": low, "color": color}
        marker = {"color": color, "size": 9}
        figure.add_scatter(x=ratios, y=list(facts["results"]), name=name, mode="markers", error_x=spread, marker=marker)
    figure.add_vline(1, line={"color": FAINT})
    figure.update_xaxes(type="log", title="times as long as ours, forward and backward", tickvals=[1, 2, 5, 10, 20, 50])
    figure.update_yaxes(autorange="reversed")
    title = f"{facts['rounds']} rounds, torch {facts['versions']['torch']}, transformers {facts['versions']['transformers']}"
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": -0.4, "yanchor": "top"}
    return figure.update_layout(title={"text": title, "xref": "container", "x": 0.02}, height=420, legend=legend)
