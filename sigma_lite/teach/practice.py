"""Training for the chapters on balance: a small model, one plain loop, and a diary like a real run's.

The settings are those of the recorded runs (lab/scales.py); the model has fewer layers and sees fewer tokens. No Lightning
and no files: what takes a chapter a minute must not take seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.metrics import ExpertLoad
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import CorpusConfig, ModelConfig, OptimConfig, RowsConfig
from sigma_lite.data.rows import Batch, Rows, train_loader
from sigma_lite.data.shards import Prepared, prepare
from sigma_lite.model import Routing, Transformer
from sigma_lite.teach.session import fast, folder
from sigma_lite.train.optim import adamw, warmup_stable_decay

Entries = list[dict]
PER_STEP = RowsConfig(length=128, per_step=16, per_micro=16)  # 2048 tokens a step
OPTIM = OptimConfig(lr=3e-3, warmup_steps=20, decay_fraction=0.4)


def corpus() -> Prepared:
    """The tokens of chapters 1 and 2."""
    documents, vocab_size = (12, 512) if fast() else (120, 2048)
    config = CorpusConfig(dir=folder(f"chapters/{vocab_size}"), max_documents=documents, vocab_size=vocab_size)
    return prepare(config, progress=False)


def small_model(seed: int = 0, **changes: object) -> Transformer:
    """Three layers of 96 experts, one active, unless `changes` (fields of ModelConfig) say otherwise."""
    shape = {"vocab_size": 512 if fast() else 2048, "n_layers": 3, "d_model": 64, "d_expert": 48}
    shape |= {"n_heads": 2, "n_kv_heads": 1, "head_dim": 32, "n_experts": 96, **changes}
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**shape))


def train(
    model: Transformer,
    data: Prepared,
    steps: int,
    balancer: Balancer,
    *,
    weight: float = 0.02,
    rows: RowsConfig = PER_STEP,
    optim: OptimConfig = OPTIM,
    k: Callable[[int], Sequence[int]] | None = None,
    window: int = 10,
) -> Entries:
    """Train in place; returns a diary like `sigma_lite.record.read`'s: step entries, and load entries a few steps apart.

    Args:
        balancer: its losses are summed over layers and multiplied by `weight`; it also moves the bias, if it has one.
        rows: size of a step and of its micro-batches, and whether these hold a single domain.
        k: optimizer steps finished -> experts per token of each layer; None leaves the model's.
        window: steps whose counts and probabilities are pooled in one load entry.
    """
    adam, entries = adamw(model, optim), []
    objective = Objective(balancer, weight, z_weight=1e-4, n_layers=model.config.n_layers)
    batches = iter(train_loader(Rows(data.train, data.token_bytes, rows.length), rows, steps=steps))
    load = ExpertLoad(model.config.n_layers, model.config.n_experts)
    for step in range(steps):
        for group in adam.param_groups:
            peak = group.setdefault("peak", group["lr"])  # routers may have a rate of their own
            group["lr"] = peak * warmup_stable_decay(step, total_steps=steps, optim=optim)
        if k:
            model.set_k(k(step))
        adam.zero_grad()
        terms, lbl, pooled = _gradients(model, batches, rows.accumulation(1), objective, load)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        bias_LE = balancer.next_bias(model.bias_LE, pooled, step)
        if bias_LE is not None:
            model.set_bias(bias_LE)
        entries.append({"kind": "step", "step": step + 1, "terms": terms, "lbl": lbl})
        switches = k is not None and tuple(k(step + 1)) != tuple(k(step))
        if (step + 1) % window == 0 or step + 1 == steps or switches:
            entries.append(load_entry(load, step + 1) | {"bias": model.bias_LE.tolist()})
            load.reset()
    return entries


def _gradients(
    model: Transformer, batches: Iterator[Batch], micros: int, objective: Objective, load: ExpertLoad
) -> tuple[dict[str, float], float, Tensor]:
    """Backward through the micro-batches of one step; (mean of each loss term, of the LBL, the balancer's statistics)."""
    pooled, seen = PooledCounts(), []
    for _ in range(micros):
        batch = next(batches)
        lm, routings = model.loss(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
        losses = objective(lm, routings, pooled, len(batch.ids_BS))
        (losses.total / micros).backward()
        load.update(routings)
        seen.append({**{name: term.item() for name, term in losses.terms.items()}, "lbl": losses.lbl.item()})
    means = {name: sum(one[name] for one in seen) / micros for name in seen[0]}
    return {name: means[name] for name in objective.term_weights}, means["lbl"], pooled.statistics


def load_entry(load: ExpertLoad, step: int) -> dict:
    """What a window of tokens has shown, as a run's diary writes it."""
    found = load.load()
    lists = {name: found[name].tolist() for name in ("f", "P", "lbl", "router_entropy")}
    return {"kind": "load", "step": step, "tokens": int(load.tokens), **lists}


@torch.no_grad()
def route(model: Transformer, batches: Iterator[Batch], n: int) -> tuple[list[Tensor], list[list[Routing]]]:
    """(language-model loss, routings) of up to n batches, without training."""
    found = [
        model.loss(b.ids_BS, b.targets_BS, documents_BS=b.documents_BS) for _, b in zip(range(n), batches, strict=False)
    ]
    return [loss for loss, _ in found], [routings for _, routings in found]


def smooth(entries: Entries, term: str = "lm", n: int = 10) -> tuple[list[int], list[float]]:
    """(steps, mean of the last n values of a loss term), for a plot."""
    values = [entry["terms"][term] for entry in entries if entry["kind"] == "step"]
    n = min(n, len(values))
    return list(range(n, len(values) + 1)), torch.tensor(values).unfold(0, n, 1).mean(-1).tolist()
