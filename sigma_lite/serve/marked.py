"""Text whose every token says what it is: kind, domain, document. What evaluation and the routing explorer look at.

Held-out rows where the prepared data is at hand; else texts that are given, or modules of this Python's library.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sigma_lite.config import require
from sigma_lite.data import library, packages
from sigma_lite.data.kinds import SPECIAL, byte_kinds, token_kinds
from sigma_lite.data.of_run import data_of
from sigma_lite.data.rows import IGNORED
from sigma_lite.data.tokenizer import special_tokens, token_bytes
from sigma_lite.serve.generate import joined
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import StorageError

ROWS = 8  # of a forward pass


class Marked(NamedTuple):
    """B rows of S tokens and their marks: of inputs, which a router sees, and of targets, which a loss sees."""

    ids_BS: Tensor  # int64
    targets_BS: Tensor  # int64, the next token; IGNORED where nothing is scored
    documents_BS: Tensor  # int64
    kinds_BS: Tensor  # int64, of the inputs, places in kinds.KINDS; -1: a row of conversations is filled up here
    domains_BS: Tensor  # int64, of the inputs, places in `domains`; -1: none
    target_kinds_BS: Tensor
    target_domains_BS: Tensor
    bytes_BS: Tensor  # int64, UTF-8 bytes of the targets; 0 where nothing is scored
    domains: tuple[str, ...]
    source: str  # where the text is from, in words


class Routed(NamedTuple):
    """What a model made of T = B * S tokens."""

    nats_T: Tensor  # -log p of each target, 0 where nothing is scored
    experts: list[Tensor]  # of each layer, int64 [T, K], best first; -1: an empty slot
    gates: list[Tensor]  # fp32 [T, K]


class Text(NamedTuple):
    text: str
    name: str = "text"  # Python is known by its ending, as in kinds.py
    domain: str | None = None


def heldout(trained: Trained, folder: str | Path | None = None, tokens: int | None = None) -> Marked:
    """Held-out rows as `validate` reads them: all of them, or evenly spaced ones with about so many tokens.

    Of a run with several sources, a token's domain is its source.

    Args:
        folder: of the prepared data, or of one source; default: the data that the run was trained on.

    Raises: StorageError where it is not there, ConfigError where it was made with another tokenizer.
    """
    data = data_of(trained.settings, folder, splits=("heldout",))
    where, sources = data.prepared.dir, data.prepared.sources
    for source in sources.values():
        same = source.tokenizer.to_str() == trained.tokenizer.to_str()
        wrong = f"{source.dir} was prepared with another tokenizer than this model's"
        require(same, f"{wrong}: give the data that it was trained on")
    was, now = trained.settings.get("packages"), data.prepared.manifest.get("packages")
    if was and now and (other := [*packages.differences(was, now)]):
        said = f"{where} is not the corpus that the model was trained on, some of what is held out here it may have read"
        warnings.warn(f"{said}: {', '.join(other)}", stacklevel=2)
    parts = [*data.parts("heldout").values()]
    rows, ends = data.together(parts), np.cumsum([len(part) for part in parts])
    require(len(rows) > 0, f"{where} has no held-out text: give the data that the model was trained on")
    wanted = len(rows) if tokens is None else min(len(rows), max(1, tokens // trained.length))
    places = np.linspace(0, len(rows) - 1, wanted).round().astype(int).tolist()
    batch, owners = rows.__getitems__(places), np.searchsorted(ends, places, side="right").tolist()
    kinds, domains = (np.full((len(places), trained.length + 1), nothing, np.int64) for nothing in (SPECIAL, -1))
    for row, (place, owner) in enumerate(zip(places, owners, strict=True)):
        own = parts[owner]
        first, end = own.window(place - int(ends[owner]) + len(own))
        found = own.stream.read(first, end)[1]
        kinds[row, : len(found)] = found
        if data.mixture.sources:
            domains[row, : len(found)] = owner
        elif own.stream.domains is not None:
            at = np.arange(first, first + len(found))
            domains[row, : len(found)] = own.stream.domains.of(at, at)
    marks = [torch.from_numpy(part.copy()) for part in (kinds[:, :-1], domains[:, :-1], kinds[:, 1:], domains[:, 1:])]
    if batch.own_BS is not None:
        marks[0] = marks[0].where(batch.own_BS, -1)
    known = parts[0].stream.domains
    names = tuple(sources) if data.mixture.sources else known.names if known is not None else ()
    source = f"{len(places)} of {len(rows)} rows of the held-out text in {where}"
    return Marked(*batch[:3], *marks, batch.bytes_BS.long(), names, source)


def texts(trained: Trained, given: Sequence[Text], source: str) -> Marked:
    """Documents one after the other, each behind an end of text, cut into rows; the last one is filled up."""
    S, sizes = trained.length, token_bytes(trained.tokenizer, trained.model.config.vocab_size)
    special = list(special_tokens(trained.tokenizer))
    domains = tuple(dict.fromkeys(text.domain for text in given if text.domain is not None))
    ids, kinds, owners = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for text in given:
        own = np.array([trained.end_of_text, *trained.ids(text.text)], np.int64)
        ids.append(own)
        kinds.append(np.concatenate([[SPECIAL], kinds_of(text, own[1:], sizes)]))
        owners.append(np.full(len(own), domains.index(text.domain) if text.domain is not None else -1))
    ids_N, kinds_N, owners_N = np.concatenate(ids), np.concatenate(kinds), np.concatenate(owners)
    require(len(ids_N) > 1, "there is no text: give at least one token")
    B = -(-(len(ids_N) - 1) // S)
    width = min(S, len(ids_N) - 1)

    def rows(values: np.ndarray, fill: int, shift: int) -> Tensor:
        filled = np.concatenate([values, np.full(B * width + 1, fill)])
        return torch.from_numpy(filled[shift : shift + B * width].reshape(B, width).copy())

    ids_BS, targets_BS = rows(ids_N, trained.end_of_text, 0), rows(ids_N, IGNORED, 1)
    bytes_BS = torch.from_numpy(sizes)[targets_BS.clamp(min=0)].long().where(targets_BS != IGNORED, 0)
    marks = [rows(part, fill, shift) for shift in (0, 1) for part, fill in ((kinds_N, SPECIAL), (owners_N, -1))]
    documents_BS = (ids_BS == trained.end_of_text).cumsum(1) if special else torch.zeros_like(ids_BS)
    return Marked(ids_BS, targets_BS, documents_BS, *marks, bytes_BS, domains, source)


def kinds_of(text: Text, ids_T: np.ndarray, sizes_V: np.ndarray) -> np.ndarray:
    """Kind of each token of a text, int64 [T]; where tokens are not the text's bytes, all are "text"."""
    lengths_T, of_bytes = sizes_V[ids_T], byte_kinds(text.name, text.text)
    if lengths_T.sum() != len(of_bytes):
        return byte_kinds("", "a" * len(ids_T)).astype(np.int64)
    return token_kinds(lengths_T, of_bytes).astype(np.int64)


