"""Generated problems whose answers can be checked, with worked steps, and a split that no problem crosses.

    add2      37+58=             7+8+0=15;3+5+1=09>   095
    sort5     sort:52413=                             12345
    reverse6  reverse:120034=                         430021
    two_step5 sort,reverse:52413=  12345>             54321

The number is how many digits a problem has. A problem's canonical form decides its side of the split: `37+58` and `58+37`
are one problem, so are all orders of the digits that are to be sorted, in one step or in two, and a text and its reverse.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from sigma_lite.config import TASK_NAME as NAME
from sigma_lite.config import TASKS, nearest, require
from sigma_lite.config import TASKS_HELDOUT as HELDOUT

SIGNS = "0123456789+=;:,>"  # each a token of its own: byte-pair encoding would cut 37 and 58 in different ways


class Problem(NamedTuple):
    prompt: str
    steps: str  # what may be written before the answer; "" for none
    answer: str
    canonical: str

    @property
    def heldout(self) -> bool:
        """A property of the problem alone."""
        place = int.from_bytes(hashlib.blake2b(self.canonical.encode()).digest()[:8], "big") / 2**64
        return place < HELDOUT

    @property
    def response(self) -> str:
        return f"{self.steps}>{self.answer}" if self.steps else self.answer

    def solved_by(self, response: str) -> bool:
        """Whether its result is the answer, to the digit."""
        return result(response) == self.answer


def result(response: str) -> str:
    """What follows the last `>`; all of it where there is none."""
    return response.rpartition(">")[2]


def add(rng: random.Random, digits: int) -> Problem:
    one, other = rng.randrange(10**digits), rng.randrange(10**digits)
    first, second = f"{one:0{digits}d}", f"{other:0{digits}d}"
    canonical = "add:{}+{}".format(*sorted((one, other)))
    return Problem(f"{first}+{second}=", column_steps(first, second), f"{one + other:0{digits + 1}d}", canonical)


def column_steps(first: str, second: str) -> str:
    """A sum of two numbers of one width, column by column from the last one on, with every carry: "7+8+0=15;3+5+1=09"."""
    carry, steps = 0, []
    for x, y in zip(first[::-1], second[::-1], strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return ";".join(steps)


def sort(rng: random.Random, digits: int) -> Problem:
    text = _digits(rng, digits)
    done = "".join(sorted(text))
    return Problem(f"sort:{text}=", "", done, f"digits:{done}")


def reverse(rng: random.Random, digits: int) -> Problem:
    text = _digits(rng, digits)
    return Problem(f"reverse:{text}=", "", text[::-1], f"reverse:{min(text, text[::-1])}")


def two_step(rng: random.Random, digits: int) -> Problem:
    text = _digits(rng, digits)
    done = "".join(sorted(text))
    return Problem(f"sort,reverse:{text}=", done, done[::-1], f"digits:{done}")


MAKERS: dict[str, Callable[[random.Random, int], Problem]] = dict(zip(TASKS, (add, sort, reverse, two_step), strict=True))


def problems(task: str, count: int, seed: int = 0, heldout: bool = False) -> list[Problem]:
    """So many draws from one side of the split; small tasks repeat themselves.

    Args:
        task: a name and a number of digits, such as "add2".

    Raises: ConfigError for an unknown task, naming the nearest.
    """
    found = NAME.fullmatch(task)
    require(found is not None, f"task {task!r}: {nearest(task, [f'{name}2' for name in MAKERS])}, with any number of digits")
    maker, digits, rng = MAKERS[found[1]], int(found[2]), random.Random(seed)
    return [_draw(maker, digits, rng, heldout) for _ in range(count)]


def mixed(tasks: Sequence[str], count: int, seed: int = 0) -> Iterator[Problem]:
    """So many draws from both sides of the split, the tasks in turn."""
    rng = random.Random(seed)
    makers = [(MAKERS[found[1]], int(found[2])) for found in map(NAME.fullmatch, tasks)]
    for maker, digits in itertools.islice(itertools.cycle(makers), count):
        yield maker(rng, digits)


def _draw(maker: Callable[[random.Random, int], Problem], digits: int, rng: random.Random, heldout: bool) -> Problem:
    drawn = (maker(rng, digits) for _ in range(10_000))
    found = next((problem for problem in drawn if problem.heldout == heldout), None)
    side = "held out" if heldout else "to be trained on"
    require(found is not None, f"{maker.__name__}{digits} has no problem {side}: ask for more digits")
    return found


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a prompt or a response: digits and signs one by one, words as the tokenizer cuts them."""
    pieces = re.findall(f"[{re.escape(SIGNS)}]|[^{re.escape(SIGNS)}]+", text)
    return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))
