"""The toy's whole training step against the same model built with transformers, on this machine.

Forward, language-model and balance loss, backward, gradient clipping and fused AdamW, on the same weights, rows and
threads; every variant is timed in each round, in random order, so a drifting machine drifts for all. A variant whose loss
or gradient norm differs from ours is refused, not timed. Writes results/bench/train_step-MACHINE.json.

    python benchmarks/train_step.py [--rounds 12] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from sigma_lite.balance.losses import load_balancing_loss
from sigma_lite.config import load_run
from sigma_lite.model import Transformer
from sigma_lite.serve.hf import to_qwen3_moe
from sigma_lite.storage import write_json

ROOT = Path(__file__).parents[1]
THEIRS = ("grouped_mm", "batched_mm", "eager")
CLIP = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run = load_run([ROOT / "scaled_configs" / "toy.yaml"])
    cases = {"K=1": (1,) * run.net.n_layers, f"K={list(run.sparsity.head)}": run.sparsity.head}
    results = {name: compare(run, k_per_layer, options.rounds) for name, k_per_layer in cases.items()}
    facts = {
        "what": "one optimizer step of scaled_configs/toy.yaml, plain causal attention, process CPU seconds",
        "tokens_per_step": run.rows.per_step * run.rows.length,
        "machine": _machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
        "results": results,
    }
    out = options.out or ROOT / "results" / "bench" / f"train_step-{platform.machine()}-{os.cpu_count()}cpu.json"
    write_json(out, facts)
    print(json.dumps(results, indent=1), f"\nwritten to {out}")


def compare(run, k_per_layer: tuple[int, ...], rounds: int) -> dict:
    """Median seconds per variant, and the ratio to ours with a 95 % bootstrap interval."""
    torch.manual_seed(0)
    ours = Transformer(run.net)
    rows = torch.randint(0, run.net.vocab_size, (4, run.rows.per_step, run.rows.length + 1))
    balance = run.balance.weight / run.net.n_layers
    steps: dict[str, Callable[[torch.Tensor], tuple[float, float]]] = {}
    for name in THEIRS:
        steps[f"transformers {name}"] = their_step(ours, name, k_per_layer, balance, run.optim.lr)
    ours.set_k(k_per_layer)
    steps["sigma_lite"] = our_step(ours, balance, run.optim.lr)
    check_agreement(steps, rows[0])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in random.sample(list(steps), len(steps)):
            started = time.process_time()
            steps[name](rows[number % len(rows)])
            seconds[name] += [time.process_time() - started] * (number > 0)  # the first round warms up
    return {name: summary(times, seconds["sigma_lite"]) for name, times in seconds.items()}


def our_step(model: Transformer, balance: float, lr: float) -> Callable:
    def loss_of(rows):
        lm, routings = model.loss(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        return lm + balance * sum(load_balancing_loss(r.probs, r.ids) for r in routings)

    return step(model, loss_of, lr)


def their_step(ours: Transformer, implementation: str, k_per_layer: tuple[int, ...], balance: float, lr: float) -> Callable:
    """Their forward and loss, with our balance loss on their router logits: their own pools all layers."""
    ours.set_k((1,) * len(k_per_layer))
    model = to_qwen3_moe(ours, experts_implementation=implementation, output_router_logits=False).train()
    routed: list[tuple] = []
    for layer, k in zip(model.model.layers, k_per_layer, strict=True):
        layer.mlp.gate.top_k = k
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: routed.append(output))

    def loss_of(rows):
        routed.clear()
        logits = model(rows[:, :-1].contiguous(), use_cache=False).logits
        lm = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        return lm + balance * sum(load_balancing_loss(out[0].float().softmax(-1), out[2]) for out in routed)

    return step(model, loss_of, lr)


def step(model: torch.nn.Module, loss_of: Callable, lr: float) -> Callable:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def run_once(rows: torch.Tensor, update: bool = True) -> tuple[float, float]:
        loss = loss_of(rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss), float(norm)

    return run_once


def check_agreement(steps: dict[str, Callable], rows: torch.Tensor) -> None:
    reference = steps["sigma_lite"](rows, update=False)
    for name, run_once in steps.items():
        for quantity, a, b in zip(("loss", "gradient norm"), run_once(rows, update=False), reference, strict=True):
            if abs(a - b) > 1e-4 * abs(b):
                raise SystemExit(f"{name}: {quantity} {a} is not ours, {b}; nothing was timed")


def summary(times: list[float], ours: list[float], draws: int = 2000) -> dict:
    pick = random.Random(0)
    pairs = list(zip(times, ours, strict=True))
    ratios = sorted(
        statistics.median(t for t, _ in sample) / statistics.median(o for _, o in sample)
        for sample in (pick.choices(pairs, k=len(pairs)) for _ in range(draws))
    )
    return {
        "median_s": round(statistics.median(times), 4),
        "min_s": round(min(times), 4),
        "times_ours": round(statistics.median(times) / statistics.median(ours), 3),
        "times_ours_95": [round(ratios[int(draws * q)], 3) for q in (0.025, 0.975)],
    }


def _machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread(s) used"


if __name__ == "__main__":
    main()
