import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigma_lite.balance.zipf import token_floor
from sigma_lite.config import ConfigError
from sigma_lite.data.copies import copies
from sigma_lite.data.tokenizer import SPECIAL

N = len(SPECIAL)
some_counts = st.lists(st.integers(0, 1000), min_size=5, max_size=40).filter(lambda c: sum(c) > 0)


def spread(counts, limit, spare=400):
    """Copies for these counts of ordinary tokens, with `spare` unused ids behind them; and the text, each token in turn."""
    counts_V = np.array([0] * N + counts + [0] * spare)
    return copies(counts_V, limit), np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts_V)), counts_V))


@given(some_counts, st.floats(0.01, 0.5))
def test_every_id_stands_for_one_token_and_gives_it_back(counts, limit):
    made, text = spread(counts, limit, spare=5000)
    split = made.rewritten(text, np.arange(len(text)))
    assert (made.originals()[split] == text).all()
    assert len(set(made.spare_N)) == len(made.spare_N)
    assert not set(made.spare_N) & (set(text) | set(range(N)))


def test_no_id_is_more_frequent_than_the_limit_and_the_floor_falls_to_nothing():
    counts = [40_000, 20_000, *[100] * 400]  # 40 %, 20 % and four hundred rare ones
    made, text = spread(counts, limit=1 / 192)
    split = np.bincount(made.rewritten(text, np.arange(len(text))))
    assert split.max() / len(text) < 1.3 / 192  # 1/192, and what chance adds to 520 occurrences
    assert token_floor(np.bincount(text), 96).bound > 37
    assert token_floor(split, 96).bound < 0.05


def test_a_limit_that_nothing_exceeds_changes_nothing():
    made, text = spread([5, 5, 5, 5], limit=0.25)
    assert (made.rewritten(text, np.arange(len(text))) == text).all()


def test_an_occurrence_keeps_its_id_wherever_it_is_read_from():
    made, text = spread([50, 7, 3], limit=0.1)
    whole = made.rewritten(text, np.arange(60))
    assert (made.rewritten(text[20:40], np.arange(20, 40)) == whole[20:40]).all()


def test_too_few_unused_ids_name_a_limit_that_works():
    with pytest.raises(
        ConfigError, match=r"split_above=0\.01 needs 99 further ids, and this vocabulary leaves 9 unused"
    ) as e:
        spread([100], limit=0.01, spare=9)
    spread([100], limit=float(str(e.value).split("set it to ")[1].split(" ")[0]), spare=9)
