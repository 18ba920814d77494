"""What a model must beat on the held-out bytes, in bits per byte: a compressor, and token frequencies alone."""

from __future__ import annotations

import lzma
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from sigma_lite.data.stream import TokenStream
from sigma_lite.data.tokenizer import END_OF_TEXT_ID

XZ_BYTES = 64 * 2**20  # of held-out text at most: the window in which xz finds repetitions at preset 9
_BLOCK = 1 << 18  # tokens looked at together


def xz_bits_per_byte(heldout: TokenStream, words: list[bytes], progress: bool = False) -> tuple[float, int]:
    """(bits per byte, bytes) of `xz -9e` over the held-out documents one after the other, the first XZ_BYTES of them.

    `words` are the bytes of each token. Text gives 1 to 3 bits; 8 would be no compression.
    """
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    given = packed = 0
    for ids in _blocks(heldout, "xz -9e of the held-out text", progress):
        text = b"".join(map(words.__getitem__, ids.tolist()))[: XZ_BYTES - given]
        given += len(text)
        packed += len(compressor.compress(text))
    packed += len(compressor.flush())
    return 8 * packed / given, given


def unigram_bits_per_byte(train: TokenStream, heldout: TokenStream, token_bytes_V: np.ndarray) -> float:
    """Bits per byte when each held-out token costs -log2 of its frequency in training (counts + 1, so that none is 0).

    As for a model, every token but the first is scored, the ends of documents included.
    """
    train_V, heldout_V = (_counts(stream, len(token_bytes_V)) for stream in (train, heldout))
    n_bytes = heldout_V @ token_bytes_V
    heldout_V[END_OF_TEXT_ID] -= 1  # the first token of all, which nothing precedes
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
