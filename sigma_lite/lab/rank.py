"""`sigma-lite lab rank mine.py:Idea`: a stranger's balancer or part among the family's arms, under the same protocol."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from sigma_lite.config import nearest, require
from sigma_lite.lab.catalogue import TOP1
from sigma_lite.lab.experiment import Arm, Experiment, Scale
from sigma_lite.lab.family import BASE, PROTOCOL
from sigma_lite.lab.results import Results, read_results, results_path
from sigma_lite.lab.run import RESULTS, RUNS, run_experiment
from sigma_lite.lab.seeds import T95, Difference, bits_per_byte, over_seeds
from sigma_lite.lab.standing import Row, floor, in_order, rows
from sigma_lite.lightning_keys import PARTS
from sigma_lite.reading import imported

RANKED = "ranked"  # folder below the results, of results that are not the project's


class Standing(NamedTuple):
    """One arm among the others; counts are of arms other than itself."""

    row: Row
    place: int  # 1: best mean difference
    of: int
    better_than: list[str]  # whose paired difference from it has an interval above 0, and a mean above the table's noise
    worse_than: list[str]
    all_rows: list[Row]
    away: float  # BASE trained here, relative to the recorded one; NaN without a seed in common


def rank(
    idea: str,
    scale: Scale,
    *,
    part: str | None = None,
    seeds: Sequence[int] | None = None,
    runs: str | Path = RUNS,
    results: str | Path = RESULTS,
    workers: int | None = None,
    if_changed: str | None = None,
) -> tuple[Standing, Path]:
    """Train the idea and, on this machine too, BASE; then place its paired differences among the recorded ones.

    Args:
        idea: FILE.py:NAME, a Balancer class, a balance loss (routing, f_E) -> scalar, or a part of the model.
        part: which part it is, "router" unless it says otherwise: router, experts, attention, dispatch or stack.
        seeds: instead of the scale's.

    Returns: where it stands, and the results file with its raw rows, RESULTS/ranked/NAME-SCALE.json.
    Raises: ConfigError for an idea that cannot be; StorageError where the family is not recorded at this scale.
    """
    most = len(T95) + 1
    require(seeds is None or len(seeds) <= most, f"seeds: {len(seeds or ())} of them: an interval takes at most {most}")
    recorded = read_results(results_path(results, "family", scale.name))
    found = recorded.get("protocol")
    require(found == PROTOCOL, f"the recorded family follows protocol {found}, this code {PROTOCOL}: record it anew")
    words = ["sigma-lite", "lab", "rank", idea, "--scale", scale.name, *(["--part", part] if part else [])]
    words += ["--seeds", *map(str, seeds)] if seeds else []
    with importable(idea) as path:
        arm = arm_of(idea, path, part)
        experiment = Experiment(
            path.rpartition(".")[2],
            f"Where does {arm.name} stand in the family?",
            (TOP1, arm),
            ("loss_against_balance",),
            measure="family",
            protocol=PROTOCOL,
        )
        made = run_experiment(
            experiment,
            scale,
            command=shlex.join(words),
            runs=runs,
            results=Path(results) / RANKED,
            seeds=seeds,
            workers=workers,
            if_changed=if_changed,
        )
    return stands(recorded, read_results(made), arm.name), made


def stands(recorded: Results, own: Mapping, arm: str) -> Standing:
    """Of an arm of `own` among those of `recorded`.

    Each is compared with BASE of its own machine, so a machine's mean cancels; the noise of two baselines does not.
    """
    mine = next(row for row in rows(own) if row.arm == arm)
    others = rows(recorded)
    noise, better, worse = floor(others, recorded).seeds, [], []
    for row in others:
        between = _difference(mine, row)
        if between is not None and between.is_clear and not abs(between.mean) <= noise:  # nan, of single seeds, is no bar
            (better if between.mean < 0 else worse).append(row.arm)
    everyone = in_order([*others, mine])
    here, there = _bits(own), _bits(recorded)
    away = [here[seed] / there[seed] - 1 for seed in here.keys() & there.keys()] or [math.nan]
    return Standing(mine, everyone.index(mine) + 1, len(everyone), better, worse, everyone, mean(away))


def _bits(results: Mapping) -> dict[int, float]:
    return {run["seed"]: bits_per_byte(run) for run in results["runs"] if run["arm"] == BASE}


def _difference(one: Row, other: Row) -> Difference | None:
    """Of their differences from BASE, over the seeds that both have; None for fewer than two."""
    seeds = sorted(one.by_seed.keys() & other.by_seed.keys())
    return over_seeds([one.by_seed[seed] - other.by_seed[seed] for seed in seeds]) if len(seeds) > 1 else None


def in_words(standing: Standing) -> str:
    """What a terminal says: the difference with its interval, then the place and what it is worth."""
    row, others = standing.row, standing.of - 1
    open_ones = others - len(standing.better_than) - len(standing.worse_than)
    lines = [
        f"{row.arm}: {row.difference} bits per byte against {BASE}; less is better. Protocol {PROTOCOL}.",
        f"place {standing.place} of {standing.of} by the mean. Clearly better than {_some(standing.better_than)}; clearly"
        f" worse than {_some(standing.worse_than)}; with these seeds it cannot be told from the other {open_ones}.",
        f"layer 0's busiest expert {100 * row.heldout[0]:+.0f} % on held-out text (first seed); {row.dead:.1f} dead experts;"
        f" {1000 * row.step_seconds:.0f} ms a step.",
    ]
    if abs(standing.away) >= 0.0005:
        lines.append(
            f"{BASE} ended {100 * standing.away:+.1f} % from the recorded runs of the same seeds: another machine, code or"
            " text (the text is the library of the Python that runs). Differences are from the baseline trained here;"
            " a difference from another arm has the noise of two baselines, which the bar does not know."
        )
    if leaks := [f"{100 * share:.0f} % in {when}" for when, share in row.leak.items() if share > 0]:
        lines.append(f"it is not causal: a later token changes the experts of earlier ones ({', '.join(leaks)}).")
    return "\n".join(lines)


def _some(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "") if names else "none"


@contextlib.contextmanager
def importable(idea: str) -> Iterator[str]:
    """FILE.NAME of FILE.py:NAME, which this process and its workers can import while this lasts."""
    file, colon, name = idea.rpartition(":")
    path = Path(file)
    require(bool(colon) and path.suffix == ".py" and name.isidentifier(), f"{idea!r}: give FILE.py:NAME")
    require(path.is_file(), f"{idea!r}: there is no file {file}")
    require(path.stem.isidentifier(), f"{idea!r}: {path.stem} cannot be imported: call the file by letters, digits and _")
    folder, before = str(path.resolve().parent), os.environ.get("PYTHONPATH")
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder + (os.pathsep + before if before else "")
    try:
        yield f"{path.stem}.{name}"
    finally:
        sys.path.remove(folder)
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def loaded(idea: str, path: str, where: str) -> Any:
    """What FILE.py:NAME names, inside `importable`. Raises ConfigError where another module has the file's name."""
    module, file = path.rpartition(".")[0], Path(idea.rpartition(":")[0]).resolve()
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # of __main__, which may have none
        spec = None
    same = spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file
    require(same, f"{where}={idea}: another module is called {module}: rename the file")
    return imported(path, where)


def arm_of(idea: str, path: str, part: str | None) -> Arm:
    """The idea as an arm. Raises ConfigError for a file that cannot be imported and for what cannot be called."""
    from sigma_lite.balance.balancer import Balancer  # torch comes with it

    module, _, name = path.rpartition(".")
    kind = loaded(idea, path, "IDEA")
    require(part is None or part in PARTS, f"part={part!r} does not exist; {nearest(str(part), PARTS)}")
    is_loss = isinstance(kind, type) and issubclass(kind, Balancer) or not isinstance(kind, type)
    if part is None and is_loss:
        balancer: object = {"class_path": path} if isinstance(kind, type) else path
        patch: dict = {"custom_balance": balancer}
    else:
        patch = {"parts": {part or "router": {"class_path": path}}}
    return Arm(f"{name} ({module}.py)", (kind.__doc__ or "").split("\n")[0], {"model": patch})
