"""A config on a cluster: does it fit, what travels, how long does it take, what does it cost, and which mesh is best."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from sigma_lite.config import require
from sigma_lite.runfile import RunConfig
from sigma_lite.scale import cost, keeping
from sigma_lite.scale.cluster import Cluster, load_cluster
from sigma_lite.scale.layout import IMBALANCE, Layout, choices, layout_of, place, precision_of, strategy_config, why_not
from sigma_lite.scale.memory import dispatch_per_layer, fits, kept_per_layer, memory, peak, usable
from sigma_lite.scale.notes import notes, whole_model_everywhere
from sigma_lite.scale.offloading import elsewhere
from sigma_lite.scale.plan import k_before_and_after, plan
from sigma_lite.scale.traffic import wire

MOST_NODES = 256  # tried when a run does not fit


def forecast(
    run: RunConfig, cluster_name: str | None = None, nodes: int | None = None, imbalance: float = IMBALANCE
) -> dict[str, Any]:
    """Everything `sigma-lite plan` says, as plain values: bytes, seconds, and [fast, slow] where a range is meant.

    Args:
        cluster_name: a built-in description or a yaml file; None: a laptop or H100, by trainer.accelerator.
        nodes: instead of trainer.num_nodes or the description's own number.
        imbalance: rows that the fullest device of an exchange gets, relative to its share; 1 is even.

    Raises ConfigError for a cluster that cannot be read, for rows that no layout of its devices can share out, and for parts
    of the reader's own on several devices or whose parameters cannot be counted.
    """
    require(nodes is None or nodes > 0, f"--nodes {nodes}: must be at least 1")
    require(1 <= imbalance < math.inf, f"--imbalance {imbalance}: must be 1 (even) or more, and finite")
    described = load_cluster(cluster_name or _usual(run, nodes))
    cluster = place(run, described, nodes)
    if run.parts:
        run = _counted(run, cluster)
    given = layout_of(run, cluster, imbalance)
    problem = why_not(run.net, run.rows, given)
    if not problem and cluster.devices > 1 and not given.sharded:
        problem = whole_model_everywhere(run, cluster)
    best = suggestion(run, cluster, imbalance)
    require(bool(best) or not problem, f"no layout of {cluster.size()} can run this: {problem}")
    layout = given if not problem or best is None else best
    stages = {
        "initial": _stage(run, layout, cluster, k_before_and_after(run)[0]),
        "target": _stage(run, layout, cluster, k_before_and_after(run)[1]),
    }
    return {
        **plan(run),
        "notes": notes(run, described, cluster, nodes, problem),
        "cluster": _described(cluster, cluster_name is None),
        "precision": precision_of(run).name,
        "attention": run.net.attention_way(run.rows.length, cluster.kind == "gpu", precision_of(run).half),
        "layout": _laid_out(run, layout) | {"problem": problem, "from": "config" if layout is given else "planner"},
        "usable_bytes": usable(cluster),
        "fits": all(stage["fits"] for stage in stages.values()),
        **stages,
        "run": _whole(run, layout, cluster),
        "checkpoints": keeping.checkpoints(run, layout, cluster, stages["initial"]["step_seconds"][-1]),
        "data": keeping.data(run),
        "experts_elsewhere": elsewhere(run, layout, cluster),
        "suggested": None if best is None else _laid_out(run, best) | _speed(run, best, cluster),
        "fits_from_nodes": None if best else _enough_nodes(run, cluster, imbalance),
    }


def _counted(run: RunConfig, cluster: Cluster) -> RunConfig:
    """With the parameters that the reader's own parts have."""
    from sigma_lite.scale.parameters import counted  # torch, which plans of usual models do without
    from sigma_lite.scale.shard import refuse_custom

    if strategy_config(run.trainer.get("strategy")):
        refuse_custom(run.parts)
    names = ", ".join(f"model.parts.{name}" for name in run.parts)
    one = "a part of your own is planned on one device: set trainer.devices=1, or --cluster with one device a node"
    require(cluster.devices == 1, f"{names} on {cluster.size()}: {one}")
    return dataclasses.replace(run, net=counted(run.net, run.parts))


def _usual(run: RunConfig, nodes: int | None) -> str:
    accelerator = run.trainer.get("accelerator")
    if accelerator == "cpu":
        return "laptop"
    unknown = accelerator not in (None, "auto", "gpu", "cuda")
    require(
        not unknown, f"no machine is known for trainer.accelerator={accelerator}: describe yours and give --cluster FILE"
    )
    several = [n for n in (nodes, run.trainer.get("num_nodes"), run.trainer.get("devices")) if isinstance(n, int) and n > 1]
    return "h100-node" if several else "h100"


