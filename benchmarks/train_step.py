"""The toy's whole training step against the same model built with transformers, on this machine.

Forward, the whole objective (language model, balance, router z-loss), backward, gradient clipping and fused AdamW, on the
same weights, rows and threads, each variant in a process of its own; all are timed in each round, in random order, so a
drifting machine drifts for all. Each of their expert implementations runs twice: with their own losses (`labels=`,
`output_router_logits=True`), as their users train, and "+ our objective", with our objective on their logits and router
logits, which isolates the model. A variant whose language-model loss, or gradient norm where the losses are the same,
differs from ours is refused, not timed. Their format has one K for all layers, so the schedule's list is timed in the
second form only. Ours runs with a malloc that keeps freed memory, as `sigma-lite fit` sets it; two more rows, ours
without and theirs with it, show what part of the ratio that is. On several threads only the times by the clock say
something. Writes results/bench/train_step-MACHINE.json.

    python benchmarks/train_step.py [--rounds 12] [--threads 1 2] [--theirs grouped_mm ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from interleaved import Elsewhere, interleave, summary

from sigma_lite.balance.objective import objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.kernels import explain_backend
from sigma_lite.model import Routing, Transformer
from sigma_lite.runfile import load_run
from sigma_lite.serve.hf import to_qwen3_moe
from sigma_lite.storage import write_json
from sigma_lite.train.memory import keep_freed_memory
from sigma_lite.train.optim import clip_gradients
from sigma_lite.train.provenance import device_name, git_commit
from sigma_lite.train.threads import cores

ROOT = Path(__file__).parents[1]
THEIRS = ("grouped_mm", "batched_mm", "eager")
CLIP = 1.0
OUR_LOSS, KEPT, NOT_KEPT = " + our objective", ", freed memory kept", ", freed memory given back"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds (default: %(default)s)")
    parser.add_argument("--theirs", nargs="+", choices=THEIRS, default=THEIRS, help="expert implementations to time")
    numbers = sorted({1, min(4, cores())})
    parser.add_argument("--threads", nargs="+", type=int, default=numbers, help="in turn (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    run = load_run([ROOT / "scaled_configs" / "toy.yaml"])
    cases = {"K=1": (1,) * run.net.n_layers, f"K={list(run.sparsity.head)}": run.sparsity.head}
    results: dict[str, dict] = {}
    for threads in options.threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the variants' processes read it
        results[str(threads)] = {name: compare(run, K, options.rounds, options.theirs) for name, K in cases.items()}
    facts = {
        "what": "a step of scaled_configs/toy.yaml by threads, plain causal attention; seconds of CPU, wall_ by the clock",
        "backend": explain_backend(torch.empty(1, run.net.d_model), torch.empty(1, 2 * run.net.d_expert, run.net.d_model)),
        "tokens_per_step": run.rows.per_step * run.rows.length,
        "machine": device_name(torch.device("cpu")).partition(",")[0],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": git_commit(),
        "load_average": os.getloadavg(),
        "rounds": options.rounds,
        "results": results,
    }
    out = options.out or ROOT / "results" / "bench" / f"train_step-{platform.machine()}-{os.cpu_count()}cpu.json"
    write_json(out, facts)
    print(json.dumps(results, indent=1), f"\nwritten to {out}")


def compare(run, k_per_layer: tuple[int, ...], rounds: int, implementations: Sequence[str] = THEIRS) -> dict:
    """CPU and wall seconds per variant, and their ratio to ours with a 95 % bootstrap interval."""
    names = ["sigma_lite", f"sigma_lite{NOT_KEPT}"]
    for name in implementations:
        names += [f"transformers {name}{OUR_LOSS}"]
        names += [f"transformers {name}"] * (len(set(k_per_layer)) == 1)
    names += [f"transformers {implementations[0]}{OUR_LOSS}{KEPT}"]
    steps = {name: Elsewhere(variant, name, run, k_per_layer) for name in names}
    check_agreement({name: step(0)[1] for name, step in steps.items()})
    seconds = interleave(steps, rounds)
    for step in steps.values():
        step.close()
    return {name: summary(spent, seconds["sigma_lite"]) for name, spent in seconds.items()}


def variant(name: str, run, k_per_layer: tuple[int, ...]) -> Callable[[int], tuple[float, float]]:
    """One optimizer step by number, in this process; returns language-model loss and gradient norm before the update."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if name.endswith(KEPT) or name == "sigma_lite":  # as `sigma-lite fit` does
        keep_freed_memory()
    torch.manual_seed(0)
    ours = Transformer(run.net)
    rows = torch.randint(0, run.net.vocab_size, (4, run.rows.per_step, run.rows.length + 1))
    who, _, implementation = name.removesuffix(KEPT).removesuffix(NOT_KEPT).removesuffix(OUR_LOSS).partition(" ")
    if who.startswith("sigma_lite"):
        ours.set_k(k_per_layer)
        step = our_step(ours, run)
    elif OUR_LOSS in name:
        step = lean_step(ours, implementation, k_per_layer, run)
    else:
        step = their_step(ours, implementation, run)
    return lambda number: step(rows[number % len(rows)])


