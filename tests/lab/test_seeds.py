"""What three seeds show: less than two standard errors would say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sigma_lite.config import ConfigError
from sigma_lite.lab.seeds import T95, interval, paired, pairs_needed, student


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 29])
def test_the_quantiles_are_students(freedom):
    """95 % of the density (1 + t^2 / v)^(-(v + 1) / 2) lies between minus and plus the quantile."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)[1:-1]  # t = tan(angle) brings all of the line into a finite interval
    t = np.tan(angle)
    weight = (1 + t**2 / freedom) ** (-(freedom + 1) / 2) / np.cos(angle) ** 2
    inside = weight[np.abs(t) < T95[freedom - 1]].sum() / weight.sum()
    assert inside == pytest.approx(0.95, abs=2e-4)


@pytest.mark.parametrize(
    ("tail", "freedom", "exact"), [(0.025, 62, 1.9990), (0.025 / 31, 62, 3.2985), (0.0125, 4, 3.4954), (0.005, 2, 9.9248)]
)
def test_students_t_for_other_tails(tail, freedom, exact):
    """Values of the integral of the density, to its fourth digit."""
    t = np.linspace(0, exact, 200_001)
    log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_norm) * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert 0.5 - (density[1:] + density[:-1]).sum() * (t[1] - t[0]) / 2 == pytest.approx(tail, rel=1e-3)
    assert student(tail, freedom) == pytest.approx(exact, rel=1e-4)
    assert [student(0.025, v) for v in range(1, 30)] == pytest.approx(T95, abs=6e-4)  # as printed


def test_one_table_of_arms_without_effect_in_twenty_exceeds_the_bar():
    """31 arms of three seeds, whose differences are noise: the largest mean against the pooled bar of lab/standing.py."""
    draws = np.random.default_rng(0).normal(size=(4000, 31, 3))
    pooled = (draws.var(2, ddof=1).mean(1) / 3) ** 0.5
    exceeded = np.abs(draws.mean(2)).max(1) > student(0.025 / 31, 62) * pooled
    assert exceeded.mean() == pytest.approx(0.05, abs=0.012)


def test_three_pairs_need_four_standard_errors():
    mean, half = interval([-0.8, -1.1, -1.5])
    assert mean == pytest.approx(-1.1333, abs=1e-3) and half == pytest.approx(4.303 * 0.3512 / 3**0.5, rel=1e-3)
    with pytest.raises(ValueError, match="needs 2 to 30"):
        interval([1.0])


def test_intervals_cover_what_they_promise():
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    covered = np.mean([abs(mean) <= half for mean, half in map(interval, draws.tolist())])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_pairs_that_an_effect_needs():
    assert pairs_needed(0.35, 1.0) == 3 and pairs_needed(0.1, 1.0) == 2 and pairs_needed(50.0, 1.0) is None
    assert pairs_needed(1.7, 1.0) == 14
    half = T95[14 - 2] * 1.7 / 14**0.5
    assert half <= 1.0 < T95[13 - 2] * 1.7 / 13**0.5


# ------------------------------------------------------------------------------------------------- arms of results


def results(**arms: dict[int, float]) -> dict:
    runs = [
        {"arm": name, "seed": seed, "heldout": {"bits_per_byte": bits}}
        for name, found in arms.items()
        for seed, bits in found.items()
    ]
    return {"experiment": "x", "arms": dict.fromkeys(arms), "runs": runs}


def test_by_hand():
    """Differences of 1, 2 and 3 %: mean 2, deviation 1, t of two degrees 4.303."""
    found = paired(results(a={0: 101.0, 1: 102.0, 2: 103.0, 7: 1.0}, b={0: 100.0, 1: 100.0, 2: 100.0}), "a", "b")
    assert found.seeds == 3 and found.mean == pytest.approx(0.02)
    assert found.high - found.mean == pytest.approx(0.01 * 4.303 / math.sqrt(3)) == found.mean - found.low
    assert not found.is_clear and str(found) == "+2.0 % (95 % interval −0.5 to +4.5 %, 3 seeds)"


def test_one_seed_has_no_interval():
    found = paired(results(a={0: 0.9}, b={0: 1.0}), "a", "b")
    assert not found.is_clear and str(found) == "−10.0 % (one seed, so no interval)"


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="no arm 'c'"):
        paired(results(a={0: 1.0}, b={0: 1.0}), "a", "c")
    with pytest.raises(ConfigError, match="no seed in common"):
        paired(results(a={0: 1.0}, b={1: 1.0}), "a", "b")
