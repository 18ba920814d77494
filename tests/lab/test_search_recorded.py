"""A night's search, results/search: its log is what its seed proposes, and the sentences of book/log/family.md hold."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import correlation, mean, median

import pytest

from sigma_lite import record
from sigma_lite.identity import identify_named
from sigma_lite.lab import retrain as again
from sigma_lite.lab.results import read_results
from sigma_lite.lab.retrain import BASE, against_founder, chosen, holds, named
from sigma_lite.lab.search import FOUNDER, Islands, _proposals, noise_of, read_log
from sigma_lite.lab.trials import busiest

SEARCH = Path(__file__).parents[2] / "results" / "search"
ISLANDS, NOISE = read_log(SEARCH)
FOUND, WEIGHT = ISLANDS.individuals, ISLANDS.search.weight
CORPORA = {name: read_results(SEARCH / f"retrained-search-{name}.json") for name in ("stdlib", "domains")}
BEST = "#503"
STOPPED = "mean((sqrt(P) * (f * (P * square(((P + (1.848 * stop(sure))) - 4.925))))))"
NO_ROOT = "mean(((f * P) * square(((P + (1.848 * sure)) - 4.925))))"
FIXED = "(15 * mean(((f * P) * sqrt(P))))"
ENTRIES = record.read(SEARCH / "search.jsonl")


@pytest.mark.slow
def test_the_log_holds_what_its_seed_proposes_and_nothing_else():
    """Each child, its parents and all that was refused before it, from the lines before it alone."""
    then = ENTRIES[0]["code"]
    own = {name: identify_named(f"sigma_lite.lab.{name}") for name in ("expressions.Candidate", "evolve.behaviour")}
    if any(then[name] != now for name, now in own.items()):
        pytest.skip("the grammar has changed since this search")
    again, size = Islands(ISLANDS.search), ISLANDS.search.islands * ISLANDS.search.children
    again.expect(FOUNDER, ())
    again.add(FOUND[0])
    for first in range(1, 1 + ISLANDS.done * size, size):
        for one, (island, proposal) in zip(FOUND[first:], _proposals(again, None), strict=False):
            assert (island, *proposal) == (one.island, one.text, one.by, one.parents, one.rejected)
        for one in FOUND[first : first + size]:
            again.add(one)


def test_it_is_of_one_clean_commit_and_fitness_is_what_it_says():
    starts = [entry for entry in ENTRIES if entry["kind"] == "search"]
    assert len({start["commit"] for start in starts}) == 1 and not any("dirty" in start["commit"] for start in starts)
    assert [one.number for one in FOUND] == list(range(len(FOUND))) and FOUND[0].text == FOUNDER
    for one in FOUND:
        scores = [bits + WEIGHT * deviation for bits, deviation in zip(one.bits, one.deviation, strict=True)]
        assert one.fitness == pytest.approx(sum(scores) / len(scores), rel=1e-12)
    founder = [entry["fitness"] for entry in ENTRIES if entry["kind"] == "founder"]
    assert noise_of(founder, 2) == NOISE and FOUND[0].fitness == pytest.approx(sum(founder[:2]) / 2)


def test_what_was_trained_anew_is_the_best_with_seeds_that_chose_nothing():
    for results in CORPORA.values():
        assert [named(one) for one in chosen(ISLANDS, 5)] == [arm for arm in results["arms"] if arm.startswith("#")]
        for arm in results["arms"]:
            assert sorted(run["seed"] for run in results["runs"] if run["arm"] == arm) == list(range(100, 106))


def against(arm: str, base: str, monkeypatch) -> list[dict]:
    """Differences of an arm from another, on each corpus."""
    monkeypatch.setattr(again, "BASE", base)
    return [against_founder(results, arm, WEIGHT) for results in CORPORA.values()]


def worst(results, arm: str) -> float:
    """Layer 0's busiest expert, times an even share; mean over seeds."""
    return 1 + mean(busiest(run["heldout"]["f"]) for run in results["runs"] if run["arm"] == arm)


