"""`sigma-lite lab retrain`: the best of a search with seeds and text that it has not seen, before anything is claimed.

The best of hundreds is the best partly by luck: its fitness was looked at to choose it. So the search's own number says
nothing, and what counts is a paired difference from the founder with fresh seeds, on each corpus. A search cannot choose the
weight of its loss, but a constant in an expression is one: the founder at larger weights tells whether there is more to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sigma_lite.config import require
from sigma_lite.lab.experiment import Arm, Experiment
from sigma_lite.lab.expressions import read
from sigma_lite.lab.results import Results, read_results
from sigma_lite.lab.run import run_experiment
from sigma_lite.lab.search import FOUNDER, Individual, Islands, Noise, read_log
from sigma_lite.lab.seeds import T95, Difference, bits_per_byte, over_seeds
from sigma_lite.lab.trials import arm_of_text, busiest, deviation, search_scale

BASE = "LBL (founder)"
BESIDE = (
    Arm("no loss", "nothing balances", {"model": {"balance": {"loss": "none"}}}),
    Arm("Top-1 LBL", "the report's loss", {"model": {"balance": {"loss": "top1"}}}),
    *(arm_of_text(f"{times} * {FOUNDER}", f"LBL, weight times {times}") for times in (5, 25)),
)


def retrain(
    out: str | Path,
    *,
    best: int = 5,
    seeds: Sequence[int] = (100, 101, 102, 103, 104, 105),
    corpora: Sequence[str] = ("stdlib", "domains"),
    beside: Sequence[str] = (),
    runs: str | Path = "runs/search",
    workers: int | None = None,
    if_changed: str | None = None,
    command: str = "",
) -> list[Results]:
    """Train the best of OUT/search.jsonl, the founder, and those of BESIDE; one results file for each corpus, in OUT.

    Args:
        beside: more expressions, such as a part of what was found: whether the rest of it does anything.

    Raises: ConfigError for seeds with which the search was made, or fewer than two, which give no interval.
    """
    islands, _ = read_log(out)
    search = islands.search
    most = len(T95) + 1
    require(2 <= len({*seeds}) == len(seeds) <= most, f"seeds={[*seeds]}: an interval needs 2 to {most}, each once")
    seen = sorted(set(seeds) & {*search.seeds, *range(search.repeats)})
    require(not seen, f"seeds {seen} are the search's own, which chose the best: give others")
    scales = [search_scale(search.steps, corpus, seeds) for corpus in corpora]  # an unknown one is refused before any work
    found = [arm_of_text(one.text, named(one)) for one in chosen(islands, best)]
    require(bool(found), f"{out}/search.jsonl holds the founder only: let `sigma-lite lab search --out {out}` go on first")
    arms = (arm_of_text(FOUNDER, BASE), *BESIDE, *found, *(arm_of_text(str(read(text))) for text in beside))
    question = "Does what the search found hold with other seeds and other text?"
    made = []
    for scale in scales:
        path = run_experiment(
            Experiment("retrained", question, arms),
            scale,
            command=command,
            runs=runs,
            results=out,
            workers=workers,
            if_changed=if_changed,
        )
        made.append(read_results(path))
    return made


def chosen(islands: Islands, best: int) -> list[Individual]:
    """The best that are not the founder."""
    require(best >= 1, f"best={best}: at least 1")
    return [one for one in islands.best() if one.number > 0][:best]


def named(one: Individual) -> str:
    return f"#{one.number}"


def fitness(run: Mapping, weight: float) -> float:
    """As in the search."""
    return bits_per_byte(run) + weight * deviation(run["heldout"]["f"])


def against_founder(results: Mapping, arm: str, weight: float) -> dict[str, Difference]:
    """Paired over seeds: bits per byte, deviation, fitness and busiest expert of an arm less the founder's; absolute."""
    measures = {
        "bits": bits_per_byte,
        "deviation": lambda run: deviation(run["heldout"]["f"]),
        "fitness": lambda run: fitness(run, weight),
        "busiest": lambda run: busiest(run["heldout"]["f"]),
    }
    of = {name: {run["seed"]: run for run in results["runs"] if run["arm"] == name} for name in (arm, BASE)}
    seeds = sorted(of[arm].keys() & of[BASE].keys())
    return {
        name: over_seeds([measure(of[arm][seed]) - measure(of[BASE][seed]) for seed in seeds])
        for name, measure in measures.items()
    }


def holds(each: Sequence[Results], arm: str, weight: float) -> bool:
    """Whether its fitness is clearly below the founder's on every corpus: the least that a claim needs."""
    return all(arm in results["arms"] and against_founder(results, arm, weight)["fitness"].high < 0 for results in each)


COLUMNS = ("arm", "corpus", "bits per byte", "deviation of loads", "fitness")


def table(islands: Islands, each: Sequence[Results]) -> list[tuple[str, ...]]:
    """A row of COLUMNS for each arm and corpus: its differences from the founder."""
    rows = []
    for arm in _arms(each):
        for results in (results for results in each if arm in results["arms"]):
            found = against_founder(results, arm, islands.search.weight)
            cells = [_cell(found[name]) for name in ("bits", "deviation", "fitness")]
            rows.append((arm, results["scale"].removeprefix("search-"), *cells))
    return rows


def _arms(each: Sequence[Results]) -> list[str]:
    """Of all corpora, each once: another call of `retrain` may have trained others on one of them."""
    return [arm for arm in dict.fromkeys(arm for results in each for arm in results["arms"]) if arm != BASE]


def verdict(islands: Islands, each: Sequence[Results]) -> str:
    """What may be claimed."""
    found = (named(one) for one in islands.individuals)
    good = [arm for arm in found if arm in each[0]["arms"] and holds(each, arm, islands.search.weight)]
    return f"Clearly better than the founder on every corpus: {', '.join(good) or 'none'}"


def in_words(islands: Islands, noise: Noise | None, each: Sequence[Results]) -> str:
    """A table, then what may be said."""
    rows, texts = [COLUMNS, *table(islands, each)], {named(one): one.text for one in islands.individuals}
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            f"difference from {BASE}, paired over seeds, with its 95 % interval; less is better in each column",
            *lines,
            *(f"{arm}: {texts[arm]}" for arm in _arms(each) if arm in texts),
            f"in the search, less than {noise.floor:.4f} was noise" if noise else "the search's noise was not measured",
            verdict(islands, each),
        ]
    )


def _cell(found: Difference) -> str:
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})".replace("-", "\u2212")
