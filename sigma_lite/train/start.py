"""How a run begins, in one place.

    new          nothing is there: step 0, weights as torch's seed and their names give them
    resume       the run's folder holds a checkpoint of the same settings: go on, as if nothing had happened
    extend       ... of the same settings but for a smaller max_steps, and --extend: go on from the newest checkpoint up to
                 which both lengths have the same rates. What lies behind it moves to RUN/ended-at-STEP, a run of its own
    branch_from  another run's checkpoint, with other settings: weights, moments, step and diary are taken over
    init_from    another run's weights, and nothing else

Nothing of a parent is changed, and its files are read again should a kill come before the first own checkpoint. Who the
parent was stands in `config.parent` of the run's diary and in every checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sigma_lite.checkpoint import SUFFIX, checkpoints, digest_of, newest_whole, read_plain, read_settings, step_of
from sigma_lite.config import OPTIMIZERS, OptimConfig, StartConfig, class_named, nearest, plain_path, require
from sigma_lite.data.tokenizer import FILE
from sigma_lite.identity import differences
from sigma_lite.runfile import from_mapping
from sigma_lite.storage import sha256_of
from sigma_lite.train.branch import Branch
from sigma_lite.train.optim import schedule_of
from sigma_lite.train.settings import STEPS, completed, flat, of_another_model, require_same_settings


@dataclasses.dataclass
class Start:
    """What `fit` does before its first step."""

    how: str = "new"  # new | resume | extend | branch_from | init_from
    checkpoint: Path | None = None  # what is restored; of init_from, what weights are taken from
    branch: Branch | None = None  # how it is read, where the settings differ
    parent: dict[str, Any] | None = None  # of a branch and of init_from, also once they go on by themselves
    aside: tuple[Path, ...] = ()  # of extend: checkpoints behind the one that it goes on from
    new_weights: str = "refuse"

    @property
    def restored(self) -> Path | None:
        return None if self.how == "init_from" else self.checkpoint


def find_start(run: Path, words: StartConfig, now: Mapping[str, Any], say: Callable[[str], object] | None = None) -> Start:
    """Which of the ways it is. Changes no file.

    Args:
        words: what was asked for.
        now: this run's settings.
        say: takes the sentence about damaged checkpoints; default: standard error.

    Raises: ConfigError, with the word that would allow it, for a checkpoint that this config cannot go on from.
    """
    newest = newest_whole(run, say)
    if newest is None:
        require(not words.extend, f"{run} holds no checkpoint, so there is nothing to extend: leave --extend out")
        return _from_parent(run, words, now)
    saved = completed(read_settings(newest))
    _require_same_parent(newest, saved, words)
    if words.extend and saved["trainer"]["max_steps"] != now["trainer"]["max_steps"]:
        return _extended(newest, saved, now, say)
    require_same_settings(newest, now)
    return Start("resume", newest, parent=saved.get("parent"))


def _extended(newest: Path, saved: Mapping[str, Any], now: Mapping[str, Any], say: Callable | None) -> Start:
    run, was, end = newest.parents[1], saved["trainer"]["max_steps"], now["trainer"]["max_steps"]
    shorter = f"--extend makes a run longer, and {run} has trainer.max_steps={was}, not {end} or less"
    require(was < end, f"{shorter}: --branch_from a step before {end} in another folder ends it sooner")
    require_same_settings(newest, now, but=(STEPS,))
    optim = from_mapping(OptimConfig, now["optim"], "optim")
    schedule, steps = schedule_of(optim), range(step_of(newest))
    parted = (s for s in steps if schedule(s, total_steps=was, optim=optim) != schedule(s, total_steps=end, optim=optim))
    common = next(parted, step_of(newest))  # steps made so far that both lengths make alike
    trunk = newest_whole(run, say, last=common)
    kept = ", ".join(str(step_of(path)) for path in checkpoints(run))
    require(
        trunk is not None,
        f"{run} cannot be extended to trainer.max_steps={end}: from step {common} on its rates were those of {was} steps,"
        f" and its checkpoints are of steps {kept}. In another folder --branch_from={newest} goes on from there with other"
        f" rates; save.milestones=[{common}] keeps the end of the plateau next time",
    )
    behind = tuple(path for path in checkpoints(run) if step_of(path) > step_of(trunk))
    return Start("extend", trunk, Branch(step_of(trunk), saved, now), saved.get("parent"), behind)


def _from_parent(run: Path, words: StartConfig, now: Mapping[str, Any]) -> Start:
    how = "branch_from" if words.branch_from else "init_from" if words.init_from else "new"
    if how == "new":
        return Start()
    given = getattr(words, how)
    path = checkpoint_named(given, how)
    require(path.parents[1].resolve() != run.resolve(), f"{how}={given} is this run's own folder: leave {how} out")
    saved = completed(read_settings(path))
    parent = {"how": how, "given": given, "run": str(path.parents[1]), "checkpoint": path.name}
    parent |= {"step": read_plain(path).get("global_step", 0), "sha256": digest_of(path)}
    prepared = Path(now["corpus"]["dir"], FILE)
    if prepared.is_file():  # otherwise once it is made
        require_tokenizer(path, sha256_of(prepared))
    if how == "init_from":
        return Start(how, path, parent=parent, new_weights=words.new_weights)
    _require_same_model(path, saved, now)
    step, end = parent["step"], now["trainer"]["max_steps"]
    require(step < end, f"{how}={path} is of step {step}, not before trainer.max_steps={end}: raise that to go on")
    branch = Branch(step, saved, now)
    return Start(how, path, branch, parent | {"changed": branch.changed})


def checkpoint_named(given: str, setting: str) -> Path:
    """The checkpoint that a setting names, by itself or as the newest whole one of a run."""
    path = Path(plain_path(given, setting))
    if path.name.endswith(SUFFIX):
        run = path.parents[1]
        there = [str(other) for other in checkpoints(run)]
        have = nearest(str(path), there) if there else f"{run} holds no checkpoint"
        require(path.exists(), f"{setting}={given} does not exist: {have}")
        return path
    newest = newest_whole(path)
    require(
        newest is not None, f"{setting}={given} holds no checkpoint: give the folder of a run that was trained, or a file"
    )
    return newest


def require_tokenizer(checkpoint: Path, sha256: str) -> None:
    """ConfigError unless this tokenizer.json is the one that a checkpoint's run was trained with.

    A run that was not trained here has it in its folder. Weights know tokens by number only.
    """
    run = checkpoint.parents[1]
    trained_with = read_plain(checkpoint).get("TokenDataModule", {}).get("tokenizer sha256")
    beside = run / FILE
    if trained_with is None and beside.is_file():
        trained_with = sha256_of(beside)
    require(
        trained_with is not None,
        f"which tokenizer {checkpoint} was trained with is not known: put its {FILE} into {run}",
    )
    require(
        trained_with == sha256,
        f"{checkpoint} was trained with another tokenizer than this run's data has (sha256 {trained_with[:12]}, not"
        f" {sha256[:12]}), so its tokens mean something else here: prepare the data with the tokenizer of {run}",
    )


def _require_same_model(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A branch keeps weights and moments: the model and the kind of optimizer must be the parent's."""
    instead = (
        "a branch keeps weights and moments; --init_from takes the weights alone, with --new_weights=begin for the rest"
    )
    one, other = flat({"net": saved["net"]}), flat({"net": now["net"]})
    for name, value in other.items():
        was = one.get(name)
        same = was == value or not of_another_model(name)
        require(same, f"{path} holds a model with {name}={was}, this config says {value}: {instead}")
    parts = [{n: v for n, v in side.items() if n.startswith("parts.")} for side in (saved, now)]
    require(not (differs := differences(*parts)), f"{path} holds a model with {differs}: {instead}")
    was, new = (class_named(side["optim"]["optimizer"], "optim.optimizer", OPTIMIZERS)[0] for side in (saved, now))
    require(was == new, f"{path} holds the state of optim.optimizer={was}, this config says {new}: {instead}")


def _require_same_parent(newest: Path, saved: Mapping[str, Any], words: StartConfig) -> None:
    """What this config says the run began from must be what it began from; a config need not say it any more."""
    parent = saved.get("parent") or {}
    for how in ("branch_from", "init_from"):
        given = getattr(words, how)
        was = parent.get("given") if parent.get("how") == how else None
        require(
            given in (None, was),
            f"{newest.parents[1]} holds a run that began from {was or 'nothing else'}, this config says {how}={given}:"
            " choose another trainer.default_root_dir, or leave the word out to go on",
        )
