"""Rows by domain: whose each token is, and an order whose stretches are pure. The domains' texts: test_library.py."""

import json
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigma_lite.config import ConfigError, MixtureConfig, RowsConfig
from sigma_lite.convert.calibrate import training_rows
from sigma_lite.data.domains import Stretches
from sigma_lite.data.of_run import RunData
from sigma_lite.data.rows import Rows, TrainSampler, epoch_order, row_order, train_loader
from sigma_lite.data.shards import load
from sigma_lite.data.stream import Domains

from .conftest import corpus_of, prepare_quietly

LENGTH = 32
SIZES = {"maths": 3, "music": 5, "law": 4}  # files a domain


def write_domains(folder) -> None:
    for domain, files in SIZES.items():
        for number in range(files):
            path = folder / "text" / domain / f"part_{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(f"{domain} has in its part {number} the line {i * i}" for i in range(60)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three domains in several shards."""
    folder = tmp_path_factory.mktemp("domains")
    write_domains(folder)
    return prepare_quietly(corpus_of(folder, heldout=0.4))  # some of each domain on either side


def train_rows(data) -> Rows:
    return Rows(data.train, data.token_bytes, LENGTH)


def domain_of_each_token(data, split: str) -> list[str]:
    """From the list of documents, one entry a token."""
    own = (row for row in data.documents() if row["split"] == split)
    return [row["name"].split("/")[0] for row in own for _ in range(row["tokens"])]


# ----------------------------------------------------------------------------------------------------- whose a row is


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("length", [1, 7, 64, 10_000])
def test_a_row_is_of_the_domain_of_all_its_tokens(data, split, length):
    assert len(data.manifest["shards"]) > 2
    stream, owners = getattr(data, split), domain_of_each_token(data, split)
    rows = Rows(stream, data.token_bytes, length, padded=True)
    names = stream.domains.names
    for row, number in enumerate(rows.domains(np.arange(len(rows)))):
        inside = set(owners[row * length : row * length + length])
        assert {names[number]} == inside if number >= 0 else len(inside) > 1
    batch = rows.__getitems__([len(rows) - 1, 0, len(rows) + 1])  # the last lies behind all tokens
    assert batch.domains_B.tolist() == [*rows.domains(np.array([len(rows) - 1, 0])), -1]


def test_a_domain_lies_in_one_piece_so_that_few_rows_hold_two(data):
    for split in ("train", "heldout"):
        owners = domain_of_each_token(data, split)
        assert len(list(groupby(owners))) == len(set(owners))
    mixed = int((train_rows(data).domains(np.arange(len(train_rows(data)))) == -1).sum())
    assert 0 < mixed <= len(SIZES) - 1


def test_sizes_are_those_of_the_documents(data):
    assert sorted(data.domain_tokens()) == sorted(SIZES)
    for name, sizes in data.domain_tokens().items():
        assert sizes == {split: domain_of_each_token(data, split).count(name) for split in ("train", "heldout")}


def test_neighbouring_stretches_of_one_domain_are_one():
    domains = Domains(["a", "b"], [("b", 3), ("b", 2), (None, 4), ("a", 1)])
    first_N, last_N = np.array([0, 1, 4, 5, 9, 9, 10]), np.array([4, 4, 5, 8, 9, 10, 10])
    assert domains.of(first_N, last_N).tolist() == [1, 1, -1, -1, 0, -1, -1]
    assert domains.tokens() == {"a": 1, "b": 5}


def test_files_in_no_folder_have_no_domain(fresh):
    mixed = prepare_quietly(corpus_of(fresh))
    rows, owners = Rows(mixed.train, mixed.token_bytes, 1), domain_of_each_token(mixed, "train")
    names = [*mixed.train.domains.names, None]
    assert [names[i] for i in rows.domains(np.arange(len(rows)))] == [o if "." not in o else None for o in owners[:-1]]
    assert owners.count(owners[0]) < len(owners) and None in {names[i] for i in rows.domains(np.arange(len(rows)))}


# ------------------------------------------------------------------------------------------------------------- order


def dealt(order: list[int], domains: list[int], run: int) -> list[int]:
    """Piles by hand."""
    piles, played = {}, []
    for row in order:
        pile = piles.setdefault(domains[row], [])
        pile.append(row)
        if len(pile) == run and domains[row] != -1:
            played += pile
            pile.clear()
    return played