def test_one_of_five_holds_on_both_corpora():
    each = list(CORPORA.values())
    assert [arm for arm in each[0]["arms"] if arm.startswith("#") and holds(each, arm, WEIGHT)] == [BEST]
    one, two = (against_founder(results, BEST, WEIGHT) for results in each)
    assert one["fitness"][:3] == pytest.approx((-0.067, -0.111, -0.023), abs=6e-4)
    assert two["fitness"][:3] == pytest.approx((-0.044, -0.057, -0.030), abs=6e-4)
    assert one["bits"][:3] == pytest.approx((-0.039, -0.078, 0), abs=6e-4) and one["bits"].high < 0
    assert two["bits"][:3] == pytest.approx((-0.016, -0.032, 0), abs=6e-4) and two["bits"].high < 0
    assert [worst(results, BEST) for results in each] == pytest.approx([1.67, 1.84], abs=0.006)
    assert [worst(results, BASE) for results in each] == pytest.approx([2.83, 2.77], abs=0.006)


def test_a_larger_weight_explains_a_part(monkeypatch):
    of_five = [against_founder(results, "LBL, weight times 5", WEIGHT) for results in CORPORA.values()]
    assert [one["fitness"].mean for one in of_five] == pytest.approx([-0.021, -0.028], abs=6e-4)
    assert all(one["fitness"].low < 0 < one["fitness"].high for one in of_five)
    assert all(found["deviation"].high > 0 for found in against("LBL, weight times 25", "LBL, weight times 5", monkeypatch))
    monkeypatch.undo()
    five = [one["deviation"] for one in of_five]
    assert [one.mean for one in five] == pytest.approx([-0.16, -0.19], abs=0.006) and all(one.high < 0 for one in five)
    one, two = against(BEST, "LBL, weight times 5", monkeypatch)
    assert one["fitness"].high < 0 < two["fitness"].high and two["fitness"].mean == pytest.approx(-0.016, abs=6e-4)
    assert max(one["deviation"].high, two["deviation"].high) < 0


def test_its_parts(monkeypatch):
    for found, bits in zip(against(BEST, STOPPED, monkeypatch), (-0.022, -0.020), strict=True):
        assert found["bits"].mean == pytest.approx(bits, abs=6e-4) and found["bits"].high < 0 > found["deviation"].high
    for found in against(FIXED, "LBL, weight times 5", monkeypatch):
        assert found["fitness"].low < 0 < found["fitness"].high or found["fitness"].mean > 0
    shares = [worst(results, NO_ROOT) / 32 for results in CORPORA.values()]
    assert shares == pytest.approx([0.72, 0.59], abs=0.006)


def test_the_searchs_own_number_was_too_good():
    assert [one.number for one in FOUND if NOISE.gain(one) > NOISE.floor] == [332]
    gain = NOISE.gain(FOUND[332])
    anew = [against_founder(results, "#332", WEIGHT)["fitness"] for results in CORPORA.values()]
    assert gain == pytest.approx(0.122, abs=6e-4) and [-one.mean for one in anew] == pytest.approx([0.061, 0.035], abs=6e-4)
    assert anew[0].high < 0 < anew[1].high


def test_how_it_went():
    assert (len(FOUND), ISLANDS.done) == (577, 36) and all(one.fitness for one in FOUND)
    refused = [why for one in FOUND for why, times in one.rejected.items() for _ in range(times)]
    assert (refused.count("not new"), refused.count("no gradient"), len(refused)) == (143, 85, 228)
    quarters = [median(one.fitness for one in FOUND[a:b]) for a, b in pairwise(range(1, 578, 144))]
    assert quarters == pytest.approx([3.096, 3.029, 3.028, 3.059], abs=6e-4)
    for by, (better, of) in {"mutation": (75, 474), "crossover": (10, 102)}.items():
        children = [one for one in FOUND if one.by == by]
        above = [one for one in children if one.fitness < min(FOUND[parent].fitness for parent in one.parents)]
        assert (len(above), len(children)) == (better, of)
    near = [one for one in FOUND if one.fitness < NOISE.mean + NOISE.floor]
    agree = [correlation(*zip(*(getattr(one, of) for one in near), strict=True)) for of in ("deviation", "bits")]
    assert len(near) == 407 and agree == pytest.approx([0.99, 0.40], abs=0.006)
    assert sum(one.seconds for one in FOUND) / 3600 == pytest.approx(3.8, abs=0.05)


def test_no_loss_at_all_is_as_good_a_model_here():
    one, two = (against_founder(results, "no loss", WEIGHT)["bits"] for results in CORPORA.values())
    assert one.low < 0 < one.high and two.high < 0
    assert [worst(results, "no loss") for results in CORPORA.values()] == pytest.approx([17.1, 17.9], abs=0.06)
    top1 = [against_founder(results, "Top-1 LBL", WEIGHT) for results in CORPORA.values()]
    assert [found["bits"].mean for found in top1] == pytest.approx([0.154, 0.067], abs=6e-4)
