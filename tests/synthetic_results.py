"""Made-up results of a lab experiment: the shapes of a real file, with numbers that nobody measured."""

from __future__ import annotations

import numpy as np

TOKENS_PER_STEP = 4096


def results(
    arms: tuple[str, ...] = ("LBL, K = 1", "loss-free, K = 1", "K = 8 low"),
    seeds: tuple[int, ...] = (0,),
    shapes: dict[str, tuple[int, int]] | None = None,
    n_windows: int = 8,
    steps: int = 400,
) -> dict:
    """One run an arm and seed. `shapes` gives (layers, experts) of an arm where they are not (4, 96)."""
    shapes = shapes or {}
    return {
        "experiment": "made-up",
        "question": "Does a figure draw what it is given?",
        "figures": ["layer0_deviation", "load_and_probability", "final_table"],
        "scale": "quick",
        "scale_says": "a first look",
        "command": "sigma-lite lab run made-up --scale quick",
        "arms": {name: {"says": f"what {name} does", "branch": None} for name in arms},
        "runs": [run(name, seed, *shapes.get(name, (4, 96)), n_windows, steps) for name in arms for seed in seeds],
    }


def run(arm: str, seed: int, n_layers: int, n_experts: int, n_windows: int, steps: int) -> dict:
    rng = np.random.default_rng([seed, *arm.encode()])
    with_bias, switched = arm.startswith("loss-free"), arm.startswith("K = 8")
    ends = [steps * (i + 1) // n_windows for i in range(n_windows)]
    windows = [loads(rng, n_layers, n_experts, uneven=0.3 + with_bias * i / n_windows) for i in range(n_windows)]
    at = np.arange(4, steps + 1, 4)
    spread = [[0.004 * end / (1 + layer) for layer in range(n_layers)] if with_bias else None for end in ends]
    last = {"f": windows[-1][0], "P": windows[-1][1]}
    if with_bias:
        last["bias"] = (spread[-1][0] * rng.random((n_layers, n_experts))).tolist()
    heldout, probabilities = loads(rng, n_layers, n_experts, uneven=0.6)
    return {
        "arm": arm,
        "seed": seed,
        "time": "2026-01-01T00:00:00+00:00",
        "commit": "0123abc",
        "device": "CPU AMD EPYC, 1 thread, 1 process",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "config": {"net": {"n_layers": n_layers, "n_experts": n_experts, "top_k": 1}, "trainer": {"max_steps": steps}},
        "tokens": steps * TOKENS_PER_STEP,
        "seconds": 100.0 + seed,
        "active_params": [400_000, 300_000],
        "k": [[8 if switched else 1] + [1] * (n_layers - 1), [1] * n_layers],
        "events": [{"kind": "event", "step": steps // 2, "what": "sparsity switch", "why": "[8] -> [1]"}] * switched,
        "curve": {
            "step": at.tolist(),
            "tokens": (at * TOKENS_PER_STEP).tolist(),
            "lm": (3 + 4 * np.exp(-at / 50) + rng.normal(0, 0.02, len(at))).tolist(),
            "balance": (1 + 0.1 * rng.random(len(at))).tolist(),
            "z": (3 + rng.random(len(at))).tolist(),
        },
        "scores": {
            "step": [steps // 2, steps],
            "tokens": [steps // 2 * TOKENS_PER_STEP, steps * TOKENS_PER_STEP],
            "flops": [4e9 * steps // 2 * TOKENS_PER_STEP, 3e9 * steps * TOKENS_PER_STEP],
            "bits_per_byte": [2.4, float(2 + 0.1 * rng.random())],
        },
        "load": {
            "step": ends,
            "window_tokens": [ends[0] * TOKENS_PER_STEP] * n_windows,
            "max": [[len(row) * max(row) - 1 for row in f] for f, _ in windows],
            "min": [[len(row) * min(row) - 1 for row in f] for f, _ in windows],
            "dead": [[sum(value == 0 for value in row) for row in f] for f, _ in windows],
            "bias_spread": spread,
            "bias_mean": [row and [0.0] * n_layers for row in spread],
            "lbl": [[n_experts * float(np.dot(a, b)) for a, b in zip(f, P, strict=True)] for f, P in windows],
            "router_entropy": [[4.0] * n_layers for _ in windows],
        },
        "last": last,
        "heldout": {
            "nats_per_token": 3.1,
            "bits_per_byte": float(2 + 0.1 * rng.random()),
            "f": heldout,
            "P": probabilities,
            "lbl": [n_experts * float(np.dot(a, b)) for a, b in zip(heldout, probabilities, strict=True)],
            "max": [len(row) * max(row) - 1 for row in heldout],
            "min": [len(row) * min(row) - 1 for row in heldout],
            "dead": [sum(value == 0 for value in row) for row in heldout],
        },
    }


def loads(rng: np.random.Generator, n_layers: int, n_experts: int, uneven: float) -> tuple[list, list]:
    """Shares f and probabilities P, [L][E]; a very uneven layer has dead experts."""
    f = np.exp(rng.normal(0, uneven, (n_layers, n_experts)))
    f[0, f[0] < 0.4 * uneven] = 0
    P = np.exp(rng.normal(0, 0.1, (n_layers, n_experts)))
    return (f / f.sum(-1, keepdims=True)).tolist(), (P / P.sum(-1, keepdims=True)).tolist()
