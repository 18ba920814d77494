"""The n-gram model against its formula, counted by hand."""

import numpy as np
import pytest

from sigma_lite.config import ConfigError
from sigma_lite.data.ngram import DISCOUNT, NGram

V = 5
IDS = np.random.default_rng(0).integers(0, V, 300) * np.random.default_rng(1).integers(0, 2, 300)


def by_hand(context: tuple[int, ...], word: int, ids: list[int]) -> float:
    n = len(context)
    seen = [ids[i + n] for i in range(len(ids) - n) if tuple(ids[i : i + n]) == context]
    shorter = by_hand(context[1:], word, ids) if n else 1 / V
    if not seen:
        return shorter
    return (max(seen.count(word) - DISCOUNT, 0) + DISCOUNT * len({*seen}) * shorter) / len(seen)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_it_is_the_formula_and_sums_to_one(order):
    model = NGram(IDS, V, order)
    for place in (0, 1, 2, 50, 299, 300):
        context = IDS[max(0, place - order + 1) : place].tolist()
        found = model.probs(IDS[:place])
        assert found.sum() == pytest.approx(1) and (found > 0).all()
        for word in range(V):
            assert found[word] == pytest.approx(by_hand(tuple(context), word, IDS.tolist()))


def test_what_never_occurred_falls_back_to_what_did():
    model = NGram(np.array([0, 1, 2, 0, 1, 3]), V, 3)
    assert model.probs([4, 4]) == pytest.approx(model.probs([]))
    assert model.probs([4, 1]) == pytest.approx(NGram(np.array([0, 1, 2, 0, 1, 3]), V, 2).probs([1]))
    assert model.probs([0, 1]).argmax() in (2, 3)


def test_a_vocabulary_that_is_too_large_is_refused():
    NGram(np.arange(9) % 4096, 4096, 5)
    with pytest.raises(ConfigError, match="5-grams of 8192 tokens do not fit into 63 bits: choose order=4 or less"):
        NGram(np.arange(9), 8192, 5)
