"""Figures of the chapters on many devices: who sends what to whom, and what fits where for how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from runpy import run_path

import plotly.graph_objects as go
import torch
from torch import Tensor

import sigma_lite
from sigma_lite.config import require
from sigma_lite.figures.style import BLUE, GREY, VERMILLION, fade
from sigma_lite.runfile import RunConfig, load_run
from sigma_lite.scale import cost
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.layout import Layout, why_not
from sigma_lite.scale.memory import GIB, fits, memory, peak, usable
from sigma_lite.scale.plan import k_before_and_after
from sigma_lite.teach.plots import MANY, heat

BESIDE = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1.0, "yanchor": "top"}
ROOT = Path(sigma_lite.__file__).parents[1]

# ------------------------------------------------------------------------------------------- who sends what to whom


def send_matrix(ids_TK: Tensor, ranks: int, n_experts: int) -> Tensor:
    """Rows that each rank sends to each other in one layer, int64 [from, to]; the diagonal stays at home.

    Args:
        ids_TK: chosen experts. Rank r has the r-th part of the tokens and the r-th part of the experts.
        ranks: R; divides T and `n_experts`.
    """
    require(n_experts % ranks == 0, f"{n_experts} experts cannot be shared out over {ranks} ranks in equal parts")
    require(len(ids_TK) % ranks == 0, f"{len(ids_TK)} tokens cannot be shared out over {ranks} ranks in equal parts")
    to_RN = (ids_TK // (n_experts // ranks)).view(ranks, -1)
    return torch.stack([torch.bincount(to_N, minlength=ranks) for to_N in to_RN])


def makespan(f_E: Tensor, ranks: int) -> float:
    """Load of the busiest of so many ranks, in fair shares: 1 balanced .. `ranks` when one of them gets everything.

    Args:
        f_E: share of each expert; neighbours live together, E / ranks of them on each rank.
    """
    return ranks * (f_E / f_E.sum()).view(ranks, -1).sum(1).max().item()


def traffic(sends_RR: Tensor, title: str) -> go.Figure:
    """A matrix of rows as a heat map, with the numbers in it."""
    names = [f"rank {r}" for r in range(len(sends_RR))]
    figure = heat(sends_RR.numpy(), title, "receives", "sends", low=0, high=float(sends_RR.max()), names=names)
    return figure.update_traces(texttemplate="%{z:.0f}").update_layout(height=380)


def tilted(imbalance: float, n_experts: int = 32) -> Tensor:
    """Shares of experts, shuffled, that fall off so that the busiest has 1 + `imbalance` fair shares, within 1 %.

    Args:
        imbalance: 0 .. n_experts - 2.
    """
    rank_E = torch.arange(n_experts, dtype=torch.float64)
    low, high = 0.0, 50.0
    for _ in range(60):  # bisection: shares fall as exp(-slope * place)
        slope = (low + high) / 2
        f_E = torch.softmax(-slope * rank_E, 0)
        low, high = (slope, high) if n_experts * f_E[0] < 1 + imbalance else (low, slope)
    return f_E[torch.randperm(n_experts, generator=torch.Generator().manual_seed(1))]


def ranks_figure(imbalance: float, n_experts: int = 32) -> go.Figure:
    """Load of every rank, in fair shares, when these experts live on 1, 2, 4 and 8 ranks and each rank on its own."""
    f_E = tilted(imbalance, n_experts)
    figure = go.Figure()
    for place, ranks in enumerate((1, 2, 4, 8, n_experts)):
        loads = (ranks * f_E.view(ranks, -1).sum(1)).sort(descending=True).values.tolist()
        x = [place + 0.8 * ((i + 0.5) / ranks - 0.5) for i in range(ranks)]
        colours = [fade(VERMILLION, 0.7)] + [fade(BLUE, 0.5)] * (ranks - 1)
        figure.add_bar(x=x, y=loads, width=0.76 / ranks, marker_color=colours, showlegend=False)
        figure.add_scatter(
            x=[place], y=[loads[0]], text=[f"{loads[0]:.2f}"], mode="text", textposition="top center", showlegend=False
        )
    figure.add_hline(y=1, line={"dash": "dot", "color": GREY})
    figure.update_xaxes(
        title="ranks",
        tickvals=list(range(5)),
        ticktext=["1", "2", "4", "8", f"{n_experts}: one expert each"],
        range=[-0.6, 4.6],
    )
    figure.update_yaxes(title="rows to compute (fair shares)", range=[0, 1.15 * max(2.0, 1 + imbalance)])
    title = f"busiest expert {imbalance:+.0%}: everybody waits for the orange bar"
    return figure.update_layout(title=title, height=400, bargap=0)


def rivals(record: Mapping) -> go.Figure:
    """Planning time against the fullest rank of each planner in results/bench/placement-*.json, before and after the switch.

    A line leads from what a plan is worth on its own window to what it is worth on the next.
    """
    figure, scores = go.Figure(), record["staleness"]
    for (name, ms), colour in zip(record["planning_ms"].items(), MANY, strict=False):
        x, y, marks = [], [], []
        for stage, beside, mark in (("before the switch", 0.94, "circle"), ("after it", 1.06, "diamond")):
            x += [ms * beside] * 2 + [None]
            y += [scores[name][stage]["same window"], scores[name][stage]["next"], None]
            marks += [f"{mark}-open", mark, mark]
        marker = {"symbol": marks, "size": 10, "color": colour}
        figure.add_scatter(x=x, y=y, name=name, mode="lines+markers", marker=marker, line={"color": colour, "width": 1})
    figure.add_hline(y=1, line={"dash": "dot", "color": GREY})
    figure.update_xaxes(title="milliseconds of one plan", type="log", dtick=1, tickformat="~g")
    figure.update_yaxes(title="fullest rank (even = 1)", range=[0.9, 2.0])
    title = f"{record['spots']} spots on {record['ranks']} ranks: planned window open, next one filled"
    return figure.update_layout(title=title, height=440, legend=BESIDE)


# --------------------------------------------------------------------------------------------- what fits, how long


def rung(name: str, over: Mapping[str, object] | None = None) -> RunConfig:
    """A config of the ladder, scaled_configs/NAME.yaml; `over` lays groups of keys over it."""
    return load_run([ROOT / "scaled_configs" / f"{name}.yaml"], over)


def question(name: str) -> dict[str, str]:
    """What the head of a rung's file says of it: Question, Hardware, Memory, Time and so on."""
    lines = (ROOT / "scaled_configs" / f"{name}.yaml").read_text("utf-8").splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if not line.startswith("#"):
            break
        key, colon, text = line[1:].strip().partition(": ")
        if colon and key.istitle() and " " not in key:
            found[key] = text
        elif found:
            found[next(reversed(found))] += " " + line[1:].strip()
    return found


