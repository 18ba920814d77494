"""How long a step takes, as a range, and what a run costs. Nothing here was measured on a GPU by us.

The law: a device computes, or waits for its memory, or for the others; the largest decides, and what does not overlap adds
up. Two levels of craft bound the range. For GPUs both were fitted to published training runs on H100, which force balanced
routing; benchmarks/plan_mfu.py says which, and what the law then predicts for others.

tuned  vendor kernels, most of the exchange hidden behind matrix products: the fast end
plain  what ordinary kernels reach, nothing hidden: the slow end
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sigma_lite.runfile import RunConfig
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.layout import Layout, precision_of
from sigma_lite.scale.traffic import Wire, flops_per_token, optimizer_bytes, streamed, wire


class Craft(NamedTuple):
    compute: float  # share of the peak that matrix products reach, everything between them included
    overlap: float  # share of the communication that hides behind them


CRAFT = {
    "gpu": (Craft(0.37, 0.55), Craft(0.17, 0.0)),  # fitted: benchmarks/plan_mfu.py
    "cpu": (Craft(0.65, 0.0), Craft(0.35, 0.0)),  # set around the toy's recorded run; narrow models reach less
}
MEMORY_REACHED = 0.9  # of the maker's memory bandwidth: 4.3 of 4.8 TB/s were reached on an H200
INTRA_REACHED = 0.78  # of NVLink's rate in an all-to-all: 350 of 450 GB/s, assumed
INTER_REACHED = 0.9  # of the network's: DeepEP reports 43 to 58 GB/s on 50
LAUNCHES = 120  # kernels of one layer, forward and backward, assumed
LAUNCH_SECONDS = {"gpu": 5e-6, "cpu": 0.0}  # of the host for each


class Step(NamedTuple):
    """Seconds of one optimizer step, by part; parts overlap."""

    compute: float
    optimizer: float
    network: float
    host: float
    seconds: float

    @property
    def bound_by(self) -> str:
        parts = self._asdict()
        del parts["seconds"]
        return max(parts, key=parts.get)


def network_seconds(sent: Wire, cluster: Cluster) -> float:
    """Both kinds of link one after the other."""
    intra = sent.intra / (cluster.intra_node_gbps * 1e9 * INTRA_REACHED) if sent.intra else 0.0
    inter = sent.inter / (cluster.inter_node_gbps * 1e9 * INTER_REACHED) if sent.inter else 0.0
    return intra + inter


def together(compute: float, network: float, overlap: float) -> float:
    """Seconds of computing and communicating, `overlap` of the communication at the same time."""
    return max(compute + (1 - overlap) * network, network)


def step(run: RunConfig, layout: Layout, cluster: Cluster, k_per_layer: Sequence[int], craft: Craft) -> Step:
    """One optimizer step at a level of craft."""
    bandwidth = cluster.memory_gbps * 1e9 * MEMORY_REACHED
    tokens = run.rows.per_step * run.rows.length / layout.devices
    work = worked(run, layout, k_per_layer, cluster.kind == "gpu")
    products = work * tokens / (cluster.peak_tflops * 1e12 * craft.compute)
    compute = max(products, streamed(run, layout) / bandwidth)
    optimizer = optimizer_bytes(run, layout) / bandwidth
    parts = wire(run, layout, cluster, k_per_layer)
    network = network_seconds(Wire(sum(w.intra for w in parts.values()), sum(w.inter for w in parts.values())), cluster)
    micros = run.rows.per_step / (layout.devices * layout.per_micro)
    passes = 4 / 3 if layout.recompute else 1.0  # a second forward pass
    host = micros * run.net.n_layers * LAUNCHES * passes * LAUNCH_SECONDS[cluster.kind]
    seconds = max(together(compute, network, craft.overlap), host) + optimizer
    return Step(compute, optimizer, network, host, seconds)


def worked(run: RunConfig, layout: Layout, k_per_layer: Sequence[int], gpu: bool) -> float:
    """FLOPs of the fullest device for each of its own tokens: all others wait for its experts (the makespan).

    Recomputation runs the layers' forward pass a second time, and not the head's. Attention with a table of who may look at
    whom multiplies the positions to come too, and throws them away; documents shorter than a row save nothing here.
    """
    way = run.net.attention_way(run.rows.length, gpu, precision_of(run).half)
    flops = flops_per_token(run.net, k_per_layer, run.rows.length)
    passes = 4 if layout.recompute else 3
    waited = (layout.fullest - 1) * 2 * run.net.ledger(k_per_layer).active_experts
    attention = flops.attention * (2 if way == "masked" else 1)
    return passes * (flops.matrices + attention + waited) + 3 * flops.head


def mfu(run: RunConfig, layout: Layout, cluster: Cluster, k_per_layer: Sequence[int], seconds: float) -> float:
    """Share of the devices' peak that the model's FLOPs take."""
    flops = flops_per_token(run.net, k_per_layer, run.rows.length).training * run.rows.per_step * run.rows.length
    return flops / (seconds * layout.devices * cluster.peak_tflops * 1e12)
