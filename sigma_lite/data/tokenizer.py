"""Byte-level BPE (Sennrich et al., 1508.07909, on bytes as in GPT-2): every text has tokens, and they give it back."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sigma_lite.config import ConfigError, nearest, require
from sigma_lite.storage import StorageError, atomic_write, sha256_of

FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"  # begins every document, so it also separates them
SPECIAL = (END_OF_TEXT, "<|user|>", "<|assistant|>", "<|end|>")  # ids 0, 1, 2, 3; the last three wait for chat
END_OF_TEXT_ID = 0  # of tokenizers trained here; for any other ask `end_of_text`
ENDS = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")  # what others call it
PIECE = (
    240  # bytes; BPE learns from no longer word, or its time would grow with the square of the longest. 2, 3, 4 divide it
)
LONG_RUN = 1000  # characters; ordinary text has a break long before
_MARKS = re.compile(r"[^\w\s]*")


def train(
    texts: Iterable[str],
    vocab_size: int,
    progress: bool = False,
    special: Sequence[str] = (),
    single_digits: bool = False,
) -> Tokenizer:
    """Learn a vocabulary of exactly `vocab_size` tokens, SPECIAL first. The order of the texts does not matter.

    Args:
        special: names of further tokens that no text is cut into; their ids follow those of SPECIAL.
        single_digits: every digit a token of its own, so that a number's digits have places one can count.

    Words (letters, digits, marks or spaces in a row) of more than PIECE bytes are cut, here only: what reads the tokens of
    a text never cuts it. Of text without such words one learns the same as without the cut.

    Raises ConfigError when the texts hold fewer different tokens than asked for.
    """
    twice = [name for name in special if name in SPECIAL]
    require(not twice, f"special_tokens: {', '.join(twice)} is reserved in every tokenizer: leave it out")
    smallest = len(SPECIAL) + len(special) + 256
    require(vocab_size >= smallest, f"vocab_size={vocab_size}: bytes and special tokens alone are {smallest}; try 512")
    tokenizer = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    words = cuts[0] if len(cuts) == 1 else pre_tokenizers.Sequence(cuts)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.FixedLength(PIECE)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL, *special],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes, seen or not
            show_progress=progress and sys.stderr.isatty(),
        ),
    )
    tokenizer.pre_tokenizer = words
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: the training documents give only {found} different tokens;"
            f" set vocab_size to {found} or less, or add text"
        )
    return _plain(tokenizer)


def has_long_run(text: str) -> bool:
    """Whether the text holds one word of LONG_RUN characters, such as base64 or DNA: certainly one of twice as many.

    Looks at every LONG_RUN-th stretch of that length, and only as far as its first break.
    """
    stretches = (text[start : start + LONG_RUN] for start in range(0, len(text) - LONG_RUN + 1, LONG_RUN))
    return any(s.isalpha() or s.isnumeric() or s.isspace() or _MARKS.fullmatch(s) for s in stretches)


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, or raise a StorageError that says what is wrong with it."""
    try:
        return from_bytes(Path(path).read_bytes(), path)  # from_file opens UTF-8 names only
    except (OSError, ConfigError) as error:
        raise StorageError(f"{path} is not a tokenizer ({error}): delete it and run `sigma-lite prepare`") from error


def from_bytes(content: bytes, name: str | Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes. Raises ConfigError calling it by `name` where it describes none."""
    try:
        return _plain(Tokenizer.from_buffer(content))
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(f"{name} holds no tokenizer: {error}") from error


def keep_tokenizer(run: str | Path, data: str | Path) -> None:
    """Copy tokenizer.json from the prepared data into the run's folder: with a checkpoint it is all that a use takes."""
    content, path = (Path(data) / FILE).read_bytes(), Path(run) / FILE
    if not path.is_file() or path.read_bytes() != content:
        with atomic_write(path) as file:
            file.write(content)


def of_run(folders: Sequence[str | Path], vocab_size: int, sha256: str | None = None) -> Tokenizer:
    """The tokenizer.json in the first of the folders that has one.

    Args:
        sha256: of the file that the model was trained with, where that is known.

    Raises StorageError when there is none, or it is not the one of this model.
    """
    path = next((Path(folder) / FILE for folder in folders if (Path(folder) / FILE).is_file()), None)
    if path is None:
        places = " nor in ".join(map(str, folders))
        raise StorageError(f"no {FILE} in {places}: copy it there from where the model was trained, or give --data")
    found, fix = load(path), f"put the {FILE} of the data that it was trained on there, or give that folder as --data"
    size, known = n_ids(found), sha256 == sha256_of(path)
    if size > vocab_size or (size < vocab_size and not known):  # a model may have more rows than its tokenizer has ids
        raise StorageError(f"{path} has {size} tokens, the model {vocab_size}: {fix}")
    if sha256 is not None and not known:
        raise StorageError(f"{path} is not the tokenizer that this model was trained with (its sha256 differs): {fix}")
    return found


def end_of_text(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id of the token that begins every document, and so ends the one before: where a model stops to write.

    Args:
        name: `data.corpus.end_of_text`, in a checkpoint's settings too; None: the first of ENDS that the tokenizer has.

    Raises ConfigError, naming the nearest, for what is no special token: text could hold any other.
    """
    own = special_tokens(tokenizer)
    found = [i for wanted in ([name] if name else ENDS) for i, special in own.items() if special == wanted]
    if found:
        return found[0]
    if not own:
        raise ConfigError("this tokenizer has no special token that could end a document: add one to its tokenizer.json")
    if name:
        raise ConfigError(f"end_of_text={name!r} is no special token of this tokenizer; {nearest(name, own.values())}")
    listed = ", ".join(list(own.values())[:12])
    raise ConfigError(f"this tokenizer has none of {', '.join(ENDS)}: set data.corpus.end_of_text to one of {listed}")


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Id and name of the tokens that no text is ever cut into."""
    return {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Cut text and do nothing else: other people's files may ask to shorten it, to fill it up or to frame it."""
    tokenizer.encode_special_tokens = True  # a document that spells out <|endoftext|> must not end there
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.post_processor is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # which adds no token
    return tokenizer


def n_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id: what a vocabulary must hold at least. A stranger's ids may have gaps."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def token_strings(tokenizer: Tokenizer, size: int | None = None) -> list[bytes]:
    """The bytes that each token stands for, by id; b"" for special tokens, and for ids that no token has.

    Args:
        size: of the list, where the model has more ids than the tokenizer; default: `n_ids`.
    """
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    special, added = special_tokens(tokenizer), tokenizer.get_added_tokens_decoder()

    def content(token: int) -> bytes:
        word = tokenizer.id_to_token(token)
        if word is None or token in special:
            return b""
        if token in added or not set(word) <= byte_of.keys():  # the latter is not byte-level: see existing.py
            return word.encode()
        return bytes(byte_of[c] for c in word)

    return [content(token) for token in range(size or n_ids(tokenizer))]


def token_bytes(tokenizer: Tokenizer, size: int | None = None) -> np.ndarray:
    """How many UTF-8 bytes each token stands for, int32 [V]; 0 for special tokens."""
    return np.array([len(piece) for piece in token_strings(tokenizer, size)], np.int32)


def _byte_characters() -> list[str]:
    """GPT-2's alphabet: the printable character that byte-level BPE writes for each of the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
