"""What an experiment is: a question, arms that differ in a few settings, and scales that say how large to run them.

An arm is a patch on a scale's yaml. Arms with the same settings are one run, whatever experiments they serve: the
top-1 arm of fig2, fig3, fig4 and table3 is trained once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sigma_lite.config import ConfigError, nearest, require
from sigma_lite.identity import identify_named
from sigma_lite.lightning_keys import PARTS
from sigma_lite.runfile import overlay

Patch = Mapping[str, object]
"""Nested yaml keys: {"model": {"balance": {"weight": 0.1}}}."""


@dataclass(frozen=True)
class Share:
    """A share of a run's optimizer steps, for settings that are steps: 0.7 of 800 is step 560."""

    of_steps: float


@dataclass(frozen=True)
class RowShare:
    """A share of an optimizer step's rows, for settings that are rows: 0.25 of per_step = 32 is 8."""

    of_rows: float


@dataclass(frozen=True)
class WholeSaves:
    """A share of a run's optimizer steps, as the nearest number that ends with a checkpoint (save.every)."""

    of_steps: float


@dataclass(frozen=True)
class DenseWidth:
    """The width of a dense model's one expert that gives it the scale's mixture's size or work.

    Args:
        same: "active": the parameters that work for a token at the end of the run, embeddings aside; "work": the training
            FLOPs of the whole run, in which a schedule's first steps have more experts per token.
    """

    same: str


@dataclass(frozen=True)
class Arm:
    """One line of a plot.

    Args:
        name: as it stands in legends.
        description: one sentence: what is different here, and what one expects.
        patch: yaml keys laid over the scale's.
        branch: (another arm's name, share of the run): begin from that arm's checkpoint at that share of its steps
            instead of from the start. Up to there the two must be the same run.
        seeds: instead of the scale's, where one seed is enough.
        own: what a balancer or parts that exist only in memory are (class, settings and code, as text); an edited one is
            another run.
    """

    name: str
    description: str
    patch: Patch = field(default_factory=dict)
    branch: tuple[str, float] | None = None
    seeds: tuple[int, ...] | None = None
    own: str = ""


@dataclass(frozen=True)
class Experiment:
    """A question and its arms. `figures` names those of sigma_lite.figures.OF_RESULTS that draw the answer."""

    name: str
    question: str
    arms: tuple[Arm, ...]
    figures: tuple[str, ...] = ("layer0_deviation", "final_table")
    measure: str = ""  # what is measured after training, a name of lab/measure.py's MEASURES
    protocol: str = ""  # version of the rules under which others' rows may stand beside these: lab/family.py

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        require(len(set(names)) == len(names), f"experiment {self.name}: two arms have the same name in {names}")
        for arm in self.arms:
            known = arm.branch is None or arm.branch[0] in names
            require(known, f"experiment {self.name}: arm {arm.name!r} branches from {arm.branch}, which is no arm of it")

    def arm(self, name: str) -> Arm:
        """Raises ConfigError naming the nearest."""
        names = [arm.name for arm in self.arms]
        require(name in names, f"experiment {self.name} has no arm {name!r}; {nearest(name, names)}")
        return self.arms[names.index(name)]

    def chosen(self, names: Sequence[str] | None) -> list[Arm]:
        """These arms (None: all) with those that they branch from, which come first."""
        asked = list(self.arms) if names is None else [self.arm(name) for name in names]
        wanted = {arm.name for arm in asked} | {arm.branch[0] for arm in asked if arm.branch is not None}
        return sorted((arm for arm in self.arms if arm.name in wanted), key=lambda arm: arm.branch is not None)


@dataclass(frozen=True)
class Scale:
    """How large: a whole yaml as nested keys, and the seeds. `description` gives hardware and time, as measured.

    Results of a `recorded` scale are kept beside the code, which must then be the code of a commit.
    """

    name: str
    description: str
    settings: Patch
    seeds: tuple[int, ...] = (0,)
    recorded: bool = False

    @property
    def steps(self) -> int:
        return self.settings["trainer"]["max_steps"]  # type: ignore[index]

    @property
    def rows_per_step(self) -> int:
        return self.settings["data"]["rows"]["per_step"]  # type: ignore[index]


@dataclass(frozen=True)
class Run:
    """One arm with one seed at one scale: a folder and everything that is in its yaml."""

    arm: str
    seed: int
    settings: Patch
    dir: Path
    branch: tuple[Path, int] | None = None  # (run to begin from, optimizer step)

    @property
    def steps(self) -> int:
        return self.settings["trainer"]["max_steps"]  # type: ignore[index]


