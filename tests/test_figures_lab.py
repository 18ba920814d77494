"""The lab's figures: they draw the numbers of a results file, for one seed or several, for arms of other shapes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import synthetic_results
from synthetic_results import TOKENS_PER_STEP

from sigma_lite import figures
from sigma_lite.figures import style
from sigma_lite.figures.family import Point, balance_against_loss

MEASURED = {
    "predicted_and_measured",
    "lumps_and_load",
    "information_by_layer",
    "domain_expert_map",
}  # tests/test_figures_measured.py
ALL = {name: draw for name, draw in figures.OF_RESULTS.items() if name not in MEASURED}
OF_EVERY_RUN = [name for name, draw in ALL.items() if not draw.__module__.endswith("lab_measured")]  # needs no extra study
ONE, THREE = synthetic_results.results(), synthetic_results.results(seeds=(0, 1, 2))
MIXED = synthetic_results.results(shapes={"loss-free, K = 1": (6, 64), "K = 8 low": (2, 8)}, seeds=(0, 1))
PLAIN = synthetic_results.results(arms=("LBL, K = 1",), n_windows=1)  # one arm, one window, no bias
NOTHING = {**ONE, "runs": []}


def legend(fig) -> list[str]:
    return [trace.name for trace in fig.data if trace.showlegend is not False]


def thick(fig, row: int, name: str):
    """The mean line of an arm in the first or second row."""
    axis = {1: (None, "y"), 2: ("y2",)}[row]
    (trace,) = [t for t in fig.data if t.yaxis in axis and t.name == name and t.line.width == 2.5]
    return trace


# ------------------------------------------------------------------------------------------------------- every figure


@pytest.mark.parametrize("name", OF_EVERY_RUN)
@pytest.mark.parametrize("results", [ONE, THREE, MIXED, PLAIN], ids=["one seed", "three seeds", "other shapes", "plain"])
def test_every_figure_draws_with_titles_units_and_a_caption(name, results):
    before = copy.deepcopy(results)
    fig = ALL[name](results)
    assert fig.to_json() == ALL[name](results).to_json() and before == results  # pure
    if name == "bias_spread" and results is PLAIN:
        assert not fig.data and "bias" in fig.layout.annotations[0].text
        return
    assert fig.data and fig.layout.title.text and fig.layout.height and len(fig.layout.meta["caption"]) > 40
    axes = [axis.title.text for axis in (*fig.select_yaxes(), *fig.select_xaxes())]
    assert name == "final_table" or any(axes)


@pytest.mark.parametrize("name", ALL)
def test_without_runs_a_figure_says_so(name):
    fig = ALL[name](NOTHING)
    assert not fig.data and len(fig.layout.annotations[0].text) > 10


def test_axes_say_their_units():
    def units(name):
        return " ".join(str(axis.title.text) for axis in (*ALL[name](ONE).select_yaxes(), *ALL[name](ONE).select_xaxes()))

    assert "training tokens" in units("layer0_deviation") and "+100 %" in ALL["layer0_deviation"](ONE).layout.yaxis.ticktext
    assert "units of 1/E" in units("load_and_probability")
    assert "units of the score" in units("bias_spread")
    assert "nats per token" in units("learning_curves")
    assert "bits per byte" in units("loss_against_balance") and "layer 0" in units("loss_against_balance")
    assert "experts E" in units("deviation_by_sparsity") and "experts per token K" in units("deviation_by_sparsity")


def test_an_arm_keeps_its_colour_in_every_figure():
    for name, place in (("LBL, K = 1", 0), ("K = 8 low", 2)):
        colour = style.line_of(place)["color"]
        assert thick(ALL["layer0_deviation"](THREE), 1, name).line.color == colour
        assert thick(ALL["learning_curves"](THREE), 1, name).line.color == colour
        assert [t.marker.color for t in ALL["loss_against_balance"](THREE).data if t.name == name] == [colour]


# --------------------------------------------------------------------------------------------------------------- truth


def test_layer_0_is_drawn_over_tokens_in_percent_seeds_thin_and_their_mean_thick():
    fig, name = ALL["layer0_deviation"](THREE), "LBL, K = 1"
    runs = [run for run in THREE["runs"] if run["arm"] == name]
    most = np.array([[100 * layers[0] for layers in run["load"]["max"]] for run in runs])
    least = np.array([[100 * layers[0] for layers in run["load"]["min"]] for run in runs])
    np.testing.assert_allclose(thick(fig, 1, name).x, np.array(runs[0]["load"]["step"]) * TOKENS_PER_STEP)
    np.testing.assert_allclose(thick(fig, 1, name).y, most.mean(0))
    np.testing.assert_allclose(thick(fig, 2, name).y, least.mean(0))
    thin = [t.y for t in fig.data if t.name == name and t.yaxis == "y" and t.line.width == 1]
    np.testing.assert_allclose(thin, most)
    assert legend(fig) == list(THREE["arms"])


def test_a_perfectly_even_layer_has_a_place_on_the_log_axis():
    results = copy.deepcopy(PLAIN)
    results["runs"][0]["load"]["max"] = [[0.0] * 4]
    assert list(thick(ALL["layer0_deviation"](results), 1, "LBL, K = 1").y) == [1.0]


def test_log_axes_show_all_that_is_drawn():
    results = copy.deepcopy(THREE)
    results["runs"][0]["load"]["max"][2][0], results["runs"][3]["heldout"]["max"][0] = 38.0, 90.0
    for name, axes in (("layer0_deviation", "y"), ("loss_against_balance", "x"), ("deviation_by_layer", "y")):
        fig = ALL[name](results)
        low, high = fig.layout[axes + "axis"].range
        drawn = np.concatenate([trace[axes] for trace in fig.data if (trace[axes + "axis"] or axes) == axes])
        assert 10**low < min(20, drawn.min()) and drawn.max() < 10**high
        assert fig.layout[axes + "axis"].type == "log" and drawn.max() > 1000


def test_seeds_of_different_length_are_averaged_where_all_have_a_point():
    results = copy.deepcopy(THREE)
    for series in results["runs"][0]["load"].values():
        del series[5:]
    fig = ALL["layer0_deviation"](results)
    assert len(thick(fig, 1, "LBL, K = 1").x) == 5 and len(thick(fig, 1, "K = 8 low").x) == 8


def test_shares_and_probabilities_are_sorted_together_in_units_of_the_uniform_share():
    fig, held = ALL["load_and_probability"](ONE), ONE["runs"][0]["heldout"]
    bar, dots = fig.data[:2]
    order = np.argsort(-np.array(held["f"][0]), kind="stable")
    np.testing.assert_allclose(bar.y, 96 * np.array(held["f"][0])[order])
    np.testing.assert_allclose(dots.y, 96 * np.array(held["P"][0])[order])
    assert list(bar.customdata) == list(order) and len(fig.data) == 2 * 2 * 3
    titles = [note.text for note in fig.layout.annotations]
    assert titles[0] == f"LBL, K = 1: layer 0, LBL {held['lbl'][0]:.2f}" and "layer 3" in titles[1]


def test_the_spread_says_when_it_passes_1():
    """0.004 a step passes 1 after step 250; the first window that ends behind it is that of step 300."""
    fig = ALL["bias_spread"](ONE)
    assert legend(fig)[0] == f"loss-free, K = 1 (passes 1 at {300 * TOKENS_PER_STEP / 1e6:.3g} M tokens)"
    assert set(fig.data[-1].y) == {1.0} and len(legend(fig)) == 2
    later = copy.deepcopy(ONE)
    for run in later["runs"]:
        run["load"]["bias_spread"] = [row and [0.5 * value for value in row] for row in run["load"]["bias_spread"]]
    assert legend(ALL["bias_spread"](later))[0] == "loss-free, K = 1"


def test_learning_curves_are_compared_seed_by_seed_and_the_switch_is_marked():
    fig = ALL["learning_curves"](THREE)
    loss = {(run["arm"], run["seed"]): np.array(run["curve"]["lm"]) for run in THREE["runs"]}
    apart = [loss["K = 8 low", seed] - loss["LBL, K = 1", seed] for seed in (0, 1, 2)]
    np.testing.assert_allclose(thick(fig, 2, "K = 8 low").y, np.mean(apart, 0), atol=1e-12)
    assert not np.any(thick(fig, 2, "LBL, K = 1").y)
    marked = {shape.x0 for shape in fig.layout.shapes}
    assert marked == {200 * TOKENS_PER_STEP}


def test_every_run_is_one_point_of_loss_against_balance():
    fig = ALL["loss_against_balance"](THREE)
    drawn = {
        (trace.name, seed, x, y) for trace in fig.data for seed, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }
    assert drawn == {
        (r["arm"], r["seed"], 100 * r["heldout"]["max"][0], r["heldout"]["bits_per_byte"]) for r in THREE["runs"]
    }


def test_layers_are_drawn_with_the_range_of_their_seeds():
    trace = ALL["deviation_by_layer"](THREE).data[0]
    values = 100 * np.array([run["heldout"]["max"] for run in THREE["runs"] if run["arm"] == trace.name])
    np.testing.assert_allclose(trace.y, values.mean(0))
    np.testing.assert_allclose(trace.y + trace.error_y.array, values.max(0))
    np.testing.assert_allclose(trace.y - trace.error_y.arrayminus, values.min(0))


def test_sparsity_is_split_into_experts_and_experts_per_token():
    """The three arms at E = 96 make the right panel, those at K = 1 the left; E = 96, K = 1 is in both."""
    sizes = {"E = 8": (8, 1), "E = 32": (32, 1), "top-1": (96, 1), "K = 2": (96, 2), "K = 4": (96, 4)}
    results = synthetic_results.results(arms=tuple(sizes), shapes={name: (4, E) for name, (E, _) in sizes.items()})
    for run in results["runs"]:
        run["k"][1] = [sizes[run["arm"]][1]] * 4
    fig = ALL["deviation_by_sparsity"](results)
    left, right = (next(t for t in fig.data if t.xaxis == axis and t.name == "layer 0") for axis in ("x", "x2"))
    assert list(left.x) == [8, 32, 96] and list(right.x) == [1, 2, 4]
    most = {run["arm"]: 100 * run["heldout"]["max"][0] for run in results["runs"]}
    np.testing.assert_allclose(left.y, [most["E = 8"], most["E = 32"], most["top-1"]])
    np.testing.assert_allclose(right.y, [most["top-1"], most["K = 2"], most["K = 4"]])


def test_the_table_gives_mean_and_range():
    results = copy.deepcopy(synthetic_results.results(arms=("one",), seeds=(0, 1, 2)))
    for run, most, dead in zip(results["runs"], (1.0, 2.0, 6.0), (0, 3, 0), strict=True):
        run["heldout"] |= {"max": [most, 9.0], "min": [-0.5, 0.0], "lbl": [1.01, 3.0], "dead": [dead, 1]}
        run["heldout"]["bits_per_byte"] = 2 + most / 10
    head, rows = figures.final_rows(results)
    cells = {name: cell.replace("\u00a0", " ") for name, cell in zip(head, rows[0], strict=True)}
    assert cells["layer 0 max"] == "+300 % (+100 to +600)" and cells["dead experts"] == "2 (1 to 4)"
    assert cells["bits per byte"] == "2.3000 (2.1000 to 2.6000)" and cells["LBL layer 0"] == "1.010 (1.010 to 1.010)"
    results["runs"] = results["runs"][:1]
    assert figures.final_rows(results)[1][0][1:3] == ["+100\u00a0%", "−50\u00a0%"]


NOT_OF_LOADS = {"learning_curves", "bias_spread", "bits_against"}


def test_what_a_figure_leaves_out_its_caption_says():
    results = synthetic_results.results(seeds=(0, 1))
    results["runs"] = [run for run in results["runs"] if run["arm"] != "LBL, K = 1" or run["seed"] == 0]
    said = figures.learning_curves(results).layout.meta["caption"]
    assert "leave out the fall of each curve's first tenth" in said
    assert "Seeds 1 have no run of 'LBL, K = 1' and so no difference" in said
    for draw in (figures.loss_against_balance, figures.deviation_by_layer, figures.deviation_by_sparsity):
        assert "what lies below is drawn there" in draw(results).layout.meta["caption"]


@pytest.mark.parametrize("name", sorted(figures.OF_RESULTS.keys() - NOT_OF_LOADS))
def test_every_figure_of_loads_names_its_window(name):
    """Held-out text after training or windows of so many training tokens: one arm's order of two differs between them."""
    results = copy.deepcopy(THREE)
    for run in results["runs"]:
        run["load"]["window_tokens"] = [200_704] * len(run["load"]["step"])
    title = figures.OF_RESULTS[name](results).layout.title.text
    assert title.endswith((", held-out text", ", windows of 201k tokens"))


def test_the_familys_numbers_lean_inwards_and_its_axis_ends_beyond_its_bars():
    points = [Point(name, (low, high), -1.0, -2.0, 0.0) for name, low, high in (("even", 0.1, 0.2), ("lone", 2.0, 6.0))]
    fig = balance_against_loss(points, 1.0, "even")
    assert [trace.textposition for trace in fig.data] == ["top right", "top left"]
    assert 10 ** fig.layout.xaxis.range[0] < 15 and 10 ** fig.layout.xaxis.range[1] > 600
