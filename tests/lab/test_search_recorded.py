"""A night's search, results/search: its log is what its seed proposes, and the sentences of book/log/family.md hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from sigma_lite import record
from sigma_lite.identity import identify_named
from sigma_lite.lab.results import read_results
from sigma_lite.lab.retrain import chosen, named
from sigma_lite.lab.search import FOUNDER, Islands, _proposals, noise_of, read_log

SEARCH = Path(__file__).parents[2] / "results" / "search"
ISLANDS, NOISE = read_log(SEARCH)
FOUND, WEIGHT = ISLANDS.individuals, ISLANDS.search.weight
CORPORA = {name: read_results(SEARCH / f"retrained-search-{name}.json") for name in ("stdlib", "domains")}
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
