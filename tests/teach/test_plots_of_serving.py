"""Figures of the chapter on serving: their values are those of the laws and of the cache."""

from __future__ import annotations

import dataclasses

import pytest

from sigma_lite.config import ModelConfig
from sigma_lite.scale.decode import reads
from sigma_lite.teach.plots_serving import cache_figure, cache_rates, decode_figure, guesses_figure

TRACE = [0, 1, 0, 2, 0, 1, 3, 0, 1, 0, 2, 4, 0]


def test_one_sequence_is_as_fast_as_its_reads_allow():
    """16-bit weights at the H100's 3,350 GB/s; with nothing in memory, the link decides."""
    dense, sigma, away = decode_figure(0.0, 10).data
    net = ModelConfig.preset("sigma_moe_tiny")
    assert sigma.y[0] == pytest.approx(3350e9 / (2 * reads(net).all)) and dense.y[0] == pytest.approx(sigma.y[0], rel=0.02)
    assert away.y[0] == pytest.approx(10e9 / (2 * reads(net).experts))
    assert dense.y[-1] == pytest.approx(1024 * 3350e9 / (2 * reads(dataclasses.replace(net, n_experts=1)).all))
    assert decode_figure(1.0, 10).data[2].y == decode_figure(1.0, 10).data[1].y


def test_more_slots_hold_more_and_nobody_beats_the_future():
    rates = cache_rates(TRACE, (1, 2, 3, 5))
    assert all(list(values) == sorted(values) for values in rates.values())
    assert all(best >= lru for best, lru in zip(rates["best possible"], rates["LRU"], strict=True))
    assert rates["LRU"][-1] == pytest.approx(1 - 5 / len(TRACE)), "with a slot each, only first uses are missed"
    assert [trace.name for trace in cache_figure(TRACE, 5, "t", (1, 2)).data][-1] == "slots / experts"


def test_guesses_stand_beside_what_was_there_without_them():
    rows = {f"{p}{g}": {"there, or on its way": n / 10} for n, (p, g) in enumerate([("lru", ""), ("lfu", ""),
            ("lru", ", guesses"), ("lfu", ", guesses")])}  # fmt: skip
    plain, ahead = guesses_figure(rows, "t").data
    assert list(plain.y) == [0.0, 0.1] and list(ahead.y) == [0.2, 0.3]
