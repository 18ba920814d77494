"""Keep what a run recorded: copy RUN/record.jsonl to results/, thinned to a size that git can carry.

python benchmarks/keep.py runs/toy results/toy.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sigma_lite.record import read, run_files
from sigma_lite.storage import atomic_write

STEPS, WINDOWS = 400, 12  # how many step and load entries are kept, evenly spread, first and last included


def main(run: str, out: str) -> None:
    entries = read(run_files(run))
    kept = {id(e) for kind, most in (("step", STEPS), ("load", WINDOWS)) for e in spread(entries, kind, most)}
    lines = [json.dumps(e, separators=(",", ":")) for e in entries if e["kind"] not in ("step", "load") or id(e) in kept]
    with atomic_write(out) as file:
        file.write("\n".join(lines).encode() + b"\n")
    print(f"{out}: {len(lines)} of {len(entries)} entries, {Path(out).stat().st_size / 1e3:.0f} kB")


def spread(entries: list[dict], kind: str, most: int) -> list[dict]:
    these = [e for e in entries if e["kind"] == kind]
    if len(these) <= most:
        return these
    return [these[round(i * (len(these) - 1) / (most - 1))] for i in range(most)]


if __name__ == "__main__":
    main(*sys.argv[1:])
