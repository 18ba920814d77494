"""Serving: how fast a token can come at best, and how often its expert is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from sigma_lite.config import ModelConfig
from sigma_lite.figures.style import BLUE, GREEN, GREY, VERMILLION, fade
from sigma_lite.scale.cluster import load_cluster
from sigma_lite.scale.decode import tokens_per_second
from sigma_lite.serve.expert_cache import LFU, LRU, Clairvoyant, hit_rate

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SLOTS = (1, 2, 4, 8, 16, 32, 48, 96)


def decode_figure(there: float, link_gbps: float) -> go.Figure:
    """Tokens per second that one H100's memory allows Sigma-MoE-Tiny and a dense model of the same active size, by batch.

    Args:
        there: share of the asked experts that are in memory.
        link_gbps: GB/s over which the others come, while something else is computed.
    """
    sigma, memory = ModelConfig.preset("sigma_moe_tiny"), load_cluster("h100").memory_gbps
    dense, away = dataclasses.replace(sigma, n_experts=1), {"hit_rate": there, "link_gbps": link_gbps}
    curves = {
        "dense, as many active weights": ([tokens_per_second(dense, memory, batch=b) for b in BATCHES], GREY),
        "Sigma, all experts in memory": ([tokens_per_second(sigma, memory, batch=b) for b in BATCHES], BLUE),
        f"Sigma, {there:.0%} of asked experts there": (
            [tokens_per_second(sigma, memory, batch=b, **away) for b in BATCHES],
            VERMILLION,
        ),
    }
    figure = go.Figure()
    for name, (values, colour) in curves.items():
        figure.add_scatter(x=list(BATCHES), y=values, name=name, mode="lines+markers", line={"color": colour})
    figure.update_xaxes(title="sequences that are written together", type="log", tickvals=list(BATCHES))
    figure.update_yaxes(title="tokens per second, at most", type="log", range=[1, 6.5])
    title = f"16-bit weights at {memory:,.0f} GB/s; missing experts at {link_gbps:g} GB/s"
    return figure.update_layout(title=title, height=430)


def cache_rates(trace: Sequence[int], slots: Sequence[int] = SLOTS) -> dict[str, list[float]]:
    """Share of the trace's experts that are there, by policy, for each number of slots."""
    asked = [[expert] for expert in trace]
    policies = {"LRU": LRU, "LFU": LFU, "best possible": lambda: Clairvoyant(asked)}
    return {name: [hit_rate(asked, count, policy()) for count in slots] for name, policy in policies.items()}


def cache_figure(trace: Sequence[int], n_experts: int, title: str, slots: Sequence[int] = SLOTS) -> go.Figure:
    """`cache_rates` over slots, beside what slots / experts would be."""
    figure = go.Figure()
    for (name, rates), colour in zip(cache_rates(trace, slots).items(), (BLUE, GREEN, VERMILLION), strict=True):
        figure.add_scatter(x=list(slots), y=rates, name=name, mode="lines+markers", line={"color": colour})
    even = {"color": GREY, "dash": "dash"}
    figure.add_scatter(x=list(slots), y=[s / n_experts for s in slots], name="slots / experts", mode="lines", line=even)
    figure.update_xaxes(title="slots of the layer", type="log", tickvals=list(slots))
    figure.update_yaxes(title="share of tokens whose expert is there", range=[0, 1.02])
    return figure.update_layout(title=title, height=400)


def guesses_figure(generation: Mapping[str, Mapping[str, Any]], title: str) -> go.Figure:
    """Recorded hit rates with and without guesses of the next layer's router: half of the story."""
    figure = go.Figure()
    for guess, colour in (("", fade(BLUE, 0.5)), (", guesses", BLUE)):
        names = [f"{policy}{guess}" for policy in ("lru", "lfu")]
        values = [generation[name]["there, or on its way"] for name in names]
        label = "the next layer's router guesses" if guess else "no guesses"
        figure.add_bar(x=["LRU", "LFU"], y=values, name=label, marker_color=colour)
    figure.update_yaxes(title="there, or on its way", range=[0, 1])
    return figure.update_layout(title=title, height=340, barmode="group")
