"""The pictures of operations: every point is a number of the facts."""

from __future__ import annotations

import pytest

from sigma_lite.figures.surgery import experts_per_token, loss_against_bytes, split_order

ROWS = [("whole", 8e6, 2.0), ("quantise", 2e6, 2.001), ("quantise", 1e6, 2.1), ("prune", 4e6, 2.2)]
FACTS = {
    "unit": "bits per byte of 8 held-out rows",
    "rows": [{"kind": k, "name": k, "bytes": b, "read": b / 16, "flops": b * 4, "bits_per_byte": y} for k, b, y in ROWS],
}
AFTER = {"0": 2.2, "2": 2.1, "12": 2.05}
SPLITS = {
    "unit": "bits per byte of 8 held-out rows",
    "dense": 2.0,
    "splits": [
        {"by": by, "seed": seed, "after the split": {k: v + more for k, v in AFTER.items()}, "after distillation": AFTER}
        for by, more in (("taylor", 0.1), ("random", 0.4))
        for seed in (0, 1)
    ],
}


@pytest.mark.parametrize("cost", ["bytes", "read", "flops"])
def test_a_kind_is_a_line_over_rising_bytes(cost):
    fig = loss_against_bytes(FACTS, cost)
    points = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in fig.data if trace.mode != "lines"}
    scale = {"bytes": 1, "read": 1 / 16, "flops": 4}[cost]
    assert points["quantise"] == [(1e6 * scale, 2.1), (2e6 * scale, 2.001)] and points["prune"] == [(4e6 * scale, 2.2)]
    (level,) = [trace for trace in fig.data if trace.mode == "lines"]
    assert list(level.y) == [2.0, 2.0] and list(level.x) == [1e6 * scale, 8e6 * scale]


def test_rankings_are_drawn_above_the_dense_model():
    fig = split_order(SPLITS)
    bars = {trace.name: list(trace.y) for trace in fig.data if trace.type == "bar"}
    assert bars["random"] == pytest.approx([0.6, 0.5, 0.45, 0.2, 0.1, 0.05])
    assert bars["taylor"] == pytest.approx([0.3, 0.2, 0.15, 0.2, 0.1, 0.05])
    assert len([trace for trace in fig.data if trace.type == "scatter"]) == 4, "a point a seed"


def test_experts_per_token_are_in_order():
    fig = experts_per_token(SPLITS)
    assert list(fig.data[0].x) == [0, 2, 12] and list(fig.data[0].y) == [2.2, 2.1, 2.05]
    assert list(fig.data[1].y) == [2.0, 2.0]
