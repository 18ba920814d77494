"""What a trained model is worth on rows of a file, by the definitions of lm-evaluation-harness, so that both print the same.

A file of JSON lines is a task. Rows with `text` are scored as whole documents (its `loglikelihood_rolling`), rows with
`query`, `choices` and `gold` as multiple choice. TASKS holds two small ones, with the yaml that lm_eval takes:

    cd FOLDER_OF_TASKS; lm_eval --model hf --model_args pretrained=EXPORT,dtype=float32 --include_path . --tasks sigma_text
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sigma_lite.config import nearest, require
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import StorageError

TASKS = Path(__file__).parent / "tasks"


def evaluate(trained: Trained, task: str | Path) -> dict[str, float]:
    """Scores of a task: a file of JSON lines, or the name of one in TASKS.

    Returns: of texts bits_per_byte, byte_perplexity and word_perplexity; of choices acc, and acc_norm (log-likelihood by
        the answer's characters); and `rows`.

    Raises: ConfigError for a row that is neither, or an unknown name; StorageError for a file that cannot be read.
    """
    rows = _read(task)
    kinds = {"text" in row for row in rows}
    require(len(kinds) == 1, f"{task}: all rows need `text`, or all `query`, `choices` and `gold`")
    if kinds == {True}:
        return {"rows": len(rows), **_texts(trained, [row["text"] for row in rows])}
    for row in rows:
        fine = {"query", "choices", "gold"} <= row.keys() and row["gold"] in range(len(row["choices"]))
        require(fine, f"{task}: {row} is no choice: it needs query, choices, and gold, the place of the right one from 0")
    return {"rows": len(rows), **_choices(trained, rows)}


def _texts(trained: Trained, texts: Sequence[str]) -> dict[str, float]:
    """Every document from its first token, after the end of text; longer ones window by window."""
    nats = -sum(_rolling(trained, text) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    return {
        "bits_per_byte": nats / size / math.log(2),
        "byte_perplexity": math.exp(nats / size),
        "word_perplexity": math.exp(nats / words),
    }


def _rolling(trained: Trained, text: str) -> float:
    """log p of a document, each token given the ones before it in its window of the trained length."""
    ids = [trained.end_of_text, *_ids(trained, text)]
    S, total, first = trained.length, 0.0, 1
    while first < len(ids):
        last = min(first + S, len(ids))
        start = 0 if first == 1 else last - S - 1  # a later window is filled up with what stands before it
        total += log_likelihood(trained, ids[start:first], ids[first:last])
        first = last
    return total


def _choices(trained: Trained, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    right, right_norm = 0, 0
    for row in rows:
        query, choices = row["query"], row["choices"]
        found = [log_likelihood(trained, *_pair(trained, query, choice)) for choice in choices]
        normed = [score / len(choice) for score, choice in zip(found, choices, strict=True)]
        right += found.index(max(found)) == row["gold"]
        right_norm += normed.index(max(normed)) == row["gold"]
    return {"acc": right / len(rows), "acc_norm": right_norm / len(rows)}


def _pair(trained: Trained, query: str, choice: str) -> tuple[list[int], list[int]]:
    """Tokens of the query and of the answer, split where both are read as one text; spaces at its end go to the answer."""
    cut = len(query.rstrip())
    context = _ids(trained, query[:cut])
    whole = _ids(trained, query + choice)
    return (context, whole[len(context) :]) if context else ([trained.end_of_text], whole)


@torch.inference_mode()
def log_likelihood(trained: Trained, context: Sequence[int], answer: Sequence[int]) -> float:
    """log p(answer | context) in nats, 0 or less; of a context that is too long, the last tokens."""
    ids = [*context, *answer][-(trained.length + 1) :]
    logits_SV = trained.model(torch.tensor([ids[:-1]])).logits[0, -len(answer) :].float()
    return float(logits_SV.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


def _ids(trained: Trained, text: str) -> list[int]:
    return trained.tokenizer.encode(text, add_special_tokens=False).ids


def _read(task: str | Path) -> list[dict[str, Any]]:
    path, names = Path(task), [p.stem for p in TASKS.glob("*.jsonl")]
    if not path.suffix:
        require(str(task) in names, f"task {str(task)!r}; {nearest(str(task), names)}, or give a file of JSON lines")
        path = TASKS / f"{task}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    require(bool(rows) and all(isinstance(row, dict) for row in rows), f"{path}: every line must be a JSON object")
    return rows
