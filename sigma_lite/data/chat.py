"""A conversation as token ids. The marks are tokens of their own that no text is cut into, so nobody can write them.

    <|endoftext|> <|user|> 37+58= <|assistant|> 95 <|end|> <|user|> ...

A text may spell out `<|user|>`: it stays plain text, because what a person types goes through the tokenizer; marks do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from sigma_lite.config import require
from sigma_lite.data.tokenizer import SPECIAL, special_tokens


class Marks(NamedTuple):
    """Ids of the tokens that frame a conversation."""

    begin: int  # ends the document before, as in pretraining
    user: int
    assistant: int
    end: int  # of an answer

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
    return Marks(begin, *(ids[name] for name in SPECIAL[1:]))
