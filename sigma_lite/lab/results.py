"""Finished runs into one small JSON file: all that figures, book and README draw from."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sigma_lite import record
from sigma_lite.config import ConfigError, ModelConfig, nearest, require
from sigma_lite.identity import code_digest, differences
from sigma_lite.lab.experiment import Experiment, Run, Scale
from sigma_lite.storage import StorageError, atomic_write

POINTS = 100  # of a loss curve; each is the mean over its share of the steps
MIDDLE = (0.5, 0.7)  # of the steps: warmed up, still at the full learning rate, several windows of tokens pooled


class Results(dict):
    """One results file, ready for a notebook: the keys that `write_results` wrote, and three ways to look at them.

    Left as the last line of a cell, it shows its table.
    """

    def table(self) -> str:
        """The final numbers of every arm as lines of text: mean over seeds, and their range; then where they come from."""
        from sigma_lite.figures import final_rows, origins

        head, rows = final_rows(self)
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
        return "\n".join([*(line.rstrip() for line in lines), "", *origins(self)]).rstrip()

    def only(self, *arms: str) -> Results:
        """The same with these arms, in this order: a figure of few lines. Raises ConfigError naming the nearest arm."""
        for name in arms:
            require(name in self["arms"], f"{self['experiment']} has no arm {name!r}; {nearest(name, self['arms'])}")
        runs = [run for name in arms for run in self["runs"] if run["arm"] == name]
        return Results({**self, "arms": {name: self["arms"][name] for name in arms}, "runs": runs})

    def figure(self, name: str) -> Any:
        """One of sigma_lite.figures.OF_RESULTS, such as "layer0_deviation", drawn from these results: a go.Figure.

        Raises ConfigError naming the nearest.
        """
        from sigma_lite.figures import OF_RESULTS

        require(name in OF_RESULTS, f"figure {name!r} does not exist; {nearest(name, OF_RESULTS)}")
        return OF_RESULTS[name](self)

    def _repr_html_(self) -> str:
        from sigma_lite.figures import final_rows, origins
        from sigma_lite.report import markup

        return markup.table(*final_rows(self)) + "".join(markup.paragraph(said, "subtitle") for said in origins(self))


def is_finished(run: Run) -> bool:
    """Whether a run reached its last step and was measured on held-out text."""
    return any(entry["step"] == run.steps for entry in record.read(run.dir / "record.jsonl", "validation"))


def results_path(folder: str | Path, experiment: str, scale: str) -> Path:
    return Path(folder) / f"{experiment}-{scale}.json"


def write_results(path: Path, experiment: Experiment, scale: Scale, runs: Sequence[Run], command: str) -> None:
    """Collect the diaries of finished runs; the file is replaced whole or not at all.

    Args:
        command: the call that made these runs, kept with each; one that the file holds already keeps its own.
    """
    made = [run_facts(run, experiment.measure) for run in runs]
    then = {_which(run): run["command"] for run in _recorded(path) if "command" in run}
    facts = {
        "experiment": experiment.name,
        "question": experiment.question,
        "figures": list(experiment.figures),
        "scale": scale.name,
        "scale_says": scale.description,
        "command": command,
        "arms": {arm.name: {"says": arm.description, "branch": arm.branch} for arm in experiment.arms},
        **({"protocol": experiment.protocol} if experiment.protocol else {}),
        "runs": [run | {"command": then.get(_which(run), command)} for run in made],
    }
    if experiment.protocol:
        from sigma_lite.lab.standing import assumptions  # imports torch and the model

        for arm in experiment.arms:
            facts["arms"][arm.name]["assumes"] = assumptions(arm, scale)
    kept, order = _kept(path, facts["runs"], set(facts["arms"])), list(facts["arms"])
    facts["runs"] = sorted(kept + facts["runs"], key=lambda run: order.index(run["arm"]))
    with atomic_write(path) as file:
        file.write(json.dumps(facts, separators=(",", ":")).replace('{"arm":', '\n{"arm":').encode() + b"\n")


def read_results(path: str | Path) -> Results:
    """What `write_results` wrote. Raises StorageError, naming the command that makes the file, when there is none."""
    path = Path(path)
    if not path.is_file():
        name, _, scale = path.stem.rpartition("-")
        raise StorageError(f"{path} does not exist: run `sigma-lite lab run {name} --scale {scale}` first")
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not {"experiment", "scale", "arms", "runs"} <= found.keys():
            raise ValueError("no experiment, scale, arms and runs in it")
        return Results(found)
    except ValueError as error:
        raise StorageError(
            f"{path} is damaged ({error}): delete it and run the experiment again, its runs are kept"
        ) from error


def _recorded(path: Path) -> list[dict[str, Any]]:
    return read_results(path)["runs"] if path.is_file() else []


def _which(facts: Mapping) -> tuple:
    """A run and not another training of it: `time` is that of its last start."""
    return facts["arm"], facts["seed"], facts["time"]


def how_to_repeat(results: Mapping) -> str:
    """The command that makes all runs of a file; for one of several calls the plain one, and what it does instead."""
    calls = {run.get("command", results["command"]) for run in results["runs"]}
    of_a_file = results["command"].startswith("sigma-lite lab run ")  # other calls have no form for all arms
    some_arms = " --arms " in results["command"] and any("command" not in run for run in results["runs"])
    if of_a_file and (len(calls) > 1 or some_arms):  # older runs do not say of which call they are
        plain = f"sigma-lite lab run {results['experiment']} --scale {results['scale']}"
        return f"{plain}\n(this file is of several calls; the command trains all arms again with today's code)"
    return results["command"] or "unknown"


def _kept(path: Path, new: list[dict[str, Any]], arms: set[str]) -> list[dict[str, Any]]:
    """Runs recorded earlier, perhaps elsewhere, of other seeds of these arms: more seeds add to a file.

    One whose settings are not those of the arm's new runs was another experiment, and one of an arm that is no more has no
    place. Both are dropped, and it is said.
    """
    latest, names = {facts["arm"]: facts for facts in new}, {(facts["arm"], facts["seed"]) for facts in new}
    old = [facts for facts in _recorded(path) if (facts["arm"], facts["seed"]) not in names]
    kept = []
    for facts in old:
        why = _other_settings(facts, latest.get(facts["arm"], facts)) if facts["arm"] in arms else "the arm is no more"
        if why:
            print(f"{path}: {facts['arm']!r} seed {facts['seed']}, recorded earlier, is dropped: {why}", file=sys.stderr)
        else:
            kept.append(facts)
    return kept


def _other_settings(then: dict[str, Any], now: dict[str, Any]) -> str:
    """In what two runs differ besides their seed, "" for nothing; a setting that one is too old to know counts as equal."""
    for part in ("net", "sparsity", "balance", "optim", "corpus", "rows", "trainer"):
        a, b = (side["config"].get(part, {}) for side in (then, now))
        for key in sorted((a.keys() & b.keys()) - {"seed", "dir"}):
            if a[key] != b[key]:
                return f"{part}.{key}={a[key]} then, {b[key]} now"
    return differences(then["config"], now["config"])


def run_facts(run: Run, measure: str = "") -> dict[str, Any]:
    """One finished run: where it came from, its curves, its loads (see `_middle`) and its held-out measurement.

    Args:
        measure: a name of lab/measure.py's MEASURES, whose result is added as `measured`.
    """
    from sigma_lite.figures.series import windows  # plotly comes with it, and `plan` does without

    entries = record.read(run.dir / "record.jsonl")
    require(is_finished(run), f"{run.dir} is not finished: run the experiment again, it continues")
    starts = [e for e in entries if e["kind"] == "run"]
    start = starts[-1]
    steps = [e for e in entries if e["kind"] == "step"]
    loads = windows(entries)
    heldout = [e for e in entries if e["kind"] == "validation"][-1]
    return {
        "arm": run.arm,
        "seed": run.seed,
        **{key: start[key] for key in ("time", "commit", "device", "versions", "config")},
        **{key: start[key] for key in ("cpu", "experts") if key in start},
        "commits": list(dict.fromkeys(e.get("commit") for e in starts)),  # of all starts: each has made some of the steps
        "code": list(dict.fromkeys(code_digest(e["code"]) for e in starts if "code" in e)),
        "refused_steps": sum("skip" in e["what"] for e in entries if e["kind"] == "event"),
        "tokens": steps[-1]["tokens"],
        "seconds": steps[-1]["seconds"],
        "active_params": [steps[0]["active_params"], steps[-1]["active_params"]],
        "k": [steps[0]["k"], steps[-1]["k"]],
        "events": [e for e in entries if e["kind"] == "event"],
        "curve": _curve(steps),
        "scores": _scores(entries, start["config"]),
        "load": _load_series(loads),
        "middle": _middle(loads, run.steps),
        "last": {key: loads[-1][key] for key in ("f", "P", "bias") if key in loads[-1]} if loads else {},
        "heldout": {
            "nats_per_token": heldout["nats_per_token"],
            "bits_per_byte": heldout["bits_per_byte"],
            **{key: heldout[key] for key in ("f", "P", "lbl")},
            **_deviations(heldout["f"]),
        },
        **({"measured": _measured(run, measure)} if measure else {}),
    }


def parts_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """Identities of the parts of its own that a run's recorded settings hold, by name."""
    return {name.removeprefix("parts."): part for name, part in config.items() if name.startswith("parts.")}


