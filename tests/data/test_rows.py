import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigma_lite.config import ConfigError, RowsConfig
from sigma_lite.data.rows import (
    IGNORED,
    HeldoutSampler,
    Rows,
    TrainSampler,
    epoch_order,
    heldout_loader,
    row_order,
    train_loader,
)

small = st.integers(1, 40)


# ------------------------------------------------------------------------------------------------------------- order


@settings(deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), n_rows=st.integers(1, 300))
def test_an_epoch_visits_every_row_once(seed, epoch, n_rows):
    assert sorted(row_order(seed, epoch * n_rows, n_rows, n_rows)) == list(range(n_rows))


@settings(deadline=None)
@given(seed=small, n_rows=small, start=st.integers(0, 200), count=st.integers(0, 200))
def test_the_order_is_one_sequence_wherever_it_is_entered(seed, n_rows, start, count):
    assert row_order(seed, start, count, n_rows).tolist() == row_order(seed, 0, start + count, n_rows)[start:].tolist()


def test_epochs_and_seeds_have_orders_of_their_own_and_the_order_is_pinned():
    orders = [epoch_order(seed, epoch, 50).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert epoch_order(0, 0, 10).tolist() == PINNED  # another order would resume old runs on other rows


PINNED = [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_every_row_is_equally_likely_everywhere():
    first = np.bincount([epoch_order(seed, 0, 4)[0] for seed in range(4000)], minlength=4)
    assert first == pytest.approx([1000] * 4, abs=120)  # 4 standard deviations


# -------------------------------------------------------------------------------------------------------------- ranks


@settings(deadline=None)
@given(n_rows=st.integers(1, 60), micro=st.integers(1, 4), world=st.sampled_from([1, 2, 4]), accumulation=st.integers(1, 3))
def test_every_rank_count_sees_the_same_rows_in_a_step(n_rows, micro, world, accumulation):
    config = RowsConfig(per_step=micro * world * accumulation, per_micro=micro, seed=5)
    ranks = [list(TrainSampler(n_rows, config, rank, world, steps=4)) for rank in range(world)]
    alone = list(TrainSampler(n_rows, config, steps=4))
    for step in range(4):
        pooled = [ranks[r][step * accumulation + m] for m in range(accumulation) for r in range(world)]
        assert pooled == alone[step * accumulation * world : (step + 1) * accumulation * world]
        assert sum(pooled, []) == row_order(5, step * config.per_step, config.per_step, n_rows).tolist()


@settings(deadline=None)
@given(cut=st.integers(0, 12), before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]))
def test_a_run_resumed_on_other_ranks_draws_the_rows_of_an_uninterrupted_one(cut, before, after):
    config = RowsConfig(per_step=8, per_micro=2)

    def rows_of_steps(world: int, first: int, last: int) -> list[list[int]]:
        samplers = [TrainSampler(21, config, rank, world, steps=last, first_step=lambda: first) for rank in range(world)]
        micros = [micro for together in zip(*samplers, strict=True) for micro in together]
        flat = sum(micros, [])
        return [flat[i : i + 8] for i in range(0, len(flat), 8)]

    assert rows_of_steps(before, 0, cut) + rows_of_steps(after, cut, 12) == rows_of_steps(1, 0, 12)


def test_the_length_counts_from_the_first_step_of_the_run():
    sampler = TrainSampler(9, RowsConfig(per_step=8, per_micro=2), steps=5, first_step=lambda: 3)
    assert len(sampler) == 5 * 4 and len(list(sampler)) == 2 * 4
    with pytest.raises(TypeError, match="endless"):
        len(TrainSampler(9, RowsConfig(per_step=8, per_micro=2)))


