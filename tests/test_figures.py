"""What is drawn is what was recorded: values, gaps, colours, axes. The runs are made up (synthetic_run.py)."""

from __future__ import annotations

import copy
import math

import numpy as np
import plotly.graph_objects as go
import pytest
import synthetic_run

from sigma_lite import figures
from sigma_lite.figures import series

RUN = synthetic_run.entries(steps=200, n_windows=10, switch=140)
LOADS = [entry for entry in RUN if entry["kind"] == "load"]
STEPS = [entry for entry in RUN if entry["kind"] == "step"]


def trace(fig: go.Figure, name: str) -> go.Scatter:
    return next(t for t in fig.data if (t.name or "").startswith(name))


# ------------------------------------------------------------------------------------------------------ the load


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_deviation_band_is_E_f_minus_1_of_the_most_and_least_loaded_expert(layer):
    fig = figures.deviation_band(RUN, layer=layer)
    most = [100 * (96 * max(load["f"][layer]) - 1) for load in LOADS]
    least = [100 * (96 * min(load["f"][layer]) - 1) for load in LOADS]
    shown = {t.name: t for t in fig.data if t.visible}
    assert set(shown) == {"most loaded expert", "least loaded expert"}
    np.testing.assert_allclose(shown["most loaded expert"].y, most)
    np.testing.assert_allclose(shown["least loaded expert"].y, least)
    assert list(shown["most loaded expert"].x) == [load["step"] for load in LOADS]


def test_each_button_of_the_layer_menu_shows_that_layer_alone():
    fig = figures.deviation_band(RUN)
    for layer, button in enumerate(fig.layout.updatemenus[0].buttons):
        shown = [t for t, visible in zip(fig.data, button.args[0]["visible"], strict=True) if visible]
        assert len(shown) == 2
        assert max(t.y[-1] for t in shown) == pytest.approx(100 * (96 * max(LOADS[-1]["f"][layer]) - 1))


def test_deviation_and_entropy_at_the_ends_of_their_ranges():
    uniform, collapsed = np.full(96, 1 / 96), np.eye(96)[0]
    assert series.extremes(uniform) == pytest.approx((0, 0), abs=1e-12)
    assert series.extremes(collapsed) == pytest.approx((95, -1))
    assert series.entropy(uniform) == pytest.approx(math.log(96))
    assert series.entropy(collapsed) == 0
    assert (series.dead(uniform), series.dead(collapsed)) == (0, 95)


def test_heat_map_keeps_minus_100_for_dead_experts():
    tiny = copy.deepcopy(LOADS[-1])
    tiny["f"][0] = [0.0, 1e-6] + [(1 - 1e-6) / 94] * 94
    z = np.array(figures.load_heatmap([tiny]).data[0].z)
    assert z[0, 0] == -100 and z[0, 1] == -99
    assert np.issubdtype(z.dtype, np.integer)
    np.testing.assert_allclose(z[1:], 100 * (96 * np.array(tiny["f"][1:]) - 1), atol=0.5)


def test_heat_map_by_load_is_each_layer_sorted_in_every_window():
    for frame in figures.load_heatmap(RUN).frames:
        by_number, by_load = (np.array(part.z) for part in frame.data)
        np.testing.assert_array_equal(by_load, np.sort(by_number)[:, ::-1])


def test_heat_map_thins_windows_and_keeps_both_ends():
    fig = figures.load_heatmap(RUN, most_windows=4)
    names = [frame.name for frame in fig.frames]
    assert len(names) == 4 and (names[0], names[-1]) == (str(LOADS[0]["step"]), str(LOADS[-1]["step"]))
    assert [step.args[0][0] for step in fig.layout.sliders[0].steps] == names


@pytest.mark.parametrize("sort", [False, True])
def test_share_and_probability_belong_to_the_same_expert(sort):
    fig, load = figures.share_and_probability(LOADS[-1], 1, sort=sort), LOADS[-1]
    order = list(fig.data[0].customdata)
    assert order == (sorted(range(96), key=lambda expert: -load["f"][1][expert]) if sort else list(range(96)))
    np.testing.assert_allclose(trace(fig, "share").y, [load["f"][1][expert] for expert in order])
    np.testing.assert_allclose(trace(fig, "probability").y, [load["P"][1][expert] for expert in order])
    assert trace(fig, "uniform").y[0] == pytest.approx(1 / 96)
    assert fig.layout.title.text == f"Layer 1: balance loss {load['lbl'][1]:.2f}"


