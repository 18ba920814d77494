"""Paired differences and their interval, against numbers worked out by hand and against a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sigma_lite.config import ConfigError
from sigma_lite.lab.paired import paired


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


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        noise = rng.normal(0, 0.01, 3)
        arms = results(a={s: 1.02 + n for s, n in enumerate(noise)}, b=dict.fromkeys(range(3), 1.0))
        found = paired(arms, "a", "b")
        held += found.low <= 0.02 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="no arm 'c'"):
        paired(results(a={0: 1.0}, b={0: 1.0}), "a", "c")
    with pytest.raises(ConfigError, match="no seed in common"):
        paired(results(a={0: 1.0}, b={1: 1.0}), "a", "b")
