"""Somebody else's tokenizer: found by name, kept as it is, and every place that asks where a document ends."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sigma_lite import cli
from sigma_lite.config import ConfigError, CorpusConfig
from sigma_lite.data import tokenizer
from sigma_lite.data.kinds import SPECIAL
from sigma_lite.data.rows import Rows
from sigma_lite.data.shards import load, prepare
from sigma_lite.data.stages import sample, training_documents

from .conftest import corpus_of, prepare_quietly, write_texts

LAST = ("<|im_start|>", "</s>", "<unused>")


def stranger(folder: Path, special=LAST, normalizer=None, **changes) -> Path:
    """A tokenizer.json in the manner of others: special tokens last, a gap before them, and orders to frame and to cut."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = changes.get("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.decoder, alphabet = decoders.ByteLevel(), sorted(pre_tokenizers.ByteLevel.alphabet())
    if normalizer:
        made.normalizer = normalizer
    texts = ["def rule(x): return x + 1\n"] * 9
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False))
    content = json.loads(made.to_str())
    content["model"]["vocab"] |= {name: 290 + i for i, name in enumerate(special)}
    content["added_tokens"] = [
        {"id": 290 + i, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, name in enumerate(special)
    ]
    made = Tokenizer.from_str(json.dumps(content))
    if special:
        made.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 290)])
    made.enable_truncation(7)
    made.enable_padding(length=9)
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(made.to_str())
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stranger")
    write_texts(folder / "text")
    stranger(folder / "theirs")
    return folder


@pytest.fixture(scope="module")
def data(place):
    return prepare_quietly(corpus_of(place, tokenizer=str(place / "theirs"), vocab_size=320))


def test_the_file_is_kept_byte_for_byte(place, data):
    assert (data.dir / "tokenizer.json").read_bytes() == (place / "theirs" / "tokenizer.json").read_bytes()


def test_every_document_begins_with_its_own_end_of_text_and_nothing_else_is_added(place, data):
    texts = {path.relative_to(place / "text").as_posix(): path.read_bytes() for path in (place / "text").rglob("*.*")}
    words, found = tokenizer.token_strings(data.tokenizer), {}
    for split in ("train", "heldout"):
        stream, start = getattr(data, split), 0
        for row in (r for r in data.documents() if r["split"] == split):
            ids, kinds = stream.read(start, start + row["tokens"])
            assert ids[0] == 291 and 291 not in ids[1:]  # </s>, although `spelled.txt` spells out the end of another
            assert kinds[0] == SPECIAL and SPECIAL not in kinds[1:]
            found[row["name"]] = b"".join(words[i] for i in ids)
            start += row["tokens"]
        assert start == len(stream)
    assert found == texts


def test_rows_know_their_documents_and_fill_up_with_the_end(data):
    assert data.manifest["end_of_text"] == data.heldout.end_of_text == 291
    rows = Rows(data.heldout, data.token_bytes, 50, padded=True)
    batch = rows.__getitems__(list(range(len(rows))))
    flat = batch.ids_BS.flatten().numpy()
    assert (np.diff(batch.documents_BS.numpy(), axis=1) == (batch.ids_BS[:, 1:].numpy() == 291)).all()
    assert (flat[len(data.heldout) :] == 291).all()
    assert int(batch.bytes_BS.sum()) == data.manifest["heldout_bytes"]


def test_the_vocabulary_may_be_larger_than_the_tokenizer(data):
    assert tokenizer.n_ids(data.tokenizer) == 293 < data.vocab_size == len(data.token_bytes) == 320
    assert not data.token_bytes[[280, 290, 291, 292, 293, 319]].any()  # gaps, special tokens, and what only the model has
    assert tokenizer.of_run([data.dir], 320, data.manifest["tokenizer"]["sha256"]).get_vocab_size() < 293
    spread = data.copies(0.02)
    assert not {290, 291, 292} & set(spread.spare_N.tolist()) and spread.n_V.max() > 1


def test_named_from_yaml_and_from_the_command_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    corpus = {
        "source": "files",
        "path": str(place / "text"),
        "dir": "data",
        "heldout": 0.2,
        "tokenizer": str(place / "theirs"),
    }
    run = {"model": {"net": {"vocab_size": 320}}, "data": {"corpus": corpus}}
    Path("run.yaml").write_text(yaml.safe_dump(run))
    cli.main(["prepare", "-c", "run.yaml", "--data.corpus.end_of_text=<unused>"])
    assert load("data").train.end_of_text == 292 and "training" in capsys.readouterr().out