def suggestion(run: RunConfig, cluster: Cluster, imbalance: float = IMBALANCE) -> Layout | None:
    """The layout that fits before and after the switch and is fastest at its worst; None where nothing fits."""
    ks = k_before_and_after(run)
    plain = cost.CRAFT[cluster.kind][1]
    able = [lay for lay in choices(run, cluster, imbalance) if all(fits(memory(run, lay, cluster, k), cluster) for k in ks)]

    def rank(layout: Layout) -> tuple:
        seconds = cost.step(run, layout, cluster, ks[0], plain).seconds
        other = layout.per_micro != run.rows.per_micro  # what makes no difference stays as it is
        return (float(f"{seconds:.2g}"), layout.recompute, other, layout.expert_parallel, layout.per_micro)

    return min(able, key=rank, default=None)


def _enough_nodes(run: RunConfig, cluster: Cluster, imbalance: float) -> int | None:
    """The smallest power of two of such nodes on which a layout fits; None for a machine that has no network."""
    nodes = cluster.nodes
    while cluster.inter_node_gbps and nodes < MOST_NODES:
        nodes *= 2
        if suggestion(run, cluster.resized(nodes), imbalance):
            return nodes
    return None


def _stage(run: RunConfig, layout: Layout, cluster: Cluster, k_per_layer: Sequence[int]) -> dict[str, Any]:
    """Memory, bytes on the wire and speed at these K."""
    items = memory(run, layout, cluster, k_per_layer)
    parts = wire(run, layout, cluster, k_per_layer)
    return {
        "memory": items,
        "peak_bytes": peak(items),
        "fits": fits(items, cluster),
        "activation_bytes_per_layer": kept_per_layer(run, layout, cluster.kind == "gpu", k_per_layer),
        "dispatch_bytes_per_layer": dispatch_per_layer(run, layout, k_per_layer),
        "wire_bytes_per_step": {name: {"intra_node": w.intra, "inter_node": w.inter} for name, w in parts.items()},
        **_speed(run, layout, cluster, k_per_layer),
    }


def _speed(run: RunConfig, layout: Layout, cluster: Cluster, k_per_layer: Sequence[int] | None = None) -> dict[str, Any]:
    k_per_layer = k_per_layer or k_before_and_after(run)[0]
    steps = [cost.step(run, layout, cluster, k_per_layer, craft) for craft in cost.CRAFT[cluster.kind]]
    return {
        "step_seconds": [s.seconds for s in steps],
        "bound_by": [s.bound_by for s in steps],
        "parts_seconds": [{n: v for n, v in s._asdict().items() if n != "seconds"} for s in steps],
        "mfu": [cost.mfu(run, layout, cluster, k_per_layer, s.seconds) for s in steps],
        "tokens_per_second": [run.rows.per_step * run.rows.length / s.seconds for s in steps],
    }


def _whole(run: RunConfig, layout: Layout, cluster: Cluster) -> dict[str, Any] | None:
    """Time and price of trainer.max_steps, each step with its experts per token and rows; None without an end."""
    total = run.trainer.get("max_steps")
    if not isinstance(total, int) or total < 1:
        return None
    k_first, k_last = k_before_and_after(run)
    changes = {0, run.sparsity.switch_step, total, *(step for step, _ in run.rows.ramp)}
    starts = sorted(step for step in changes if step <= total)
    hours = [0.0 for _ in cost.CRAFT[cluster.kind]]
    for first, end in itertools.pairwise(starts):
        size = run.rows.at(first)
        same = dataclasses.replace(run, rows=dataclasses.replace(run.rows, per_step=size, ramp=()))
        speed = _speed(same, layout, cluster, k_first if first < run.sparsity.switch_step else k_last)
        hours = [h + (end - first) * seconds / 3600 for h, seconds in zip(hours, speed["step_seconds"], strict=True)]
    return {
        "steps": total,
        "tokens": run.rows.before(total) * run.rows.length,
        "hours": hours,
        "days": [h / 24 for h in hours],
        "cost": [h * cluster.devices * cluster.price_per_hour for h in hours],
        "currency": cluster.currency,
    }


def _laid_out(run: RunConfig, layout: Layout) -> dict[str, Any]:
    micros = run.rows.per_step // (layout.devices * layout.per_micro)
    return dataclasses.asdict(layout) | {"data_parallel": layout.data, "accumulation": micros}


def _described(cluster: Cluster, by_default: bool) -> dict[str, Any]:
    given = dataclasses.asdict(cluster)
    figures = [name for name in given if name not in ("name", "kind", "sources", "currency")]
    return given | {"by_default": by_default, "sources": {name: cluster.source(name) for name in figures}}
