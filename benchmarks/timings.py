"""Write the table of minutes in book/instructor.md: what each chapter's header claims, and what its run took.

Seconds of a run are of processor time, the kernel's start included, as book/build.py notes them when it runs a chapter.

    python book/build.py && python benchmarks/timings.py --keep     note the runs of this machine, then write the table
    python benchmarks/timings.py                                    write the table from what is noted
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from sigma_lite.storage import write_json
from sigma_lite.teach import exercises
from sigma_lite.teach.session import CHAPTERS
from sigma_lite.train.provenance import device_name

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "book" / "instructor.md"
NOTED = ROOT / "results" / "bench" / "chapters.json"
KINDS = ("full", "fast")  # a few training steps only
BEGIN, END = "<!-- timings:begin (written by benchmarks/timings.py) -->\n", "<!-- timings:end -->"


def chapters() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def seconds(kind: str) -> dict[str, float]:
    """Of the kept runs, "full" or "fast", whose inputs are those of today."""
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    from executed_notebooks import STORE, digest

    facts = {path.name: STORE / kind / f"{path.stem}.json" for path in chapters()}
    known = {name: json.loads(file.read_bytes()) for name, file in facts.items() if file.exists()}
    today = {name: one for name, one in known.items() if one["inputs"] == digest(ROOT / "notebooks" / name, one["files"])}
    return {name: round(one["seconds"], 1) for name, one in today.items()}


def keep() -> None:
    """Add to the noted seconds; a chapter that was not run here keeps what was noted before."""
    before = json.loads(NOTED.read_bytes()) if NOTED.exists() else {}
    runs = {kind: {**before.get(kind, {}), **seconds(kind)} for kind in KINDS}
    write_json(NOTED, {"machine": device_name(torch.device("cpu")), "unit": "seconds of processor time", **runs})


def table() -> str:
    noted = json.loads(NOTED.read_bytes())
    rows, reading_all, steps_all = [], 0, 0
    for path in chapters():
        number = int(path.name[:2])
        reading = int(re.search(r"reading\** (\d+) min", path.read_text("utf-8"))[1])
        own = [step for step in exercises.ALL.values() if step.chapter == number]
        steps, needed = (sum(step.minutes for step in own if step.importance >= least) for least in (1, 5))
        full, fast = (f"{noted[kind][path.name]:.0f}" if path.name in noted[kind] else "not measured" for kind in KINDS)
        rows.append(f"| {number} {CHAPTERS[number].title} | {reading} | {steps} | {needed} | {full} | {fast} |")
        reading_all, steps_all = reading_all + reading, steps_all + steps
    return f"""\
| chapter | reading, min | steps, min | of them 5/5 | a run, s | a fast run, s |
|---|---|---|---|---|---|
{chr(10).join(rows)}

All of it: {reading_all / 60:.0f} hours of reading and {steps_all / 60:.0f} of steps.
Seconds are of one core ({noted["machine"]}).

"""


def main() -> None:
    if "--keep" in sys.argv:
        keep()
    before, _, rest = GUIDE.read_text("utf-8").partition(BEGIN)
    GUIDE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], "utf-8")
    print(table())


if __name__ == "__main__":
    main()
