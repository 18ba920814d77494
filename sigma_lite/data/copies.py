"""Frequent tokens under several ids: an intervention of the study "Why layer 0?", not a way to train.

What sees a token alone must treat all its occurrences alike. Give a frequent token so many ids that none of them is more
frequent than a limit, each occurrence one of them at random, and no token is a lump any more: the floor of balance/zipf.py
falls to nothing while the text stays the text. The further ids are those that the vocabulary has and the text never uses.
Only inputs are rewritten. Targets keep their ids, so losses stay comparable.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sigma_lite.config import ConfigError
from sigma_lite.data.tokenizer import SPECIAL

MIXER = np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing (Knuth 6.4): neighbouring positions fall far apart


class Copies(NamedTuple):
    """Which ids stand for which token."""

    n_V: np.ndarray  # int64 [V]: ids of each token, itself included, at least 1
    first_V: np.ndarray  # int64 [V]: place of its first further id in `spare_N`
    spare_N: np.ndarray  # int64: ids that stand for other tokens

    def rewritten(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Each token as one of its ids, chosen by a hash of its position in the stream; int64, the shape of `ids`."""
        ids = ids.astype(np.int64)
        drawn = (positions.astype(np.uint64) * MIXER >> np.uint64(40)).astype(np.int64) % self.n_V[ids]
        place = np.minimum(self.first_V[ids] + drawn - 1, len(self.spare_N) - 1)
        return np.where(drawn == 0, ids, self.spare_N[place] if len(self.spare_N) else ids)

    def originals(self) -> np.ndarray:
        """The token that each id stands for, int64 [V]."""
        of_V = np.arange(len(self.n_V))
        of_V[self.spare_N] = np.repeat(of_V, self.n_V - 1)
        return of_V


def copies(counts_V: np.ndarray, limit: float, used_V: np.ndarray | None = None) -> Copies:
    """Spread tokens over ids until none makes up more than `limit` of the text.

    Args:
        counts_V: occurrences of each token in the training text, [V].
        limit: largest share of the text that one id may have, 0 < limit.
        used_V: bool [V], ids that some text uses; default: those that occur in the training text.

    Raises: ConfigError with the smallest limit that works when the unused ids do not suffice.
    """
    used_V = (counts_V > 0) if used_V is None else used_V
    spare = np.flatnonzero(~used_V)
    spare = spare[spare >= len(SPECIAL)]
    n_V = _ids_needed(counts_V, limit)
    if (needed := int((n_V - 1).sum())) > len(spare):
        enough = next(share for share in np.geomspace(limit, 1) if (_ids_needed(counts_V, share) - 1).sum() <= len(spare))
        raise ConfigError(
            f"rows.split_above={limit:g} needs {needed} further ids, and this vocabulary leaves {len(spare)} unused:"
            f" set it to {1.01 * enough:.3g} or more"
        )
    return Copies(n_V, np.cumsum(n_V - 1) - (n_V - 1), spare[:needed])


def _ids_needed(counts_V: np.ndarray, limit: float) -> np.ndarray:
    return np.maximum(1, np.ceil(counts_V / counts_V.sum() / limit - 1e-9)).astype(np.int64)