def test_dead_experts_and_blind_spot_hold_the_recorded_numbers():
    counts = [[f.count(0) for f in load["f"]] for load in LOADS]
    np.testing.assert_array_equal(np.array([t.y for t in figures.dead_experts(RUN).data]).T, counts)
    assert np.max(counts) > 0
    np.testing.assert_allclose(figures.blind_spot(LOADS[-1]).data[0].x, LOADS[-1]["lbl"])


# ------------------------------------------------------------------------------------------------ learning and sparsity


def test_losses_draw_every_recorded_step_of_every_term():
    fig = figures.losses(RUN)
    for name, what in (("lm", "language-model loss"), ("balance", "balance loss"), ("z", "router z-loss")):
        np.testing.assert_allclose(trace(fig, f"{what}, each").y, [entry["terms"][name] for entry in STEPS])


def test_moving_average_halves_an_impulse_every_half_life_and_is_not_pulled_to_zero():
    steps = np.arange(200.0)
    np.testing.assert_allclose(series.ema(steps, np.full(200, 7.0), 10), 7)
    answer = series.ema(steps, np.where(steps == 100, 1.0, 0.0), 10)
    assert answer[99] == 0 and answer[120] / answer[110] == pytest.approx(0.5, rel=0.01)
    with_gap = series.ema(steps, np.where(steps == 50, np.nan, 7.0), 10)
    np.testing.assert_allclose(with_gap, 7)


def test_thinning_keeps_a_spike_of_one_step_a_gap_and_both_ends():
    values = np.sin(np.arange(50_000) / 3000)
    values[31_234], values[40_001] = 9.0, np.nan
    kept = series.thin(values, most=200)
    assert {0, 31_234, 40_001, 49_999} <= set(kept) and len(kept) <= 204


def test_bits_per_byte_stand_at_the_tokens_of_their_step_beside_both_baselines():
    fig, data = figures.bits_per_byte(RUN), RUN[0]["data"]
    held = [entry for entry in RUN if entry["kind"] == "validation"]
    np.testing.assert_allclose(trace(fig, "this model").x, [entry["step"] * 8192 for entry in held])
    np.testing.assert_allclose(trace(fig, "this model").y, [entry["bits_per_byte"] for entry in held])
    assert set(trace(fig, "xz -9e given the training text").y) == {data["xz_given_training_bits_per_byte"]}
    assert set(trace(fig, "xz -9e given no training text").y) == {data["xz_bits_per_byte"]}
    assert set(trace(fig, "token frequencies").y) == {data["unigram_bits_per_byte"]}


@pytest.mark.parametrize("kept", [lambda e: True, lambda e: e["step"] % 7 == 0, lambda e: e["kind"] != "step"])
def test_tokens_at_a_step_follow_from_sparse_records_or_from_the_config(kept):
    entries = [entry for entry in RUN if entry["kind"] == "run" or kept(entry)]
    np.testing.assert_allclose(series.tokens_at(entries, [1, 100, 200]), [8192, 100 * 8192, 200 * 8192])


def test_staircases_say_the_right_thing_at_every_step():
    fig = figures.active_parameters(RUN)
    x, y = np.array(fig.data[0].x), np.array(fig.data[0].y)
    assert len(x) < 10 and fig.data[0].line.shape == "hv"
    at = [y[np.searchsorted(x, entry["step"], side="right") - 1] for entry in STEPS]
    assert at == [entry["active_params"] for entry in STEPS]
    assert [t.name for t in figures.experts_per_token(RUN).data] == ["layer 0", "layer 1", "layer 2", "layer 3"]
    flat = figures.experts_per_token(synthetic_run.entries(steps=5, switch=0))
    assert [(t.name, set(t.y)) for t in flat.data] == [("layers 0–3", {1.0})]


def test_switch_is_marked_where_it_was_recorded_or_planned_and_reached():
    assert series.switch_steps(RUN) == [140]
    assert [shape.x0 for shape in figures.losses(RUN).layout.shapes] == [140]
    planned = [entry for entry in RUN if entry["kind"] != "event"]
    assert series.switch_steps(planned) == [140]
    assert series.switch_steps([entry for entry in planned if entry["step"] < 140]) == []
    assert series.switch_steps(synthetic_run.entries(steps=5, switch=0)) == []


def test_compared_runs_have_one_legend_entry_and_a_line_of_their_own_each():
    fig = figures.compare({f"run {i}": RUN for i in range(12)})
    shown = [t for t in fig.data if t.showlegend]
    assert [t.name for t in shown] == [f"run {i}" for i in range(12)]
    assert len({(t.line.color, t.line.dash) for t in shown}) == 12
    two = figures.compare_deviation({"a": RUN, "b": RUN}, layer=1)
    np.testing.assert_allclose(two.data[0].y, [100 * (96 * max(load["f"][1]) - 1) for load in LOADS])
