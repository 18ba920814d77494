"""Training for the chapters on balance: a small model, the plain loop, and a diary like a real run's.

The settings are those of the recorded runs (lab/scales.py); the model has fewer layers and sees fewer tokens. No Lightning
and no files: what takes a chapter a minute must not take seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sigma_lite import loop
from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.metrics import ExpertLoad
from sigma_lite.balance.objective import Objective
from sigma_lite.config import CorpusConfig, ModelConfig, OptimConfig, RowsConfig
from sigma_lite.data.rows import Batch, Rows, train_loader
from sigma_lite.data.shards import Prepared, prepare
from sigma_lite.model import Parts, Routing, Transformer, of_experts
from sigma_lite.teach.session import fast, folder

Entries = list[dict]
PER_STEP = RowsConfig(length=128, per_step=16, per_micro=16)  # 2048 tokens a step
OPTIM = OptimConfig(lr=3e-3, warmup_steps=20, decay_fraction=0.4)


def corpus() -> Prepared:
    """The tokens of chapters 1 and 2."""
    documents, vocab_size = (12, 512) if fast() else (120, 2048)
    config = CorpusConfig(dir=folder(f"chapters/{vocab_size}"), max_documents=documents, vocab_size=vocab_size)
    return prepare(config, progress=False)


def small_model(seed: int = 0, parts: Parts = Parts(), **changes: object) -> Transformer:  # noqa: B008  frozen
    """Three layers of 96 experts, one active, unless `parts` or `changes` (fields of ModelConfig) say otherwise."""
    shape = {"vocab_size": 512 if fast() else 2048, "n_layers": 3, "d_model": 64, "d_expert": 48}
    shape |= {"n_heads": 2, "n_kv_heads": 1, "head_dim": 32, "n_experts": 96, **changes}
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**shape), parts)


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
    objective = Objective(balancer, weight, z_weight=1e-4, n_layers=model.config.n_layers)
    batches = train_loader(Rows(data.train, data.token_bytes, rows.length), rows, steps=steps)
    load, entries = ExpertLoad(model.config.n_layers, model.config.n_experts), []
    for done in loop.train(model, batches, objective, optim, steps=steps, micros=rows.accumulation(1), k=k):
        for routings in done.routings:
            load.update(of_experts(routings))
        terms = {name: _mean(one.terms[name] for one in done.losses) for name in objective.term_weights}
        entries.append({"kind": "step", "step": done.step, "terms": terms, "lbl": _mean(one.lbl for one in done.losses)})
        switches = k is not None and tuple(k(done.step)) != tuple(k(done.step - 1))
        if done.step % window == 0 or done.step == steps or switches:
            entries.append(load_entry(load, done.step) | {"bias": model.bias_LE.tolist()})
            load.reset()
    return entries


def _mean(values: Iterable[Tensor]) -> float:
    return torch.stack([value.detach() for value in values]).mean().item()


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
