"""The figures of what is measured after training: each point and cell is a number of the results."""

import numpy as np
import synthetic_results

from sigma_lite import figures


def with_layers(results: dict) -> dict:
    for place, run in enumerate(results["runs"]):
        facts = {
            "max_deviation": 0.5 + place,
            "floor": {"bound": 1.5},
            "variance": {"max_at_random": 2.0 + place},
            "information": {"token": {"share": 0.7 - 0.1 * place}},
        }
        run["measured"] = [facts, {**facts, "max_deviation": 9.0}]
    return results


def with_domains(results: dict) -> dict:
    for run in results["runs"]:
        f_LDE = np.random.default_rng(0).dirichlet(np.ones(6), (2, 3))
        run["measured"] = {"names": ["code", "prose", "tables"], "f": f_LDE.tolist()}
    return results


def test_measured_against_the_floor():
    results = with_layers(synthetic_results.results(seeds=(0, 1)))
    points = [trace for trace in figures.predicted_and_measured(results).data if trace.mode == "markers"]
    assert [float(t.y[0]) for t in points] == [100 * r["measured"][0]["max_deviation"] for r in results["runs"]]
    assert {float(t.x[0]) for t in points} == {150.0}


def test_measured_against_lumps_at_random_has_a_point_for_every_layer_and_seed():
    results = with_layers(synthetic_results.results(seeds=(0, 1)))
    points = [trace for trace in figures.lumps_and_load(results).data if trace.mode == "markers"]
    measured = [f for run in results["runs"] for f in run["measured"]]
    np.testing.assert_allclose(
        np.concatenate([t.x for t in points]), [100 * f["variance"]["max_at_random"] for f in measured]
    )
    np.testing.assert_allclose(np.concatenate([t.y for t in points]), [100 * f["max_deviation"] for f in measured])
    assert [list(t.customdata) for t in points] == [[0, 1, 0, 1]] * len(points)
    assert all(list(t.marker.symbol) == ["diamond", "circle"] * 2 for t in points)


def test_information_is_the_mean_over_seeds():
    results = with_layers(synthetic_results.results(arms=("LBL, K = 1",), seeds=(0, 1)))
    (line,) = figures.information_by_layer(results).data
    np.testing.assert_allclose(line.y, [65.0, 65.0])


def test_a_domain_map_shows_every_load_once_in_units_of_the_uniform_share():
    results = with_domains(synthetic_results.results(arms=("micro", "global")))
    fig = figures.domain_expert_map(results)
    assert len(fig.data) == 4  # two arms, two layers
    f_DE = np.array(results["runs"][0]["measured"]["f"][0])
    np.testing.assert_allclose(np.sort(fig.data[0].z, axis=1), np.sort(6 * f_DE, axis=1))
    experts = np.asarray(fig.data[0].customdata)[0]
    np.testing.assert_allclose(fig.data[0].z, 6 * f_DE[:, experts])
    first_choice = np.asarray(fig.data[0].z).argmax(0)
    assert (np.diff(first_choice) >= 0).all(), "specialists of one domain stand together"


def test_without_the_measurement_they_say_so():
    results = synthetic_results.results()
    for name in ("predicted_and_measured", "lumps_and_load", "information_by_layer", "domain_expert_map"):
        fig = figures.OF_RESULTS[name](results)
        assert not fig.data and "measurement" in fig.layout.annotations[0].text
