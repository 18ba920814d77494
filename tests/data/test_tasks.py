"""Generated problems: the answers are right, and no problem is on both sides of the split."""

from __future__ import annotations

import random
import re

import pytest

from sigma_lite.config import ConfigError
from sigma_lite.data import tokenizer
from sigma_lite.data.tasks import HELDOUT, MAKERS, encode, problems

TASKS = ["add2", "add3", "sort5", "reverse6", "two_step5"]


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_prompt(task):
    for one in problems(task, 200, heldout=False):
        body = one.prompt.partition(":")[2].rstrip("=") or one.prompt.rstrip("=")
        if task.startswith("add"):
            first, second = body.split("+")
            assert int(one.answer) == int(first) + int(second) and len(one.answer) == int(task[3:]) + 1
        elif task.startswith("reverse"):
            assert one.answer == body[::-1] and not one.steps
        else:
            assert list(one.answer) == sorted(body, reverse="reverse" in one.prompt)
        assert one.solved_by(one.response) and one.solved_by(one.answer)
        assert not one.solved_by(one.answer + "0") and not one.solved_by(one.response + ">") and not one.solved_by("")


def test_steps_of_an_addition_are_its_digits_and_carries():
    for problem in problems("add3", 50):
        places, carry = problem.steps.split(";"), 0
        digits = ""
        for place in places:
            x, y, given, total = map(int, re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d\d)", place).groups())
            assert given == carry and total == x + y + carry
            digits, carry = str(total % 10) + digits, total // 10
        assert str(carry) + digits == problem.answer


def test_the_split_goes_by_the_problem_and_not_by_how_it_is_written():
    sides: dict[str, set[bool]] = {}
    for task in TASKS:
        for heldout in (False, True):
            for one in problems(task, 300, seed=3, heldout=heldout):
                assert one.heldout is heldout
                sides.setdefault(one.canonical, set()).add(heldout)
    assert len(sides) > 1000 and all(len(found) == 1 for found in sides.values())
    sums = {p.canonical for p in problems("add2", 300) if p.prompt[:2] > p.prompt[3:5]}
    assert all(int(c[4:].split("+")[0]) <= int(c.split("+")[1]) for c in sums), "37+58 and 58+37 are one problem"
    one_step, two_steps = ({p.canonical for p in problems(task, 400, heldout=True)} for task in ("sort5", "two_step5"))
    assert one_step & two_steps, "what is held out of sorting is held out of sorting in two steps"
    shares = [sum(maker(random.Random(i), 6).heldout for i in range(2000)) / 2000 for maker in MAKERS.values()]
    assert all(abs(share - HELDOUT) < 0.03 for share in shares)


def test_draws_are_those_of_the_seed():
    assert problems("add2", 5, seed=1) == problems("add2", 5, seed=1) != problems("add2", 5, seed=2)


def test_digits_and_signs_are_tokens_of_their_own():
    bpe = tokenizer.train(["37+58=95 37 58 sort:37 sort,reverse:" * 9, "reverse"], 270)
    assert len(bpe.encode("37").ids) == 1, "or nothing is shown"
    ids = encode(bpe, "sort,reverse:3758=37>95;")
    assert bpe.decode(ids) == "sort,reverse:3758=37>95;"
    assert [bpe.decode([i]) for i in ids[-11:]] == list("3758=37>95;")
    assert encode(bpe, "37") == [bpe.token_to_id("3"), bpe.token_to_id("7")]


@pytest.mark.parametrize(
    "wrong, words", [("ad2", "did you mean 'add2'"), ("add", "add2"), ("add0", "add2"), ("x", "choose")]
)
def test_unknown_tasks_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        problems(wrong, 1)


def test_a_side_without_problems_says_so(monkeypatch):
    monkeypatch.setattr("sigma_lite.data.tasks.HELDOUT", 0.0)
    with pytest.raises(ConfigError, match="sort1 has no problem held out: ask for more digits"):
        problems("sort1", 1, heldout=True)
