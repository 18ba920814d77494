"""What three seeds of the stages after pretraining recorded: results/bench/post.json, written by benchmarks/post.py."""

import json
import statistics
from pathlib import Path

import pytest

from sigma_lite.lab.seeds import interval

ARMS = json.loads((Path(__file__).parents[2] / "results" / "bench" / "post.json").read_bytes())
BEFORE, ARMS = ARMS["before"], ARMS["arms"]


def right(arm: str, task: str = "add2") -> list[float]:
    """Exact match of each seed."""
    return [entry["tasks"][task]["exact_match"] for entry in ARMS[arm].values()]


def idle(arm: str, when: str = "now") -> list[float]:
    """Experts of 96 without a token of the sums, mean over layers, of each seed."""
    return [statistics.mean(entry["drift"]["unused_problems"][when]) for entry in ARMS[arm].values()]


def forgotten(arm: str) -> list[float]:
    return [entry["bits_per_byte"] - BEFORE["bits_per_byte"] for entry in ARMS[arm].values()]


def test_three_seeds_of_each():
    assert {name: sorted(seeds) for name, seeds in ARMS.items()} == {name: ["0", "1", "2"] for name in ARMS}


def test_worked_steps_are_learned_and_bare_answers_are_not():
    assert min(right("worked")) >= 0.85 and max(right("direct")) <= 0.25
    assert min(right("family", "sort5") + right("family", "reverse6") + right("family", "two_step5")) >= 0.95


def test_pretraining_is_a_head_start_only():
    assert min(right("begun")) > 2 * max(right("random start, cut short"))
    assert min(right("random start")) > 0.5, "a pilot expected at most .5"


def test_three_digits_are_not_reached():
    assert max(right("family", "add3")) < 0.7, "the log says so: change it if this is mended"


def test_replay_keeps_most_of_what_was_known():
    assert min(forgotten("worked")) >= 0.6 and max(forgotten("replay")) <= 0.45


def test_balance_spreads_a_new_task_over_experts():
    assert min(idle("worked", "before")) >= 80 and max(idle("worked")) <= 35 and min(idle("no balance")) >= 50


def test_rewards_beat_their_start_and_their_null_arm_in_each_seed():
    gains = [after - start for start, after in zip(right("begun"), right("rewarded"), strict=True)]
    gain, half = interval(gains)
    assert min(gains) > 0 and gain - half > 0
    assert gain == pytest.approx(0.107, abs=0.001) and half == pytest.approx(0.031, abs=0.001)
    assert max(right("null rewards")) < min(right("begun"))
