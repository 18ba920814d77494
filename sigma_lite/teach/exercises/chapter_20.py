"""The 96-expert model on a cluster: what a device stores, what it sends, and how busy it is."""

from __future__ import annotations

import math
from dataclasses import replace

from sigma_lite.config import ModelConfig
from sigma_lite.runfile import RunConfig
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.layout import PRECISIONS, Layout
from sigma_lite.scale.memory import parameters_of_device
from sigma_lite.scale.traffic import Flops, exchanged
from sigma_lite.teach.differences import Tolerance
from sigma_lite.teach.exercises.exercise import Exercise

NET = ModelConfig.preset("sigma_moe_tiny")
TOY = ModelConfig()


def state_bytes(net: ModelConfig, devices: int) -> int:
    """Weights, gradients and AdamW's two moments, in fp32, shared out over all devices."""
    mixed = PRECISIONS["bf16-mixed"]
    return 4 * mixed.weight * parameters_of_device(RunConfig(net=net), Layout(devices, sharded=True))


def _without_moments(net: ModelConfig, devices: int) -> int:
    return state_bytes(net, devices) // 2


def _not_rounded(net: ModelConfig, devices: int) -> float:
    return 4 * PRECISIONS["bf16-mixed"].weight * net.ledger().total / devices


def _rounded_down(net: ModelConfig, devices: int) -> int:
    return 4 * PRECISIONS["bf16-mixed"].weight * (net.ledger().total // devices)


def _bytes_rounded_up(net: ModelConfig, devices: int) -> int:
    return math.ceil(_not_rounded(net, devices))


def sent_bytes(tokens: int, k_per_layer: tuple[int, ...], d_model: int, ranks: int) -> float:
    """Tokens to experts and back, forward and backward, in bf16."""
    net = replace(NET, d_model=d_model)
    one_node = Cluster("gpu", 80, 989, 3350, devices_per_node=ranks, intra_node_gbps=450)
    even = Layout(ranks, ranks, sharded=True, imbalance=1.0)
    return exchanged(net, tokens, k_per_layer, even, PRECISIONS["bf16-mixed"], one_node).intra


def _all_of_them_travel(tokens: int, k_per_layer: tuple[int, ...], d_model: int, ranks: int) -> float:
    return sent_bytes(tokens, k_per_layer, d_model, ranks) * ranks / (ranks - 1)


def mfu(forward_flops: float, tokens_per_second: float, devices: int, peak_tflops: float) -> float:
    return Flops(forward_flops, 0, 0).training * tokens_per_second / (devices * peak_tflops * 1e12)


def _forward_only(forward_flops: float, tokens_per_second: float, devices: int, peak_tflops: float) -> float:
    return mfu(forward_flops, tokens_per_second, devices, peak_tflops) / 3


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="state_bytes",
        chapter=20,
        solution=state_bytes,
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
        name="sent_bytes",
        chapter=20,
        solution=sent_bytes,
        inputs=lambda: [(1000, (1, 1), 64, 8), (10, (8, 4, 1), 32, 2)],
        mistake=_all_of_them_travel,
        says="one row in `ranks` has its expert at home and is not sent",
    ),
    Exercise(
        name="mfu",
        chapter=20,
        solution=mfu,
        inputs=lambda: [(1e9, 5e5, 8, 989), (4e6, 2e4, 1, 0.1)],
        mistake=_forward_only,
        says="a third of it: for every product of the forward pass the backward pass has two",
    ),
)
