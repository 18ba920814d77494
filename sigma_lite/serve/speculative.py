"""Speculative decoding (2211.17192), greedy: a small draft guesses some tokens, the model checks all of them in one pass.

What comes out is what the model alone would write. What is saved is passes: a pass that checks five tokens reads the shared
weights once, where five passes would read them five times. Experts are another matter: see scale/decode.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sigma_lite.config import require
from sigma_lite.model import KeyValueCache, Transformer, of_experts
from sigma_lite.serve.generate import Sampling, draw_each, why_it_cannot_write

GREEDY = Sampling(temperature=0)


@dataclass
class Speculated:
    """A continuation, and what it took."""

    tokens: list[int] = field(default_factory=list)
    rounds: int = 0  # passes of the model, the one over the prompt included
    drafted: int = 0  # tokens that were guessed
    accepted: int = 0  # of them, that were right and used
    checked: int = 0  # of them, up to the first wrong one of each round: those behind it were never judged
    experts: int = 0  # distinct experts that the model's passes touched, summed over layers and passes

    @property
    def acceptance(self) -> float:
        """Chance that a guess is right, given that those before it were: what scale/decode.py's laws take."""
        return self.accepted / max(self.checked, 1)


@torch.inference_mode()
def speculate(
    model: Transformer, draft: Transformer | None, prompt_S: Tensor, *, max_new_tokens: int, drafted: int = 4
) -> Speculated:
    """The most probable continuation, `drafted` tokens guessed at a time; without a draft, token by token.

    Args:
        draft: any model of the same tokens; it writes greedily too.
        prompt_S: token ids, [S], S >= 1.
        drafted: tokens guessed before each check, 1 or more.

    Raises: ConfigError for an empty prompt, a number that cannot be, a draft of another vocabulary, a router of either model
        that has to know the future, and logits that are not finite.
    """
    require(prompt_S.dim() == 1 and len(prompt_S) > 0, "the prompt is empty: give at least one token to continue")
    require(drafted >= 1, f"drafted={drafted}: must be at least 1; without a draft, give draft=None")
    if draft is not None:
        sizes = draft.config.vocab_size, model.config.vocab_size
        require(sizes[0] == sizes[1], f"the draft has {sizes[0]} tokens, the model {sizes[1]}: they must share a tokenizer")
    for one in (model, draft):
        why = why_it_cannot_write(one) if one is not None else ""
        require(not why, why)
    text, found = prompt_S.tolist(), Speculated()
    own, its = (_Reader(one) if one is not None else None for one in (model, draft))
    while len(found.tokens) < max_new_tokens:
        guesses = its.continued(text, min(drafted, max_new_tokens - len(found.tokens) - 1)) if its else []
        said = own.read(text + guesses)[-len(guesses) - 1 :]
        right = next((n for n, guess in enumerate(guesses) if guess != said[n]), len(guesses))
        text, found.tokens = text + said[: right + 1], found.tokens + said[: right + 1]
        found.rounds, found.drafted, found.accepted = found.rounds + 1, found.drafted + len(guesses), found.accepted + right
        found.checked += min(right + 1, len(guesses))
        for reader in (own, its) if its else (own,):
            reader.cut(len(text) - 1)
    found.experts = own.experts
    return found


class _Reader:
    """A model that has read a part of a text, and can go back in it."""

    def __init__(self, model: Transformer):
        self.model, self.cache, self.seen, self.experts = model, [KeyValueCache() for _ in model.blocks], 0, 0

    def read(self, text: list[int]) -> list[int]:
        """What follows each token that it has not seen yet."""
        new_BS = torch.tensor([text[self.seen :]], device=self.model.embedding.weight.device)
        logits_BSV, routings = self.model(new_BS, cache=self.cache)
        self.seen = len(text)
        self.experts += sum(len(routing.ids.unique()) for routing in of_experts(routings))
        return draw_each(logits_BSV[0], GREEDY, ()).tolist()

    def continued(self, text: list[int], count: int) -> list[int]:
        """`count` tokens more."""
        more: list[int] = []
        while len(more) < count:
            more.append(self.read(text + more)[-1])
        return more

    def cut(self, length: int) -> None:
        """Forget what was read beyond this length."""
        self.seen = min(self.seen, length)
        for one in self.cache:
            if one.keys is None or one.values is None:  # a layer without attention has none
                continue
            one.keys, one.values = one.keys[:, :, : self.seen], one.values[:, :, : self.seen]
