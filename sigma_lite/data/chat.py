"""A conversation as token ids. The marks are tokens of their own that no text is cut into, so nobody can write them.

    <|endoftext|> <|user|> 37+58= <|assistant|> 95 <|end|> <|user|> ...

A text may spell out `<|user|>`: it stays plain text, because what a person types goes through the tokenizer; marks do not.
What the model thinks before it answers stands between <think> and </think>, where the tokenizer has reserved these names
(`data.corpus.special_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from sigma_lite.config import require
from sigma_lite.data.tokenizer import SPECIAL, special_tokens

THINK = ("<think>", "</think>")


class Turn(NamedTuple):
    """What the user said, and the answer."""

    said: str
    answer: str
    thought: str = ""  # before the answer


class Marks(NamedTuple):
    """Ids of the tokens that frame a conversation."""

    begin: int  # ends the document before, as in pretraining
    user: int
    assistant: int
    end: int  # of an answer
    think: tuple[int, int] | None = None  # around thoughts; None: the tokenizer has reserved no such names

    def prompt(self, turns: Sequence[tuple[Sequence[int], Sequence[int] | None]]) -> list[int]:
        """Ids up to where the model answers.

        Args:
            turns: (what the user said, what was answered) in order; the last answer is None.
        """
        ids = [self.begin]
        for said, answer in turns:
            ids += [self.user, *said, self.assistant]
            ids += [] if answer is None else [*answer, self.end]
        return ids

    def conversation(self, turns: Sequence[Turn], encode: Callable[[str], list[int]]) -> list[int]:
        """Ids of a whole one; thoughts stand before their answer, in tags where there are any."""
        opens, closes = ([self.think[0]], [self.think[1]]) if self.think else ([], [])
        thoughts = [[*opens, *encode(t.thought), *closes] if t.thought else [] for t in turns]
        answered = [[*thought, *encode(t.answer)] for t, thought in zip(turns, thoughts, strict=True)]
        return self.prompt([(encode(t.said), answer) for t, answer in zip(turns, answered, strict=True)])

    def answers(self, ids_BS: np.ndarray) -> np.ndarray:
        """Which tokens the assistant says, bool [B, S]: those behind its mark, up to and with the end of the answer."""
        opened, closed = ids_BS == self.assistant, ids_BS == self.end
        return opened.cumsum(1) - opened > closed.cumsum(1) - closed


def marks(tokenizer: Tokenizer, begin: int) -> Marks:
    """Those of a tokenizer; `begin` is its end of text.

    Raises: ConfigError naming the marks that it lacks.
    """
    ids = {name: i for i, name in special_tokens(tokenizer).items()}
    missing = [name for name in SPECIAL[1:] if name not in ids]
    require(
        not missing,
        f"this run's tokenizer lacks {', '.join(missing)}, which frame a conversation: `generate` continues plain text; to"
        " chat, train with a tokenizer that has them (each one trained here has, an imported one may not)",
    )
    think = tuple(ids[name] for name in THINK if name in ids)
    return Marks(begin, *(ids[name] for name in SPECIAL[1:]), think=think if len(think) == 2 else None)
