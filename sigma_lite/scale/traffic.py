"""FLOPs of a token, and the bytes that a training step moves: between devices and between a device and its memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sigma_lite.config import ModelConfig
from sigma_lite.runfile import RunConfig
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.layout import Layout, Precision, precision_of

FP32 = 4


class Flops(NamedTuple):
    """Of one token in a forward pass, 2 for each multiply-add."""

    matrices: int  # projections, routers, chosen experts
    head: int  # logits over the vocabulary
    attention: int  # scores and their sums over the values, over the positions seen so far: half a row on average

    @property
    def forward(self) -> int:
        return sum(self)

    @property
    def training(self) -> int:
        """Forward and backward: the backward pass multiplies twice for each multiplication of the forward pass."""
        return 3 * self.forward


def flops_per_token(net: ModelConfig, k_per_layer: Sequence[int], length: int) -> Flops:
    """The model's FLOPs, as MFU counts them: neither recomputation nor what a kernel wastes on masked positions."""
    counts = net.ledger(k_per_layer)
    layers = net.n_layers - net.attention_from_layer
    return Flops(
        matrices=2 * (counts.active - counts.norms),
        head=2 * net.vocab_size * net.d_model,
        attention=2 * layers * length * net.n_heads * net.head_dim,
    )


class Wire(NamedTuple):
    """Bytes through one device's link in a step, the busier direction of it: inside its node, and to other nodes."""

    intra: float
    inter: float


def exchanged(
    net: ModelConfig, tokens: int, k_per_layer: Sequence[int], layout: Layout, number: Precision, cluster: Cluster
) -> Wire:
    """All-to-all of a step: a row goes to its expert's rank and its result comes back; both again in the backward pass, and
    with recomputation once more, because the layer is computed a second time from its input.

    Counted is the link that everybody waits for: the one into the fullest device on the way out, out of it on the way back.
    With `imbalance` 1 that is what every device sends.
    """
    ranks = layout.expert_parallel
    near = math.gcd(ranks, cluster.devices_per_node)  # who of them shares a node: neighbours along the expert axis do
    row = (6 if layout.recompute else 4) * net.d_model * number.compute
    rows = tokens * sum(k_per_layer) * layout.fullest
    return Wire(rows * row * (near - 1) / ranks, rows * row * (ranks - near) / ranks)


def gathered(net: ModelConfig, layout: Layout, number: Precision, cluster: Cluster) -> Wire:
    """FSDP2 in one micro-batch: weights are gathered before the forward and the backward pass, gradients summed after.

    Dense weights travel as they are stored, experts in the compute format, gradients in fp32. Embedding, head and last norm
    are gathered once and kept until the backward pass ends. Recomputation gathers nothing more: its second forward pass runs
    while the layer's weights are there for the backward pass.
    """
    if not layout.sharded:
        return Wire(0.0, 0.0)
    counts = net.ledger()
    kept = counts.embedding + net.d_model
    dense = (counts.total - counts.experts) * (2 * number.weight + FP32) - kept * number.weight
    experts = counts.experts / layout.expert_parallel * (2 * number.compute + FP32)
    near = min(layout.expert_parallel, cluster.devices_per_node)
    spread = cluster.nodes / max(1, layout.expert_parallel // cluster.devices_per_node)  # nodes that share an expert
    per_node = cluster.devices_per_node  # whose adapters share what their node receives
    inter = dense / per_node * (1 - 1 / cluster.nodes) + experts * near / per_node * (1 - 1 / spread)
    intra = dense * (1 - 1 / per_node) + experts * (1 - near / per_node)
    return Wire(intra, inter)


def wire(run: RunConfig, layout: Layout, cluster: Cluster, k_per_layer: Sequence[int]) -> dict[str, Wire]:
    """Bytes through the fullest device's link in an optimizer step, by reason."""
    number = precision_of(run)
    tokens = run.rows.per_step * run.rows.length // layout.devices
    micros = run.rows.per_step // (layout.devices * layout.per_micro)
    weights = gathered(run.net, layout, number, cluster)
    return {
        "tokens_to_experts": exchanged(run.net, tokens, k_per_layer, layout, number, cluster),
        "weights_and_gradients": Wire(weights.intra * micros, weights.inter * micros),
    }


def streamed(run: RunConfig, layout: Layout) -> float:
    """Bytes of weights that a device reads from its own memory in a step: forward, backward, and a gradient written; with
    recomputation the layers' once more.
    """
    micros = run.rows.per_step // (layout.devices * layout.per_micro)
    counts = run.net.ledger()
    layers = counts.total - counts.embedding - counts.experts + counts.experts / layout.expert_parallel
    passes = 3 * (counts.embedding + layers) + layout.recompute * layers
    return passes * precision_of(run).compute * micros


def optimizer_bytes(run: RunConfig, layout: Layout) -> float:
    """AdamW reads weight, gradient and both moments, and writes weight and moments: seven passes over each parameter."""
    share = layout.devices if layout.sharded else 1
    return 7 * precision_of(run).weight * run.net.ledger().total / share
