import hashlib
import json
import lzma
import math
import os
import pickle
import shutil
import subprocess
import warnings
from collections import Counter

import numpy as np
import pytest

from sigma_lite.config import ConfigError, CorpusConfig
from sigma_lite.data import corpora, stages, tokenizer
from sigma_lite.data.kinds import KINDS, SPECIAL
from sigma_lite.data.shards import prepare
from sigma_lite.data.stream import TokenStream, token_dtype, write_array

from .conftest import corpus_of, prepare_quietly, write_texts


def unpack(stream: TokenStream, bpe) -> list[str]:
    ids, _ = stream.read(0, len(stream))
    assert ids[0] == tokenizer.END_OF_TEXT_ID
    return [bpe.decode(part[1:].tolist()) for part in np.split(ids, (ids == 0).nonzero()[0][1:])]


# -------------------------------------------------------------------------------------------------------------- laws


def test_unpacking_gives_back_every_document_once(texts_and_data):
    texts, data = texts_and_data
    assert len(data.manifest["shards"]) > 2
    listed = list(data.documents())
    for split, stream in (("train", data.train), ("heldout", data.heldout)):
        own = [row for row in listed if row["split"] == split]
        assert unpack(stream, data.tokenizer) == [texts[row["name"]] for row in own]
        assert sum(row["tokens"] for row in own) == len(stream) == data.manifest[f"{split}_tokens"]
        assert sum(row["bytes"] for row in own) == data.manifest[f"{split}_bytes"]
    assert sorted(row["name"] for row in listed) == sorted(texts)
    assert all(row["sha256"] == hashlib.sha256(texts[row["name"]].encode()).hexdigest() for row in listed)


def test_the_split_is_that_of_the_documents(texts_and_data):
    texts, data = texts_and_data
    for row in data.documents():
        document = corpora.Document(row["name"], texts[row["name"]], row["name"])
        assert (row["split"] == "heldout") == corpora.is_heldout(document, 0.2)


def test_every_token_has_a_kind_and_special_tokens_that_of_special(data):
    for stream in (data.train, data.heldout):
        ids, kinds = stream.read(0, len(stream))
        assert len(kinds) == len(ids) and kinds.max() < len(KINDS)
        assert ((ids == 0) == (kinds == SPECIAL)).all()


def test_reading_across_shards_is_slicing_the_whole(data):
    ids, kinds = data.train.read(0, len(data.train))
    ends = data.train.ends
    for start in (0, 5, ends[0] - 1, ends[0], ends[1] - 7):
        for length in (0, 1, 8, ends[1], len(ids)):
            part_ids, part_kinds = data.train.read(start, start + length)
            assert (part_ids == ids[start : start + length]).all() and len(part_ids) == len(ids[start : start + length])
            assert (part_kinds == kinds[start : start + length]).all()


def test_a_stream_sent_to_a_worker_process_carries_no_tokens(data):
    data.train.read(0, 10)
    sent = pickle.dumps(data.train)
    assert len(sent) < len(data.train)
    assert (pickle.loads(sent).read(0, 50)[0] == data.train.read(0, 50)[0]).all()


@pytest.mark.parametrize("vocab_size", [300, 65_536, 65_537, 200_000])
def test_the_last_token_of_any_vocabulary_fits(vocab_size, tmp_path):
    ids = np.array([0, vocab_size - 1], token_dtype(vocab_size))
    assert ids.itemsize == (2 if vocab_size <= 65_536 else 4)
    write_array(tmp_path / "ids", [ids])
    write_array(tmp_path / "kinds", [np.zeros(2, np.uint8)])
    stream = TokenStream([tmp_path / "ids"], [tmp_path / "kinds"], [2], token_dtype(vocab_size))
    assert stream.read(0, 2)[0].tolist() == [0, vocab_size - 1]


def test_baselines_are_those_of_the_held_out_text(texts_and_data):
    texts, data = texts_and_data
    text = b"".join(texts[row["name"]].encode() for row in data.documents() if row["split"] == "heldout")
    baselines = data.manifest["baselines"]
    packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert baselines["xz_bits_per_byte"] == 8 * len(packed) / len(text)
    assert baselines["xz_bytes"] == len(text) == data.manifest["heldout_bytes"]
    train = b"".join(texts[row["name"]].encode() for row in data.documents() if row["split"] == "train")
    more = len(lzma.compress(train + text, preset=9 | lzma.PRESET_EXTREME))
    more -= len(lzma.compress(train, preset=9 | lzma.PRESET_EXTREME))
    assert baselines["xz_given_training_bits_per_byte"] == 8 * more / len(text) and baselines["xz_train_bytes"] == len(train)
    assert 0 <= baselines["heldout_long_lines_in_training"] <= baselines["heldout_lines_in_training"] < 1
    counts = Counter(data.train.read(0, len(data.train))[0].tolist())
    total = sum(counts.values()) + data.vocab_size
    scored = data.heldout.read(1, len(data.heldout))[0].tolist()
    bits = sum(-math.log2((counts[i] + 1) / total) for i in scored)
    assert baselines["unigram_bits_per_byte"] == pytest.approx(bits / len(text), rel=1e-12)