corpora_of_rows = st.lists(st.integers(-1, 3), min_size=1, max_size=80)
with_a_stretch_of_4 = corpora_of_rows.map(lambda domains: [2, 2, *domains, 2, 2])


@settings(deadline=None)
@given(domains=corpora_of_rows, run=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_an_epoch_is_a_shuffle_dealt_onto_piles(domains, run, seed, epoch):
    stretches = Stretches(np.array(domains), 4, run)
    got = epoch_order(seed, epoch, len(domains), stretches).tolist()
    assert got == dealt(epoch_order(seed, epoch, len(domains)).tolist(), domains, run)
    assert len(got) == len(set(got)) == stretches.n_rows  # no row twice
    for i in range(0, len(got), run):
        stretch = {domains[row] for row in got[i : i + run]}
        assert len(stretch) == 1 and stretch != {-1}
    for domain in range(4):  # fewer than a stretch is left out
        assert sum(domains[row] == domain for row in got) == domains.count(domain) // run * run


@settings(deadline=None)
@given(domains=with_a_stretch_of_4, start=st.integers(0, 99), count=st.integers(0, 99))
def test_the_order_is_one_sequence_wherever_it_is_entered(domains, start, count):
    stretches = Stretches(np.array(domains), 4, 4)
    whole = row_order(1, 0, start + count, len(domains), stretches)
    assert row_order(1, start, count, len(domains), stretches).tolist() == whole[start:].tolist()


def test_stretches_of_one_row_are_the_plain_order():
    domains_N = np.arange(200) % 3
    for epoch in range(3):
        plain = epoch_order(7, epoch, 200)
        assert (epoch_order(7, epoch, 200, Stretches(domains_N, 3, 1)) == plain).all()


def test_domain_run_1_is_the_order_of_a_corpus_without_domains(data):
    config = RowsConfig(length=LENGTH, per_step=8, per_micro=4)
    drawn = sum(train_loader(train_rows(data), config, steps=9).batch_sampler, [])
    assert drawn == row_order(0, 0, 72, len(train_rows(data))).tolist()


def test_who_is_left_out_of_an_epoch_comes_in_another():
    domains_N = np.repeat([0, 1], [13, 10])
    stretches = Stretches(domains_N, 2, 8)
    epochs = [set(epoch_order(3, epoch, 23, stretches).tolist()) for epoch in range(20)]
    assert all(len(epoch) == 16 for epoch in epochs)
    assert set.union(*epochs) == set(range(23))


def test_domains_alternate_as_often_as_in_a_shuffle():
    """Each hundred stretches hold the domains in proportion: nothing is bunched at one end of the epoch."""
    domains_N = np.repeat([0, 1, 2], [4000, 2000, 2000])
    order = epoch_order(0, 0, 8000, Stretches(domains_N, 3, 8))
    shares = [np.bincount(domains_N[part], minlength=3) / len(part) for part in np.split(order, 10)]
    assert np.abs(np.array(shares) - [0.5, 0.25, 0.25]).max() < 0.05


@settings(deadline=None, max_examples=50)
@given(
    domains=with_a_stretch_of_4, micro=st.sampled_from([1, 2, 4]), world=st.sampled_from([1, 2, 4]), cut=st.integers(0, 6)
)  # fmt: skip
def test_micro_batches_are_pure_and_the_same_on_any_ranks_and_after_a_resume(domains, micro, world, cut):
    stretches = Stretches(np.array(domains), 4, 4)

    def micros(world: int, first: int, last: int) -> list[list[int]]:
        config = RowsConfig(per_step=16, per_micro=micro, domain_run=4)
        ranks = [TrainSampler(len(domains), config, r, world, last, lambda: first, stretches) for r in range(world)]
        return [batch for together in zip(*ranks, strict=True) for batch in together]

    whole = micros(1, 0, 6)
    assert micros(1, 0, cut) + micros(world, cut, 6) == whole
    assert all(len({domains[row] for row in batch}) == 1 for batch in whole)


def test_the_loader_gives_batches_of_one_domain(data):
    config = RowsConfig(length=LENGTH, per_step=8, per_micro=4, domain_run=4)
    batches = list(train_loader(train_rows(data), config, steps=60))
    assert all(len(set(batch.domains_B.tolist())) == 1 for batch in batches)
    assert {int(batch.domains_B[0]) for batch in batches} == {0, 1, 2}
    owners, ids = domain_of_each_token(data, "train"), data.train.read(0, len(data.train))[0]
    names = data.train.domains.names
    for batch, rows in zip(batches, train_loader(train_rows(data), config, steps=60).batch_sampler, strict=True):
        for row, number, row_ids in zip(rows, batch.domains_B, batch.ids_BS, strict=True):
            inside = slice(row * LENGTH, row * LENGTH + LENGTH)
            assert row_ids.tolist() == ids[inside].tolist() and set(owners[inside]) == {names[number]}


def test_a_conversion_is_calibrated_on_the_first_rows_of_the_run(data):
    for run in (1, 4):
        config = RowsConfig(length=LENGTH, per_step=8, per_micro=4, domain_run=run)
        seen = training_rows(RunData(data, config, MixtureConfig()), count=20, per_batch=4)
        expected = list(train_loader(train_rows(data), config, steps=3))[:5]
        assert [batch.ids_BS.tolist() for batch in seen] == [batch.ids_BS.tolist() for batch in expected]


# ------------------------------------------------------------------------------------------------------------- errors


def refused(data, run: int, pattern: str, length: int = LENGTH) -> None:
    config = RowsConfig(length=length, per_step=8 * run, per_micro=8, domain_run=run)
    with pytest.raises(ConfigError, match=pattern):
        train_loader(Rows(data.train, data.token_bytes, length), config)


def test_a_run_that_does_not_divide_the_step():
    with pytest.raises(ConfigError, match="domain_run=5 rows do not divide per_step=32: .* try domain_run=4"):
        RowsConfig(domain_run=5)
    with pytest.raises(ConfigError, match="domain_run=64 .* try domain_run=32"):
        RowsConfig(domain_run=64)
    with pytest.raises(ConfigError, match="domain_run=0: must be at least 1"):
        RowsConfig(domain_run=0)


def test_text_without_a_domain_is_counted(fresh):
    data = prepare_quietly(corpus_of(fresh))
    outside = sum("." in owner for owner in domain_of_each_token(data, "train"))
    refused(data, 2, f"domain_run=2: {outside} training tokens belong to no domain: use corpus source 'domains', or")


def test_a_domain_smaller_than_a_stretch_is_named_with_what_would_fit(data):
    domains_N = train_rows(data).domains(np.arange(len(train_rows(data))))
    counts = np.bincount(domains_N[domains_N >= 0])
    smallest, name = int(counts.min()), data.train.domains.names[int(counts.argmin())]
    said = f"domain '{name}' has only {smallest} whole training rows .*domain_run to {smallest} or less"
    refused(data, smallest + 1, said)
    train_loader(train_rows(data), RowsConfig(LENGTH, 8 * smallest, 8, domain_run=smallest))
    refused(data, 2, "has only 0 whole training rows .* or set rows.domain_run to 1", length=len(data.train) - 1)


def test_data_prepared_before_domains_were_recorded_still_loads(tmp_path):
    write_domains(tmp_path)
    new = prepare_quietly(corpus_of(tmp_path, heldout=0.4))
    for path in [*(tmp_path / "data").glob("shard-*.json"), tmp_path / "data" / "manifest.json"]:
        content = json.loads(path.read_text("utf-8"))
        for shard in content.get("shards", [content]):
            shard.pop("domains", None)
        path.write_text(json.dumps(content))
    old = load(tmp_path / "data")
    assert old.manifest["fingerprint"] == new.manifest["fingerprint"]  # its checkpoints go on
    assert prepare_quietly(corpus_of(tmp_path, heldout=0.4)).manifest == old.manifest
    assert old.domain_tokens() == {}
    a, b = (Rows(d.train, d.token_bytes, LENGTH).__getitems__([0, 3]) for d in (old, new))
    assert a.domains_B.tolist() == [-1, -1] and all((x == y).all() for x, y in zip(a[:-2], b[:-2], strict=True))
    refused(old, 2, "prepared before domains were recorded: delete its folder and run `sigma-lite prepare`")
