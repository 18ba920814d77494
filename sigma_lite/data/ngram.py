"""A smoothed n-gram model over tokens: what counting alone knows of a text. A model that learns should write better."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sigma_lite.config import require

DISCOUNT = 0.75  # taken off every count and given to shorter contexts (Ney, Essen and Kneser 1994)


class NGram:
    """Interpolated absolute discounting: p(w | h) = max(c(hw) - d, 0) / c(h) + d N(h) / c(h) p(w | h').

    h' is h without its first token, N(h) how many different tokens followed h. The last fallback is the same for all
    tokens, 1 / V. A context that never occurred, or only at the end of the text, gives what the shorter one gives.

    Args:
        ids_T: the text it counts, document after document.
        vocab_size: V; V ** order must fit into 63 bits, as with 4096 tokens and order 5.
        order: longest n-gram, at least 1.

    Raises: ConfigError for a vocabulary that is too large for the order.
    """

    def __init__(self, ids_T: np.ndarray, vocab_size: int, order: int = 5):
        fits = vocab_size**order < 2**63
        require(
            fits, f"{order}-grams of {vocab_size} tokens do not fit into 63 bits: choose order={_most(vocab_size)} or less"
        )
        self.V, self.order = vocab_size, order
        self.grams = []  # of length 1, 2, ...: sorted numbers of the n-grams that occur, and how often each does
        keys_T = np.zeros(len(ids_T), np.int64)
        for n in range(1, order + 1):
            keys_T = keys_T[: len(ids_T) - n + 1] * vocab_size + ids_T[n - 1 :]
            self.grams.append(np.unique(keys_T, return_counts=True))

    def probs(self, context: Sequence[int]) -> np.ndarray:
        """Probability of each token behind a context, of which the last order - 1 tokens count; float64 [V]."""
        p_V = np.full(self.V, 1 / self.V)
        for n in range(1, self.order + 1):
            if len(context) < n - 1:
                break
            head = 0
            for token in context[len(context) - n + 1 :]:
                head = head * self.V + int(token)
            grams, counts = self.grams[n - 1]
            first, end = np.searchsorted(grams, (head * self.V, (head + 1) * self.V))
            if first == end:
                break
            own, total = counts[first:end], counts[first:end].sum()
            p_V *= DISCOUNT * len(own) / total
            p_V[grams[first:end] - head * self.V] += (own - DISCOUNT) / total
        return p_V


def _most(vocab_size: int) -> int:
    return int(63 / np.log2(vocab_size))
