"""What a reader is told: the first wrong thing, in words, and never the answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sigma_lite.config import ConfigError
from sigma_lite.teach import check, exercises
from sigma_lite.teach.differences import call_difference, difference

REFERENCE_TE = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.5, 32.0]])


@pytest.mark.parametrize(
    "mine, says",
    [
        (REFERENCE_TE.numpy(), "type: yours is a numpy array"),
        (REFERENCE_TE.double(), "dtype: yours is float64, expected float32"),
        (REFERENCE_TE.T, "shape: yours is [T=3, E=2], expected [T=2, E=3]"),
        (REFERENCE_TE + torch.eye(2, 3), "value: first wrong at t=0, e=0 (yours is 2); 2 of 6 are wrong"),
        (REFERENCE_TE * 3, "everywhere 3 times what it should be"),
        (REFERENCE_TE + 0.5, "everywhere off by the same amount"),
        (-REFERENCE_TE, "the opposite sign"),
        (REFERENCE_TE.flip(1), "the right numbers in another order"),
        (REFERENCE_TE / 0, "nan or inf"),
        (None, "nothing there yet"),
        (..., "nothing there yet"),
    ],
)
def test_first_difference(mine, says):
    assert says in difference(mine, REFERENCE_TE, "TE")


def test_the_answer_is_not_told():
    wrong = REFERENCE_TE.clone()
    wrong[1, 1] = 99.0
    message = difference(wrong, REFERENCE_TE, "TE")
    assert "99" in message and "t=1, e=1" in message and "16.5" not in message
    assert "16.5" not in difference(3.0, 16.5) and "too small" in difference(3.0, 16.5)
    assert "secret" not in difference("guess", "secret")


@pytest.mark.parametrize(
    "value", [REFERENCE_TE, np.arange(3), 1.5, 7, "text", [1, [2.0, "x"]], (1, 2), {"a": REFERENCE_TE, "b": [1]}, None, True]
)
def test_equal_is_equal(value):
    assert difference(value, value) == ""


def test_difference_names_the_place_in_nested_values():
    assert difference([1, 2, 4], [1, 2, 3]).startswith("item 2: value")
    assert difference([1, 2], [1, 2, 3]) == "length: yours has 2 items, expected 3"
    assert difference({"a": 1}, {"b": 1}) == "keys: 'b' missing"
    assert difference({"a": 1, "b": 2}, {"a": 1}) == "keys: 'b' not expected"
    assert difference({"a": 2}, {"a": 1}).startswith("'a': value")
    assert difference(True, 1).startswith("type")


def test_tolerance_is_relative():
    assert difference(torch.tensor([1e6 + 1]), torch.tensor([1e6])) == ""
    assert difference(torch.tensor([1e-3 + 1e-5]), torch.tensor([1e-3])) != ""


def test_gradients_are_compared_after_values():
    x = torch.tensor([1.0, 2.0])
    assert call_difference(lambda x: x * x, torch.square, [x]) == ""
    assert "none reaches the inputs" in call_difference(lambda x: (x * x).detach(), torch.square, [x])
    half = call_difference(lambda x: x * x.detach(), torch.square, [x])
    assert half.startswith("gradient of argument 1:") and "0.5 times" in half
    assert not x.requires_grad, "the reader's tensors are left alone"


def test_same_prints_or_raises(capsys):
    check.same(REFERENCE_TE, REFERENCE_TE.clone())
    assert "same" in capsys.readouterr().out
    with pytest.raises(check.CheckFailed, match="shape"):
        check.same(REFERENCE_TE, REFERENCE_TE.T)


@pytest.mark.parametrize("exercise", exercises.ALL.values(), ids=lambda e: e.name)
class TestExercise:
    def test_stub_fails(self, exercise):
        assert "nothing there yet" in exercise.verdict(lambda *_: None)

    def test_solution_passes(self, exercise):
        assert exercise.verdict(exercise.solution) == ""

    def test_typical_mistake_is_named(self, exercise):
        assert exercise.verdict(exercise.mistake) == exercise.says

    def test_other_faults_are_verdicts_too(self, exercise):
        def broken(*_):
            raise IndexError("out of range")

        assert exercise.verdict(broken) == "it raises IndexError: out of range"


def test_unknown_exercise_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'row_order'"):
        exercises.find("row_ordr")


def test_exercise_never_raises(capsys):
    check.exercise("row_order", lambda *_: None)
    assert "row_order: nothing there yet" in capsys.readouterr().out
