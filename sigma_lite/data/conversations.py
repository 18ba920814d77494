"""Where conversations come from: generated problems, or lines of messages; and how they become tokens.

A line of a .jsonl file (packed or not) holds messages as most chat data does, under `messages` unless text_field says else:

    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"},
                  {"role": "assistant", "content": "4", "reasoning_content": "two twice"}]}

There is no mark for `system`: what it says is put before the first thing that the user says, with an empty line between.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from sigma_lite.config import ConfigError, CorpusConfig, require
from sigma_lite.data import tasks
from sigma_lite.data.chat import THINK, Turn, marks
from sigma_lite.data.listing import leave_out
from sigma_lite.data.unpack import open_unpacked, unpacked_name


class Talk(NamedTuple):
    name: str
    turns: tuple[Turn, ...]
    key: str  # what the held-out split hashes


class NoTalk(Exception):
    """Why a line is no conversation."""


def of_tasks(config: CorpusConfig) -> Iterator[Talk]:
    """`max_documents` draws, the tasks in turn. The key is the canonical problem, so the split is that of data/tasks.py."""
    for number, one in enumerate(tasks.mixed(config.tasks, config.max_documents)):
        worked = bool(one.steps) and config.worked
        turn = Turn(one.prompt, f">{one.answer}" if worked else one.answer, one.steps if worked else "")
        yield Talk(f"{config.tasks[number % len(config.tasks)]}:{number}", (turn,), one.canonical)


def of_files(config: CorpusConfig, root: Path, files: Sequence[Path], skipped: Counter) -> Iterator[Talk]:
    """Every line of the .jsonl files.

    Raises: ConfigError for a line that is no conversation, with its number; with missing_text=empty it is left out.
    """
    field = "messages" if config.text_field == "text" else config.text_field
    for path in files:
        name = path.relative_to(root).as_posix()
        if not unpacked_name(path).endswith((".jsonl", ".ndjson")):
            leave_out(skipped, "no .jsonl", name)
            continue
        with open_unpacked(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    turns = turns_of(line, field)
                except NoTalk as reason:
                    fix = "mend it, or set data.corpus.missing_text=empty to leave such lines out"
                    require(config.missing_text == "empty", f"line {number} of {path}: {reason}; {fix}")
                    leave_out(skipped, "no conversation", f"{name}:{number}")
                else:
                    yield Talk(f"{name}:{number}", turns, "\0".join(turn.said for turn in turns))


def turns_of(line: bytes, field: str = "messages") -> tuple[Turn, ...]:
    """What a line of JSON says. Raises NoTalk where user and assistant do not take turns, the assistant last."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise NoTalk(f"it is no JSON ({error})") from error
    given = row.get(field) if isinstance(row, dict) else None
    if not isinstance(given, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in given):
        raise NoTalk(f"its {field!r} is no list of messages with role and content")
    system = "".join(f"{m['content']}\n\n" for m in itertools.takewhile(lambda m: m.get("role") == "system", given))
    messages = list(itertools.dropwhile(lambda m: m.get("role") == "system", given))
    roles = [str(message.get("role")) for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise NoTalk(f"its roles are {', '.join(roles[:6]) or 'none'}: user and assistant must take turns, from user on")
    pairs = zip(messages[::2], messages[1::2], strict=True)
    turns = [Turn(said["content"], m["content"], m.get("reasoning_content") or "") for said, m in pairs]
    return (turns[0]._replace(said=system + turns[0].said), *turns[1:])


def encoded(talks: Sequence[tuple[Turn, ...]], tokenizer: Tokenizer, begin: int, one_by_one: bool) -> Iterator[list[int]]:
    """Ids of each conversation.

    Args:
        begin: end of text, which stands before each.
        one_by_one: digits and signs are tokens of their own, and thoughts need no tags: of generated problems.

    Raises: ConfigError for thoughts where the tokenizer has no tags for them.
    """
    frame = marks(tokenizer, begin)
    encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    if one_by_one:
        encode = lambda text: tasks.encode(tokenizer, text)  # noqa: E731
    for turns in talks:
        if frame.think is None and not one_by_one and any(turn.thought for turn in turns):
            fix = f"train one with data.corpus.special_tokens=[{', '.join(THINK)}], or take reasoning_content out"
            raise ConfigError(f"a conversation has reasoning_content, and the tokenizer has not reserved its tags: {fix}")
        yield frame.conversation(turns, encode)
