"""Figures of chapter 16: what is drawn is what the formulas say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.teach import plots_kernels


def trace(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


@pytest.mark.parametrize("routing", plots_kernels.ROUTINGS)
def test_every_routing_sends_all_tokens(routing):
    counts_E = plots_kernels.loads(routing, 96, 85)
    assert counts_E.sum() == 96 * 85 and (counts_E >= 0).all()
    assert (counts_E.max() == 85) == (routing == "balanced")


def test_zipf_is_zipf():
    counts_E = plots_kernels.loads("zipf", 8, 100_000)
    assert counts_E[0] / counts_E[7] == pytest.approx(8, rel=0.05)
    with pytest.raises(ConfigError, match="choose balanced, multinomial, zipf"):
        plots_kernels.loads("zip", 8, 1)


@pytest.mark.parametrize("rows, useful", [(16, 1.0), (64, 0.5 * 32 / 32), (128, 0.25)])
def test_useful_rows_of_equal_experts(rows, useful):
    assert plots_kernels.useful_rows(np.full(7, 32), rows) == useful


def test_an_idle_expert_has_no_tile():
    assert plots_kernels.useful_rows(np.array([0, 16]), 16) == 1.0
    assert "1 tiles of 16" in plots_kernels.tile_painter(16, "balanced", 16, n_experts=1).layout.title.text


def test_painted_rows_are_whole_tiles():
    figure = plots_kernels.tile_painter(32, "zipf", 85)
    token, empty = (np.array(trace(figure, name).y) for name in ("rows with a token", "rows multiplied for nothing"))
    assert token.sum() == 96 * 85 and ((token + empty) % 32 == 0).all() and (empty < 32).all()
    assert (
        f"{(token + empty).sum() // 32} tiles of 32 rows: {token.sum() / (token + empty).sum():.0%}"
        in figure.layout.title.text
    )


def test_the_recorded_benchmark_is_drawn_as_it_is():
    path = next((Path(__file__).parents[2] / "results" / "bench").glob("experts-*.json"))
    results = json.loads(path.read_text("utf-8"))["results"]
    figure = plots_kernels.recorded_experts(path)
    for name in ("transformers eager", "transformers grouped_mm"):
        drawn = trace(figure, name)
        assert list(drawn.y) == list(results) and list(drawn.x) == [case[name]["times_ours"] for case in results.values()]


def test_weights_and_flops_are_even_at_184_tokens_an_expert():
    """By hand: 6 T K D F / peak = 6 E D F / bandwidth, so T K / E = peak / bandwidth. Attention and head are left out."""
    net = ModelConfig.preset("sigma_moe_tiny")
    experts_only = net.ledger().active_experts / net.ledger().active
    tokens = 96 * plots_kernels.PEAK / plots_kernels.BANDWIDTH
    step = plots_kernels.walls(tokens, k=1)
    assert experts_only * step["FLOPs"] == pytest.approx(step["expert weights"])


def test_walls_against_the_numbers_worked_out_by_hand():
    one, eight = plots_kernels.walls(31_293), plots_kernels.walls(31_293, gpus=8, link=50e9)
    assert one["FLOPs"] == pytest.approx(one["AdamW"], rel=1e-3)
    assert one["expert parallelism"] == 0
    for name in ("FLOPs", "expert weights", "AdamW"):
        assert eight[name] == pytest.approx(one[name] / 8)
    sent = eight["expert parallelism"] * 50e9 / (31_293 / 8) / 56  # bytes a token and layer
    assert sent == 4 * 1536 * 2 * 7 / 8
    assert plots_kernels.walls(1, k=8, gpus=8)["expert parallelism"] == pytest.approx(
        8 * plots_kernels.walls(1, gpus=8)["expert parallelism"]
    )


def test_the_title_names_the_crossings_of_the_curves():
    figure = plots_kernels.walls_figure(1, 8, "NVLink 350 GB/s")
    assert "weights at 6,510 tokens a step, AdamW at 31,293" in figure.layout.title.text
    flops, adam = (np.array(trace(figure, name).y) for name in ("FLOPs", "AdamW"))
    tokens = np.array(trace(figure, "FLOPs").x)
    assert tokens[flops < adam].max() < 31_293 < tokens[flops > adam].min()
    assert all(word in figure.layout.annotations[0].text for word in ("790 TFLOP/s", "4.3 TB/s", "NVLink", "not measured"))


def test_the_roof_bends_where_reading_takes_as_long_as_multiplying():
    """By hand: n tokens do 2 n FLOP on a weight of b bytes, so the roof bends at n = peak / bandwidth * b / 2."""
    figure = plots_kernels.roofline({"bf16": (800e12, 4e12, 2), "fp32": (60e9, 10e9, 4)}, tokens=(4, 400))
    assert figure.layout.title.text == "Tokens an expert at which the roof bends: bf16: 200, fp32: 12"
    marks = trace(figure, "fp32, tokens an expert")
    assert list(marks.x) == [2.0, 200.0] and list(marks.y) == [20e9, 60e9]
    assert max(trace(figure, "bf16").y) == 800e12 and trace(figure, "bf16").y[0] == 4e12
    assert list(trace(figure, "bf16, tokens an expert").x) == [4.0, 400.0]


def test_growth_is_told_in_the_title():
    figure = plots_kernels.growth({"naive": {8: 10.0, 192: 450.0}, "loop": {8: 10.0, 192: 65.0}})
    assert figure.layout.title.text == "8 to 192 experts: naive 45.0x, loop 6.5x"
    assert list(trace(figure, "naive").y) == [10.0, 450.0]