def active_parameters(facts: Mapping[str, Any]) -> list[int] | None:
    """Of a recorded run, at its first and its last step; None where nobody can tell.

    Older runs recorded what the shape alone says, whatever their parts were. It is counted anew where all parts are this
    package's: a record names no code of others that would be run.
    """
    recorded, parts = facts["active_params"], parts_in(facts["config"])
    if not parts:
        return recorded
    net = ModelConfig(**facts["config"]["net"])
    if recorded != [net.ledger(k).active for k in facts["k"]]:
        return recorded
    if not all(isinstance(part, dict) and part["class"].startswith("sigma_lite.") for part in parts.values()):
        return None
    named = {name: {"class_path": part["class"], "init_args": part["settings"]} for name, part in parts.items()}
    shape = _counted(json.dumps(facts["config"]["net"]), json.dumps(named))
    return shape and [shape.ledger(k).active for k in facts["k"]]


@lru_cache(maxsize=1)  # seeds of an arm follow each other
def _counted(net: str, parts: str) -> ModelConfig | None:
    """The shape of such a model; None for a class that has another name now, or a setting that is no plain value."""
    from sigma_lite.scale.parameters import counted  # torch comes with it

    try:
        return counted(ModelConfig(**json.loads(net)), json.loads(parts))
    except ConfigError:
        return None


