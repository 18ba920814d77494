"""After pretraining, in arms: worked steps or none, a random start, no balance, frozen routers, replay, a family, rewards.

RUN is a finished pretraining of the toy. Each arm is `sigma-lite fit -c scaled_configs/post/sft1.yaml`, or reward.yaml, with
other settings; `rewarded` and its null arm begin from `begun`, worked examples cut short. A run goes on where it was cut off
and what is finished is kept, so the same command again does the rest. Measured on problems that nobody trained on: exact
match; bits per byte of the held-out programs (forgetting); what `sigma-lite eval ARM drift --against RUN` says of experts.
Writes results/bench/post.json.

    sigma-lite fit -c scaled_configs/toy.yaml
    python benchmarks/post.py runs/toy [--seeds 3] [--arms NAME ...] [--steps N] [--rows 4] [--problems 200] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sigma_lite import record
from sigma_lite.checkpoint import digest_of, newest_whole
from sigma_lite.reading import overlay, read_yaml
from sigma_lite.serve.answers import exact_match
from sigma_lite.serve.drift import drift
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import write_json
from sigma_lite.train.provenance import device_name, git_commit
from sigma_lite.train.run import RunCLI

ROOT = Path(__file__).parents[1]
POST = ROOT / "scaled_configs" / "post"
FAMILY = ["sort5", "reverse6", "two_step5", "add3"]
START, SHORT = "begun", 145  # the arm that those with rewards begin from, and its steps: pretraining shows in these


def sft(tasks: list[str], steps: int, replay: float = 0.0, **more: Any) -> dict[str, Any]:
    """What an arm changes in sft1.yaml. Without replay its source is only measured."""
    source = {"tasks": tasks, **{name: more.pop(name) for name in ("worked",) if name in more}}
    mixture = {"sources": {"problems": source}, "weights": {"problems": 1 - replay, "replay": replay}}
    return overlay({"data": {"mixture": mixture}, "trainer": {"max_steps": steps}}, more)


def rewards(steps: int, **more: Any) -> dict[str, Any]:
    """What an arm changes in reward.yaml."""
    return {"trainer": {"max_steps": steps}, "model": {"reward": more}}


ARMS: dict[str, dict[str, Any]] = {
    "worked": sft(["add2"], 250),
    "direct": sft(["add2"], 250, worked=False),
    "random start": sft(["add2"], 250, init_from=None),
    "no balance": sft(["add2"], 250, model={"balance": {"loss": "none", "z_weight": 0.0}}),
    "frozen routers": sft(["add2"], 250, model={"optim": {"router_lr": 0.0}}),
    "replay": sft(["add2"], 250, replay=0.1),
    "family": sft(FAMILY, 420, replay=0.1),
    START: sft(["add2"], SHORT),
    "random start, cut short": sft(["add2"], SHORT, init_from=None),
    "rewarded": rewards(200),
    "null rewards": rewards(200, null=True),
}
REWARDED = ("rewarded", "null rewards")


def main(args: Sequence[str] | None = None) -> None:
    options = parsed(args)
    path = newest_whole(options.RUN)
    if path is None:
        raise SystemExit(f"{options.RUN} holds no checkpoint: train it first")
    same = {"start": digest_of(path), "rows": options.rows, "steps": options.steps, "problems": options.problems}
    facts = json.loads(options.out.read_text()) if options.out.is_file() else {"same": same, "arms": {}}
    if facts["same"] != same:
        raise SystemExit(f"{options.out} holds arms of {facts['same']}, not of {same}: choose another --out, or delete it")
    facts |= described(options)
    if "before" not in facts:
        facts["before"] = before(options)
    for seed in range(options.seeds):
        for name in [name for name in ARMS if name in options.arms]:  # in this order: rewards come after their start
            if str(seed) in facts["arms"].get(name, {}):
                continue
            entry = arm(options, name, seed)
            facts["arms"].setdefault(name, {})[str(seed)] = entry
            print(name, seed, {task: one["exact_match"] for task, one in entry["tasks"].items()}, flush=True)
            write_json(options.out, facts)
            if name != START:
                shutil.rmtree(folder(options, name, seed) / "checkpoints", ignore_errors=True)  # which are large


def parsed(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("RUN", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS], metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, help="of every arm, for a trial (default: each arm's own)")
    parser.add_argument("--rows", type=int, default=4, help="in a step; of an arm with rewards problems (16) instead")
    parser.add_argument("--problems", type=int, default=200, help="asked of each task")
    parser.add_argument("--runs", type=Path, default=Path("runs/post"), help="where the arms are trained (%(default)s)")
    parser.add_argument("--over", type=Path, help="a yaml file laid over every arm, for a model of another size")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "post.json")
    options = parser.parse_args(args)
    if {*REWARDED} & {*options.arms} and START not in options.arms:
        options.arms.append(START)
    return options


def described(options: argparse.Namespace) -> dict[str, Any]:
    steps = f" --rows {options.rows}" + (f" --steps {options.steps}" if options.steps else "")
    return {
        "what": __doc__.split("\n")[0],
        "command": f"python benchmarks/post.py {options.RUN} --seeds {options.seeds}{steps} --problems {options.problems}",
        "device": device_name(torch.device("cpu")),
        "unit": "exact_match 0..1 on held-out problems; bits per byte of held-out programs; drift: by layer",
    }


def before(options: argparse.Namespace) -> dict[str, Any]:
    """What the pretrained model answers, and its cost of held-out programs."""
    trained = Trained(options.RUN)
    tasks = {task: exact_match(trained, task, options.problems) for task in ["add2", *FAMILY]}
    last = record.read(options.RUN / "record.jsonl", "validation")[-1]
    return {"tasks": tasks, "bits_per_byte": last["bits_per_byte"]}


def arm(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train one arm, or go on with it, and measure it."""
    run, begun = folder(options, name, seed), time.perf_counter()
    base = "reward" if name in REWARDED else "sft1"
    layer = run.with_suffix(".yaml")
    write_json(layer, settings(options, name, seed))  # JSON is yaml
    with RunCLI(["fit", "-c", str(POST / f"{base}.yaml"), "-c", str(layer)]) as cli:
        if not cli.finished:
            raise SystemExit(f"{run} did not come to its end: the same command goes on")
        cli.validate_at_end()
    steps, trained = record.read(run / "record.jsonl", "step"), Trained(run)
    tasks = cli.datamodule.mixture.sources["problems"]["tasks"]
    told = {"rewards": curve(steps)} if name in REWARDED else {}
    return {
        "commit": git_commit(),
        "steps": len(steps),
        "tasks": {task: exact_match(trained, task, options.problems) for task in tasks},
        "bits_per_byte": record.read(run / "record.jsonl", "validation")[-1]["sources"]["replay"]["bits_per_byte"],
        "drift": drift(trained, Trained(options.RUN), count=options.problems),
        **told,
        "training_seconds": round(steps[-1]["seconds"], 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def settings(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """What an arm changes in its yaml file."""
    changes, rewarded = ARMS[name], name in REWARDED
    steps = options.steps or changes["trainer"]["max_steps"]
    start = folder(options, START, seed) if rewarded else options.RUN
    source = changes.get("data", {}).get("mixture", {}).get("sources", {}).get("problems", {})
    label = "-".join([*source.get("tasks", ["add2"]), *["direct"] * (not source.get("worked", True))])  # kept once for all
    rows = {"seed": seed} | ({} if rewarded else {"per_step": options.rows, "per_micro": options.rows})
    own = {
        "seed_everything": seed,
        "data": {"corpus": {"dir": f"data/post-{label}", "tokenizer": str(options.RUN / "tokenizer.json")}, "rows": rows},
        "save": {"every": next(n for n in range(min(50, steps), 0, -1) if steps % n == 0)},
        "trainer": {"max_steps": steps, "val_check_interval": steps, "default_root_dir": str(folder(options, name, seed))},
        **({"model": {"reward": {"seed": seed}}} if rewarded else {}),
    }
    over = read_yaml(options.over) if options.over else {}
    return overlay(overlay(overlay({"init_from": str(start)}, over), changes), own)


def curve(steps: Sequence[dict], pieces: int = 10) -> dict[str, list[float]]:
    """What the diary says of rewards, as means over tenths of the stage."""
    names = steps[0]["rewards"]
    values = {name: np.array([entry["rewards"][name] for entry in steps]) for name in names}
    pieces = min(pieces, len(steps))
    return {name: [float(f"{part.mean():.4g}") for part in np.array_split(all_, pieces)] for name, all_ in values.items()}


def folder(options: argparse.Namespace, name: str, seed: int) -> Path:
    return options.runs / f"{name.replace(',', '').replace(' ', '-')}-{seed}"


if __name__ == "__main__":
    main()
