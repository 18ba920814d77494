"""What a search over placing programs finds depends on who scores it. A clock of fixed prices makes tests repeatable."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sigma_lite.papers import eplb
from sigma_lite.papers.barbarians import (
    NO_DATA,
    PACK,
    REPLICATE,
    VERIFIERS,
    Program,
    Task,
    measured,
    problem,
    rank_balance,
    search,
    spot_balance,
    threshold,
)
from sigma_lite.scale.placement import copies_of, rank_loads

PRICES = {"in turn": 0.1, "greedy": 1.0, "threshold": 1.2, "as they come": 0.0, "snake": 0.2, "lightest": 5.0}  # ms


def prices(program, task) -> float:
    if program is eplb.plan:
        return 0.040
    return 1e-3 * (PRICES[program.replicate] + PRICES[program.pack] + 0.2 * program.swaps + 0.1)


def drifting(windows: int = 6, L: int = 3, E: int = 24) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    now, found = chance.lognormal(0, 1, (L, E)), []
    for _ in range(windows):
        found.append(now)
        now = now * chance.lognormal(0, 0.1, (L, E))
    return found


TASK = Task(drifting(), ranks=4, spots=32, seconds=prices)


def test_every_honest_program_places_every_expert():
    for replicate in REPLICATE:
        for pack in PACK:
            for swaps in (0, 4):
                assert not problem(Program(replicate, pack, swaps), TASK), (replicate, pack)
    assert "no spot for expert" in problem(Program(forget=1), TASK)


def test_the_first_program_is_eplb():
    for loads in TASK.windows:
        mine, theirs = (rank_loads(p(loads, 4, 32), loads, 4) for p in (Program(), eplb.plan))
        assert np.allclose(mine, theirs)


def test_a_threshold_is_as_good_as_greedy_copies():
    """Both make the fullest spot as light as can be."""
    for loads in TASK.windows:
        fullest = [(loads / copies_of(f(loads, 32), 24)).max(1) for f in (threshold, eplb.replicate_all)]
        assert np.allclose(*fullest)
        assert all((copies_of(threshold(loads, spots), 24).sum(1) == spots).all() for spots in (24, 32, 80))


def test_swaps_make_no_rank_fuller():
    for pack in PACK:
        for loads in TASK.windows:
            spans = [rank_loads(Program(pack=pack, swaps=n)(loads, 4, 32), loads, 4).max(1) for n in (0, 1, 4, 16)]
            assert all((after <= before + 1e-9).all() for before, after in zip(spans, spans[1:], strict=False))


def test_the_published_score_does_not_see_ranks():
    """Packing changes what ranks have to do, and not that score; forgetting the busiest expert raises it."""
    loads = TASK.windows[0]
    packed, heaped = (Program(pack=pack)(loads, 4, 32) for pack in ("lightest", "as they come"))
    assert spot_balance(packed, loads) == pytest.approx(spot_balance(heaped, loads))
    assert rank_balance(Program(), TASK) > 1.2 * rank_balance(Program(pack="as they come"), TASK)
    assert spot_balance(Program(forget=4)(loads, 4, 32), loads) > spot_balance(packed, loads)


def test_the_published_score_is_the_mean_of_balance_and_speed():
    """Twelve windows are eleven pairs; even loads and 0.02 s a plan make 1; twice as fast makes 1.5, and has no limit."""
    even = [np.ones((2, 8))] * 12
    for seconds, score in ((0.02, 1.0), (0.01, 1.5), (0.0002, 50.5)):
        task = Task(even, ranks=4, spots=8, seconds=lambda program, task, took=seconds: took)
        assert len(task.plans(Program())) == 11
        assert VERIFIERS["published"](task)(Program()) == pytest.approx(score)
    loads = np.array([[6.0, 1, 1, 0]])
    assert spot_balance(np.arange(4)[None], loads) == 2 / 6, "mean of the spots over the fullest"


def test_a_score_without_data_is_750_for_anything():
    score = VERIFIERS["no data"](TASK)
    assert score(Program()) == score(Program("in turn", "as they come", 0, 16)) == NO_DATA == 0.75


def test_what_each_verifier_rewards():
    """Published: the cheapest program, unpacked. No data: wherever chance leads, here to lost experts. Ranks: EPLB's balance
    at a tenth of its price or less."""
    won = {name: search(make(TASK), 200, seed=1) for name, make in VERIFIERS.items()}
    assert won["published"].pack == "as they come" and won["published"].swaps == 0
    assert won["published"].replicate == "in turn"
    assert not problem(won["ranks"], TASK)
    assert rank_balance(won["ranks"], TASK) >= rank_balance(eplb.plan, TASK) - 0.005
    assert prices(won["ranks"], TASK) * 10 <= prices(eplb.plan, TASK)
    assert rank_balance(won["published"], TASK) < rank_balance(won["ranks"], TASK) - 0.1
    drift = {search(VERIFIERS["no data"](TASK), 200, seed) for seed in range(8)}
    assert len(drift) > 4 and any(problem(program, TASK) for program in drift)


def test_mutation_changes_one_gene():
    chance = random.Random(0)
    for _ in range(50):
        changed = vars(Program().mutated(chance)).items() - vars(Program()).items()
        assert len(changed) == 1


def test_the_clock_runs():
    assert measured(Program(), TASK, rounds=1) > 0
