import random
import re
import time
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from sigma_lite.config import ConfigError, CorpusConfig
from sigma_lite.data import tokenizer
from sigma_lite.data.corpora import documents
from sigma_lite.storage import StorageError

TEXTS = [
    f"the {word} of the {other} is {len(word)}\n"
    for word in ("table", "chair", "house", "window", "garden")
    for other in ("cat", "dog")
]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train(TEXTS, 290)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_every_text_survives_the_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(bpe, text):
    ids = bpe.encode(text).ids
    words = tokenizer.token_strings(bpe)
    assert b"".join(words[i] for i in ids) == text.encode()
    assert tokenizer.token_bytes(bpe)[ids].sum() == len(text.encode())


def test_special_tokens_come_first_and_stand_for_no_bytes(bpe):
    assert [bpe.id_to_token(i) for i in range(4)] == list(tokenizer.SPECIAL)
    assert bpe.token_to_id("<|endoftext|>") == tokenizer.END_OF_TEXT_ID == 0
    assert (tokenizer.token_bytes(bpe) == 0).nonzero()[0].tolist() == [0, 1, 2, 3]


def test_a_document_that_spells_out_a_special_token_does_not_contain_it(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.to_str())
    for candidate in (bpe, tokenizer.load(path)):
        assert min(candidate.encode("a<|endoftext|>b<|end|>").ids) >= len(tokenizer.SPECIAL)


def test_training_does_not_depend_on_the_order_of_the_documents(bpe):
    assert tokenizer.train(TEXTS[::-1], 290).to_str() == bpe.to_str()


def test_all_bytes_have_a_token_even_if_no_document_held_them(bpe):
    single = [word for word in tokenizer.token_strings(bpe) if len(word) == 1]
    assert sorted(single) == [bytes([b]) for b in range(256)]


def test_too_large_a_vocabulary_says_how_many_tokens_there_are():
    with pytest.raises(
        ConfigError, match=r"vocab_size=5000: .* only (\d+) different tokens.* set vocab_size to \1 or less"
    ) as e:
        tokenizer.train(TEXTS, 5000)
    most = int(str(e.value).split("only ")[1].split()[0])
    assert tokenizer.train(TEXTS, most).get_vocab_size() == most


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="vocab_size=259: bytes and special tokens alone are 260"):
        tokenizer.train(TEXTS, 259)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(StorageError, match=r"tokenizer\.json is not a tokenizer .* delete it and run `sigma-lite prepare`"):
        tokenizer.load(tmp_path / "tokenizer.json")


def test_byte_characters_are_those_of_the_library():
    assert sorted(tokenizer._byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    text = np.arange(0x20, 0x300, dtype=np.uint32).tobytes().decode("utf-32-le")
    [(pieces, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert pieces == "".join(tokenizer._byte_characters()[b] for b in text.encode())


# ------------------------------------------------------------------------------------------------------- unbroken text


def uncut(monkeypatch):
    """`train` as it would be without the cut."""
    monkeypatch.setattr(tokenizer, "PIECE", 10**9)


def test_the_cut_changes_nothing_for_ordinary_text(monkeypatch):
    texts = [d.text for d in islice(documents(CorpusConfig()), 0, None, 12)]
    cut = tokenizer.train(texts, 2048).to_str()
    uncut(monkeypatch)
    assert tokenizer.train(texts, 2048).to_str() == cut


def test_no_word_of_the_library_is_ever_cut():
    """Recorded runs depend on its tokens."""
    words, long = pre_tokenizers.ByteLevel(add_prefix_space=False), re.compile(r"\S{60,}|\s{60,}")  # what could be one
    stretches = [s for d in documents(CorpusConfig()) for s in long.findall(d.text)]
    longest = max(len(word) for s in stretches for word, _ in words.pre_tokenize_str(s))
    assert 60 < longest < tokenizer.PIECE


UNBROKEN = {
    "dna": lambda n: "".join(random.choices("ACGT", k=n)),
    "chinese": lambda n: "".join(chr(0x4E00 + random.randrange(2500)) for _ in range(n)),
    "digits": lambda n: "".join(random.choices("0123456789", k=n)),
    "marks": lambda n: "".join(random.choices("=-+*", k=n)),
    "spaces": lambda n: "".join(random.choices(" \t\n", k=n)),
}


@pytest.mark.parametrize("kind", UNBROKEN)
def test_time_grows_with_the_length_of_unbroken_text_not_with_its_square(kind):
    make = UNBROKEN[kind]

    def seconds(n: int) -> float:
        text = make(n)
        begun = time.process_time()
        tokenizer.train([text], 700)
        return time.process_time() - begun

    assert seconds(120_000) < 8 * seconds(30_000) + 0.5  # four times as much; uncut it is sixteen times and more
    assert tokenizer.has_long_run("a b " * 1000 + make(2000)) and not tokenizer.has_long_run(make(990))


def test_ordinary_text_has_no_long_run():
    assert not any(tokenizer.has_long_run(d.text) for d in documents(CorpusConfig()))


# --------------------------------------------------------------------------------------------------------- end of text


def with_special(*names: str):
    """A byte-level tokenizer of somebody else: its special tokens come last."""
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(list(names))
    return made


def test_the_end_of_text_is_found_by_name(bpe):
    assert tokenizer.end_of_text(bpe) == 0
    assert tokenizer.end_of_text(with_special("<pad>", "<|endoftext|>")) == 257
    assert tokenizer.end_of_text(with_special("</s>", "<|end_of_text|>")) == 257  # ENDS are in order of preference
    assert tokenizer.end_of_text(with_special("<|im_end|>", "</s>"), "<|im_end|>") == 256


def test_an_end_of_text_that_is_not_there_is_answered_with_the_nearest():
    own = with_special("<|im_start|>", "<|im_end|>")
    with pytest.raises(
        ConfigError, match=r"'<\|im_ende\|>' is no special token of this tokenizer; did you mean '<\|im_end\|>'"
    ):
        tokenizer.end_of_text(own, "<|im_ende|>")
    with pytest.raises(ConfigError, match=r"none of .*set data.corpus.end_of_text to one of <\|im_start\|>, <\|im_end\|>"):
        tokenizer.end_of_text(own)
    with pytest.raises(ConfigError, match="no special token that could end a document"):
        tokenizer.end_of_text(with_special())


def test_a_token_that_text_can_hold_ends_no_document():
    with pytest.raises(ConfigError, match="'a' is no special token"):
        tokenizer.end_of_text(with_special("</s>"), "a")
