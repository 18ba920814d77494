"""Several sources under one tokenizer, and what Lightning makes of a mixture whose weights and batch size change."""

import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch

from sigma_lite.config import ConfigError, CorpusConfig, MixtureConfig, RowsConfig
from sigma_lite.data import mixture as module
from sigma_lite.data import stages
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.data.mixture import RowsOfSources, load_mixture, prepare_mixture
from sigma_lite.data.order import Order
from sigma_lite.data.rows import Rows
from sigma_lite.data.shards import prepare
from sigma_lite.runfile import source_corpora
from sigma_lite.storage import StorageError

from .conftest import write_texts
from .test_datamodule import Watcher, trainer_for

WORDS = ["cat", "dog", "bird", "tree", "sea"]
MIXTURE = {"weights": {"code": 3, "prose": 1}, "stages": ({"at_step": 5, "weights": {"code": 1, "prose": 3}},)}
ROWS = RowsConfig(length=16, per_step=8, per_micro=2, ramp=((0, 2), (3, 4), (7, 8)))


def settings(folder, **changes) -> tuple[CorpusConfig, MixtureConfig]:
    sources = {name: {"source": "files", "path": str(folder / name)} for name in ("code", "prose")}
    corpus = CorpusConfig(dir=str(folder / "mix"), vocab_size=300, heldout=0.2)
    return corpus, MixtureConfig(sources=sources, **(MIXTURE | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two corpora and their tokens. Do not write into it."""
    folder = tmp_path_factory.mktemp("mixture")
    write_texts(folder / "code")
    (folder / "prose").mkdir()
    for n in range(12):
        lines = (f"The {word} of chapter {n} says {i} things to the reader.\n" for i, word in enumerate(WORDS * 3))
        (folder / "prose" / f"p{n}.txt").write_text("".join(lines))
    prepare_mixture(*settings(folder), progress=False)
    return folder


@pytest.fixture
def mixed(folder):
    return load_mixture(*settings(folder))


# ------------------------------------------------------------------------------------------------------------ prepare


def test_each_source_is_what_it_would_be_alone_with_that_tokenizer(folder, mixed, tmp_path):
    corpus, mixture = settings(folder)
    for name, own in source_corpora(corpus, mixture).items():
        alone = CorpusConfig(**{**vars(own), "dir": str(tmp_path / name), "tokenizer": f"{corpus.dir}/tokenizer.json"})
        made, found = prepare(alone, progress=False), mixed.sources[name]
        assert found.manifest["fingerprint"] == made.manifest["fingerprint"]
    total = mixed.facts()
    assert total["train_tokens"] == sum(mixed.tokens.values()) == sum(len(s.train) for s in mixed.sources.values())
    assert total["heldout_bytes"] == sum(f["heldout_bytes"] for f in total["sources"].values())


def test_an_interrupted_prepare_goes_on_and_one_that_has_ended_does_nothing(folder, tmp_path, monkeypatch):
    corpus, mixture = settings(folder)
    corpus = CorpusConfig(**vars(corpus) | {"dir": str(tmp_path / "mix")})
    write, seen = stages._write_shard, []

    def breaks(*args):
        seen.append(args[1])
        if len(seen) == 6:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "_write_shard", breaks)
        prepare_mixture(corpus, mixture, progress=False, shard_tokens=1500)
    monkeypatch.setattr(module, "_sample", lambda *_: pytest.fail("the tokenizer is there"))
    made = prepare_mixture(corpus, mixture, progress=False, shard_tokens=1500)
    assert made.tokens == load_mixture(*settings(folder)).tokens
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "mix").rglob("*") if path.suffix != ".lock"}
    prepare_mixture(corpus, mixture, progress=False)
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_two_processes_prepare_the_same_tokens(folder, tmp_path):
    corpus, mixture = settings(folder)
    one, corpus = (CorpusConfig(**vars(corpus) | {"dir": str(tmp_path / name), "parts": 2}) for name in ("one", "mix"))
    assert prepare_mixture(corpus, mixture, progress=False, rank=0, ranks=2) is None
    made = prepare_mixture(corpus, mixture, progress=False, rank=1, ranks=2)
    assert made.manifest["fingerprint"] == prepare_mixture(one, mixture, progress=False).manifest["fingerprint"]
    with pytest.raises(ConfigError, match="there are parts=2"):
        prepare_mixture(corpus, mixture, progress=False, rank=2, ranks=3)


@pytest.mark.parametrize(("changes", "code"), [({}, 0.5), ({"stages": ()}, 0.75), ({"weights": {}, "stages": ()}, None)])
def test_the_tokenizer_reads_each_source_with_its_share(folder, changes, code):
    """The mean of the stages' shares; 0.5 of 0.75 and 0.25. By temperature 1 all text comes once."""
    corpus, mixture = settings(folder, **changes)
    own = {name: [*stages.training_documents(s, False)] for name, s in source_corpora(corpus, mixture).items()}
    texts, read = {d.text: name for name, docs in own.items() for d in docs}, Counter()
    sampled = [*module._sample(corpus, mixture, False)]
    for text in sampled:
        read[texts[text]] += len(text)
    if code is None:
        assert sampled == [d.text for docs in own.values() for d in docs]
    else:
        longest = max(map(len, texts))
        assert abs(read["code"] - code * read.total()) < 2 * longest


def test_shares_by_temperature(mixed):
    tokens = mixed.tokens
    sizes = np.array([*tokens.values()])

    def at(temperature):
        return MixtureConfig(sources=dict.fromkeys(tokens, {}), temperature=temperature).shares(tokens)

    assert at(1.0) == [(0, pytest.approx(sizes / sizes.sum()))]
    assert at(2.0) == [(0, pytest.approx(sizes**0.5 / (sizes**0.5).sum()))]
    assert at(1e6) == [(0, pytest.approx([0.5, 0.5], abs=1e-5))]
    assert at(1e-3) == [(0, pytest.approx([1.0, 0.0]))] and sizes[0] > sizes[1]
    annealed = MixtureConfig(sources=dict.fromkeys(tokens, {}), stages=({"at_step": 9, "temperature": 1e6},))
    assert annealed.shares(tokens)[1] == (9, pytest.approx([0.5, 0.5], abs=1e-5))


def test_rows_of_all_sources_are_the_rows_of_each(mixed):
    parts = [Rows(s.heldout, s.token_bytes, 16, padded=True) for s in mixed.sources.values()]
    rows, first = RowsOfSources(parts), len(parts[0])
    batch = rows.__getitems__([first, 2, first - 1, len(rows) - 1, len(rows)])
    assert batch.domains_B.tolist() == [1, 0, 0, 1, 1]
    for place, (source, row) in enumerate([(1, 0), (0, 2), (0, first - 1), (1, len(parts[1]) - 1), (1, len(parts[1]))]):
        alone = parts[source][row]
        assert all(torch.equal(getattr(batch, n)[place], getattr(alone, n)[0]) for n in alone._fields[:-2])
    whole = rows.__getitems__([*range(len(rows))])
    assert int(whole.bytes_BS.sum()) == mixed.manifest["heldout_bytes"]


def test_documents_of_a_row(mixed):
    source = mixed.sources["code"]
    documents, at = [d for d in source.documents() if d["split"] == "train"], 0
    for row in range(len(source.train) // 16):
        wanted, at = [], 0
        for d in documents:
            wanted += [d["name"]] if at < row * 16 + 16 and row * 16 < at + d["tokens"] else []
            at += d["tokens"]
        assert source.documents_in(row * 16, row * 16 + 16) == wanted


# ---------------------------------------------------------------------------------------------------------- Lightning


@pytest.fixture
def rows_seen(folder):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def fit(steps, resume=None, config=ROWS, save=None, validations=None, **changes):
        model = Watcher()
        data = TokenDataModule(*settings(folder, **changes)[:1], config, mixture=settings(folder, **changes)[1])
        micros = config.accumulation(1)
        options = {"val_check_interval": 4 * micros, "check_val_every_n_epoch": None} if validations is not None else {}
        options |= {} if validations is not None else {"limit_val_batches": 0}
        trainer = trainer_for(steps, micros, save, **options)
        if validations is not None:
            model.on_validation_start = lambda: validations.append(trainer.global_step)
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
        assert trainer.global_step == steps and trainer.accumulate_grad_batches == micros
        first = 0 if resume is None else int(str(resume.stem).partition("=")[2])
        ends = [config.before(s) - config.before(first) for s in range(first, steps + 1)]
        assert len(model.rows) == ends[-1]
        return [model.rows[a:b] for a, b in zip(ends, ends[1:], strict=False)]

    yield fit
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def test_lightning_steps_where_the_ramp_says_and_draws_the_rows_of_the_order(rows_seen, mixed):
    validations = []
    seen = rows_seen(12, validations=validations)
    parts = [Rows(s.train, s.token_bytes, 16) for s in mixed.sources.values()]
    order = Order([len(p) for p in parts], ROWS, settings(mixed.dir.parent)[1].shares(mixed.tokens))
    rows = RowsOfSources(parts)
    assert seen == [rows.__getitems__(order.rows(step).tolist()).ids_BS.tolist() for step in range(12)]
    assert [len(step) for step in seen] == [2] * 3 + [4] * 4 + [8] * 5
    assert validations == [4, 8, 12]


@pytest.mark.parametrize("per_micro", [1, 2])
def test_resume_at_every_step_gives_the_same_rows(rows_seen, tmp_path, per_micro):
    """Also with another split into micro-batches, as another number of ranks makes it; and the same validations."""
    whole = rows_seen(10, save=tmp_path)
    config = RowsConfig(length=16, per_step=8, per_micro=per_micro, ramp=ROWS.ramp)
    for at in (1, 3, 4, 5, 7, 9):
        validations = []
        assert rows_seen(10, tmp_path / f"step={at}.ckpt", config, validations=validations) == whole[at:], at
        assert validations == [s for s in (4, 8) if s > at]


def test_a_ramp_of_one_corpus(folder, tmp_path):
    """Without a mixture the rows are those of the one sequence, a few at a time."""
    corpus = source_corpora(*settings(folder))["code"]
    found = []
    for config in (ROWS, RowsConfig(length=16, per_step=2, per_micro=2)):
        model = Watcher()
        steps = 9 if config.ramp else ROWS.before(9) // 2
        trainer_for(steps, config.accumulation(1), limit_val_batches=0).fit(
            model, datamodule=TokenDataModule(corpus, config)
        )
        found.append(model.rows)
    assert found[0] == found[1]


def test_a_checkpoint_of_another_mixture_is_refused(rows_seen, tmp_path):
    rows_seen(4, save=tmp_path)
    for changes, config, said in (
        ({"stages": ()}, ROWS, "mixture shares"),
        ({}, RowsConfig(length=16, per_step=8, per_micro=2), "rows.ramp"),
    ):
        with pytest.raises(ConfigError, match=f"the checkpoint was trained with {said}"):
            rows_seen(6, tmp_path / "step=3.ckpt", config, **changes)


def test_the_checkpoint_says_what_was_read(rows_seen, mixed, tmp_path):
    rows_seen(8, save=tmp_path)
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["TokenDataModule"]
    assert (saved["step"], saved["rows_consumed"], saved["micro_batches"]) == (6, 3 * 2 + 3 * 4, 2)
    assert sum(saved["taken"].values()) == saved["rows_consumed"]
    assert [*saved["taken"]] == [source.manifest["fingerprint"] for source in mixed.sources.values()]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("changes", "said"), [
    ({"weights": {"code": 1, "pros": 1}}, "mixture.weights.pros is no source; did you mean 'prose'?"),
    ({"weights": {"code": 1}}, "mixture.weights says nothing of prose: give 0"),
    ({"weights": {"code": 0, "prose": 0}}, "are all 0"),
    ({"weights": {"code": -1, "prose": 2}}, "mixture.weights.code=-1: must be a number, 0 or more"),
    ({"stages": ({"at_stp": 4},)}, r"unknown key mixture.stages\[0\].at_stp; did you mean 'at_step'?"),
    ({"stages": ({"at_step": 0, "weights": {}},)}, "give the step that it begins with, from 1"),
    ({"stages": ({"at_step": 4},)}, "give either weights or a temperature"),
    ({"stages": ({"at_step": 4, "temperature": 0},)}, "temperature=0: must be a number greater than 0"),
    ({"stages": ({"at_step": 4, "temperature": 2}, {"at_step": 4, "temperature": 3})}, "each must come after"),
    ({"temperature": 0.0}, "mixture.temperature=0.0: must be greater than 0"),
])  # fmt: skip
def test_what_a_mixture_cannot_be(folder, changes, said):
    with pytest.raises(ConfigError, match=said):
        settings(folder, **changes)


@pytest.mark.parametrize(("source", "said"), [
    ({"path": "x"}, "data.mixture.sources.code needs source: programs, stdlib"),
    ({"source": "filez"}, "data.mixture.sources.code: corpus source 'filez' does not exist; did you mean 'files'?"),
    ({"source": "files", "pth": "x"}, "unknown key data.mixture.sources.code.pth; did you mean 'path'?"),
    ({"source": "stdlib", "vocab_size": 300}, "all sources share one tokenizer; set data.corpus.vocab_size"),
    ({"source": "stdlib", "dir": "mix/prose"}, "two are kept in mix/prose"),
])  # fmt: skip
def test_what_a_source_cannot_be(source, said):
    with pytest.raises(ConfigError, match=said):
        source_corpora(CorpusConfig(dir="mix"), MixtureConfig(sources={"code": source, "prose": {"source": "programs"}}))


@pytest.mark.parametrize(("ramp", "said"), [
    (((0, 3), (4, 8)), r"rows.ramp's 3 rows do not divide into 1 rank\(s\) x per_micro=2; try 4, or a smaller per_micro"),
    (((0, 4), (4, 6)), "rows.ramp ends with 6 rows a step, and per_step=8: set per_step to 6"),
    (((1, 4), (4, 8)), "begins at step 1: its first step must be 0"),
    (((0, 4), (4, 4), (6, 8)), "rows must grow from pair to pair"),
    (((0, 4), (0, 8)), "steps must grow from pair to pair"),
    (((0, 4, 1), (4, 8)), "give pairs of whole numbers"),
])  # fmt: skip
def test_what_a_ramp_cannot_be(ramp, said):
    with pytest.raises(ConfigError, match=said):
        RowsConfig(per_step=8, per_micro=2, ramp=ramp)


def test_every_size_of_a_ramp_must_divide_among_the_ranks():
    rows = RowsConfig(per_step=8, per_micro=2, ramp=((0, 2), (3, 8)))
    assert [rows.accumulation(1, step) for step in (0, 3)] == [1, 4]
    with pytest.raises(ConfigError, match=r"rows.ramp's 2 rows do not divide into 2 rank\(s\) x per_micro=2; try 4"):
        rows.accumulation(2)


def test_folders_of_other_data_are_left_alone(folder, tmp_path, monkeypatch):
    corpus, mixture = settings(folder)
    for name, value, said in (
        ("vocab_size", 400, "vocab_size=300, not 400"),
        ("single_digits", True, "_digits=False"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare_mixture(CorpusConfig(**vars(corpus) | {name: value}), mixture, progress=False)
    one = source_corpora(corpus, mixture)["code"]
    with pytest.raises(ConfigError, match="holds files that `prepare` did not write"):
        prepare(CorpusConfig(**vars(one) | {"dir": corpus.dir}), progress=False)
    prepare(CorpusConfig(**vars(one) | {"dir": str(tmp_path / "one")}), progress=False)
    with pytest.raises(ConfigError, match="holds files of no mixture"):
        prepare_mixture(CorpusConfig(**vars(corpus) | {"dir": str(tmp_path / "one")}), mixture, progress=False)
    elsewhere = {**mixture.sources, "code": {**mixture.sources["code"], "dir": str(tmp_path / "one")}}
    with pytest.raises(ConfigError, match="was prepared with another tokenizer than"):
        prepare_mixture(corpus, MixtureConfig(sources=elsewhere), progress=False)
    with pytest.raises(StorageError, match="no finished data"):
        load_mixture(CorpusConfig(**vars(corpus) | {"dir": str(tmp_path / "none")}), mixture)
    assert json.loads((folder / "mix" / "mixture.json").read_text())["tokenizer"]["vocab_size"] == 300
