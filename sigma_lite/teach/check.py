"""Is it the same? Says the first thing that is not, and never the answer."""

from __future__ import annotations

from collections.abc import Callable

from sigma_lite.teach import exercises
from sigma_lite.teach.differences import Tolerance, call_difference, difference
from sigma_lite.teach.source import Steps


class CheckFailed(AssertionError):
    """Two things that should be equal are not; the message is the first difference."""


def same(mine: object, reference: object, *inputs: object, axes: str = "", rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Compare two values, or two functions called with the same inputs; prints what was found equal.

    Args:
        mine, reference: tensors, arrays, numbers, text, and lists, tuples or dicts of them; or two callables.
        inputs: arguments for the callables. Float tensors are copied and asked for their gradients as well.
        axes: letters of the result's shape, such as "TE": they name sizes and positions in the message.
        rtol, atol: relative and absolute tolerance of float values, as in numpy.isclose.

    Raises: CheckFailed.
    """
    tolerance = Tolerance(rtol, atol)
    if callable(reference):
        problem = call_difference(mine, reference, inputs, axes, tolerance)
    else:
        problem = difference(mine, reference, axes, tolerance)
    if problem:
        raise CheckFailed(problem)
    print("same: type, shape and value" + (", and gradient where there is one" if callable(reference) else ""))


passed: dict[str, Callable] = {}  # exercise -> the reader's function; of this kernel


def exercise(name: str, mine: Callable) -> None:
    """Try your function on the exercise's inputs and print a verdict: a known mistake by name, or the first case that is
    wrong (`teach.check.inputs(name)` shows the cases). A wrong answer raises nothing, so that a chapter
    with open exercises still runs from top to bottom."""
    verdict = exercises.find(name).judge(mine)
    passed.pop(name, None)
    if verdict.kind == "passed":
        passed[name] = mine
    print(f"{name}: {verdict.says or 'passed'}")


def inputs(name: str) -> list[tuple]:
    """The cases on which an exercise's answers are compared, each with its arguments by name: `mine(*inputs(name)[0])`."""
    return exercises.find(name).cases()


def solution(name: str) -> Steps:
    """An exercise's folds: the idea, the cases, a plain solution, the package's source."""
    return Steps(exercises.find(name))


def mine(name: str) -> Callable:
    """What comes after an exercise runs on this: your function where its check has passed in this kernel, else the
    package's; says which."""
    asked = exercises.find(name)
    print(f"{name}: {'your function' if name in passed else 'the function of the package, until yours passes its check'}")
    return passed.get(name, asked.solution)
