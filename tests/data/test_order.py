"""Which rows a step takes: shares of a mixture, stages and ramps, wherever a run is entered and on any number of ranks."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigma_lite.config import RowsConfig
from sigma_lite.data.order import Begun, Order, merged, merged_before
from sigma_lite.data.rows import TrainSampler, row_order

weights = st.lists(st.floats(0, 1).map(lambda w: round(w, 3)), min_size=1, max_size=6).filter(lambda w: sum(w) > 0)
shares = weights.map(lambda w: tuple(x / sum(w) for x in w))


def one_after_another(shares, count):
    """The rows with the earliest times, taken one by one."""
    heap = [((0 + 0.5) / share, source, 0) for source, share in enumerate(shares) if share > 0]
    heapq.heapify(heap)
    found = []
    for _ in range(count):
        _, source, k = heap[0]
        heapq.heapreplace(heap, ((k + 1.5) / shares[source], source, k + 1))
        found.append(source)
    return found


# ------------------------------------------------------------------------------------------------------------- shares


@given(shares=shares, start=st.integers(0, 300), count=st.integers(0, 60))
def test_a_merged_sequence_is_one_wherever_it_is_entered(shares, start, count):
    whole = one_after_another(shares, start + count)
    assert merged(shares, start, count).tolist() == whole[start:]
    assert merged_before(shares, start).tolist() == np.bincount(whole[:start], minlength=len(shares)).tolist()


@given(shares=shares, n=st.one_of(st.integers(0, 500), st.integers(10**9, 10**12)))
def test_no_share_is_ever_off_by_more_than_a_few_rows(shares, n):
    for share, taken in zip(shares, merged_before(shares, n).tolist(), strict=True):
        assert abs(taken - share * n) <= (1 + share * len(shares)) / 2 + 1e-3
        assert share > 0 or taken == 0


@pytest.mark.parametrize("asked", [(0.7, 0.2, 0.1), (0.55, 0.3, 0.1, 0.05), (1 / 3, 2 / 3)])
def test_every_stretch_of_a_run_has_the_shares_that_were_asked_for(asked):
    """Within 1 % of each share over any 2400 rows, and over any 10 000 within 0.3 %."""
    sources = merged(asked, 0, 40_000)
    for rows, limit in ((2400, 0.01), (10_000, 0.003)):
        for start in range(0, 30_000, 997):
            found = np.bincount(sources[start : start + rows], minlength=len(asked)) / rows
            assert found == pytest.approx(asked, rel=limit)


# -------------------------------------------------------------------------------------------------------------- steps

ROWS = RowsConfig(length=8, per_step=8, per_micro=2, seed=3, ramp=((0, 2), (5, 4), (9, 8)))
STAGES = ((0, (0.7, 0.3)), (7, (0.2, 0.8)), (12, (0.0, 1.0)))


def whole(order, steps, first=0):
    return np.concatenate([order.rows(step) for step in range(first, steps)])


def test_one_source_is_the_sequence_of_its_rows():
    plain = RowsConfig(per_step=8, per_micro=8, seed=2)
    assert whole(Order([21], plain), 9).tolist() == row_order(2, 0, 72, 21).tolist()
    assert whole(Order([21], ROWS), 12).tolist() == row_order(3, 0, 5 * 2 + 4 * 4 + 3 * 8, 21).tolist()


@settings(deadline=None)
@given(ramp=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), max_size=4), step=st.integers(0, 30))
def test_rows_before_a_step_are_those_of_the_steps_before(ramp, step):
    firsts, sizes = (np.cumsum([pair[i] for pair in ramp]).tolist() for i in (0, 1))
    pairs = tuple(zip([0, *firsts[:-1]], sizes, strict=True)) if ramp else ()
    rows = RowsConfig(per_step=sizes[-1] if ramp else 6, per_micro=1, ramp=pairs)
    assert rows.before(step) == sum(rows.at(s) for s in range(step))


def test_each_source_is_read_in_its_own_order_through_stages_and_ramp():
    order = Order([13, 29], ROWS, STAGES)
    found = [order.origin(step) for step in range(20)]
    sources, epochs, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
    for source, n_rows in enumerate((13, 29)):
        own = sources == source
        assert rows[own].tolist() == row_order(3, 0, int(own.sum()), n_rows).tolist()
        assert epochs[own].tolist() == (np.arange(own.sum()) // n_rows).tolist()
    assert [len(o.rows) for o in found] == [2] * 5 + [4] * 4 + [8] * 11
    assert whole(order, 20).tolist() == (rows + 13 * (sources == 1)).tolist()
    assert order.taken(20).tolist() == np.bincount(sources).tolist()
    assert order.passes(20) == pytest.approx(np.bincount(sources) / [13, 29])
    for first, end, asked in ((0, 7, 0.7), (7, 12, 0.2), (12, 20, 0.0)):
        own = np.concatenate([found[step].sources for step in range(first, end)]) == 0
        assert abs(own.sum() - asked * len(own)) <= 1 and order.shares(first)[0] == order.shares(end - 1)[0] == asked


@pytest.mark.parametrize("cut", [0, 3, 5, 6, 7, 9, 13])
def test_stages_and_ramp_on_other_ranks_give_the_same_rows(cut):
    """Cut anywhere: before, at and behind a stage and a step of the ramp."""
    order = Order([13, 29], ROWS, STAGES)

    def steps(world, per_micro, first, last):
        rows = RowsConfig(length=8, per_step=8, per_micro=per_micro, seed=3, ramp=ROWS.ramp)
        fresh = Order([13, 29], rows, STAGES)
        samplers = [TrainSampler(42, rows, r, world, last, lambda: first, rows_of=fresh.rows) for r in range(world)]
        return sum((micro for together in zip(*samplers, strict=True) for micro in together), [])

    for before, after in (((1, 2), (2, 1)), ((2, 1), (1, 1)), ((1, 1), (1, 2))):
        assert steps(*before, 0, cut) + steps(*after, cut, 16) == whole(order, 16).tolist()


def test_a_branch_reads_on_behind_its_parent():
    """Other weights from step 6 on: no row is seen again before its source has ended."""
    parent = Order([50, 40], ROWS, ((0, (0.7, 0.3)),))
    branch = Order([50, 40], ROWS, ((0, (0.1, 0.9)),), begun=Begun(6, tuple(parent.taken(6).tolist())))
    rows = np.concatenate([whole(parent, 6), whole(branch, 14, first=6)])
    for source, (first, n_rows) in enumerate(((0, 50), (50, 40))):
        own = rows[(rows >= first) & (rows < first + n_rows)] - first
        assert own.tolist() == row_order(3, 0, len(own), n_rows).tolist(), source
    assert branch.taken(6).tolist() == parent.taken(6).tolist()
    with pytest.raises(IndexError, match="step 5 is before step 6"):
        branch.rows(5)
