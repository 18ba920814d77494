"""After pretraining, in arms: worked steps against none, a random start, no balance, routers that stay, replay, a family.

RUN is a finished pretraining of the toy. Each arm is `sigma-lite fit -c scaled_configs/post/sft1.yaml` with other settings;
its run goes on where it was cut off, and what is finished is kept, so the same command again does the rest. Measured on
problems that nobody trained on: exact match; bits per byte of the held-out programs before and after (forgetting); experts
that no token of these problems reaches. Writes results/bench/post.json.

    sigma-lite fit -c scaled_configs/toy.yaml
    python benchmarks/post.py runs/toy [--seeds 3] [--arms NAME ...] [--steps N] [--rows 4] [--problems 200] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from sigma_lite import record
from sigma_lite.data.chat import Turn, marks
from sigma_lite.data.tasks import encode, problems
from sigma_lite.reading import overlay
from sigma_lite.serve.answers import exact_match
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import write_json
from sigma_lite.train.provenance import device_name, git_commit
from sigma_lite.train.run import RunCLI

ROOT = Path(__file__).parents[1]
FAMILY = ["sort5", "reverse6", "two_step5", "add3"]


def sft(tasks: list[str], steps: int, replay: float = 0.0, **more: Any) -> dict[str, Any]:
    """What an arm changes in sft1.yaml. Without replay its source is only measured."""
    source = {"tasks": tasks, **{name: more.pop(name) for name in ("worked",) if name in more}}
    mixture = {"sources": {"problems": source}, "weights": {"problems": 1 - replay, "replay": replay}}
    return overlay({"data": {"mixture": mixture}, "trainer": {"max_steps": steps, "val_check_interval": steps}}, more)


ARMS: dict[str, dict[str, Any]] = {
    "worked": sft(["add2"], 250),
    "direct": sft(["add2"], 250, worked=False),
    "random start": sft(["add2"], 250, init_from=None),
    "no balance": sft(["add2"], 250, model={"balance": {"loss": "none", "z_weight": 0.0}}),
    "routers stay": sft(["add2"], 250, model={"optim": {"router_lr": 1e-12}}),  # steps too small to change any weight
    "replay": sft(["add2"], 250, replay=0.1),
    "family": sft(FAMILY, 420, replay=0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("RUN", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS], metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--steps", type=int, help="of every arm, for a trial (default: 250, of the family 420)")
    parser.add_argument("--rows", type=int, default=4, help="of 256 tokens in a step (%(default)s)")
    parser.add_argument("--problems", type=int, default=200, help="asked of each task")
    parser.add_argument("--runs", type=Path, default=Path("runs/post"), help="where the arms are trained (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "post.json")
    options = parser.parse_args()
    facts = json.loads(options.out.read_text()) if options.out.is_file() else {}
    found = facts.get("arms", {})
    if "before" not in facts:
        facts["before"] = measured(Trained(options.RUN), ["add2", *FAMILY], options.problems)
    for seed in range(options.seeds):
        for name in options.arms:
            if str(seed) in found.get(name, {}):
                continue
            entry = arm(options, name, seed)
            found.setdefault(name, {})[str(seed)] = entry
            print(name, seed, {task: one["exact_match"] for task, one in entry["tasks"].items()}, flush=True)
            write_json(options.out, described(options) | {"before": facts["before"], "arms": found})
            shutil.rmtree(folder(options, name, seed) / "checkpoints", ignore_errors=True)  # which are large


def described(options: argparse.Namespace) -> dict[str, Any]:
    steps = f" --rows {options.rows}" + (f" --steps {options.steps}" if options.steps else "")
    return {
        "what": __doc__.split("\n")[0],
        "command": f"python benchmarks/post.py {options.RUN} --seeds {options.seeds}{steps} --problems {options.problems}",
        "device": device_name(torch.device("cpu")),
        "commit": git_commit(),
        "unit": "exact_match 0..1 on held-out problems; bits per byte of held-out programs; unused experts by layer",
    }


def arm(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train one arm, or go on with it, and measure it."""
    run, begun = folder(options, name, seed), time.perf_counter()
    label = name.replace(" ", "-")
    changes = overlay({"init_from": str(options.RUN)}, ARMS[name])
    steps = options.steps or changes["trainer"]["max_steps"]
    own = {
        "seed_everything": seed,
        "data": {
            "corpus": {"dir": f"data/post-{label}", "tokenizer": str(options.RUN / "tokenizer.json")},
            "rows": {"seed": seed, "per_step": options.rows, "per_micro": options.rows},
        },
        "save": {"every": min(50, steps) if steps % 50 == 0 else steps // -(-steps // 70)},
        "trainer": {"max_steps": steps, "val_check_interval": steps, "default_root_dir": str(run)},
    }
    layer = run.with_suffix(".yaml")
    write_json(layer, overlay(changes, own))  # JSON is yaml
    with RunCLI(["fit", "-c", str(ROOT / "scaled_configs" / "post" / "sft1.yaml"), "-c", str(layer)]) as cli:
        if not cli.finished:
            raise SystemExit(f"{run} did not come to its end: the same command goes on")
        cli.validate_at_end()
    return {
        "steps": steps,
        **measured(Trained(run), changes["data"]["mixture"]["sources"]["problems"]["tasks"], options.problems),
        "bits_per_byte": record.read(run / "record.jsonl", "validation")[-1]["sources"]["replay"]["bits_per_byte"],
        "training_seconds": round(record.read(run / "record.jsonl", "step")[-1]["seconds"], 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def folder(options: argparse.Namespace, name: str, seed: int) -> Path:
    return options.runs / f"{name.replace(' ', '-')}-{seed}"


def measured(trained: Trained, tasks: list[str], count: int) -> dict[str, Any]:
    found = {task: exact_match(trained, task, count) for task in tasks}
    return {"tasks": found, "unused": {task: unused(trained, task, count) for task in tasks}}


@torch.inference_mode()
def unused(trained: Trained, task: str, count: int) -> list[int]:
    """Experts of each layer that no token of the held-out problems and their answers reaches."""
    frame = marks(trained.tokenizer, trained.end_of_text)
    E, used = trained.model.config.n_experts, [set() for _ in trained.model.blocks]
    for one in problems(task, count, heldout=True):
        turn = Turn(one.prompt, f">{one.answer}" if one.steps else one.answer, one.steps)
        ids = frame.conversation([turn], lambda text: encode(trained.tokenizer, text))
        for seen, routing in zip(used, trained.model.backbone(torch.tensor([ids]))[1], strict=True):
            seen.update(routing.ids.flatten().tolist())
    return [E - len(seen - {-1}) for seen in used]


if __name__ == "__main__":
    main()