def test_a_name_on_the_hub_is_read_from_the_cache_of_the_hub(place, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    folder = tmp_path / "models--someone--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    stranger(folder / "snapshots", ("<eos>",)).parent.rename(folder / ("a" * 40))
    (folder / "snapshots").mkdir()
    (folder / ("a" * 40)).rename(folder / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    corpus = corpus_of(place, dir=str(tmp_path / "data"), tokenizer="someone/small", vocab_size=300)
    assert prepare_quietly(corpus).train.end_of_text == 290
    with pytest.raises(ConfigError, match="'someone/smal' is no file or folder here .* and the hub did not give it: "):
        prepare_quietly(corpus_of(place, dir=str(tmp_path / "other"), tokenizer="someone/smal", vocab_size=300))


def test_letters_that_the_tokenizer_joins_are_counted_as_it_writes_them(tmp_path):
    write_texts(tmp_path / "text")
    for number in range(6):
        (tmp_path / "text" / f"accents{number}.txt").write_text(unicodedata.normalize("NFD", f"déjà vu {number} é" * 9))
    path = stranger(tmp_path / "theirs", normalizer=normalizers.NFC())
    data = prepare_quietly(corpus_of(tmp_path, tokenizer=str(path), vocab_size=300))
    for row in (r for r in data.documents() if r["name"].startswith("accents")):
        text = (tmp_path / "text" / row["name"]).read_text()
        assert row["bytes"] == len(unicodedata.normalize("NFC", text).encode()) < len(text.encode())


# --------------------------------------------------------------------------------------------------------- refusals

LOSSY = {
    "lower case": {"normalizer": normalizers.Lowercase()},
    "a space before the text": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "SentencePiece": {"pre_tokenizer": pre_tokenizers.Metaspace()},
    "words only": {"pre_tokenizer": pre_tokenizers.Whitespace()},
}


@pytest.mark.parametrize("what", LOSSY)
def test_a_tokenizer_that_loses_text_is_refused(fresh, what):
    path = stranger(fresh / "theirs", **LOSSY[what])
    with pytest.raises(ConfigError, match="does not keep every byte of a text .* choose a byte-level one"):
        prepare_quietly(corpus_of(fresh, tokenizer=str(path), vocab_size=300))


def test_a_vocabulary_too_small_for_its_ids_is_refused_and_the_folder_stays_free(fresh):
    path = stranger(fresh / "theirs")
    with pytest.raises(ConfigError, match="has ids up to 292: set model.net.vocab_size=293"):
        prepare_quietly(corpus_of(fresh, tokenizer=str(path), vocab_size=292))
    assert prepare_quietly(corpus_of(fresh, tokenizer=str(path), vocab_size=293)).vocab_size == 293


def test_what_is_not_there_is_answered_with_the_nearest(fresh, monkeypatch):
    stranger(fresh / "tokenizer_of_theirs")
    with pytest.raises(ConfigError, match=r"no file or folder here \(did you mean '.*tokenizer_of_theirs'\?\)"):
        prepare_quietly(corpus_of(fresh, tokenizer=str(fresh / "tokeniser_of_theirs")))
    with pytest.raises(ConfigError, match="is a folder without tokenizer.json: save it there"):
        prepare_quietly(corpus_of(fresh, tokenizer=str(fresh / "text")))
    with pytest.raises(ConfigError, match="did you mean '</s>'"):
        prepare_quietly(corpus_of(fresh, tokenizer=str(fresh / "tokenizer_of_theirs"), end_of_text="<s>", vocab_size=300))
    (fresh / "none.json").write_text("{}")
    with pytest.raises(ConfigError, match="none.json holds no tokenizer"):
        prepare_quietly(corpus_of(fresh, tokenizer=str(fresh / "none.json")))


@pytest.mark.parametrize("option", [{"special_tokens": ("<think>",)}, {"single_digits": True}])
def test_options_of_training_do_not_go_with_a_finished_tokenizer(option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))}: tokenizer='x' is finished and stays as it is"):
        CorpusConfig(tokenizer="x", **option)


def test_a_stranger_cannot_hide_that_nothing_is_held_out(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("only one")
    path = stranger(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="leaves no document for"):
        prepare(corpus_of(tmp_path, tokenizer=str(path), vocab_size=300), progress=False)


# --------------------------------------------------------------------------------------------- options of training


def test_reserved_names_and_single_digits(fresh):
    names = ("<think>", "</think>")
    made = prepare_quietly(corpus_of(fresh, special_tokens=names, single_digits=True)).tokenizer
    assert [made.id_to_token(i) for i in range(6)] == [*tokenizer.SPECIAL, *names] and made.get_vocab_size() == 300
    assert not set(made.encode("a <think> b </think>").ids) & set(range(6))  # a text that spells them out has none
    digits = [word for word in tokenizer.token_strings(made) if any(48 <= b < 58 for b in word)]
    assert sorted(digits) == [b"%d" % d for d in range(10)]
    assert made.decode(made.encode("12 34.5 x9\n").ids) == "12 34.5 x9\n"


def test_reserved_names_are_checked():
    with pytest.raises(ConfigError, match="give different names, none empty"):
        CorpusConfig(special_tokens=("<a>", "<a>"))
    with pytest.raises(ConfigError, match="vocab_size=260: .* and 5 special tokens"):
        CorpusConfig(special_tokens=("<a>",), vocab_size=260)
    with pytest.raises(ConfigError, match=r"<\|user\|> is reserved in every tokenizer"):
        tokenizer.train(["text"], 300, special=["<|user|>"])


def test_the_sample_for_bpe_is_fair_and_does_not_depend_on_the_order(tmp_path, monkeypatch):
    """A corpus whose halves differ: the first 200 M characters would be the first half alone."""
    lines = [json.dumps({"text": f"{n} " + ("early " if n < 2000 else "later ") * 20}) for n in range(4000)]
    sizes = {}
    for name, order in {"as it is": lines, "backwards": lines[::-1]}.items():
        (tmp_path / "text.jsonl").write_text("\n".join(order))
        corpus = CorpusConfig(source="files", path=str(tmp_path / "text.jsonl"), heldout=0.1)
        monkeypatch.setattr("sigma_lite.data.stages.SAMPLE_CHARACTERS", 60_000)
        with pytest.warns(UserWarning, match="drawn evenly: 60,"):
            sizes[name] = sorted(sample(training_documents(corpus, False)))
    assert sizes["as it is"] == sizes["backwards"]
    early = sum("early" in text for text in sizes["as it is"])
    assert abs(early / len(sizes["as it is"]) - 0.5) < 0.075  # 490 draws: three standard deviations
    assert 60_000 <= sum(map(len, sizes["as it is"])) < 60_000 + 130
