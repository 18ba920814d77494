"""What a model writes, judged by rules: exact answers to generated problems, code that parses and runs."""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from sigma_lite.config import require
from sigma_lite.data.chat import marks
from sigma_lite.data.tasks import encode, problems
from sigma_lite.serve import sandbox
from sigma_lite.serve.generate import Sampling, generate
from sigma_lite.serve.trained import Trained

GREEDY = Sampling(temperature=0)
CODE_TOKENS = 120  # of an answer in code


def exact_match(trained: Trained, task: str, count: int = 200, seed: int = 0, heldout: bool = True) -> dict[str, Any]:
    """Share of greedy answers to generated problems that are right to the digit.

    A problem stands in the frame of a conversation, see data/chat.py; the answer is what follows the last `>`.

    Args:
        task: such as "add2", see data/tasks.py.
        heldout: problems of the side that is never trained on.

    Returns: exact_match 0..1, its standard error, ended (share of answers that closed with the end mark), rows.
    Raises: ConfigError for an unknown task, and for a tokenizer without the marks.
    """
    require(count >= 1, f"problems={count}: must be at least 1")
    given, frame = problems(task, count, seed, heldout), marks(trained.tokenizer, trained.end_of_text)
    prompts = [frame.prompt([(encode(trained.tokenizer, one.prompt), None)]) for one in given]
    longest = max(len(encode(trained.tokenizer, one.response)) for one in given)
    stop = {frame.end, trained.end_of_text}
    written = generate(trained.model, prompts, max_new_tokens=longest + 8, sampling=GREEDY, stop=stop, at_once=256)
    answers = ["".join(trained.texts(own.tokens)) for own in written]
    right = [own.stopped and one.solved_by(answer) for own, one, answer in zip(written, given, answers, strict=True)]
    share = sum(right) / count
    error = math.sqrt(share * (1 - share) / count)
    examples = [[one.prompt, answer, one.answer] for one, answer in zip(given[:3], answers, strict=False)]
    ended = sum(own.stopped for own in written) / count
    return {"rows": count, "exact_match": share, "standard_error": error, "ended": ended, "examples": examples}


def code(trained: Trained, rows: Sequence[Mapping[str, Any]], execute: bool = True) -> dict[str, Any]:
    """Share of greedy continuations of `prompt` that are not empty and that Python parses, and that pass `check` when run.

    A continuation ends where the function that the prompt began does: before the first line that is not indented.

    Returns: parses 0..1; passes 0..1 of the rows with a check, where these were run; rows.
    """
    prompts = [trained.prompt_ids(row["prompt"]) for row in rows]
    written = generate(
        trained.model, prompts, max_new_tokens=CODE_TOKENS, sampling=GREEDY, stop={trained.end_of_text}, at_once=64
    )
    bodies = [body("".join(trained.texts(own.tokens))) for own in written]
    texts = [row["prompt"] + own for row, own in zip(rows, bodies, strict=True)]
    good = [bool(own.strip()) and parses(text) for own, text in zip(bodies, texts, strict=True)]
    found: dict[str, Any] = {"rows": len(rows), "parses": sum(good) / len(rows)}
    checked = [(text, row["check"], fine) for text, row, fine in zip(texts, rows, good, strict=True) if row.get("check")]
    if execute and checked:
        passed = [fine and sandbox.run(f"{text}\n\n{check}\n").ok for text, check, fine in checked]
        found["passes"] = sum(passed) / len(checked)
    return found | {"examples": texts[:3]}


def body(text: str) -> str:
    """What of a continuation belongs to the function that was begun."""
    first, *lines = text.split("\n")
    kept = [first]
    for line in lines:
        if line and not line[0].isspace() and line[0] not in ")]}":
            break
        kept.append(line)
    return "\n".join(kept)


def parses(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