def our_step(model: Transformer, run) -> Callable:
    whole = objective(run.balance, run.net.n_layers)

    def losses(ids, targets):
        lm, routings = model.loss(ids, targets)
        return lm, whole(lm, routings, PooledCounts(), len(ids)).total

    return step(model, losses, run.optim.lr, our_clip)


def their_step(ours: Transformer, implementation: str, run) -> Callable:
    """As their users train: the model computes both losses itself. Their balance loss pools all layers."""
    coefficient = run.balance.weight * run.net.n_layers  # ours is of a layer, and layers are summed
    model = theirs(ours, implementation, output_router_logits=True, router_aux_loss_coef=coefficient)

    def losses(ids, targets):
        out = model(ids, labels=targets, shift_labels=targets, use_cache=False)
        return out.loss - coefficient * out.aux_loss, out.loss

    return step(model, losses, run.optim.lr)


def lean_step(ours: Transformer, implementation: str, k_per_layer: tuple[int, ...], run) -> Callable:
    model = theirs(ours, implementation, output_router_logits=False)
    routed: list[tuple] = []
    whole = objective(run.balance, run.net.n_layers)
    for layer, k in zip(model.model.layers, k_per_layer, strict=True):
        layer.mlp.gate.top_k = k
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: routed.append(output))

    def losses(ids, targets):
        routed.clear()
        logits = model(ids, use_cache=False).logits
        lm = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        routings = [Routing(logits.float().softmax(-1), chosen, gates, logits) for logits, gates, chosen in routed]
        return lm, whole(lm, routings, PooledCounts(), len(ids)).total

    return step(model, losses, run.optim.lr)


def theirs(ours: Transformer, implementation: str, **options: object) -> torch.nn.Module:
    ours.set_k((1,) * ours.config.n_layers)
    return to_qwen3_moe(ours, experts_implementation=implementation, **options).train()


def their_clip(parameters) -> torch.Tensor:
    return torch.nn.utils.clip_grad_norm_(parameters, CLIP)


def our_clip(parameters) -> torch.Tensor:
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    clip_gradients(parameters, norm, CLIP)
    return norm


def step(model: torch.nn.Module, losses: Callable, lr: float, clip: Callable = their_clip) -> Callable:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def run_once(rows: torch.Tensor) -> tuple[float, float]:
        lm, total = losses(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        total.backward()
        norm = clip(model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return lm.item(), norm.item()

    return run_once


def check_agreement(first: dict[str, tuple[float, float]]) -> None:
    """First steps from the same weights on the same rows: the same loss, and gradient norm where the losses are the same."""
    our_lm, our_norm = first["sigma_lite"]
    for name, (lm, norm) in first.items():
        same_losses = name.startswith("sigma_lite") or OUR_LOSS in name
        if abs(lm - our_lm) > 1e-4 * our_lm or (same_losses and abs(norm - our_norm) > 1e-3 * our_norm):
            raise SystemExit(f"{name}: loss {lm}, gradient norm {norm}; ours are {our_lm}, {our_norm}; nothing was timed")


if __name__ == "__main__":
    main()