def _measured(run: Run, measure: str) -> Any:
    from sigma_lite.lab.measure import measured  # imports torch and the model

    return measured(run.dir, measure)


def _middle(loads: list[dict], steps: int) -> dict[str, Any]:
    """The windows of the MIDDLE of the run as one: tokens, lbl [L], and max, min, dead [L]; {} for a run too short."""
    inside = [e for e in loads if MIDDLE[0] * steps < e["step"] <= MIDDLE[1] * steps]
    if not inside:
        return {}
    tokens = sum(e["tokens"] for e in inside)
    f, P = ([_pooled(layer, inside, tokens) for layer in zip(*(e[key] for e in inside), strict=True)] for key in ("f", "P"))
    lbl = [_short(len(f_E) * sum(a * b for a, b in zip(f_E, P_E, strict=True))) for f_E, P_E in zip(f, P, strict=True)]
    return {"tokens": tokens, "lbl": lbl, **_deviations(f)}


def _pooled(windows: Sequence[list[float]], entries: list[dict], tokens: int) -> list[float]:
    """One layer's shares over several windows, weighted by their tokens."""
    weights = [e["tokens"] / tokens for e in entries]
    return [sum(w * x for w, x in zip(weights, values, strict=True)) for values in zip(*windows, strict=True)]


def _scores(entries: list[dict], config: dict) -> dict[str, list]:
    """Held-out bits per byte over the run, against the tokens and the training FLOPs that each took.

    A model with parts of its own has no `flops`: nobody has counted what they do.
    """
    from sigma_lite.scale.traffic import flops_per_token

    net, spent, tokens, flops = ModelConfig(**config["net"]), {0: (0, 0.0)}, 0, 0.0
    for entry in (e for e in entries if e["kind"] == "step"):
        per_token = flops_per_token(net, entry["k"], config["rows"]["length"]).training
        flops += per_token * (entry["tokens"] - tokens)
        tokens = entry["tokens"]
        spent[entry["step"]] = tokens, flops
    scores = {e["step"]: e["bits_per_byte"] for e in entries if e["kind"] == "validation"}
    return {
        "step": list(scores),
        "tokens": [spent[step][0] for step in scores],
        **({} if parts_in(config) else {"flops": [spent[step][1] for step in scores]}),
        "bits_per_byte": list(scores.values()),
    }


def _curve(steps: list[dict]) -> dict[str, list[float]]:
    size = max(1, len(steps) // POINTS)
    bins = [steps[i : i + size] for i in range(0, len(steps), size)]
    terms = {name: [_mean(e["terms"][name] for e in part) for part in bins] for name in ("lm", "balance", "z")}
    lbl = [_mean(e["lbl"] for e in part) for part in bins]
    at = {name: [part[-1][name] for part in bins] for name in ("step", "tokens")}
    return {**at, **terms, "lbl": lbl}


def _load_series(loads: list[dict]) -> dict[str, list]:
    """Per window and layer; bias spread and mean only where a bias moved."""
    series: dict[str, list] = {"step": [e["step"] for e in loads], "window_tokens": [e["tokens"] for e in loads]}
    for entry in loads:
        for name, value in _deviations(entry["f"]).items():
            series.setdefault(name, []).append(value)
        bias = entry.get("bias")
        series.setdefault("bias_spread", []).append([_short(max(b) - min(b)) for b in bias] if bias else None)
        series.setdefault("bias_mean", []).append([_short(sum(b) / len(b)) for b in bias] if bias else None)
    return {**series, **{name: [e[name] for e in loads] for name in ("lbl", "router_entropy")}}


def _deviations(f: list[list[float]]) -> dict[str, list]:
    """max and min of E f - 1 and experts without a token, for each layer."""
    return {
        "max": [_short(len(row) * max(row) - 1) for row in f],
        "min": [_short(len(row) * min(row) - 1) for row in f],
        "dead": [sum(value == 0 for value in row) for row in f],
    }


def _mean(values) -> float:
    values = list(values)
    return _short(sum(values) / len(values))


def _short(value: float) -> float:
    return float(f"{value:.5g}")
