"""Figures of the chapters on experts and routers: numbers in, plotly figure out."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from sigma_lite.config import ModelConfig
from sigma_lite.kernels.torch_grouped import routing_plan
from sigma_lite.teach.plots import MANY
from sigma_lite.teach.style import BLUE, FAINT, GREEN, GREY, ORANGE

GRID = 61  # points along each side of the plane of tokens
REACH = 2.5  # the plane shows -REACH..REACH


def sorting(ids_TK: Tensor, n_experts: int) -> go.Figure:
    """Slots in token order above, the same slots sorted by expert below; colour is the expert, the number the slot."""
    flat_N, plan = ids_TK.flatten(), routing_plan(ids_TK, n_experts)
    rows = {"sorted by expert": plan.slot_N, "in token order": torch.arange(len(flat_N))}
    fig = go.Figure()
    for expert in range(n_experts):
        for name, slot_N in rows.items():
            at = (flat_N[slot_N] == expert).nonzero().flatten()
            fig.add_scatter(
                x=at.tolist(), y=[name] * len(at), text=slot_N[at].tolist(), mode="markers+text", name=f"expert {expert}",
                marker={"symbol": "square", "size": 32, "color": MANY[expert % len(MANY)]}, textfont_color="white",
                legendgroup=expert, showlegend=name == "in token order", hoverinfo="skip",
            )  # fmt: skip
    fig.update_xaxes(title_text="row", dtick=1, range=[-0.6, len(flat_N) - 0.4], showgrid=False, zeroline=False)
    fig.update_yaxes(categoryorder="array", categoryarray=list(rows), showgrid=False)
    return fig.update_layout(title=f"{len(flat_N)} slots, {n_experts} experts", height=270)


def parameter_bars(net: ModelConfig) -> go.Figure:
    """All non-embedding parameters beside those that one token uses, in billions, by part of the model."""
    ledger = net.ledger()
    parts = {
        "attention": (ledger.attention, ledger.attention, BLUE),
        "router": (ledger.router, ledger.router, GREEN),
        "experts": (ledger.experts, ledger.active_experts, ORANGE),
    }
    fig = make_subplots(1, 2, subplot_titles=("kept in memory", "used by one token"), horizontal_spacing=0.12)
    for name, (held, used, colour) in parts.items():
        for column, count in enumerate((held, used), start=1):
            fig.add_bar(
                x=[count / 1e9], y=[""], name=name, orientation="h", marker_color=colour, legendgroup=name,
                showlegend=column == 1, hovertemplate=f"{name}: %{{x:.3f}} billion<extra></extra>", row=1, col=column,
            )  # fmt: skip
    fig.update_xaxes(title_text="billion parameters")
    fig.update_xaxes(range=[0, 60], col=1)
    fig.update_xaxes(range=[0, 3], col=2)
    held, used = ledger.non_embedding, ledger.active
    shape = f"E = {net.n_experts}, K = {net.top_k}, F = {net.d_expert}"
    title = f"{shape} · {held / 1e9:.2f} B held, {used / 1e9:.3f} B used: {held / used:.1f} : 1"
    legend = {"y": 1.2, "traceorder": "normal"}
    return fig.update_layout(barmode="stack", title=title, height=300, legend=legend, margin_t=110)


def sigma_with(experts: int, k: int = 1, width: int = 768) -> go.Figure:
    """`parameter_bars` of Sigma-MoE-Tiny with E, K and F changed; K is cut to E."""
    net = ModelConfig.preset("sigma_moe_tiny")
    return parameter_bars(replace(net, n_experts=experts, top_k=min(k, experts), d_expert=width))


def directions(n_experts: int, seed: int = 4) -> Tensor:
    """Router rows for tokens in the plane, fp32 [E, 2], of length 1: spread around the circle, not evenly."""
    turn_E = torch.rand(n_experts, generator=torch.Generator().manual_seed(seed)) * 0.5
    angle_E = (torch.arange(n_experts) + turn_E) * (2 * torch.pi / n_experts)
    return torch.stack((angle_E.cos(), angle_E.sin()), dim=1)


def plane(scale: float, k: int, x_TD: Tensor, w_ED: Tensor) -> go.Figure:
    """Who serves which token of a plane. Regions: the chosen set; lines: the largest gate; dots: tokens, area = gate."""
    line = torch.linspace(-REACH, REACH, GRID)
    grid_TD = torch.cartesian_prod(line, line).flip(1)  # rows of the picture are the second coordinate
    sets_T, gate_T = _choice(scale * grid_TD @ w_ED.T, k)
    kinds = sets_T.unique()
    region = torch.searchsorted(kinds, sets_T).view(GRID, GRID)
    _, mine_T = _choice(scale * x_TD @ w_ED.T, k)
    axis, last = [round(v, 3) for v in line.tolist()], max(len(kinds) - 1, 1)
    fig = go.Figure()
    fig.add_heatmap(
        x=axis, y=axis, z=region.tolist(), zmin=0, zmax=last, showscale=False, opacity=0.35, hoverinfo="skip",
        colorscale=[[n / last, MANY[n % len(MANY)]] for n in range(last + 1)],
    )  # fmt: skip
    fig.add_contour(
        x=axis, y=axis, z=[[round(v, 3) for v in row] for row in gate_T.view(GRID, GRID).tolist()], showscale=False,
        contours={"coloring": "lines", "start": 0.3, "end": 0.9, "size": 0.2, "showlabels": True},
        colorscale=[[0, GREY], [1, GREY]], hovertemplate="gate %{z:.2f}<extra></extra>", line_width=1,
    )  # fmt: skip
    fig.add_scatter(
        x=x_TD[:, 0].tolist(), y=x_TD[:, 1].tolist(), mode="markers", hoverinfo="skip",
        marker={"color": GREY, "size": (mine_T.sqrt() * 14).tolist(), "line": {"color": FAINT, "width": 1}},
    )  # fmt: skip
    for expert, (a, b) in enumerate((w_ED * REACH * 0.8).tolist()):
        fig.add_annotation(x=a, y=b, ax=0, ay=0, axref="x", ayref="y", showarrow=True, arrowhead=2, arrowcolor=GREY, text="")
        fig.add_annotation(x=a * 1.12, y=b * 1.12, text=f"expert {expert}", showarrow=False)
    fig.update_xaxes(
        range=[-REACH, REACH], title_text="first coordinate", constrain="domain", showgrid=False, zeroline=False
    )
    fig.update_yaxes(range=[-REACH, REACH], title_text="second coordinate", scaleanchor="x", showgrid=False, zeroline=False)
    title = f"logits x {scale:g}, K = {k}: {len(kinds)} regions, mean largest gate {mine_T.mean():.2f}"
    return fig.update_layout(title=title, height=520, width=560, showlegend=False)


def _choice(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(a number that names the chosen set, the largest gate) of each token."""
    gates_TK, ids_TK = logits_TE.softmax(-1).topk(k, dim=-1)
    return (2**ids_TK).sum(-1), gates_TK[:, 0]
