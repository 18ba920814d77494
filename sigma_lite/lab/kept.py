"""Runs that are kept from earlier: which of them this code would make again, and what becomes of the others.

An arm's own code is part of its folder's name (experiment.py), so an edited balancer is a new run. The package is not: an
edit there would orphan every run at once. Each run's diary holds fingerprints of the files that trained it instead, and
runs made by other code are not used, nor gone on with, until someone says what to do with them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sigma_lite import record
from sigma_lite.config import ConfigError, nearest, require
from sigma_lite.identity import changed_files, edited_since_import, package_code
from sigma_lite.lab.experiment import Run, Scale
from sigma_lite.storage import exclusive

CHOICES = ("again", "reuse")
NOT_RECORDED = "which code made it was not recorded"


def settle(runs: Sequence[Run], if_changed: str | None) -> None:
    """Before any work: find the runs that other code has made, and do with them what was asked for.

    Args:
        if_changed: "again" forgets them, so that they are trained anew; "reuse" takes them as they are, and results say
            that their rows come from different code; None raises ConfigError, which names the files that changed.
    """
    require(if_changed in (None, *CHOICES), f"if_changed={if_changed!r} does not exist; {nearest(str(if_changed), CHOICES)}")
    now = package_code()
    stale = {run.dir: (run, files) for run in runs if (files := made_by_other_code(run.dir, now))}
    if not stale:
        return
    runs_of_it, files = [run for run, _ in stale.values()], sorted({file for _, files in stale.values() for file in files})
    what = f"{_some([f'{run.arm!r} seed {run.seed}' for run in runs_of_it])} in {runs_of_it[0].dir.parents[1]}"
    changed = f"trained by other code than this; changed since: {_some(files)}"
    if if_changed is None:
        raise ConfigError(
            f"{what}: {changed}. Say what to do with what is kept: train it anew (--again, or in Python"
            ' if_changed="again") or take it as it is (--reuse, if_changed="reuse")'
        )
    print(f"{what}: {changed}; {'trained anew' if if_changed == 'again' else 'taken as it is'}", file=sys.stderr)
    if if_changed == "again":
        for run in runs_of_it:
            forget(run.dir)


def made_by_other_code(folder: Path, now: dict[str, str]) -> list[str]:
    """Files that differ from those that trained what a run's folder keeps, over all its starts; [] where nothing does."""
    from sigma_lite.checkpoint import newest_checkpoint  # torch comes with it, and `lab list` does without

    starts = record.read(folder / "record.jsonl", "run")
    if newest_checkpoint(folder) is None and not record.read(folder / "record.jsonl", "validation"):
        return []  # nothing of it would be used: it begins at its start
    found = [changed_files(start["code"], now) if "code" in start else [NOT_RECORDED] for start in starts]
    return sorted({file for files in found for file in files})


def forget(folder: Path) -> None:
    """Delete what a run has made, its measurements too: they are of weights that are no more."""
    from sigma_lite.checkpoint import checkpoints, remove

    with exclusive(folder / "run.lock"):
        for path in [folder / "record.jsonl", *folder.glob("*.json")]:
            path.unlink(missing_ok=True)
        for path in checkpoints(folder):
            remove(path)


def require_code_in_memory() -> None:
    """ConfigError where this process has imported what is no longer on disk: it would train one and record the other."""
    edited = edited_since_import()
    require(
        not edited,
        f"{_some(edited)} changed after this Python imported sigma_lite: start it again (in a notebook, restart the kernel),"
        " so that what trains is what is recorded",
    )


def require_commit(scale: Scale, is_kept: bool) -> None:
    """ConfigError where a recording that others will read would come from code that they cannot get."""
    if not (scale.recorded and is_kept):
        return
    from sigma_lite.train.provenance import DIRTY, git_commit

    commit = git_commit() or ""
    require(
        not commit.endswith(DIRTY),
        f"scale {scale.name} is recorded beside the code, and files of sigma_lite differ from commit"
        f" {commit.removesuffix(DIRTY)}: commit them first, or give --results another folder",
    )


def _some(names: Sequence[str], most: int = 6) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
