"""Bytes that one layer keeps for its backward pass, tensor by tensor: the sum of model/*.py's and kernels/*.py's saves.

The terms for a CPU were read off `torch.autograd.graph.saved_tensors_hooks` and are held to the bytes that a run really
allocates (benchmarks/plan_memory.py), where a C++ compiler is: without one torch's grouped_mm computes the experts, and each
choice keeps its row once more. For a GPU they are the same but for norms, which have kernels of their own there, and
assume an attention kernel that keeps no S x S matrix but the mask; they have not been measured.
"""

from __future__ import annotations

from sigma_lite.config import PIECE, ModelConfig
from sigma_lite.scale.layout import Layout, Precision

INDEX, FP32 = 8, 4  # bytes of an index and of what is always computed in fp32
LANES = 16  # tokens in a vector register of kernels/cpu, with AVX-512; 8 with AVX2
EXCHANGE_INDICES = 4  # of every row that travels: its token, its slot, and two that embedding_bag keeps


def kept_by_layer(
    net: ModelConfig, layer: int, k: int, length: int, layout: Layout, number: Precision, gpu: bool = False
) -> dict[str, int]:
    """{part: bytes} for rows.per_micro rows of `length` tokens and `k` experts per token."""
    T, D = layout.per_micro * length, net.d_model
    parts = {}
    if layer >= net.attention_from_layer:
        parts |= _attention(net, layout.per_micro, length, number, gpu)
    parts["moe norm"] = number.stream * T * D + FP32 * T
    parts["router"] = _router(net, T, k, number)
    parts["experts"] = _experts(net, T, k, layout, number, gpu)
    if number.compute != number.weight and not layout.sharded:
        parts["16-bit copies of experts"] = 3 * net.n_experts * D * net.d_expert * number.compute
    if layout.expert_parallel > 1:
        parts["dispatch"] = T * k * (D * number.compute + EXCHANGE_INDICES * INDEX)
    return parts


def _attention(net: ModelConfig, B: int, S: int, number: Precision, gpu: bool) -> dict[str, int]:
    T, D, C, mixed = B * S, net.d_model, net.head_dim, number.compute != number.stream
    queries, keys = T * net.n_heads * C, T * net.n_kv_heads * C
    way = net.attention_way(S, gpu, number.half)
    casts = 3 * number.compute if mixed else number.stream  # autocast makes a copy for each of the three projections
    # A GPU norm keeps its input; on a CPU the fp32 norm keeps its output, and torch's own for 16 bits both, in fp32.
    normed = number.stream if gpu or number.compute == FP32 else 2 * FP32
    parts = {
        "attention norm": number.stream * T * D + FP32 * T,
        "projections": casts * T * D,
        "query and key norms": (queries + keys) * normed + FP32 * (queries + keys) // C,
        "rotation": 4 * S * C * number.compute,
        "attention": 2 * (queries + keys) * number.compute + FP32 * T * net.n_heads,
        "mask": table(way, T, S) * number.compute,  # one a layer: attention makes numbers of the booleans
    }
    if way == "blocks":
        parts["pieces laid end to end"] = queries * number.compute
    if mixed:
        parts["16-bit copies of projections"] = 2 * D * C * (net.n_heads + net.n_kv_heads) * number.compute
    return parts


def table(way: str, T: int, S: int) -> int:
    """Entries of the tables of who may look at whom; with `blocks` the most that there can be, if no document is long."""
    return {"masked": T * S, "blocks": T * min(PIECE, S), "varlen": 0}[way]


def _router(net: ModelConfig, T: int, k: int, number: Precision) -> int:
    matrices = 2 if net.router_score == "softmax" else 3  # logits and probabilities; sigmoids beside them
    inputs = FP32 * T * net.d_model + (number.stream * T * net.d_model if number.stream != FP32 else 0)
    gates = T * k * (FP32 + (number.compute if number.compute != FP32 else 0))
    return inputs + matrices * FP32 * T * net.n_experts + T * k * INDEX + gates + FP32 * T + FP32 * net.n_experts


def _experts(net: ModelConfig, T: int, k: int, layout: Layout, number: Precision, gpu: bool) -> int:
    """The experts' input, their pre-activations, and the plan that sorted the rows.

    Compiled kernels keep the input as it came; torch's grouped_mm (kernels/torch_grouped.py) needs it sorted, once for each
    choice. After an exchange it is the rows that came, which may be more than a share. On a CPU an expert's rows fill
    whole registers.
    """
    compiled = gpu or compiled_on_cpu(net, number)
    exchanged = layout.expert_parallel > 1
    rows = int(T * k * layout.fullest)
    as_it_came = 0 if number.compute == number.stream else T  # of the same format it is the norm's output, counted there
    inputs = as_it_came if compiled and not exchanged else rows
    plan = INDEX // 2 if compiled else 2 * INDEX
    filled = net.n_experts // layout.expert_parallel * (LANES - 1) if compiled and not gpu else 0
    numbers = inputs * net.d_model + (rows + filled) * 2 * net.d_expert
    return numbers * number.compute + rows * plan + FP32 * net.n_experts


def compiled_on_cpu(net: ModelConfig, number: Precision) -> bool:
    """Whether kernels/cpu takes such experts."""
    return number.compute == FP32 and net.d_model % 16 == 0 and net.d_expert % 16 == 0


def kept_of_recomputed(net: ModelConfig, k: int, length: int, layout: Layout, number: Precision) -> int:
    """With recompute: the block's input, and the routing that the losses still need."""
    T = layout.per_micro * length
    return T * (number.stream * net.d_model + 2 * FP32 * net.n_experts + k * (INDEX + FP32) + FP32)