def library_texts(tokens: int, trained: Trained) -> Marked:
    """Modules of this Python's library, evenly spaced among all, with about so many tokens."""
    found, size = [], 0
    paths = library.paths()
    for path in paths[:: max(1, len(paths) // 60)]:
        text = path.read_text("utf-8", "replace")[:8000]
        found.append(Text(text, path.name, "library"))
        size += len(text) // 3
        if size > tokens:
            break
    return texts(trained, found, f"{len(found)} modules of this Python's library")


@torch.inference_mode()
def route(trained: Trained, marked: Marked) -> Routed:
    """Costs and routing of every token, a few rows at a time."""
    parts = list(_passes(trained, marked))
    layers = range(len(trained.model.blocks))
    nats_T = torch.cat([nats.flatten() for nats, _ in parts])
    experts = [joined([routings[layer].ids for _, routings in parts]) for layer in layers]
    gates = [joined([routings[layer].gates for _, routings in parts]) for layer in layers]
    return Routed(nats_T, experts, gates)


def _passes(trained: Trained, marked: Marked) -> Iterator[tuple]:
    for first in range(0, len(marked.ids_BS), ROWS):
        ids_BS, targets_BS, documents_BS = (part[first : first + ROWS] for part in marked[:3])
        yield trained.model.nats(ids_BS, targets_BS, documents_BS=documents_BS)


def at_hand(trained: Trained, folder: str | Path | None, tokens: int) -> Marked:
    """Held-out rows if the data is there, else modules of this Python's library."""
    try:
        return heldout(trained, folder, tokens)
    except StorageError:
        if folder is not None:
            raise
        return library_texts(tokens, trained)
