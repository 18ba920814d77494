"""What an exercise is: inputs, a solution in the package, and the mistake that most people make first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sigma_lite.teach.differences import EXACT_ENOUGH, Tolerance, call_difference


@dataclass(frozen=True)
class Exercise:
    name: str
    chapter: int
    solution: Callable  # a function of the package, perhaps adapted to the exercise's signature
    inputs: Callable[[], Sequence[Sequence[object]]]  # makes the argument lists on which answers are compared
    mistake: Callable  # a typical wrong answer
    says: str  # what to tell a reader whose results equal the mistake's
    axes: str = ""
    tolerance: Tolerance = EXACT_ENOUGH

    def verdict(self, mine: Callable) -> str:
        """ "" for a right answer, otherwise one sentence: the typical mistake by name, or the first difference."""
        for inputs in self.inputs():
            problem = self._problem(mine, inputs)
            if problem:
                return self.says if self._is_mistake(mine, inputs) else problem
        return ""

    def _problem(self, mine: Callable, inputs: Sequence[object]) -> str:
        try:
            return call_difference(mine, self.solution, inputs, self.axes, self.tolerance)
        except NotImplementedError:
            return "nothing there yet: the function returns no result"
        except Exception as error:  # whatever a reader's code raises is a verdict, not a crash of the chapter
            return f"it raises {type(error).__name__}: {error}"

    def _is_mistake(self, mine: Callable, inputs: Sequence[object]) -> bool:
        try:
            return not call_difference(mine, self.mistake, inputs, "", self.tolerance)
        except Exception:
            return False
