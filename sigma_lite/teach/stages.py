"""Stages after pretraining for the chapters: problems as rows, fine-tuning and rewards, by the plain loop."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sigma_lite import loop
from sigma_lite.balance.balancer import balancer
from sigma_lite.balance.objective import Objective
from sigma_lite.config import BalanceConfig, CorpusConfig, OptimConfig, RewardConfig, RowsConfig
from sigma_lite.data.chat import marks
from sigma_lite.data.packed import PackedRows
from sigma_lite.data.rows import train_loader
from sigma_lite.data.shards import Prepared, prepare
from sigma_lite.serve.trained import Trained
from sigma_lite.teach.session import fast, folder
from sigma_lite.train.optim import clip_gradients, optimizer_of, total_norm
from sigma_lite.train.reward import Reinforcement

WARMUP = 5  # steps of rewards
OPTIM = OptimConfig(lr=2e-3, warmup_steps=10, decay_fraction=0.3, weight_decay=0.0)


def asked(trained: Trained, tasks: Sequence[str], worked: bool = True, count: int = 4000) -> Prepared:
    """Generated problems in the tokens of this model, split so that no problem is on both sides."""
    words = trained.tokenizer.to_str()
    name = "-".join([*tasks, "worked" if worked else "direct", hashlib.sha256(words.encode()).hexdigest()[:8]])
    home = Path(folder(f"chapters/problems-{name}"))
    home.mkdir(parents=True, exist_ok=True)
    given = home.with_suffix(".json")
    given.write_text(words, "utf-8")
    more = {"source": "tasks", "tasks": tuple(tasks), "worked": worked, "max_documents": 200 if fast() else count}
    net = trained.model.config
    return prepare(CorpusConfig(dir=str(home), tokenizer=str(given), vocab_size=net.vocab_size, heldout=0.1, **more), False)


def tuned(
    trained: Trained,
    data: Prepared,
    steps: int,
    balance: BalanceConfig = BalanceConfig(loss="global", weight=2.5e-3, z_weight=2.5e-4),  # noqa: B008  frozen
    optim: OptimConfig = OPTIM,
    length: int = 128,
    per_step: int = 8,
) -> tuple[Trained, list[float]]:
    """A copy of the model after so many steps on answers, and the loss of each step in nats per token of an answer."""
    found, net = copy.deepcopy(trained), trained.model.config
    frame = marks(data.tokenizer, data.manifest["end_of_text"])
    rows = PackedRows(data.train, data.token_bytes, length, frame)
    batches = train_loader(rows, RowsConfig(length=length, per_step=per_step, per_micro=per_step), steps=steps)
    objective = Objective(balancer(balance), balance.weight, balance.z_weight, net.n_layers)
    done = loop.train(found.model, batches, objective, optim, steps=steps)
    return found, [step.losses[0].terms["lm"].item() for step in done]


def rewarded(
    trained: Trained,
    data: Prepared,
    steps: int,
    reward: RewardConfig,
    problems: int = 16,
    lr: float = 1e-4,
    length: int = 128,
) -> Iterator[tuple[Trained, dict[str, float]]]:
    """A copy of the model and what the diary would say, after each step of rewards; no loss but the policy's."""
    found = copy.deepcopy(trained)
    frame = marks(data.tokenizer, data.manifest["end_of_text"])
    text = functools.partial(data.tokenizer.decode, skip_special_tokens=False)
    learner = Reinforcement(reward, found.model, frame, text)
    rows = PackedRows(data.train, data.token_bytes, length, frame, several=False)
    batches = train_loader(rows, RowsConfig(length=length, per_step=problems, per_micro=problems), steps=steps)
    optimizer = optimizer_of(found.model, OptimConfig(lr=lr, weight_decay=0.0))
    for step, batch in enumerate(batches):
        outcome = learner(batch, step, 0)
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP)  # Adam's first steps are as long as its rate, whatever they saw
        if outcome.live:
            outcome.loss.backward()
            gradients = (p.grad for p in found.model.parameters() if p.grad is not None)
            clip_gradients(found.model.parameters(), total_norm(gradients), 1.0)
            optimizer.step()
        yield found, {name: float(value) for name, value in outcome.told.items()}
