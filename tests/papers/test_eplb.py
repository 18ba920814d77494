"""EPLB: the golden rows of its README, its laws, and what a placement is worth on loads of our own runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigma_lite import record
from sigma_lite.config import ConfigError
from sigma_lite.papers import eplb
from sigma_lite.reading import imported
from sigma_lite.scale.placement import (
    check,
    copies_of,
    identity,
    makespan,
    near_home,
    rank_loads,
    waiting,
)

ROWS = np.array([
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
], dtype=float)  # fmt: skip
PLACED = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
PLANNERS = (identity, eplb.replicate_only, eplb.plan, eplb.snake)


def test_golden_rows():
    """16 spots, 4 groups, 2 nodes, 8 GPUs: the placement of the README; average over fullest GPU is 0.828 and 0.805."""
    found = np.stack([eplb.balanced(row, 16, 8, groups=4, nodes=2) for row in ROWS])
    assert found.tolist() == PLACED
    assert (1 / makespan(found, ROWS, 8)).round(3).tolist() == [0.828, 0.805]


def test_a_group_stays_in_one_node():
    for row, placed in zip(ROWS, np.array(PLACED), strict=True):
        nodes = [set(half // 3) for half in placed.reshape(2, 8)]
        assert not nodes[0] & nodes[1] and len(nodes[0]) == len(nodes[1]) == 2
        everywhere = eplb.balanced(row, 16, 8, groups=3, nodes=2)  # 3 groups over 2 nodes: global
        assert everywhere.tolist() == eplb.balanced(row, 16, 8).tolist()


def test_one_item_a_pack_is_not_sorted():
    pack, place = eplb.pack(np.array([1.0, 5.0, 3.0]), 3)
    assert pack.tolist() == [0, 1, 2] and place.tolist() == [0, 0, 0]


def test_greedy_and_snake_on_lognormal_loads():
    """58 layers, 256 experts, 288 spots, 32 GPUs, average over fullest: greedy 0.995, snake 0.975, and nothing done 0.5."""
    loads = np.random.default_rng(0).lognormal(0, 1, (58, 256))
    found = {planner.__name__: 1 / waiting(planner(loads, 32, 288), loads, 32) for planner in PLANNERS}
    assert found["plan"] == pytest.approx(0.995, abs=0.002) and found["snake"] == pytest.approx(0.975, abs=0.006)
    assert found["identity"] < found["replicate_only"] < 0.8


loads = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).lognormal(0, 1.5, (3, 12)))


@given(loads, st.sampled_from([(2, 12), (4, 16), (4, 24), (3, 21)]))
def test_laws_of_every_planner(loads, shape):
    """No expert is lost, no row is lost, no rank is emptier than even; all layers at once equal one after the other."""
    ranks, spots = shape
    for planner in PLANNERS:
        placed = planner(loads, ranks, spots)
        check(placed, 3, 12, ranks, spots)
        assert np.allclose(rank_loads(placed, loads, ranks).sum(1), loads.sum(1))
        assert (makespan(placed, loads, ranks) >= 1 - 1e-12).all()
        home = near_home(placed, 12, ranks)
        check(home, 3, 12, ranks, spots)
        assert np.allclose(np.sort(rank_loads(home, loads, ranks)), np.sort(rank_loads(placed, loads, ranks)))
        apart = np.concatenate([planner(row[None], ranks, spots) for row in loads])
        assert np.array_equal(apart, placed)
    counts = copies_of(eplb.replicate_all(loads, spots), 12)
    assert np.array_equal(counts, [np.bincount(eplb.replicate(row, spots), minlength=12) for row in loads])


@given(loads)
def test_a_copy_goes_where_copies_are_busiest(loads):
    """No move of one copy makes the busiest copy lighter: greedy replication is optimal in the fullest spot."""
    for row in loads:
        counts = np.bincount(eplb.replicate(row, 16), minlength=12)
        fullest = (row / counts).max()
        assert all((row / np.maximum(counts - (np.arange(12) == e), 1e-9)).max() >= fullest for e in range(12))
        assert ((row / counts).max() <= row / np.maximum(counts - 1, 1e-9) + 1e-12)[counts > 1].all()


def test_groups_go_to_the_ranks_that_store_them():
    shuffled = np.arange(16).reshape(4, 4)[[2, 0, 3, 1]].reshape(1, 16)
    assert near_home(shuffled, 16, 4).tolist() == [list(range(16))]


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        (np.array([[0, 1, 2, 2]]), "no spot for expert 3"),
        (np.array([[0, 1, 2, 4]]), r"names experts 0\.\.4, and there are 0\.\.3"),
        (np.array([[0, 1, 2]]), r"\[layers, spots\] = \[1, 4\]"),
    ],
)
def test_placements_that_lose_something_are_refused(placed, words):
    with pytest.raises(ConfigError, match=words):
        check(placed, 1, 4, 2, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ranks": 3, "spots": 12, "groups": 4, "nodes": 2}, "3 ranks do not divide into 2 nodes"),
        ({"ranks": 4, "spots": 16, "groups": 5, "nodes": 1}, "12 experts do not divide into 5 groups"),
        ({"ranks": 4, "spots": 18}, "18 spots do not divide into 4 ranks"),
        ({"ranks": 4, "spots": 8}, "8 spots for 12 experts"),
    ],
)
def test_what_cannot_be_packed(given, words):
    with pytest.raises(ConfigError, match=words):
        eplb.balanced(ROWS[0], **given)


def test_a_planner_has_a_path():
    assert imported("sigma_lite.papers.eplb.plan", "planner") is eplb.plan
    with pytest.raises(ConfigError, match="did you mean .*snake"):
        imported("sigma_lite.papers.eplb.snaek", "planner")
    with pytest.raises(ConfigError, match="cannot be imported"):
        imported("sigma_lite.papers.no_such.plan", "planner")
    with pytest.raises(ConfigError, match="give the whole path"):
        imported("plan", "planner")


def test_loads_of_the_toy_run():
    """96 experts, 8 ranks, two more spots each; the fullest ranks' rows relative to even shares.

    Where experts are stored 1.52 before the switch of sparsity and 1.95 after it. A plan is 1.003 on the window that it was
    made for; on the next one it is 1.24 before the switch, 1.24 across it and 1.14 after it.
    """
    windows = [e for e in record.read(Path(__file__).parents[2] / "results" / "toy.jsonl", "load")]
    ks, f = [e["k"] for e in windows], [np.array(e["f"]) for e in windows]
    found: dict[str, list[tuple[float, float, float]]] = {"before": [], "across": [], "after": []}
    for t in range(len(f) - 1):
        stage = "across" if ks[t] != ks[t + 1] else "after" if ks[t][0] == 1 else "before"
        placed = eplb.plan(f[t], 8, 112)
        still = waiting(identity(f[t], 8, 96), f[t + 1], 8)
        found[stage].append((still, waiting(placed, f[t], 8), waiting(placed, f[t + 1], 8)))
    means = {stage: np.mean(values, axis=0) for stage, values in found.items()}
    assert len(found["across"]) == 1
    assert means["before"] == pytest.approx([1.518, 1.003, 1.244], abs=2e-3)
    assert means["across"] == pytest.approx([1.889, 1.002, 1.240], abs=2e-3)
    assert means["after"] == pytest.approx([1.947, 1.003, 1.142], abs=2e-3)