def settings_of(arm: Arm, scale: Scale, seed: int) -> Patch:
    """The whole yaml of one run, without its folder."""
    seeded = {"seed_everything": seed, "data": {"rows": {"seed": seed}}}
    return overlay(overlay(dict(scale.settings), _counted(arm.patch, scale)), seeded)


def _counted(node: Any, scale: Scale) -> Any:
    """The same settings with each Share as a number of steps, each RowShare as rows, each DenseWidth as hidden units."""
    if isinstance(node, Mapping):
        return {key: _counted(value, scale) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_counted(value, scale) for value in node]
    if isinstance(node, WholeSaves):
        every = scale.settings["save"]["every"]  # type: ignore[index]
        return max(1, round(node.of_steps * scale.steps / every)) * every
    if isinstance(node, DenseWidth):
        return _dense_width(node.same, scale.settings)
    if isinstance(node, RowShare):
        return round(node.of_rows * scale.rows_per_step)
    return round(node.of_steps * scale.steps) if isinstance(node, Share) else node


def _dense_width(same: str, settings: Patch) -> int:
    """The width that comes nearest. Every layer's router and experts are exchanged for one SwiGLU; all else is the same."""
    model, steps = settings["model"], settings["trainer"]["max_steps"]  # type: ignore[index]
    net, schedule = model["net"], model.get("sparsity", {})
    k_last = [net["top_k"]] * net["n_layers"]
    head = list(schedule.get("head", ()))
    k_first = head + k_last[len(head) :]
    share = min(1.0, schedule.get("switch_step", 0) / steps) if same == "work" else 0.0
    slots = share * sum(k_first) + (1 - share) * sum(k_last)  # experts per token over all layers, mean over the run
    return round(net["n_experts"] / 3 + net["d_expert"] * slots / net["n_layers"])  # a router row is a third of a unit


def run_dir(arm: Arm, scale: Scale, seed: int, root: Path) -> Path:
    """ROOT/SCALE/HASH/seedN: the hash is of what the weights depend on, so another experiment's same arm is found.

    That is the settings, and the code of what they name or of the arm's own balancer. A branch is not part of it:
    beginning from another run's checkpoint saves time and changes nothing. Nor is the rest of the package: see kept.py.
    """
    settings = {key: value for key, value in settings_of(arm, scale, seed=-1).items() if key != "save"}
    what = json.dumps([settings, arm.own, *_code_of(arm, settings)], sort_keys=True)
    return root / scale.name / hashlib.blake2b(what.encode(), digest_size=4).hexdigest() / f"seed{seed}"


def _code_of(arm: Arm, settings: Patch) -> list[str]:
    """Fingerprints of the classes and functions that the settings name. Raises ConfigError for one that is not there."""
    try:
        return [identify_named(path) for path in named_in(settings)]
    except Exception as error:  # whatever a reader's own file raises
        raise ConfigError(f"arm {arm.name!r} names code that cannot be imported: {error}") from error


def named_in(node: Any, key: str = "") -> Iterator[str]:
    """Import paths in settings: what a `class_path` says, and a custom_balance or a part that is a name."""
    if isinstance(node, Mapping):
        for name in sorted(node):
            yield from named_in(node[name], name)
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from named_in(item)
    elif key in ("class_path", "custom_balance", *PARTS) and isinstance(node, str):
        yield node


def runs_of(
    experiment: Experiment,
    scale: Scale,
    root: Path,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
) -> list[Run]:
    """Every run of an experiment, or of some of its arms, those that others branch from first.

    Raises: ConfigError for seeds that are none, or one twice, which would count twice in every mean.
    """
    require(seeds is None or len(seeds) == len(set(seeds)) > 0, f"seeds={list(seeds or [])}: give at least one, each once")
    return [
        _run(experiment, arm, scale, seed, root)
        for arm in experiment.chosen(arms)
        for seed in (seeds if seeds is not None else arm.seeds or scale.seeds)
    ]


def _run(experiment: Experiment, arm: Arm, scale: Scale, seed: int, root: Path) -> Run:
    folder = run_dir(arm, scale, seed, root)
    settings = overlay(dict(settings_of(arm, scale, seed)), {"trainer": {"default_root_dir": str(folder)}})
    branch = None
    if arm.branch is not None:
        parent, share = experiment.arm(arm.branch[0]), arm.branch[1]
        branch = (run_dir(parent, scale, seed, root), round(share * scale.steps))
    return Run(arm.name, seed, settings, folder, branch)
