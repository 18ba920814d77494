"""The 96-expert model on a cluster: what a device stores, keeps and sends, how long it waits, and how busy it is."""

from __future__ import annotations

import math
from dataclasses import replace

from sigma_lite.config import ModelConfig, RowsConfig
from sigma_lite.runfile import RunConfig
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.cost import together
from sigma_lite.scale.layout import PRECISIONS, Layout
from sigma_lite.scale.memory import dispatch_per_layer, parameters_of_device
from sigma_lite.scale.traffic import Flops, exchanged
from sigma_lite.teach.differences import Tolerance
from sigma_lite.teach.exercises.exercise import Exercise

NET = ModelConfig.preset("sigma_moe_tiny")
TOY = ModelConfig()


def count(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    """Parameters of attention, routers and so many experts of each layer."""
    counts = net.ledger(k_per_layer)
    return counts.attention + counts.router + counts.active_experts


def _layer_by_layer(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    queries_and_output = 2 * net.d_model * net.n_heads * net.head_dim
    keys_and_values = 2 * net.d_model * net.n_kv_heads * net.head_dim
    router = net.d_model * net.n_experts
    expert = 3 * net.d_model * net.d_expert
    return sum(queries_and_output + keys_and_values + router + k * expert for k in k_per_layer)


def _without_routers(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return count(net, k_per_layer) - net.ledger(k_per_layer).router


def _two_matrices(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return count(net, k_per_layer) - net.ledger(k_per_layer).active_experts // 3


def _as_many_keys_as_queries(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return count(replace(net, n_kv_heads=net.n_heads), k_per_layer)


def state_bytes(net: ModelConfig, devices: int) -> int:
    """Weights, gradients and AdamW's two moments, in fp32, shared out over all devices."""
    mixed = PRECISIONS["bf16-mixed"]
    return 4 * mixed.weight * parameters_of_device(RunConfig(net=net), Layout(devices, sharded=True))


def _four_numbers_each(net: ModelConfig, devices: int) -> int:
    share = -(-net.ledger().total // devices)  # rounded up
    weight, gradient, first_moment, second_moment = 4, 4, 4, 4
    return share * (weight + gradient + first_moment + second_moment)


def _without_moments(net: ModelConfig, devices: int) -> int:
    return state_bytes(net, devices) // 2


def _not_rounded(net: ModelConfig, devices: int) -> float:
    return 4 * PRECISIONS["bf16-mixed"].weight * net.ledger().total / devices


def _rounded_down(net: ModelConfig, devices: int) -> int:
    return 4 * PRECISIONS["bf16-mixed"].weight * (net.ledger().total // devices)


def _bytes_rounded_up(net: ModelConfig, devices: int) -> int:
    return math.ceil(_not_rounded(net, devices))


def sorted_copies(tokens: int, k_per_layer: tuple[int, ...], d_model: int) -> list[int]:
    """Bytes of the sorted rows of each layer, in bf16, on one device."""
    run = RunConfig(
        net=replace(NET, d_model=d_model),
        rows=RowsConfig(length=tokens, per_step=1, per_micro=1),
        trainer={"precision": "bf16-mixed"},
    )
    return dispatch_per_layer(run, Layout(per_micro=1), k_per_layer)


def _copies_in_a_loop(tokens: int, k_per_layer: tuple[int, ...], d_model: int) -> list[int]:
    sizes = []
    for k in k_per_layer:
        rows = tokens * k  # a token is copied once for each of its experts
        sizes.append(rows * d_model * 2)
    return sizes


def _k_forgotten(tokens: int, k_per_layer: tuple[int, ...], d_model: int) -> list[int]:
    return sorted_copies(tokens, (1,) * len(k_per_layer), d_model)


def _copies_in_fp32(tokens: int, k_per_layer: tuple[int, ...], d_model: int) -> list[int]:
    return [2 * size for size in sorted_copies(tokens, k_per_layer, d_model)]


def waits(compute: float, network: float, overlap: float) -> float:
    return together(compute, network, overlap)


def _whichever_is_longer(compute: float, network: float, overlap: float) -> float:
    one_after_the_other = compute + (1 - overlap) * network
    return one_after_the_other if one_after_the_other > network else network


def _hidden_for_ever(compute: float, network: float, overlap: float) -> float:
    return compute + (1 - overlap) * network


def _all_hidden(compute: float, network: float, overlap: float) -> float:
    return max(compute, network)


def sent_bytes(tokens: int, k_per_layer: tuple[int, ...], d_model: int, ranks: int) -> float:
    """Tokens to experts and back, forward and backward, in bf16."""
    net = replace(NET, d_model=d_model)
    one_node = Cluster("gpu", 80, 989, 3350, devices_per_node=ranks, intra_node_gbps=450)
    even = Layout(ranks, ranks, sharded=True, imbalance=1.0)
    return exchanged(net, tokens, k_per_layer, even, PRECISIONS["bf16-mixed"], one_node).intra


def _journeys_counted(tokens: int, k_per_layer: tuple[int, ...], d_model: int, ranks: int) -> float:
    rows = tokens * sum(k_per_layer)
    abroad = rows * (ranks - 1) / ranks  # the others have their expert at home
    journeys = 2 + 2  # there and back, forward and backward
    return journeys * abroad * d_model * 2


def _all_of_them_travel(tokens: int, k_per_layer: tuple[int, ...], d_model: int, ranks: int) -> float:
    return sent_bytes(tokens, k_per_layer, d_model, ranks) * ranks / (ranks - 1)


def _one_way(tokens: int, k_per_layer: tuple[int, ...], d_model: int, ranks: int) -> float:
    return sent_bytes(tokens, k_per_layer, d_model, ranks) / 2


def tokens_that_pay(peak_tflops: float, memory_gbps: float) -> float:
    """Tokens of an expert whose arithmetic takes as long as reading a bf16 weight once."""
    return peak_tflops * 1e12 / (memory_gbps * 1e9)


def _seconds_of_each(peak_tflops: float, memory_gbps: float) -> float:
    seconds_to_read = 2 / (memory_gbps * 1e9)  # two bytes
    seconds_for_a_token = 2 / (peak_tflops * 1e12)  # a multiplication and an addition
    return seconds_to_read / seconds_for_a_token


def _one_operation(peak_tflops: float, memory_gbps: float) -> float:
    return 2 * tokens_that_pay(peak_tflops, memory_gbps)


def _prefixes_mixed(peak_tflops: float, memory_gbps: float) -> float:
    return peak_tflops / memory_gbps


def mfu(forward_flops: float, tokens_per_second: float, devices: int, peak_tflops: float) -> float:
    return Flops(forward_flops, 0, 0).training * tokens_per_second / (devices * peak_tflops * 1e12)


def _mfu_in_words(forward_flops: float, tokens_per_second: float, devices: int, peak_tflops: float) -> float:
    done_each_second = (forward_flops + 2 * forward_flops) * tokens_per_second
    possible_each_second = devices * peak_tflops * 1e12
    return done_each_second / possible_each_second


def _forward_only(forward_flops: float, tokens_per_second: float, devices: int, peak_tflops: float) -> float:
    return mfu(forward_flops, tokens_per_second, devices, peak_tflops) / 3


def _one_device(forward_flops: float, tokens_per_second: float, devices: int, peak_tflops: float) -> float:
    return mfu(forward_flops, tokens_per_second, 1, peak_tflops)


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="count_parameters",
        chapter=20,
        asks="the ledger",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=count,
        also=_layer_by_layer,
        source="config.ModelConfig.ledger",
        hint="Write down the matrices of one layer: queries and output are as wide as all query heads, keys and values as"
        " all key/value heads. A router has a row for each expert, and an expert has three matrices.",
        inputs=lambda: [(NET, (1,) * 56), (NET, (8, 8, 6) + (1,) * 53), (TOY, (2,) * TOY.n_layers)],
        mistake=_without_routers,
        says="the routers are missing: one row of d_model numbers for each expert, in every layer",
        others=(
            (_two_matrices, "an expert has three matrices, each d_model times d_expert: gate, up and down"),
            (_as_many_keys_as_queries, "keys and values have n_kv_heads heads, which are fewer than the n_heads of queries"),
        ),
    ),
    Exercise(
        name="state_bytes",
        chapter=20,
        asks="what a device stores",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=state_bytes,
        also=_four_numbers_each,
        source="scale.memory.parameters_of_device",
        hint="First share out the parameters, and round the share up. Then count four numbers of four bytes for each.",
        inputs=lambda: [(TOY, 1), (TOY, 4), (TOY, 7), (NET, 64), (NET, 96)],
        mistake=_without_moments,
        tolerance=Tolerance(0, 1e-3),  # a rounded share and one that is not differ in the ninth digit
        says="that is half of it: AdamW keeps two more numbers for every parameter, its two moments",
        others=(
            (_not_rounded, "almost: a parameter is not cut in two. Round the share up: -(-a // b) rounds up"),
            (_rounded_down, "almost: rounded down, the last parameters belong to nobody. -(-a // b) rounds up"),
            (_bytes_rounded_up, "almost: you round up bytes; round up the number of parameters, then count bytes"),
        ),
    ),
    Exercise(
        name="sorted_copies",
        chapter=20,
        asks="copies of a token",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=sorted_copies,
        also=_copies_in_a_loop,
        source="scale.memory.dispatch_per_layer",
        hint="A token with K experts lies K times among the sorted rows. A row has d_model numbers of two bytes.",
        inputs=lambda: [(1000, (8, 4, 1), 64), (4096, (2, 2), 32)],
        mistake=_k_forgotten,
        says="so it is with K = 1: with K experts a token is copied K times",
        others=((_copies_in_fp32, "twice as much: a number in bf16 has two bytes"),),
    ),
    Exercise(
        name="step_seconds",
        chapter=20,
        asks="compute, or wait",
        minutes=5,
        difficulty=2,
        importance=5,
        solution=waits,
        also=_whichever_is_longer,
        source="scale.cost.together",
        hint="The part of the network's time that does not hide is added to the computing. But a step cannot be shorter than"
        " all of the network's time.",
        inputs=lambda: [(2.0, 1.0, 0.5), (1.0, 10.0, 0.9), (3.0, 3.0, 0.0)],
        mistake=_hidden_for_ever,
        says="right while computing is long. But nothing can hide behind computing that has ended: take the network's time"
        " where it is longer",
        others=((_all_hidden, "so it is if all of the communication could hide: only the share `overlap` does"),),
    ),
    Exercise(
        name="sent_bytes",
        chapter=20,
        asks="what a device sends",
        minutes=10,
        difficulty=3,
        importance=4,
        solution=sent_bytes,
        also=_journeys_counted,
        source="scale.traffic.exchanged",
        hint="Count the journeys of a row: to its expert and back, and the same for the gradients. One row in `ranks` stays"
        " at home. A row has d_model numbers of two bytes.",
        inputs=lambda: [(1000, (1, 1), 64, 8), (10, (8, 4, 1), 32, 2)],
        mistake=_all_of_them_travel,
        says="one row in `ranks` has its expert at home and is not sent",
        others=((_one_way, "half of it: rows travel in the forward pass, and their gradients in the backward pass"),),
    ),
    Exercise(
        name="tokens_that_pay",
        chapter=20,
        asks="tokens that pay for a read",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=tokens_that_pay,
        also=_seconds_of_each,
        source="teach.exercises.chapter_20.tokens_that_pay",
        hint="How long does it take to read two bytes? How long does one multiplication and one addition take? Divide.",
        inputs=lambda: [(989.0, 3350.0), (0.1, 20.0)],
        mistake=_prefixes_mixed,
        says="a thousand times too small: tera is 10**12 and giga is 10**9",
        others=((_one_operation, "twice as many: for each token a weight does two operations, it multiplies and adds"),),
    ),
    Exercise(
        name="mfu",
        chapter=20,
        asks="model FLOPs utilisation",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=mfu,
        also=_mfu_in_words,
        source="scale.cost.mfu",
        hint="FLOPs done each second, divided by FLOPs that all devices could do each second. The backward pass does two"
        " products for each product of the forward pass.",
        inputs=lambda: [(1e9, 5e5, 8, 989), (4e6, 2e4, 2, 0.1)],
        mistake=_forward_only,
        says="a third of it: for every product of the forward pass the backward pass has two",
        others=((_one_device, "you divide by the peak of one device: all of them could work"),),
    ),
)
