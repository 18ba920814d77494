"""Byte-level BPE (Sennrich et al., 1508.07909, on bytes as in GPT-2): every text has tokens, and they give it back."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sigma_lite.config import ConfigError, require
from sigma_lite.storage import StorageError

END_OF_TEXT = "<|endoftext|>"  # begins every document, so it also separates them
SPECIAL = (END_OF_TEXT, "<|user|>", "<|assistant|>", "<|end|>")  # ids 0, 1, 2, 3; the last three wait for chat
END_OF_TEXT_ID = 0


def train(texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
    """Learn a vocabulary of exactly `vocab_size` tokens, SPECIAL first. The order of the texts does not matter.

    Raises ConfigError when the texts hold fewer different tokens than asked for.
    """
    smallest = len(SPECIAL) + 256
    require(vocab_size >= smallest, f"vocab_size={vocab_size}: bytes and special tokens alone are {smallest}; try 512")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes, seen or not
            show_progress=progress and sys.stderr.isatty(),
        ),
    )
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: the training documents give only {found} different tokens;"
            f" set vocab_size to {found} or less, or add text"
        )
    return _plain(tokenizer)


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, or raise a StorageError that says what is wrong with it."""
    try:
        return _plain(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exceptions
        raise StorageError(f"{path} is not a tokenizer ({error}): delete it and run `sigma-lite prepare`") from error


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True  # a document that spells out <|endoftext|> must not end there
    return tokenizer


def token_strings(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token stands for, by id; b"" for special tokens."""
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    words = (tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size()))
    return [b"" if word in SPECIAL else bytes(byte_of[c] for c in word) for word in words]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many UTF-8 bytes each token stands for, int32 [V]; 0 for special tokens."""
    return np.array([len(piece) for piece in token_strings(tokenizer)], np.int32)


def _byte_characters() -> list[str]:
    """GPT-2's alphabet: the printable character that byte-level BPE writes for each of the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