def published() -> list[dict]:
    """Runs that others published, and the planner's law for them: benchmarks/plan_mfu.py, without printing anything."""
    law = run_path(str(ROOT / "benchmarks" / "plan_mfu.py"))
    rows = []
    for run in (*law["FITTED"], *law["PREDICTED"]):
        slow, fast = law["spread"](run)
        verdict = "fitted" if run in law["FITTED"] else law["verdict"](slow, run.tflops, fast)
        name = f"{run.name}, {run.system}"
        rows.append({"run": name, "published": run.tflops, "slow": slow, "fast": fast, "verdict": verdict})
    return rows


def published_figure(rows: Sequence[Mapping]) -> go.Figure:
    """The law's range as a bar, the published number as a dot."""
    figure = go.Figure()
    names = [row["run"] for row in rows]
    figure.add_bar(
        y=names, x=[row["fast"] - row["slow"] for row in rows], base=[row["slow"] for row in rows], orientation="h",
        name="the law, slow to fast", marker_color=fade(BLUE, 0.45), width=0.5,
    )  # fmt: skip
    dot = {"size": 12, "color": VERMILLION}
    figure.add_scatter(y=names, x=[row["published"] for row in rows], mode="markers", name="published", marker=dot)
    figure.update_xaxes(title="TFLOP/s of each GPU", range=[0, 1000])
    figure.update_yaxes(autorange="reversed")
    return figure.update_layout(title="Published training runs and the planner's law", height=620)


def planner(run: RunConfig, cluster: Cluster, expert_parallel: int, per_micro: int, recompute: bool) -> go.Figure:
    """Memory of a device item by item before and after the switch, against what it has; the step's seconds as title."""
    layout = Layout(cluster.devices, expert_parallel, per_micro, recompute, sharded=True)
    problem = why_not(run.net, run.rows, layout)
    limit = usable(cluster) / GIB
    figure = go.Figure()
    ks = k_before_and_after(run)
    found = [] if problem else [memory(run, layout, cluster, k) for k in ks]
    for name, colour in zip(found[0] if found else (), MANY, strict=False):
        sizes = [items[name] / GIB for items in found]
        figure.add_bar(x=["before the switch", "after it"], y=sizes, name=name.replace("_", " "), marker_color=colour)
    figure.add_hline(y=limit, line={"dash": "dash", "color": VERMILLION}, annotation_text=f"usable: {limit:.0f} GiB")
    figure.update_yaxes(title="memory of one device (GiB)", range=[0, 2 * limit])
    figure.update_xaxes(range=[-0.6, 1.6])
    title = f"not possible: {problem}" if problem else _verdict(run, layout, cluster, ks[0], found[0])
    return figure.update_layout(title=title, barmode="stack", height=440, margin={"r": 150}, legend=BESIDE)


def _verdict(run: RunConfig, layout: Layout, cluster: Cluster, k: Sequence[int], items: Mapping[str, int]) -> str:
    slow, fast = (seconds(run, layout, cluster, k, craft) for craft in reversed(cost.CRAFT[cluster.kind]))
    verdict = "fits" if fits(items, cluster) else "DOES NOT FIT"
    grid = f"data {layout.data} × expert {layout.expert_parallel}"
    return f"{grid}: {peak(items) / GIB:.0f} GiB, {verdict} · a step predicted at {fast:.1f} to {slow:.1f} s"


def seconds(run: RunConfig, layout: Layout, cluster: Cluster, k: Sequence[int], craft: cost.Craft) -> float:
    return cost.step(run, layout, cluster, k, craft).seconds


def over_nodes(run: RunConfig, cluster: Cluster, nodes: Sequence[int], layout: Callable[[Cluster], Layout]) -> go.Figure:
    """Parts of a step of ordinary craft, before the switch, as the same work goes to more nodes."""
    parts: dict[str, list[float]] = {"compute": [], "network": [], "optimizer": [], "host": []}
    k, plain = k_before_and_after(run)[0], cost.CRAFT[cluster.kind][1]
    for n in nodes:
        larger = cluster.resized(n)
        step = cost.step(run, layout(larger), larger, k, plain)
        for name, values in parts.items():
            values.append(getattr(step, name))
    figure = go.Figure()
    for name, values in parts.items():
        figure.add_scatter(x=list(nodes), y=values, name=name, mode="lines+markers")
    figure.update_xaxes(title="nodes of eight GPUs", type="log", tickvals=list(nodes))
    figure.update_yaxes(title="predicted seconds of a step", type="log", dtick=1, tickformat="~g")
    tokens = run.rows.per_step * run.rows.length / 1e6
    return figure.update_layout(title=f"More nodes, the same {tokens:.1f} million tokens a step", height=400)
