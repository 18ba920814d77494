"""Where each arm of the family stands: paired differences with intervals, what is noise, and what an arm assumes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, variance
from typing import Any, NamedTuple

from sigma_lite.config import require
from sigma_lite.figures import machine_of
from sigma_lite.lab.experiment import Arm, Scale, named_in, settings_of
from sigma_lite.lab.family import BASE
from sigma_lite.lab.seeds import Difference, bits_per_byte, over_seeds, student
from sigma_lite.runfile import load_run


class Row(NamedTuple):
    """An arm among the others. Deviations are E f - 1 of the busiest expert, means over seeds; shares lie in 0..1."""

    arm: str
    difference: Difference  # of bits per byte from BASE, relative
    by_seed: Mapping[int, float]
    bits: float
    trained: float  # layer 0's deviation over the middle of training; NaN for a run too short
    heldout: Sequence[float]  # layer 0's deviation on held-out text, one a seed
    layers: float  # mean over layers of the held-out deviation
    dead: float  # experts without a held-out token, all layers
    token_share: float  # specialisation: mean over layers
    leak: Mapping[str, float]
    step_seconds: float
    assumes: Mapping[str, str]


def rows(results: Mapping) -> list[Row]:
    """A row for each arm that has a seed in common with BASE, best mean difference first.

    Raises: ConfigError for results without BASE.
    """
    base = {run["seed"]: bits_per_byte(run) for run in results["runs"] if run["arm"] == BASE}
    require(bool(base), f"{results['experiment']} has no run of {BASE!r}, with which every arm is compared")
    found = []
    for arm, facts in results["arms"].items():
        runs = [run for run in results["runs"] if run["arm"] == arm and run["seed"] in base]
        if runs:
            found.append(_row(arm, runs, base, facts.get("assumes", {})))
    return in_order(found)


def in_order(found: Iterable[Row]) -> list[Row]:
    return sorted(found, key=lambda row: row.difference.mean)


def _row(arm: str, runs: Sequence[Mapping], base: Mapping[int, float], assumes: Mapping[str, str]) -> Row:
    by_seed = {run["seed"]: bits_per_byte(run) / base[run["seed"]] - 1 for run in runs}
    middle = [run["middle"]["max"][0] for run in runs if run.get("middle")]
    measured = [run["measured"] for run in runs if "measured" in run]
    return Row(
        arm=arm,
        difference=over_seeds(list(by_seed.values())),
        by_seed=by_seed,
        bits=mean(map(bits_per_byte, runs)),
        trained=mean(middle) if middle else math.nan,
        heldout=[run["heldout"]["max"][0] for run in runs],
        layers=mean(mean(run["heldout"]["max"]) for run in runs),
        dead=mean(sum(run["heldout"]["dead"]) for run in runs),
        token_share=mean(mean(m["token_share"]) for m in measured) if measured else math.nan,
        leak={name: mean(m["leak"][name] for m in measured) for name in ("training", "evaluation")} if measured else {},
        step_seconds=mean(run["seconds"] / run["config"]["trainer"]["max_steps"] for run in runs),
        assumes=assumes,
    )


class Floor(NamedTuple):
    """What is nothing, relative bits per byte."""

    seeds: float  # what a mean difference must exceed, see `floor`; NaN for one seed
    elsewhere: tuple[float, ...]  # BASE at the same seed from another machine or older code: relative differences


def floor(found: Sequence[Row], results: Mapping, others: Iterable[Mapping] = ()) -> Floor:
    """The noise of the table: one spread of differences, pooled over all arms, and a bar for all comparisons together.

    The bar is Bonferroni's: each of m comparisons may be wrong in 5 % / m. It takes the arms' spreads as equal, which they
    are not quite, and the arms as independent, which they are not: all differences contain the runs of BASE. So chance
    exceeds it in more than 5 % of tables, and a verdict asks for an arm's own interval as well. For 33 arms and 3 seeds
    whose differences share as much as the recorded family's, a simulation gives 7 % for the bar, 4 % for both together.

    Args:
        found: its rows.
        results: that they are of.
        others: more results at the same scale, in which BASE may have been made on other machines.
    """
    arms = [list(row.by_seed.values()) for row in found if row.arm != BASE and len(row.by_seed) > 1]
    freedom, n = sum(len(values) - 1 for values in arms), max(map(len, arms), default=0)
    pooled = (sum((len(values) - 1) * variance(values) for values in arms) / freedom / n) ** 0.5 if arms else math.nan
    seeds = student(0.025 / len(arms), freedom) * pooled if arms else math.nan
    here = {run["seed"]: run for run in results["runs"] if run["arm"] == BASE}
    elsewhere = {
        (run["seed"], machine_of(run)): bits_per_byte(run) / bits_per_byte(here[run["seed"]]) - 1
        for other in others
        if other["scale"] == results["scale"]
        for run in other["runs"]
        if run["arm"] == BASE and run["seed"] in here and machine_of(run) != machine_of(here[run["seed"]])
    }
    return Floor(seeds, tuple(elsewhere.values()))


def verdict(row: Row, noise: Floor) -> str:
    """What the difference from BASE says. An interval that holds 0 says nothing, nor what seeds or another machine make."""
    if row.arm == BASE:
        return "the baseline"
    if row.difference.seeds < 2:
        return "one seed only"
    nothing = (noise.seeds, *map(abs, noise.elsewhere))  # nan, where no arm has two seeds, is below none
    if not row.difference.is_clear or any(abs(row.difference.mean) <= size for size in nothing):
        return "within noise"
    return "worse" if row.difference.mean > 0 else "better"


def assumptions(arm: Arm, scale: Scale) -> dict[str, str]:
    """What the arm's classes say of themselves, together; of the named balancer where it has none of its own."""
    from sigma_lite.balance.balancer import balancer  # torch comes with it
    from sigma_lite.model.assumes import assumed, together

    settings = dict(settings_of(arm, scale, seed=0))
    run = load_run([], settings)
    kinds: list[Any] = [] if run.custom_balance else [type(balancer(run.balance))]
    for path in named_in(settings["model"]):
        module, _, name = path.rpartition(".")
        kinds.append(getattr(importlib.import_module(module), name))
    return together([assumed(kind) for kind in kinds])._asdict()
