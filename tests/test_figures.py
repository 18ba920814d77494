"""What is drawn is what was recorded: values, gaps, colours, axes. The runs are made up (synthetic_run.py)."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
import synthetic_run

from sigma_lite import figures
from sigma_lite.figures import series, style
from sigma_lite.storage import StorageError

RUN = synthetic_run.entries(steps=200, n_windows=10, switch=140)
LOADS = [entry for entry in RUN if entry["kind"] == "load"]
STEPS = [entry for entry in RUN if entry["kind"] == "step"]
OF_RUN = [
    "active_parameters", "balance_loss_by_layer", "bits_per_byte", "dead_experts", "deviation_band", "experts_per_token",
    "load_entropy", "load_heatmap", "losses", "optimisation", "router_entropy", "throughput", "weighted_losses",
]  # fmt: skip
OF_ENTRY, OF_RUNS = ["blind_spot", "share_and_probability"], ["compare", "compare_deviation"]
ALL = [*OF_RUN, *OF_ENTRY, *OF_RUNS]


def draw(name: str, entries: list[dict]) -> go.Figure:
    if name in OF_ENTRY:
        return getattr(figures, name)(series.last(entries, "load"))
    return getattr(figures, name)({"one": entries, "two": entries} if name in OF_RUNS else entries)


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
    assert sorted(order) == list(range(96)) and (order == list(range(96))) != sort
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
    assert set(trace(fig, "xz").y) == {data["xz_bits_per_byte"]}
    assert set(trace(fig, "unigram").y) == {data["unigram_bits_per_byte"]}


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


# ------------------------------------------------------------------------------------------------------ every figure


@pytest.mark.parametrize("name", ALL)
def test_every_axis_has_a_title(name):
    fig = draw(name, RUN)
    rows = [axis for axis in fig.select_yaxes() if axis.title.text]
    assert len(rows) == len(list(fig.select_yaxes()))
    assert sum(bool(axis.title.text) for axis in fig.select_xaxes()) == 1  # rows share the lowest one


@pytest.mark.parametrize("name", ALL)
def test_figures_are_pure(name):
    before = copy.deepcopy(RUN)
    assert draw(name, RUN).to_json() == draw(name, RUN).to_json()
    assert before == RUN


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("entries", [[], RUN[:1]], ids=["empty", "only started"])
def test_without_data_a_figure_says_what_is_missing(name, entries):
    fig = draw(name, entries)
    assert not fig.data and len(fig.layout.annotations[0].text) > 10


@pytest.mark.parametrize("name", ALL)
def test_null_values_are_gaps_and_never_an_error(name):
    entries = copy.deepcopy(RUN)
    for entry in entries[len(entries) // 2 :]:
        blank = {"lm": None, "balance": None, "z": None}
        if entry["kind"] == "step":
            entry |= {"terms": blank, "weighted": blank, "loss": None, "grad_norm": None, "tokens_per_s": None}
        if entry["kind"] == "load":
            entry["f"][1] = [None] * 96
            entry |= {"lbl": None, "P": None, "router_entropy": [None] * 4}
    fig = draw(name, entries)
    assert fig.to_json()
    if name == "deviation_band":
        assert np.isnan(fig.data[2].y[-1]) and np.isfinite(fig.data[0].y).all()
    if name == "losses":
        assert np.isnan(fig.data[0].y[-1]) and np.isfinite(fig.data[0].y[0])


# ------------------------------------------------------------------------------------------------------------- look


def _linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("paper", [style.LIGHT_PAPER, style.DARK_PAPER])
@pytest.mark.parametrize("colour", [*style.SERIES, *(style.depth_colour(layer, 9) for layer in range(9))])
def test_lines_have_a_contrast_of_3_on_both_papers(colour, paper):
    bright, dim = sorted((_linear(c) @ [0.2126, 0.7152, 0.0722] + 0.05 for c in (colour, paper)), reverse=True)
    assert bright / dim >= 3


def test_colours_stay_apart_for_colour_blind_readers():
    """Full protanopia and deuteranopia after Machado, Oliveira and Fernandes (2009), on linear RGB."""
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    for seen in (np.eye(3), np.array(protan), np.array(deutan)):
        perceived = [np.clip(seen @ _linear(c), 0, 1) ** (1 / 2.2) for c in style.SERIES[:4]]  # as many as meet in a figure
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(perceived, 2)) > 0.1


def test_figures_import_no_torch():
    code = "import sys, sigma_lite.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# ------------------------------------------------------------------------------------------------------------- files


def test_svg_without_kaleido_names_the_fix(monkeypatch, tmp_path):
    def absent(*args, **kwargs):
        raise ValueError("Image export requires kaleido")

    monkeypatch.setattr(go.Figure, "to_image", absent)
    with pytest.raises(StorageError, match="pip install kaleido"):
        figures.static_svg(figures.losses(RUN), tmp_path / "losses.svg")
    assert not list(tmp_path.iterdir())


@pytest.mark.browser
@pytest.mark.slow
def test_the_same_figure_gives_the_same_svg(tmp_path):
    pytest.importorskip("kaleido")
    if not any(map(shutil.which, ("chromium", "google-chrome", "chrome"))):
        pytest.skip("needs a Chrome or Chromium")
    one, two = (figures.static_svg(figures.deviation_band(RUN), tmp_path / name).read_text() for name in ("1.svg", "2.svg"))
    assert one == two and one.startswith("<svg") and "layer 3" not in one
