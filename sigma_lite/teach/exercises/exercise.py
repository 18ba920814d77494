"""What an exercise is: inputs, right solutions, and the mistakes that most people make first."""

from __future__ import annotations

import inspect
import textwrap
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sigma_lite.teach.differences import EXACT_ENOUGH, NOTHING, Tolerance, call_difference, with_article
from sigma_lite.teach.limit import TooLong, within

FEW = 8  # numbers of a tensor that a verdict still writes out
SECONDS = 10.0  # for all cases of an exercise
PLAINLY = {  # what torch says about a habit from numpy, and what it means here
    "on Tensor that requires grad": "the check looks at gradients too, so its inputs carry them; stay with torch functions",
    "could not infer output dtype": "turn True and False into numbers first, with .float()",
    'bincount_cpu" not implemented': "bincount wants whole numbers; / makes fractions",
    "bincount only supports 1-d": "bincount wants a flat tensor of whole numbers, none of them below 0",
}


class Verdict(NamedTuple):
    """What an answer is, "passed", "not tried", "mistake" (one that has a name) or "wrong", and a sentence about it."""

    kind: str
    says: str = ""


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
    asks: str = ""  # the step in a few words, as its heading says them
    minutes: int = 10
    difficulty: int = 2  # 1 to 5
    importance: int = 3  # 1 to 5; at 5 the rest of the chapter stands on it
    hint: str = ""  # the first fold: the idea, no code
    also: Callable | None = None  # a second right solution, the plain one that a reader would write; the second fold
    source: str = ""  # where the package has it, as teach.show takes it, or FILE#NAME of C++; the last fold

    def cases(self) -> list[tuple]:
        """The arguments of each case, by name: `mine(*cases[0])`."""
        return self.named(self.inputs())

    def named(self, inputs: Sequence[Sequence[object]]) -> list[tuple]:
        names = list(inspect.signature(self.solution).parameters)
        return [namedtuple(self.name, names[: len(arguments)])(*arguments) for arguments in inputs]

    def described(self) -> str:
        """Each case in a line: its arguments with values or shapes, and the type and shape of the right result."""
        lines = []
        for number, case in enumerate(self.cases(), start=1):
            arguments = ", ".join(f"{name}{_short(value)}" for name, value in case._asdict().items())
            lines.append(f"case {number}: {arguments} → {_kind(self.solution(*case), self.axes)}")
        return "\n".join(lines)

    def solved(self) -> str:
        """The text of the plain solution, as its fold shows it."""
        return textwrap.dedent(inspect.getsource(self.also))

    def verdict(self, mine: object) -> str:
        """ "" for a right answer, otherwise one sentence: a typical mistake by name, or the first case that differs."""
        return self.judge(mine).says

    def judge(self, mine: object, cases: Sequence[tuple] | None = None, seconds: float = SECONDS) -> Verdict:
        """The same with the kind of the answer. `cases` are compared instead of the exercise's own; it never raises."""
        cases = self.cases() if cases is None else cases
        if mine is None or mine is Ellipsis:
            return Verdict("not tried", NOTHING)
        if problem := _not_to_be_called(mine, cases[0]):
            return Verdict("wrong", problem)
        try:
            with within(seconds):
                return self._judged(mine, cases)
        except TooLong:
            return Verdict("wrong", f"it has not ended after {seconds:g} seconds: is there a loop that never stops?")

    def _judged(self, mine: Callable, cases: Sequence[tuple]) -> Verdict:
        for number, case in enumerate(cases, start=1):
            problem = self._problem(mine, case)
            if problem == NOTHING:
                return Verdict("not tried", problem)
            if problem:
                named = self._named(mine, cases)
                return Verdict("mistake", named) if named else Verdict("wrong", self._of_case(number, cases, problem))
        return Verdict("passed")

    def _problem(self, mine: Callable, case: Sequence[object]) -> str:
        try:
            return call_difference(mine, self.solution, case, self.axes, self.tolerance)
        except (Exception, SystemExit) as error:  # what a reader's code raises is a verdict, not a crash of the chapter
            if isinstance(error, NotImplementedError) and "not implemented for" not in str(error):
                return NOTHING  # raised by a stub; torch raises the same class where a function does not take a dtype
            plainly = next((f" ({says})" for part, says in PLAINLY.items() if part in str(error)), "")
            return f"it raises {type(error).__name__}: {str(error).rstrip('.')}{plainly}"

    def _named(self, mine: Callable, cases: Sequence[tuple]) -> str:
        """What to say about the mistake that equals `mine` on every case; "" when none does."""
        for mistake, says in ((self.mistake, self.says), *self.others):
            if all(self._equal(mine, mistake, case) for case in cases):
                return says
        return ""

    def _equal(self, mine: Callable, mistake: Callable, case: Sequence[object]) -> bool:
        try:
            return not call_difference(mine, mistake, case, "", self.tolerance)
        except (Exception, SystemExit):
            return False

    def _of_case(self, number: int, cases: Sequence[tuple], problem: str) -> str:
        shown = ", ".join(f"{name}{_short(value)}" for name, value in cases[number - 1]._asdict().items())
        return (
            f"case {number} of {len(cases)} ({shown}): {problem}{'' if problem.endswith('?') else '.'}"
            f' All inputs of this case: teach.check.inputs("{self.name}")[{number - 1}]'
        )


def _not_to_be_called(mine: object, case: tuple) -> str:
    """Why `mine(*case)` cannot even begin; "" when it can."""
    called = ", ".join(case._fields)
    if not callable(mine):
        return f"that is {with_article(mine)}: hand over the function itself, by its name and without calling it"
    try:
        signature = inspect.signature(mine)
    except (TypeError, ValueError):  # some functions written in C do not tell
        return ""
    try:
        signature.bind(*case)
    except TypeError:
        return f"your function takes {signature}, and it is called with ({called})"
    return ""


def _kind(value: object, axes: str) -> str:
    """Of a result its type, dtype and shape, without a value."""
    if isinstance(value, (Tensor, np.ndarray)):
        names = f", axes {axes}" if axes and value.ndim == len(axes) else ""
        return f"{with_article(value)}, {str(value.dtype).removeprefix('torch.')}, shape {list(value.shape)}{names}"
    if isinstance(value, (tuple, list)):
        return f"{with_article(value)} of " + "; ".join(_kind(item, "") for item in value)
    return with_article(value)


def _short(value: object) -> str:
    """An argument in a few words: small ones are written out, of large arrays the shape, of objects the class."""
    if isinstance(value, (Tensor, np.ndarray)):
        size = int(np.prod(value.shape))
        return f"={_digits(value)}" if size <= FEW and value.ndim < 2 else f" of shape {list(value.shape)}"
    text = repr(value)
    return f"={text}" if len(text) <= 40 else f", a {type(value).__name__}"


def _digits(value: Tensor | np.ndarray) -> str:
    """A number or a flat list of numbers, floats with four digits: enough to recognise a case."""
    shown = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in value.reshape(-1).tolist()]
    return f"[{', '.join(shown)}]" if value.ndim else shown[0]
