"""What a model must beat on the held-out bytes, in bits per byte: a compressor without and with the training text, and
token frequencies alone. And how much of the held-out text stands in the training text, line for line."""

from __future__ import annotations

import lzma
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from sigma_lite.data.families import TELLING
from sigma_lite.data.stream import TokenStream

XZ_BYTES = 96 * 2**20  # of text at most: all of it must fit into the window in which xz finds repetitions
PRESET_WINDOW = 64 * 2**20  # bytes, of preset 9; xz needs 11 times its window of memory
_BLOCK = 1 << 18  # tokens looked at together


def xz_bits_per_byte(heldout: bytes) -> float:
    """Bits per byte of `xz -9e` over the held-out text alone: what a program needs that has never seen such text.

    Text gives 1 to 3 bits; 8 would be no compression.
    """
    return 8 * _xz(heldout) / len(heldout)


def xz_given_training(train: bytes, heldout: bytes) -> float:
    """Bits per byte of held-out text for xz that has read the training text first, as a trained model has.

    8 (|xz(training + held-out)| - |xz(training)|) / |held-out|. This is the one to compare a model with. The window is as
    large as the text, so that nothing of the training text is forgotten: at most XZ_BYTES.
    """
    return 8 * (_xz(train + heldout) - _xz(train)) / len(heldout)


def seen_lines(train: bytes, heldout: bytes) -> tuple[float, float]:
    """Shares of the held-out bytes that are lines found in the training text: all, and lines of 20 characters or more.

    Short ones such as `return self` are the language; long ones were copied. Range: 0..1, the second at most the first.
    """
    known, found, copied = set(train.split(b"\n")), 0, 0
    for line in heldout.split(b"\n"):
        if line in known:
            found += len(line) + 1
            copied += (len(line) + 1) * (len(line.strip()) >= TELLING)
    return found / (len(heldout) + 1), copied / (len(heldout) + 1)


def _xz(text: bytes) -> int:
    window = max(PRESET_WINDOW, len(text))
    best = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}
    return len(lzma.compress(text, filters=[best]))


def first_bytes(stream: TokenStream, words: list[bytes], most: int = XZ_BYTES) -> bytes:
    """The first `most` bytes of a stream's text; `words` are the bytes of each token."""
    text = b""
    for ids in _blocks(stream, "held-out text", progress=False):
        text += b"".join(map(words.__getitem__, ids.tolist()))
        if len(text) >= most:
            break
    return text[:most]


def last_bytes(stream: TokenStream, words: list[bytes], most: int) -> bytes:
    """The last `most` bytes of a stream's text; of a long stream only its end is read."""
    pieces, size, end = [], 0, len(stream)
    while end > 0 and size < most:
        start = max(0, end - _BLOCK)
        pieces.append(b"".join(map(words.__getitem__, stream.read(start, end)[0].tolist())))
        size, end = size + len(pieces[-1]), start
    return b"".join(reversed(pieces))[max(0, size - most) :]


def unigram_bits_per_byte(train: TokenStream, heldout: TokenStream, token_bytes_V: np.ndarray) -> float:
    """Bits per byte when each held-out token costs -log2 of its frequency in training (counts + 1, so that none is 0).

    As for a model, every token but the first is scored, the ends of documents included.
    """
    train_V, heldout_V = (_counts(stream, len(token_bytes_V)) for stream in (train, heldout))
    n_bytes = heldout_V @ token_bytes_V
    heldout_V[heldout.read(0, 1)[0]] -= 1  # the first token of all, which nothing precedes
    bits_V = np.log2(train_V.sum() + len(train_V)) - np.log2(train_V + 1)
    return float(heldout_V @ bits_V / n_bytes)


def _counts(stream: TokenStream, n_vocab: int) -> np.ndarray:
    counts_V = np.zeros(n_vocab, np.int64)
    for ids in _blocks(stream, "counting tokens", progress=False):
        counts_V += np.bincount(ids, minlength=n_vocab)
    return counts_V


def _blocks(stream: TokenStream, desc: str, progress: bool) -> Iterator[np.ndarray]:
    for start in tqdm(range(0, len(stream), _BLOCK), desc=desc, disable=not progress, delay=1, leave=False):
        yield stream.read(start, start + _BLOCK)[0]
