"""What an exercise is: inputs, a solution in the package, and the mistakes that most people make first."""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sigma_lite.teach.differences import EXACT_ENOUGH, NOTHING, Tolerance, call_difference

FEW = 8  # numbers of a tensor that a verdict still writes out


@dataclass(frozen=True)
class Exercise:
    name: str
    chapter: int
    solution: Callable  # a function of the package, perhaps adapted to the exercise's signature
    inputs: Callable[[], Sequence[Sequence[object]]]  # makes the argument lists, the cases, on which answers are compared
    mistake: Callable  # a typical wrong answer
    says: str  # what to tell a reader whose results equal the mistake's on every case
    axes: str = ""
    tolerance: Tolerance = EXACT_ENOUGH
    others: tuple[tuple[Callable, str], ...] = ()  # more mistakes that have a name, and what to say about each

    def cases(self) -> list[tuple]:
        """The arguments of each case, by name: `mine(*cases[0])`."""
        names = list(inspect.signature(self.solution).parameters)
        return [namedtuple(self.name, names[: len(arguments)])(*arguments) for arguments in self.inputs()]

    def verdict(self, mine: Callable) -> str:
        """ "" for a right answer, otherwise one sentence: a typical mistake by name, or the first case that differs."""
        cases = self.cases()
        for number, case in enumerate(cases, start=1):
            problem = self._problem(mine, case)
            if problem == NOTHING:
                return problem
            if problem:
                return self._named(mine, cases) or self._of_case(number, cases, problem)
        return ""

    def _problem(self, mine: Callable, case: Sequence[object]) -> str:
        try:
            return call_difference(mine, self.solution, case, self.axes, self.tolerance)
        except NotImplementedError:
            return NOTHING
        except Exception as error:  # whatever a reader's code raises is a verdict, not a crash of the chapter
            return f"it raises {type(error).__name__}: {error}"

    def _named(self, mine: Callable, cases: Sequence[tuple]) -> str:
        """What to say about the mistake that equals `mine` on every case; "" when none does."""
        for mistake, says in ((self.mistake, self.says), *self.others):
            if all(self._equal(mine, mistake, case) for case in cases):
                return says
        return ""

    def _equal(self, mine: Callable, mistake: Callable, case: Sequence[object]) -> bool:
        try:
            return not call_difference(mine, mistake, case, "", self.tolerance)
        except Exception:
            return False

    def _of_case(self, number: int, cases: Sequence[tuple], problem: str) -> str:
        shown = ", ".join(f"{name}{_short(value)}" for name, value in cases[number - 1]._asdict().items())
        return (
            f"case {number} of {len(cases)} ({shown}): {problem}."
            f' All inputs of this case: teach.check.inputs("{self.name}")[{number - 1}]'
        )


def _short(value: object) -> str:
    """An argument in a few words: small ones are written out, of large arrays the shape, of objects the class."""
    if isinstance(value, (Tensor, np.ndarray)):
        size = int(np.prod(value.shape))
        return f"={value.tolist()}" if size <= FEW and value.ndim < 2 else f" of shape {list(value.shape)}"
    text = repr(value)
    return f"={text}" if len(text) <= 40 else f", a {type(value).__name__}"
