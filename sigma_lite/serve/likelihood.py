"""Texts and choices by their likelihood, by the definitions of lm-evaluation-harness, so that both print the same."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sigma_lite.data.kinds import KINDS
from sigma_lite.data.tokenizer import token_bytes
from sigma_lite.serve.marked import Text, kinds_of
from sigma_lite.serve.trained import Trained

# ------------------------------------------------------------------------------------------------------------- texts


def texts(trained: Trained, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every document from its first token, after the end of text; longer ones window by window.

    `by` says what the tokens of each kind cost (a document whose `name` ends in .py is Python), and of each `domain`.
    """
    sizes_V = token_bytes(trained.tokenizer, trained.model.config.vocab_size)
    total, costs, lengths, kinds, domains = 0.0, [], [], [], []
    for row in rows:
        text = Text(row["text"], row.get("name", "text"), row.get("domain"))
        ids, windows = np.array(trained.ids(text.text), np.int64), rolling(trained, text.text)
        total -= sum(float(window.sum()) for window in windows)
        costs.append(-torch.cat([torch.zeros(0), *windows]).double().numpy())
        lengths.append(sizes_V[ids])
        kinds.append(kinds_of(text, ids, sizes_V))
        domains += [text.domain] * len(ids)
    size = sum(len(row["text"].encode()) for row in rows)
    words = sum(len(re.split(r"\s+", row["text"])) for row in rows)
    marks = {"kind": [KINDS[kind] for kind in np.concatenate(kinds)], "domain": domains}
    return {
        "bits_per_byte": total / size / math.log(2),
        "byte_perplexity": math.exp(total / size),
        "word_perplexity": math.exp(total / words),
        "by": {mark: costs_by(np.concatenate(costs), np.concatenate(lengths), names) for mark, names in marks.items()},
    }


def costs_by(nats_T: np.ndarray, bytes_T: np.ndarray, names_T: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """What the tokens of each name cost, the most first: {name: tokens, bytes, nats_per_token, bits_per_byte}.

    A kind without bytes, such as the end of a text, has no bits_per_byte. Nats and bytes add up to the whole's.
    """
    names_T, found = np.array(names_T, object), {}
    for name in dict.fromkeys(name for name in names_T if name is not None):
        own_T = names_T == name
        nats, size = float(nats_T[own_T].sum()), int(bytes_T[own_T].sum())
        found[name] = {"tokens": int(own_T.sum()), "bytes": size, "nats_per_token": nats / int(own_T.sum())}
        found[name] |= {"bits_per_byte": nats / math.log(2) / size} if size else {}
    return dict(sorted(found.items(), key=lambda item: -item[1]["tokens"] * item[1]["nats_per_token"]))


def rolling(trained: Trained, text: str) -> list[Tensor]:
    """log p of each token of a document, given the ones before it in its window of the trained length, window by window."""
    ids = [trained.end_of_text, *trained.ids(text)]
    S, found, first = trained.length, [], 1
    while first < len(ids):
        last = min(first + S, len(ids))
        start = 0 if first == 1 else last - S - 1  # a later window is filled up with what stands before it
        found.append(log_likelihoods(trained, ids[start:first], ids[first:last]))
        first = last
    return found


# ----------------------------------------------------------------------------------------------------------- choices


def choices(trained: Trained, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    right, right_norm = 0, 0
    for row in rows:
        query, choices = row["query"], row["choices"]
        found = [float(log_likelihoods(trained, *_pair(trained, query, choice)).sum()) for choice in row["choices"]]
        normed = [score / len(choice) for score, choice in zip(found, choices, strict=True)]
        right += found.index(max(found)) == row["gold"]
        right_norm += normed.index(max(normed)) == row["gold"]
    return {"acc": right / len(rows), "acc_norm": right_norm / len(rows)}


def _pair(trained: Trained, query: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of the query and of the answer, split where both are read as one text; spaces at its end go to the answer."""
    cut = len(query.rstrip())
    context = trained.ids(query[:cut])
    whole = trained.ids(query + choice)
    return (context, whole[len(context) :]) if context else ([trained.end_of_text], whole)


@torch.inference_mode()
def log_likelihoods(trained: Trained, context: Sequence[int], answer: Sequence[int]) -> Tensor:
    """log p of each token of the answer in nats, 0 or less; of a context that is too long, the last tokens."""
    ids = [*context, *answer][-(trained.length + 1) :]
    logits_SV = trained.model(torch.tensor([ids[:-1]])).logits[0, -len(answer) :].float()
    return logits_SV.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
