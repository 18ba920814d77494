"""The diary of a run: one JSON object a line in RUN/record.jsonl, written as it happens, read by report, lab and book.

Each entry has a `kind` and the optimizer `step` at which it was true:

    run         command, versions, device, cpu, experts, commit, code, threads (of one process on a CPU: number, why, and
                seconds of a step by number where it was measured), config, ledger, parameters, plan, data
                once a start; a resumed run has several. `code` holds a fingerprint of each file that decides training
    step        tokens, terms, weighted, loss, lbl (measured, whatever is trained), lr, grad_norm, k, active_params,
                tokens_per_s, seconds, perf (seconds waited so far by kind, mfu; peak_memory in bytes now and then),
                rows {source: rows of this step}, passes {source: times read by its end}; the source of a run without a
                mixture is "corpus". `sigma-lite rows RUN STEP` names each row and its documents
    load        tokens (of the window), k of its steps, f and P [L][E], lbl [L], router_entropy [L] in nats, logit_max [L],
                bias [L][E] where there is one; others {"layer 0 queries": f, P and lbl} where attention chooses heads
    experts     grad_norm [L][E] of single experts in this step, before clipping; rows of each expert-parallel rank and
                fullest_rank, relative to an even share, where there are such ranks
    validation  nats_per_token, bits_per_byte, f and P [L][E], lbl [L]; of a mixture also sources {source: {bits_per_byte,
                nats_per_token}}
    sample      prompt, text
    event       what (a skipped step, a switch of sparsity, another mixture or batch size, ...), and why

RUN/evals.jsonl has the same form, and is written by `sigma-lite eval`; a training that goes on does not touch it:

    eval        task, and what serve/evaluate.py found
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from sigma_lite.storage import StorageError, atomic_write, cannot_write

EVALS = "evals.jsonl"


class Record:
    """Append entries to a run's diary. A resumed run first drops the entries that were written after its checkpoint.

    It also drops events of the checkpoint's own step: they happened while the next step was made, and that is made again.
    """

    def __init__(self, path: str | Path, resume_step: int = 0):
        self.path = Path(path)
        kept = [e for e in read(self.path) if e["step"] + (e["kind"] == "event") <= resume_step and resume_step > 0]
        with atomic_write(self.path) as file:
            file.writelines(line(entry) for entry in kept)

    def write(self, kind: str, step: int, **facts: object) -> None:
        append(self.path, kind, step, **facts)


def append(path: str | Path, kind: str, step: int, **facts: object) -> None:
    """Add one entry to a diary, after removing what a kill in the middle of the last entry may have left.

    Raises StorageError when the disk is full.
    """
    try:
        with open(path, "a+b") as file:
            _cut_torn_line(file)
            file.write(line({"kind": kind, "step": step, **facts}))
    except OSError as error:
        raise cannot_write(path, error) from error


def _cut_torn_line(file: IO[bytes]) -> None:
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def line(entry: dict) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def read(path: str | Path, kind: str | None = None) -> list[dict]:
    """Entries in order, all or of one kind; [] when there is no file. A line cut by a kill at the end is left out."""
    path = Path(path)
    if not path.exists():
        return []
    entries = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entries += [_entry(line)] if line else []
        except ValueError as error:
            if number < len(lines):
                raise StorageError(f"{path} line {number} is damaged ({error}): delete the line to go on") from error
    return [e for e in entries if kind is None or e["kind"] == kind]


def _entry(line: bytes) -> dict:
    entry = json.loads(line)
    if not isinstance(entry, dict) or not {"kind", "step"} <= entry.keys():
        raise ValueError("not an entry with kind and step")
    return entry


def last_step(path: str | Path) -> int:
    """The step of the newest entry, 0 where there is none; reads the end of the file only, so it may be asked often."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 100_000))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    for line in reversed(lines[:-1]):
        try:
            return _entry(line)["step"]
        except ValueError:  # the beginning of this piece, or a torn line
            continue
    return 0


def run_files(run: str | Path) -> Path:
    """The record of a run's folder, or a StorageError that says where runs are."""
    path = Path(run) / "record.jsonl"
    if not path.exists():
        raise StorageError(f"{run} holds no record.jsonl: give the folder of a run, such as {os.path.join('runs', 'toy')}")
    return path