@settings(deadline=None)
@given(n_rows=st.integers(1, 50), micro=small, world=st.integers(1, 5))
def test_held_out_rows_are_shared_out_once_and_ranks_stay_in_step(n_rows, micro, world):
    ranks = [list(HeldoutSampler(n_rows, micro, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(HeldoutSampler(n_rows, micro, 0, world))}
    rows = sorted(row for batches in ranks for batch in batches for row in batch)
    assert [row for row in rows if row < n_rows] == list(range(n_rows))
    assert all(batch for batches in ranks for batch in batches)  # no rank is handed an empty batch


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("length", [1, 7, 64])
def test_training_rows_are_the_stream_cut_in_pieces(data, length):
    rows = Rows(data.train, data.token_bytes, length)
    ids, kinds = data.train.read(0, len(data.train))
    n = len(rows)
    assert n == (len(ids) - 1) // length
    batch = rows.__getitems__(list(range(n)))
    assert batch.ids_BS.flatten().tolist() == ids[: n * length].tolist()
    assert batch.targets_BS.flatten().tolist() == ids[1 : n * length + 1].tolist()
    assert batch.kinds_BS.flatten().tolist() == kinds[1 : n * length + 1].tolist()
    assert (batch.bytes_BS == torch.from_numpy(data.token_bytes)[batch.targets_BS]).all()
    dtypes = [torch.int64, torch.int64, torch.int64, torch.uint8, torch.int32, torch.int64]
    assert [t.dtype for t in batch[:-1]] == dtypes and batch.own_BS is None, "nothing is filled up"


def test_documents_change_exactly_where_one_begins(data):
    batch = Rows(data.train, data.token_bytes, 64).__getitems__([0, 3, 5, 8])
    begins_BS = batch.ids_BS == 0
    assert begins_BS[:, 1:].any()
    assert ((batch.documents_BS.diff() == 1) == begins_BS[:, 1:]).all()
    assert (batch.documents_BS.diff() >= 0).all()


@pytest.mark.parametrize("length", [1, 5, 64, 100_000])
@pytest.mark.parametrize("world", [1, 3])
def test_every_held_out_byte_is_scored_once(data, length, world):
    rows = Rows(data.heldout, data.token_bytes, length, padded=True)
    config = RowsConfig(length=length, per_step=7 * world, per_micro=7)
    batches = [b for rank in range(world) for b in heldout_loader(rows, config, rank, world)]
    scored = [batch.targets_BS[batch.targets_BS != IGNORED] for batch in batches]
    expected = data.heldout.read(1, len(data.heldout))[0]
    assert sorted(torch.cat(scored).tolist()) == sorted(expected.tolist())
    assert sum(int(batch.bytes_BS.sum()) for batch in batches) == data.manifest["heldout_bytes"]
    for batch in batches:
        assert (batch.bytes_BS[batch.targets_BS == IGNORED] == 0).all()


def test_held_out_targets_follow_their_inputs(data):
    rows = Rows(data.heldout, data.token_bytes, 50, padded=True)
    whole = data.heldout.read(0, len(data.heldout))[0]
    last = rows[len(rows) - 1]
    left = len(whole) - 1 - (len(rows) - 1) * 50
    assert 0 < left < 50
    assert last.targets_BS[0, :left].tolist() == whole[-left:].tolist()
    assert last.ids_BS[0, :left].tolist() == whole[-left - 1 : -1].tolist()
    assert (last.targets_BS[0, left:] == IGNORED).all()


def test_the_loader_gives_the_rows_that_the_order_names(data):
    rows = Rows(data.train, data.token_bytes, 64)
    config = RowsConfig(length=64, per_step=6, per_micro=3, seed=2)
    loader = train_loader(rows, config, steps=5)
    assert len(loader) == 10
    got = torch.cat([batch.ids_BS for batch in loader])
    assert (got == rows.__getitems__(row_order(2, 0, 30, len(rows)).tolist()).ids_BS).all()


def test_worker_processes_change_nothing(data):
    rows = Rows(data.train, data.token_bytes, 64)
    config = RowsConfig(length=64, per_step=6, per_micro=3)
    alone, helped = (list(train_loader(rows, config, steps=3, num_workers=n)) for n in (0, 2))
    assert all((a == b).all() for x, y in zip(alone, helped, strict=True) for a, b in zip(x[:-1], y[:-1], strict=True))


def test_a_row_longer_than_the_text_says_how_long_it_may_be(data):
    config = RowsConfig(length=10**6)
    with pytest.raises(
        ConfigError, match=r"rows.length=1000000 is longer than the training text .*set it to (\d+) or less"
    ) as e:
        train_loader(Rows(data.train, data.token_bytes, config.length), config)
    longest = int(str(e.value).split("set it to ")[1].split()[0])
    assert len(Rows(data.train, data.token_bytes, longest)) == 1
    assert len(Rows(data.train, data.token_bytes, longest + 1)) == 0


def test_rows_come_without_lightning():
    code = "import sys, sigma_lite.data.rows, sigma_lite.data.shards; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
