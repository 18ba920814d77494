"""`sigma-lite check`: grades a folder of notebooks, or lists what there is to solve."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from sigma_lite.config import ConfigError, require
from sigma_lite.teach import exercises
from sigma_lite.teach.grading import Step, asked, code_cells, read_hidden


@dataclass
class Graded:
    """One notebook of one student; `says` is why it could not be graded, or not to its end."""

    student: str
    notebook: str
    steps: list[Step] = field(default_factory=list)
    says: str = ""


def run(options: argparse.Namespace) -> None:
    require(not (options.json and options.csv), "give --json or --csv, not both")
    if options.list:
        require(options.FOLDER is None, "--list grades nothing: leave FOLDER out")
        print(listing(options.json, options.csv))
        return
    require(options.FOLDER is not None, "say which folder of notebooks to grade, or --list")
    require(options.seconds > 0, f"--seconds {options.seconds:g}: must be above 0")
    if options.hidden:
        read_hidden(options.hidden)  # before any work: a mistake in it is the teacher's
    found = notebooks(options.FOLDER)
    bar = tqdm(found, unit="notebook", disable=None, leave=False)
    graded = [grade(student, path, options.hidden, options.seconds) for student, path in bar]
    if options.json:
        print(json.dumps([asdict(one) for one in graded], indent=1, ensure_ascii=False))
    elif options.csv:
        write_csv(graded)
    else:
        print("\n".join(line for one in graded for line in table(one)))


def notebooks(folder: Path) -> list[tuple[str, Path]]:
    """(student, notebook): the student is the folder below FOLDER, or the file where there is none."""
    if folder.is_file():
        return [(folder.stem, folder)]
    require(folder.is_dir(), f"{folder} does not exist")
    found = [path for path in sorted(folder.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    require(found, f"{folder} holds no notebook (.ipynb)")
    inside = ((path.relative_to(folder).parts, path) for path in found)
    return [(parts[0] if len(parts) > 1 else path.stem, path) for parts, path in inside]


def grade(student: str, notebook: Path, hidden: Path | None, seconds: float) -> Graded:
    """In a process of its own with a time limit."""
    graded = Graded(student, notebook.name)
    try:
        names = asked(code_cells(notebook))
        require(names, "no exercise of this package is checked in it")
    except ConfigError as error:
        graded.says = str(error)
        return graded
    with tempfile.TemporaryDirectory() as place:  # files that a student's code writes go there
        answers, package = Path(place) / "answers.jsonl", str(Path(exercises.__file__).parents[3])
        order = [sys.executable, "-m", "sigma_lite.teach.grading", str(notebook.resolve()), str(answers)]
        order += [str(hidden.resolve())] if hidden else []
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "SIGMA_FAST": "1", "OMP_NUM_THREADS": "1"}
        nowhere = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        try:
            code = subprocess.run(order, cwd=place, env=environment, timeout=seconds, **nowhere).returncode
            graded.says = f"its process ended with exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            graded.says = f"stopped after {seconds:g} seconds"
        read = answers.read_text("utf-8").splitlines() if answers.exists() else []
    lines = [json.loads(line) for line in read]
    begun = {line["begun"] for line in lines if "begun" in line}
    judged = {line["name"]: Step(**line) for line in lines if "name" in line}
    if graded.says and not begun:
        graded.says += ", before the first exercise; on a busy machine give more --seconds"
    graded.steps = [judged.get(name) or _unjudged(name, name in begun, graded.says) for name in names]
    return graded


def _unjudged(name: str, begun: bool, why: str) -> Step:
    """Wrong if its own cell stopped the process; what comes after that cell is not the student's fault."""
    kind, says = ("wrong", why or "its check was not reached") if begun else ("not graded", f"not reached: {why}")
    return Step(name, exercises.find(name).chapter, kind, says)


def table(one: Graded) -> list[str]:
    count = Counter(step.kind for step in one.steps)
    head = f"{one.student} · {one.notebook}: "
    lines = [head + (f"{count['passed']} of {len(one.steps)} passed" if one.steps else one.says)]
    if one.steps and one.says:
        lines[0] += f"; {one.says}"
    width = max((len(step.name) for step in one.steps), default=0)
    lines += [
        f"  {step.name:{width}}  {step.kind:10}  {step.says}".rstrip() for step in one.steps if step.kind != "not tried"
    ]
    rest = [step.name for step in one.steps if step.kind == "not tried"]
    return [*lines, f"  not tried: {', '.join(rest)}"] if rest else lines


def write_csv(graded: list[Graded]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("student", "notebook", "chapter", "step", "result", "says"))
    for one in graded:
        rows = [(step.chapter, step.name, step.kind, step.says) for step in one.steps] or [("", "", "not graded", one.says)]
        writer.writerows((one.student, one.notebook, *row) for row in rows)


def listing(as_json: bool = False, as_csv: bool = False) -> str:
    """All exercises with chapter, minutes, difficulty and importance, and how many they are."""
    facts = ("chapter", "name", "minutes", "difficulty", "importance", "asks")
    rows = [{fact: getattr(one, fact) for fact in facts} for one in exercises.ALL.values()]
    if as_json:
        return json.dumps(rows, indent=1, ensure_ascii=False)
    if as_csv:
        return "\n".join([",".join(facts), *(",".join(json.dumps(v, ensure_ascii=False) for v in r.values()) for r in rows)])
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'chapter':7}  {'step':{width}}  minutes  difficulty  importance"]
    lines += [
        f"{r['chapter']:7}  {r['name']:{width}}  {r['minutes']:7}  {r['difficulty']:8}/5  {r['importance']:8}/5  {r['asks']}"
        for r in rows
    ]
    minutes = sum(row["minutes"] for row in rows)
    chapters = len({row["chapter"] for row in rows})
    return "\n".join([*(line.rstrip() for line in lines), f"{len(rows)} steps in {chapters} chapters, {minutes} minutes"])
