"""Rows of whole conversations: as many as fit, in their order, and only what the assistant says is a target."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from sigma_lite.config import require
from sigma_lite.data.chat import Marks
from sigma_lite.data.rows import Batch, Rows
from sigma_lite.data.stream import TokenStream

READ = 10_000_000  # tokens looked through at a time


class PackedRows(Rows):
    """Rows of a stream of conversations. A row has S inputs and S targets, so S + 1 tokens of conversations fit.

    What is left of a row is filled with ends of text, which are documents of their own, and of which a batch's `own_BS` is
    False: neither a loss nor an expert's load counts them. A conversation that is longer than
    a row is left out: cut, it would teach an answer without an end. The row behind the last is empty.

    Args:
        several: False: one conversation a row.

    Raises: ConfigError where all are too long.
    """

    def __init__(self, stream: TokenStream, token_bytes_V: np.ndarray, length: int, frame: Marks, several: bool = True):
        super().__init__(stream, token_bytes_V, length)
        self.frame = frame
        starts_N = np.append(beginnings(stream), len(stream))
        self.spans_R2, longest = packed(starts_N, length + 1, several), int(np.diff(starts_N).max(initial=0))
        self.n_rows = len(self.spans_R2)
        lost = int((np.diff(starts_N) > length + 1).sum())
        here = f"rows.length={length}: {lost} of {len(starts_N) - 1} conversations do not fit into a row"
        fix = f"{longest - 1} holds the longest"
        require(self.n_rows > 0 or len(starts_N) == 1, f"{here}; {fix}")
        if lost:
            warnings.warn(f"{here} and are left out; {fix}", stacklevel=2)

    def span(self, row: int) -> tuple[int, int]:
        first, end = self.spans_R2[row].tolist() if row < self.n_rows else (0, 0)
        return first, end

    window = span

    def __getitems__(self, rows: list[int]) -> Batch:
        spans = [self.span(row) for row in rows]
        ids, kinds = self.tokens(spans)
        own = np.arange(self.length) < np.array([end - first for first, end in spans])[:, None]
        return self.batch(ids, kinds, self.frame.answers(ids)[:, 1:], rows)._replace(own_BS=torch.from_numpy(own))

    def domains(self, rows_N: np.ndarray) -> np.ndarray:
        return np.full(len(rows_N), -1, np.int64)


def beginnings(stream: TokenStream) -> np.ndarray:
    """Where documents begin, int64 [N]."""
    found = [np.empty(0, np.int64)]
    for first in range(0, len(stream), READ):
        found.append(first + np.flatnonzero(stream.read(first, first + READ)[0] == stream.end_of_text))
    return np.concatenate(found)


def packed(starts_N: np.ndarray, room: int, several: bool = True) -> np.ndarray:
    """(first token, token behind the last) of each row, int64 [R, 2]: neighbouring documents, as many as have room.

    Args:
        starts_N: where documents begin, and where the last one ends.
        room: tokens; a document that has more is left out.
        several: False: one document a row.
    """
    rows: list[list[int]] = []
    for first, end in zip(starts_N[:-1].tolist(), starts_N[1:].tolist(), strict=True):
        if end - first > room:
            continue
        if several and rows and rows[-1][1] == first and end - rows[-1][0] <= room:
            rows[-1][1] = end
        else:
            rows.append([first, end])
    return np.array(rows, np.int64).reshape(-1, 2)
