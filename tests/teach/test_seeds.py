"""What three seeds show: less than two standard errors would say."""

from __future__ import annotations

import numpy as np
import pytest

from sigma_lite.teach.seeds import T95, interval, pairs_needed


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 10, 29])
def test_the_quantiles_are_students(freedom):
    """95 % of the density (1 + t^2 / v)^(-(v + 1) / 2) lies between minus and plus the quantile."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)[1:-1]  # t = tan(angle) brings all of the line into a finite interval
    t = np.tan(angle)
    weight = (1 + t**2 / freedom) ** (-(freedom + 1) / 2) / np.cos(angle) ** 2
    inside = weight[np.abs(t) < T95[freedom - 1]].sum() / weight.sum()
    assert inside == pytest.approx(0.95, abs=2e-4)


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
