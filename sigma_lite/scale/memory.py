"""Memory of one device at the fullest moment of a training step, item by item, in bytes.

Two moments compete. At the end of a forward pass all layers' activations are there, the loss has just made its gradients
from a chunk of logits, and the weights' gradients of the step before still stand: Lightning clears them between forward
and backward. Then the backward pass of a layer needs room of its own, and its weights gathered where they lie in pieces,
while the layers above it have given theirs back.
"""

from __future__ import annotations

from collections.abc import Sequence

from sigma_lite.config import ModelConfig
from sigma_lite.runfile import RunConfig
from sigma_lite.scale.activations import FP32, INDEX, compiled_on_cpu, kept_by_layer, kept_of_recomputed, table
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.layout import Layout, Precision, precision_of

GIB = 2**30
CHUNK = 512  # tokens whose logits exist at one time: model/transformer.py
USABLE = {"gpu": 0.92, "cpu": 0.85}  # assumed: the rest is the driver's, the allocator's and the operating system's


def memory(run: RunConfig, layout: Layout, cluster: Cluster, k_per_layer: Sequence[int]) -> dict[str, int]:
    """Bytes by item; the peak is their sum.

    `activations` are what the layers keep, `loss` the gradients that the cross entropy makes at once, `working` the room
    that the fullest moment needs besides: a chunk of logits, or the backward pass of one layer.
    """
    number, gpu = precision_of(run), cluster.kind == "gpu"
    D, T = run.net.d_model, layout.per_micro * run.rows.length
    own = parameters_of_device(run, layout) * number.weight
    way = run.net.attention_way(run.rows.length, gpu, number.half)
    kept = kept_per_layer(run, layout, gpu, k_per_layer)
    items = {
        "weights": own,
        "gradients": own,
        "adamw_moments": 2 * own,
        "gathered": _gathered_root(run.net, number) if layout.sharded else 0,
        "activations": sum(kept) + T * (number.stream * D + FP32),  # and the last norm
        "loss": (run.net.vocab_size * number.weight + T * number.compute) * D,
        "rows": 3 * T * INDEX + table(way, T, run.rows.length),  # ids, targets, documents, and who may look at whom
    }
    if not gpu and run.save.get("in_background"):
        items["checkpoint_copy"] = 3 * own  # a CPU's memory is the host's
    return items | {"working": max(_loss(run.net, T, number), _backward(run, layout, gpu, k_per_layer, kept, items))}


def _loss(net: ModelConfig, T: int, number: Precision) -> int:
    """Bytes that the cross entropy needs besides what it leaves: see model/transformer.py."""
    logits, head = min(CHUNK, T) * net.vocab_size, net.vocab_size * net.d_model
    if number.compute == number.weight:
        return logits * (FP32 if number.weight == FP32 else FP32 + number.weight)
    chunk = max(2 * FP32 * logits, (FP32 + number.compute) * logits + number.compute * head)
    return chunk + number.compute * (head + T * net.d_model)  # and the copies of head and stream


def kept_per_layer(run: RunConfig, layout: Layout, gpu: bool, k_per_layer: Sequence[int]) -> list[int]:
    """Bytes that each layer keeps for the backward pass."""
    number, net = precision_of(run), run.net
    if layout.recompute:
        return [kept_of_recomputed(net, k, run.rows.length, layout, number) for k in k_per_layer]
    return [sum(kept_by_layer(net, n, k, run.rows.length, layout, number, gpu).values()) for n, k in enumerate(k_per_layer)]


def dispatch_per_layer(run: RunConfig, layout: Layout, k_per_layer: Sequence[int]) -> list[int]:
    """Bytes of the sorted rows, and with an exchange of those that come back, of each layer: they grow with its K."""
    number, T = precision_of(run), layout.per_micro * run.rows.length
    copies = 2 + layout.fullest if layout.expert_parallel > 1 else 1  # sorted; received; returned
    return [int(copies * T * k * run.net.d_model * number.compute) for k in k_per_layer]


def parameters_of_device(run: RunConfig, layout: Layout) -> int:
    """Parameters whose gradient and moments a device holds."""
    return -(-run.net.ledger().total // layout.devices) if layout.sharded else run.net.ledger().total


def peak(items: dict[str, int]) -> int:
    return sum(items.values())


def fits(items: dict[str, int], cluster: Cluster) -> bool:
    return peak(items) <= usable(cluster)


def usable(cluster: Cluster) -> int:
    """Bytes of one device that a run can count on."""
    return int(cluster.memory_gib * GIB * USABLE[cluster.kind])


def _gathered_root(net: ModelConfig, number: Precision) -> int:
    """Whole tensors all the time on a device that stores pieces: embedding, head and the last norm."""
    return (net.ledger().embedding + net.d_model) * number.weight


def _gathered_in_backward(net: ModelConfig, layout: Layout, number: Precision) -> int:
    """Whole tensors while a layer's experts work backward: their weights, the dense ones of the layer and of the next, which
    FSDP2 fetches ahead (its experts come later); and the experts' gradients, of one layer as they come and of two in fp32,
    the earlier of them still being summed. A forward pass needs less, and at its end nothing is left of them.
    """
    counts = net.ledger()
    dense = (counts.attention + counts.router + counts.norms) // net.n_layers * number.weight
    experts = counts.experts // net.n_layers // layout.expert_parallel
    return 2 * dense + 2 * experts * number.compute + 2 * experts * FP32


def _of_a_slot(net: ModelConfig, number: Precision, gpu: bool, k: int) -> int:
    """Numbers that the experts' backward pass needs for each chosen expert of a token: see _backward in the kernels."""
    if not gpu and compiled_on_cpu(net, number):
        return net.d_model if k > 1 else 0
    return net.d_model + 3 * net.d_expert if gpu else 2 * net.d_model + 5 * net.d_expert


def _backward(run: RunConfig, layout: Layout, gpu: bool, k_per_layer: Sequence[int], kept: list[int], items: dict) -> int:
    """Bytes above the end of the forward pass at the fullest moment of the backward pass; negative if it stays below."""
    number, net, L = precision_of(run), run.net, run.net.n_layers
    accumulating = run.rows.per_step > layout.devices * layout.per_micro
    T, head = layout.per_micro * run.rows.length, net.vocab_size * net.d_model * number.weight
    gathered = _gathered_in_backward(net, layout, number) if layout.sharded else 0
    most = -sum(items.values())
    for n, k in enumerate(k_per_layer):
        given_back = sum(kept[n + 1 :]) + T * net.d_model * (number.stream + number.weight)
        # The head's gradient joins the one that is there, or becomes it; those of lower layers are not there yet.
        given_back += head if accumulating else items["gradients"] * (n + 1) // L
        rows = int(T * k * layout.fullest)
        room = rows * _of_a_slot(net, number, gpu, k) * number.compute + T * net.d_model * number.stream
        if accumulating and not layout.sharded:
            room += 3 * net.n_experts * net.d_model * net.d_expert * number.weight
        if layout.recompute:
            room += sum(kept_by_layer(net, n, k, run.rows.length, layout, number, gpu).values())
        most = max(most, gathered + room - given_back)
    return most
