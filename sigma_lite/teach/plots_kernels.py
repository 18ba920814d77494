"""Figures of the chapter on the grouped matmul: tiles and their rows, walls of a training step, what a compiler made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from sigma_lite.config import ModelConfig, require
from sigma_lite.figures.style import fade
from sigma_lite.kernels.compile_offline import Compiled
from sigma_lite.teach.style import BLUE, CLEAR, FAINT, GREEN, GREY, ORANGE, PINK

PEAK = 790e12  # FLOP/s, bf16: what a large matmul reaches on an H200. A stated ceiling, like the next one
BANDWIDTH = 4.3e12  # bytes/s of its memory
LINKS = {"NVLink 350 GB/s": 350e9, "InfiniBand 50 GB/s": 50e9}  # assumed achieved rates, per GPU
ROUTINGS = ("balanced", "multinomial", "zipf")
TENSOR_CORE = re.compile(r"\b(wgmma\.\w+|mma\.sync|ldmatrix|tcgen05\.(?:mma|ld|commit)|cp\.async\.c[ag])\b")


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
    """`walls` over tokens per step; the title tells from where on FLOPs cost more than weights, and than AdamW."""
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
    title = "FLOPs cost more than weights from {:,.0f} tokens on, more than AdamW from {:,.0f}".format(*pays)
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


def compiled_figure(arch: str, made: Compiled) -> go.Figure:
    """What the compiler made for one GPU: counts and resources on the left, the lines of PTX that matter on the right."""
    counts = {name: n for name, n in made.instructions.items() if n}
    facts = {**counts, "registers a thread": made.registers, "spilled registers": made.spills}
    facts["shared memory (KB)"] = made.shared_bytes / 1024
    figure = go.Figure()
    look = {"fill": {"color": CLEAR}, "line": {"color": FAINT}, "align": "left", "font": {"color": GREY}}
    values = [f"{value:g}" for value in facts.values()]
    figure.add_table(
        header={**look, "values": ["in PTX, occurrences", ""]},
        cells={**look, "values": [list(facts), values], "height": 26},
        columnwidth=[3, 1],
        domain={"x": [0, 0.32]},
    )
    mono = {**look, "font": {"color": GREY, "family": "ui-monospace, monospace", "size": 11}}
    lines = [TENSOR_CORE.sub(r"<b>\1</b>", line) for line in ptx_lines(made.ptx)]
    figure.add_table(
        header={**look, "values": ["PTX around a tensor-core instruction"]},
        cells={**mono, "values": [lines], "height": 22},
        domain={"x": [0.34, 1]},
    )
    return figure.update_layout(title=f"{arch}: compiled, not run", height=420, margin={"l": 10, "r": 10, "t": 50, "b": 10})


def ptx_lines(ptx: str, width: int = 62) -> list[str]:
    """The first lines of PTX with a tensor-core instruction, a load for one or a copy, each kind at most twice."""
    found: dict[str, list[str]] = {}
    for line in ptx.splitlines():
        if match := TENSOR_CORE.search(line):
            text = " ".join(line.split())
            same = found.setdefault(match[1], [])
            if len(same) < 2:
                same.append(text if len(text) <= width else text[: width - 1] + "…")
    return [line for same in found.values() for line in same]
