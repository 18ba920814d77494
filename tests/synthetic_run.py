"""A made-up run for tests of figures and report: the shapes of a real record, with numbers that nobody measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def entries(
    n_layers: int = 4, n_experts: int = 96, steps: int = 1000, n_windows: int = 40, switch: int = 700, seed: int = 0
) -> list[dict]:
    """A run that learns, switches its sparsity, and has one layer (0) in the balance loss's blind spot."""
    rng = np.random.default_rng(seed)
    head = [8, 6, 4, 2][:n_layers] if switch else []
    before = head + [1] * (n_layers - len(head))
    found = [start(n_layers, n_experts, steps, head, switch)]
    every = max(1, steps // n_windows)
    for step in range(1, steps + 1):
        k = before if step < switch else [1] * n_layers
        found.append(one_step(step, k, rng))
        if step == switch:
            why = f"{before} -> {[1] * n_layers}"
            found.append({"kind": "event", "step": step, "what": "sparsity switch", "why": why})
        if step % every == 0 and n_windows:
            found.append(window(step, step / steps, k, n_layers, n_experts, rng))
        if step % max(1, steps // 10) == 0:
            bits = 1.45 + 3.2 * np.exp(-step / steps * 5)
            held = {
                "nats_per_token": bits * 2.4,
                "bits_per_byte": bits,
                "f": shares(k, 0.5, n_layers, n_experts, rng)[0],
            }
            found.append({"kind": "validation", "step": step, **held})
    found.append({"kind": "event", "step": steps // 3, "what": "step skipped", "why": "gradient norm 31.2 > 10 x median"})
    sample = 'self, path: str) -> "Path":\n    """Return the <b>path</b> & its parent."""\n    return os.path.join(path)\n'
    found.append({"kind": "sample", "step": steps, "prompt": "def parent(", "text": sample})
    return found


def start(n_layers: int, n_experts: int, steps: int, head: list[int], switch: int) -> dict:
    net = {"vocab_size": 4096, "n_layers": n_layers, "d_model": 128, "n_experts": n_experts, "d_expert": 64, "top_k": 1}
    config = {
        "net": net,
        "sparsity": {"head": head, "switch_step": switch},
        "balance": {"loss": "global", "weight": 0.01, "z_weight": 0.001, "window_tokens": 200_000},
        "optim": {"lr": 0.003, "warmup_steps": 100},
        "corpus": {"source": "stdlib", "dir": "data/stdlib"},
        "rows": {"length": 256, "per_step": 32, "per_micro": 32, "seed": 0},
        "trainer": {"max_steps": steps, "accelerator": "cpu"},
    }
    ledger = {"total": 10_322_304, "non_embedding": 9_798_016, "embedding": 524_288}
    ledger |= {"active_initial": 852_224, "active_target": 458_880}
    data = {"train_tokens": 6_120_333, "heldout_tokens": 498_112, "heldout_bytes": 1_812_004}
    data |= {
        "xz_given_training_bits_per_byte": 1.402,
        "xz_bits_per_byte": 1.823,
        "unigram_bits_per_byte": 2.71,
        "interpreter": "CPython 3.11.7",
    }
    return {
        "kind": "run",
        "step": 0,
        "command": "sigma-lite fit -c scaled_configs/toy.yaml",
        "time": "2026-01-01T00:00:00+00:00",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "lightning": "2.6.6", "sigma_lite": "0.1.0"},
        "device": "cpu: AMD EPYC, 2 threads",
        "commit": "0123abc",
        "config": config,
        "ledger": ledger,
        "data": data,
    }


def one_step(step: int, k: list[int], rng: np.random.Generator) -> dict:
    terms = {
        "lm": 8.3 * np.exp(-step / 90) + 3.3 + 0.9 * np.exp(-step / 500) + rng.normal(0, 0.07),
        "balance": 1.02 + 0.6 * np.exp(-step / 40) + abs(rng.normal(0, 0.01)),
        "z": 21 * np.exp(-step / 60) + 3 + rng.normal(0, 0.1),
    }
    weighted = {"lm": terms["lm"], "balance": 0.01 * terms["balance"], "z": 0.001 * terms["z"]}
    return {
        "kind": "step",
        "step": step,
        "tokens": step * 8192,
        "terms": terms,
        "weighted": weighted,
        "loss": sum(weighted.values()),
        "lr": 0.003 * min(1, step / 100),
        "grad_norm": float(np.exp(rng.normal(-0.7, 0.3))),
        "k": k,
        "active_params": 389_248 + sum(k) * 24_576,
        "tokens_per_s": float(rng.normal(9_000, 400)),
        "seconds": step * 0.91,
    }


def shares(k: list[int], progress: float, n_layers: int, n_experts: int, rng: np.random.Generator) -> tuple[list, list]:
    """f and P [L][E]: layer 0 is uneven under flat P once it is top-1, deep layers are even under uneven P."""
    f_LE, P_LE = [], []
    for layer in range(n_layers):
        depth = layer / max(n_layers - 1, 1)
        uneven = (0.12 if k[layer] > 1 else 0.55 * (1 - depth) + 0.08) + 0.8 * np.exp(-progress * 20)
        f_E = np.exp(rng.normal(0, uneven, n_experts))
        if n_experts > 8:
            f_E[: int(5 * np.exp(-progress * 15))] = 0
        P_E = np.exp(rng.normal(0, 0.05 + 0.3 * depth, n_experts))
        f_LE.append((f_E / f_E.sum()).tolist())
        P_LE.append((P_E / P_E.sum()).tolist())
    return f_LE, P_LE


def window(step: int, progress: float, k: list[int], n_layers: int, n_experts: int, rng: np.random.Generator) -> dict:
    f_LE, P_LE = shares(k, progress, n_layers, n_experts, rng)
    lbl = [n_experts * float(np.dot(f, P)) for f, P in zip(f_LE, P_LE, strict=True)]
    certain = [float(np.log(n_experts) * (0.95 - 0.5 * progress * layer / n_layers)) for layer in range(n_layers)]
    facts = {"f": f_LE, "P": P_LE, "lbl": lbl, "router_entropy": certain}
    return {"kind": "load", "step": step, "tokens": 200_704, **facts}


def write(folder: str | Path, found: list[dict]) -> Path:
    """The entries as RUN/record.jsonl; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(entry, separators=(",", ":")) for entry in found)
    (folder / "record.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder
