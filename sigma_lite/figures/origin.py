"""Where the rows of a lab's results come from, in words: what a reader must know before rows are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sigma_lite.figures.arms import Results, arms

DIRTY = "-dirty"
MARK = "\u00a0†"


def commits_of(run: dict) -> list[str]:
    """Of every start of a run that was gone on with, or branched, in order; [] where none was recorded."""
    return [commit for commit in run.get("commits") or [run.get("commit")] if commit]


def refused_steps(run: dict) -> int:
    """Optimizer steps whose gradient was refused: the weights have seen so many updates fewer."""
    return sum("skip" in str(event.get("what")) for event in run.get("events") or [])


def machine_of(run: dict) -> str:
    """CPU and its vector instructions, and what multiplied the experts; older runs did not record them."""
    cpu, experts = run.get("cpu"), run.get("experts")
    if not cpu:
        return f"{run['device']}: what torch used of it is not recorded"
    return f"{run['device']}: {cpu['instructions']}" + (f", experts by backend {experts['backend']!r}" if experts else "")


def marked(name: str, runs: Iterable[dict]) -> str:
    """An arm's name, with a mark where code that is in no commit has made a run of it."""
    return name + MARK * any(commit.endswith(DIRTY) for run in runs for commit in commits_of(run))


def origins(results: Results) -> list[str]:
    """One sentence each on commits, uncommitted code, refused steps and machines."""
    runs = [run for _, _, found in arms(results) for run in found]
    return [sentence for tell in (_commits, _uncommitted, _refused, _machines) if runs and (sentence := tell(runs))]


def _commits(runs: list[dict]) -> str:
    places = _grouped(runs, lambda run: " → ".join(commits_of(run)) or "not recorded")
    if len(places) == 1:
        (commit,) = places
        return f"All rows come from commit {commit}." if commit != "not recorded" else "The rows' commit was not recorded."
    codes = {tuple(run.get("code") or ()) for run in runs}
    same = "whether the code that trains differs was not recorded" if () in codes else "the code that trains differs"
    same = "the code that trains is the same" if len(codes) == 1 and () not in codes else same
    found = "; ".join(
        f"{commit} ({', '.join(dict.fromkeys(map(_day, made)))}): {_rows(made)}" for commit, made in places.items()
    )
    return f"The rows come from {len(places)} different commits, and {same}: {found}."


def _uncommitted(runs: list[dict]) -> str:
    dirty = [run for run in runs if any(commit.endswith(DIRTY) for commit in commits_of(run))]
    return f"† {len(dirty)} of {len(runs)} runs were made by code that is in no commit (-dirty): {_rows(dirty)}." * bool(
        dirty
    )


def _refused(runs: list[dict]) -> str:
    lost = {count: made for count, made in _grouped(runs, refused_steps).items() if count}
    found = "; ".join(f"{count} in {'each of ' * (len(made) > 1)}{_rows(made)}" for count, made in sorted(lost.items()))
    return f"Refused steps: {found}." if lost else "No step was refused."


def _machines(runs: list[dict]) -> str:
    places = _grouped(runs, machine_of)
    if len(places) == 1:
        return f"{next(iter(places))}."
    return f"{len(places)} kinds of machine: " + "; ".join(f"{name}: {_rows(made)}" for name, made in places.items()) + "."


def _grouped(runs: list[dict], by: Callable) -> dict:
    found: dict = {}
    for run in runs:
        found.setdefault(by(run), []).append(run)
    return found


def _rows(runs: list[dict]) -> str:
    """ "LBL, K = 1 (seeds 0, 1), K = 8 low (seed 2)"."""
    arms = _grouped(runs, lambda run: run["arm"])
    return ", ".join(
        f"{arm} (seed{'s' * (len(made) > 1)} {', '.join(str(run['seed']) for run in made)})" for arm, made in arms.items()
    )


def _day(run: dict) -> str:
    return str(run.get("time") or "no date")[:10]