@pytest.mark.skipif(shutil.which("xz") is None, reason="needs the program xz")
def test_the_xz_baseline_is_what_the_program_gives(texts_and_data, tmp_path):
    texts, data = texts_and_data
    path = tmp_path / "heldout.txt"
    path.write_bytes(b"".join(texts[row["name"]].encode() for row in data.documents() if row["split"] == "heldout"))
    subprocess.run(["xz", "-9e", "-k", "-T1", path], check=True, env={"PATH": os.environ["PATH"]})  # no XZ_OPT
    bits = 8 * (tmp_path / "heldout.txt.xz").stat().st_size
    assert data.manifest["baselines"]["xz_bits_per_byte"] == bits / path.stat().st_size


# -------------------------------------------------------------------------------------------------- small, odd corpora


def test_a_single_document_cannot_be_split(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "all.txt").write_text("the whole of it " * 100)
    with pytest.raises(ConfigError, match="a single document, .* cut it into several files"):
        prepare_quietly(corpus_of(tmp_path))


def test_a_share_that_leaves_one_side_empty_names_one_that_does_not(tmp_path):
    (tmp_path / "text").mkdir()
    for name in "abc":
        (tmp_path / "text" / name).write_text(f"text of {name}: " + " ".join(f"word{i}{name}" for i in range(400)))
    for share, side in (
        (0.001, "validation: set heldout to ([0-9.]+) or more"),
        (0.999, "training: set heldout to ([0-9.]+) or less"),
    ):
        with pytest.raises(ConfigError, match=f"heldout={share} of 3 documents keeps none for {side}") as error:
            prepare_quietly(corpus_of(tmp_path, heldout=share, dir=str(tmp_path / str(share))))
        named = float(str(error.value).split("set heldout to ")[1].split()[0])
        data = prepare_quietly(corpus_of(tmp_path, heldout=named, dir=str(tmp_path / str(named))))
        assert data.manifest["train_documents"] > 0 and data.manifest["heldout_documents"] > 0


def test_a_vocabulary_that_the_corpus_cannot_fill_leaves_no_tokenizer(fresh):
    with pytest.raises(ConfigError, match="vocab_size=60000: the training documents give only"):
        prepare_quietly(corpus_of(fresh, vocab_size=60_000))
    assert not (fresh / "data" / "tokenizer.json").exists()


def test_the_first_documents_of_the_library_make_a_quick_corpus(tmp_path):
    data = prepare(CorpusConfig(dir=str(tmp_path / "data"), vocab_size=512, max_documents=24), progress=False)
    assert data.manifest["train_documents"] + data.manifest["heldout_documents"] == 24
    assert data.facts()["interpreter"].startswith(corpora.interpreter().split()[0])


def test_rows_of_a_table_are_a_corpus(tmp_path):
    write_texts(tmp_path / "other")
    lines = (json.dumps({"body": f"row {i} tells of the number {i * i}"}) for i in range(200))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "rows.jsonl").write_text("\n".join(lines))
    data = prepare_quietly(corpus_of(tmp_path, text_field="body"))
    assert data.manifest["train_documents"] + data.manifest["heldout_documents"] == 200
    assert "row 7 tells of the number 49" in unpack(data.train, data.tokenizer) + unpack(data.heldout, data.tokenizer)


# ------------------------------------------------------------------------------------------------- nothing in silence


def test_a_document_without_breaks_is_named(fresh):
    for name in ("mouse", "yeast", "rice"):  # not all are held out
        (fresh / "text" / f"{name}.txt").write_text(f"{name} " + "ACGT" * 600)
    with pytest.warns(UserWarning, match=r"(mouse|rice|yeast)\.txt: over 1000 characters without a break.* leave it out"):
        prepare_quietly(corpus_of(fresh))


def test_what_was_left_out_is_said_and_kept(fresh):
    text = fresh / "text"
    for name, content in {"latin.txt": b"caf\xe9", "a.bin": b"PK\0", "b.bin": b"\0", "copy.txt": b"x", ".git": b"y"}.items():
        (text / name).write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"left out of the corpus: 2 binary \(a\.bin, \.\.\.\), 1 not UTF-8 \(latin\.txt\)$"
    ):
        data = prepare_quietly(corpus_of(fresh))
    assert "1 duplicate (one.txt)" in data.left_out() and "1 hidden (.git)" in data.left_out()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_quietly(corpus_of(fresh))  # said once


def test_a_tokenizer_of_a_part_of_the_text_says_so(fresh, monkeypatch):
    monkeypatch.setattr(stages, "SAMPLE_CHARACTERS", 8000)
    with pytest.warns(UserWarning, match=r"learned from 12 of 16 training documents, drawn evenly: 8,\d+ characters"):
        prepare_quietly(corpus_of(fresh))
