"""What a trained model is worth, by named measures: `sigma-lite eval RUN TASKS`.

A file of JSON lines is a task. Rows with `text` are scored as whole documents (the `loglikelihood_rolling` of
lm-evaluation-harness), rows with `query`, `choices` and `gold` as multiple choice. Rows with `prompt`, and perhaps
`check`, are code. TASKS holds small ones, the first two with the yaml that lm_eval takes:

    cd FOLDER_OF_TASKS; lm_eval --model hf --model_args pretrained=EXPORT,dtype=float32 --include_path . --tasks sigma_text

`heldout`, `specialisation` and `ablation` look at the held-out text of the run; `add2`, `sort5` and so on are generated.
`drift` compares a run with an earlier one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sigma_lite import record
from sigma_lite.config import nearest, require
from sigma_lite.data import tasks
from sigma_lite.serve.answers import code, exact_match
from sigma_lite.serve.drift import drift
from sigma_lite.serve.inside import INSIDE
from sigma_lite.serve.likelihood import choices, texts
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import StorageError

TASKS = Path(__file__).parent / "tasks"
DRIFT = "drift"


@dataclass(frozen=True)
class Options:
    """What `eval` takes besides tasks."""

    data: str | Path | None = None  # folder of the prepared corpus; None: where the run had it
    tokens: int | None = None  # of held-out text; None: all for heldout, 30,000 for specialisation, 4,096 for ablation
    problems: int = 200  # of a generated task
    seed: int = 0  # of these problems
    execute: bool = True  # run the code that a model writes, in a process with limits
    against: str | Path | None = None  # of drift: folder of the earlier run; None: the one that this run began from

    def __post_init__(self) -> None:
        require(self.tokens is None or self.tokens >= 1, f"tokens={self.tokens}: must be at least 1")


def evaluate(trained: Trained, task: str | Path, options: Options = Options()) -> dict[str, Any]:
    """Scores of a task: a file of JSON lines, or the name of one in TASKS, of a measure in INSIDE, or of a generated task.

    Returns: of texts bits_per_byte, byte_perplexity and word_perplexity; of choices acc, and acc_norm (log-likelihood by
        the answer's characters); of others what their functions say; and `rows`.

    Raises: ConfigError for a row that is neither, or an unknown name; StorageError for a file that cannot be read.
    """
    if str(task) in INSIDE:
        return INSIDE[str(task)](trained, options.data, options.tokens)
    if str(task) == DRIFT:
        return _drifted(trained, options)
    if tasks.NAME.fullmatch(str(task)):
        return exact_match(trained, str(task), options.problems, options.seed)
    rows = _read(task)
    kinds = {next((key for key in ("text", "prompt") if key in row), "query") for row in rows}
    require(len(kinds) == 1, f"{task}: all rows need `text`, or all `query`, `choices` and `gold`, or all `prompt`")
    for row in rows:
        wrong = [key for key in ("text", "prompt", "check", "query") if not isinstance(row.get(key, ""), str)]
        require(not wrong, f"{task}: {row}: {', '.join(wrong)} must be a string")
    if kinds == {"text"}:
        return {"rows": len(rows), **texts(trained, rows)}
    if kinds == {"prompt"}:
        return code(trained, rows, options.execute)
    for row in rows:
        fine = {"query", "choices", "gold"} <= row.keys() and row["gold"] in range(len(row["choices"]))
        require(fine, f"{task}: {row} is no choice: it needs query, choices, and gold, the place of the right one from 0")
    return {"rows": len(rows), **choices(trained, rows)}


def _drifted(trained: Trained, options: Options) -> dict[str, Any]:
    against = options.against or (trained.settings.get("parent") or {}).get("run")
    require(against is not None, "drift: this run began from no other: give --against, the folder of an earlier run")
    before = Trained(against, parts=trained.model.parts)
    found = drift(trained, before, options.data, options.tokens, options.problems)
    return {"against": str(against), "against_step": before.step, **found}


def summary(task: str, found: dict[str, Any]) -> list[str]:
    """A result as lines: its scores, or those of each layer; then what each kind and domain costs."""
    scores = [f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float)]
    for name, value in found.items():
        if isinstance(value, list) and all(own is None or isinstance(own, float) for own in value):
            scores.append(f"{name} by layer " + " ".join("–" if own is None else f"{own:.3f}" for own in value))
    lines = [f"eval          {task}: {', '.join(scores)} ({found['rows']} rows)"]
    for name, value in found.items():
        if isinstance(value, dict) and value.keys() == {"before", "now"}:
            lines.append(f"  {name:<24} " + ", ".join(f"{when} {_shown(own)}" for when, own in value.items()))
    for mark, costs in found.get("by", {}).items():
        for name, own in costs.items():
            bits = f"{own['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in own else ""
            nats = f"{own['nats_per_token']:8.4f} nats a token, {own['tokens']:,} tokens"
            lines.append(f"  {mark:<8} {name:<12} {bits:>21}  {nats}")
    return lines


def _shown(value: int | float | list) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def keep(run: str | Path, trained: Trained, task: str, found: dict[str, Any]) -> Path | None:
    """Add a result to RUN/evals.jsonl, which the report reads; None for a folder that is no run's."""
    if not Path(run, "record.jsonl").is_file():
        return None
    record.append(path := Path(run, record.EVALS), "eval", trained.step, task=task, **found)
    return path


def require_known(task: str | Path) -> None:
    """ConfigError for what is neither a task nor a file, before any task is measured."""
    stored = [path.stem for path in TASKS.glob("*.jsonl")]
    every = [*stored, *INSIDE, DRIFT, *(f"{name}2" for name in tasks.MAKERS)]
    known = str(task) in every or tasks.NAME.fullmatch(str(task)) or Path(task).suffix
    file = "a file of JSON lines ends in .jsonl" if Path(task).is_file() else "or give a file of JSON lines, FILE.jsonl"
    require(bool(known), f"there is no task {str(task)!r}: {nearest(str(task), every)}; {file}")


def _read(task: str | Path) -> list[dict[str, Any]]:
    require_known(task)
    path = Path(task) if Path(task).suffix else TASKS / f"{task}.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    require(bool(rows) and all(isinstance(row, dict) for row in rows), f"{path}: every line must be a JSON object")
    return rows
