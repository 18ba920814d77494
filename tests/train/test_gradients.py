"""One optimizer step, however it is cut over ranks and micro-batches. Gradients are compared: Adam would hide factors."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sigma_lite.config import BalanceConfig, CorpusConfig, ModelConfig, RowsConfig
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.data.rows import Rows, train_loader
from sigma_lite.data.shards import load
from sigma_lite.model import Transformer
from sigma_lite.runfile import from_mapping
from sigma_lite.train.module import SigmaLit

ROWS = 8
NET = dataclasses.replace(from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net"), top_k=2, router_init_std=0.2)
LM = {"lm": 1.0, "balance": 0.0, "z": 0.0}
LBL = {"lm": 0.0, "balance": 1.0, "z": 0.0}
ALL = {"lm": 1.0, "balance": 1.0, "z": 0.1}  # weights at which each term matters


class Grab(pl.Callback):
    """Write what the optimizer would get, and the rows that this rank saw, in the first step."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rows.append(batch.ids_BS)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = {name: p.grad.clone() for name, p in module.model.named_parameters()}
        save_file(gradients, self.folder / f"gradients-{trainer.global_rank}")
        save_file({"rows": torch.stack(self.rows)}, self.folder / f"rows-{trainer.global_rank}")


def one_step(data: Path, out: Path, *, ranks: int, per_micro: int, weights: dict[str, float]) -> dict[str, Tensor]:
    """Gradients of one step through a real Trainer; with two ranks also that both have the same."""
    out.mkdir(parents=True)
    rows = RowsConfig(length=32, per_step=ROWS, per_micro=per_micro)
    corpus = from_mapping(CorpusConfig, {**tiny.SETTINGS["data"]["corpus"], "vocab_size": 300}, "corpus")
    corpus = dataclasses.replace(corpus, dir=str(data / "prepared"))
    torch.manual_seed(0)
    module = SigmaLit(NET, balance=BalanceConfig())
    module.objective.term_weights = weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = tiny.bare_trainer(out, ranks, steps=1, micros=rows.accumulation(ranks), callbacks=[Grab(out)])
        trainer.fit(module, datamodule=_data(corpus, rows, data))
    found = [load_file(out / f"gradients-{rank}") for rank in range(ranks)]
    for name in found[0]:
        assert all(torch.equal(found[0][name], other[name]) for other in found), name
    return found[0]


def _data(corpus: CorpusConfig, rows: RowsConfig, folder: Path) -> TokenDataModule:
    module = TokenDataModule(corpus, rows)
    module.prepare_data = lambda: None
    module.prepared = load(folder / "prepared")
    return module


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative difference of a parameter's gradient, |a - b| / |a|."""
    return max(float((a[n].double() - b[n].double()).norm() / a[n].double().norm().clamp(min=1e-30)) for n in a)


@pytest.mark.parametrize("micros", [1, 2])
def test_ranks_do_not_change_the_gradient(corpus_and_data, tmp_path, port, micros):
    """Language model, global LBL and z-loss; with and without accumulation."""
    one = one_step(corpus_and_data, tmp_path / "1", ranks=1, per_micro=ROWS // micros, weights=ALL)
    two = one_step(corpus_and_data, tmp_path / "2", ranks=2, per_micro=ROWS // micros // 2, weights=ALL)
    assert distance(one, two) < 1e-6
    alone = load_file(tmp_path / "1" / "rows-0")["rows"]
    shared = [load_file(tmp_path / "2" / f"rows-{rank}")["rows"] for rank in range(2)]
    assert torch.equal(torch.cat(shared, 1), alone), "not the same rows"
    without = one_step(corpus_and_data, tmp_path / "3", ranks=1, per_micro=ROWS // micros, weights=LM)
    assert distance(one, without) > 0.01, "the balance loss does not matter here, so the test would show nothing"


def test_micro_batches_do_not_change_the_language_model_gradient(corpus_and_data, tmp_path):
    one, *others = (
        one_step(corpus_and_data, tmp_path / str(m), ranks=1, per_micro=ROWS // m, weights=LM) for m in (1, 2, 8)
    )
    for other in others:
        assert distance(one, other) < 1e-6


# ------------------------------------------------------------------------------------------- the accumulation buffer


def step_rows(data: Path, step: int, length: int = 32):
    """The rows of one optimizer step, drawn without Lightning."""
    prepared, rows = load(data / "prepared"), RowsConfig(length=length, per_step=ROWS, per_micro=ROWS)
    loader = train_loader(Rows(prepared.train, prepared.token_bytes, length), rows, steps=step + 1, first_step=lambda: step)
    return next(iter(loader))


def by_hand(model: Transformer, batch, micros: int) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of Demons in the Detail (2501.11873) as a loop: the loss with the buffer's f, and with the pooled f.

    Returns (buffered mean, pooled mean, |difference| [micros]); means over micro-batches and layers.
    """
    E = model.config.n_experts
    parts = [model(ids, documents_BS=documents).routings for ids, documents in _cut(batch, micros)]
    counts = [[torch.bincount(r.ids.flatten(), minlength=E) for r in routings] for routings in parts]
    buffered, pooled = [], []
    for m, routings in enumerate(parts):
        terms = {"buffer": [], "pooled": []}
        for layer, routing in enumerate(routings):
            P = routing.probs.mean(0)
            for name, upto in (("buffer", m + 1), ("pooled", micros)):
                c = sum(counts[i][layer] for i in range(upto))
                terms[name].append(E * ((c / c.sum()) * P).sum())
        buffered.append(torch.stack(terms["buffer"]).mean())
        pooled.append(torch.stack(terms["pooled"]).mean())
    buffered, pooled = torch.stack(buffered), torch.stack(pooled)
    return buffered.mean(), pooled.mean(), (buffered - pooled).abs().detach()


def _cut(batch, micros: int):
    return zip(batch.ids_BS.chunk(micros), batch.documents_BS.chunk(micros), strict=True)


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(model.named_parameters(), found, strict=True)}


@pytest.mark.parametrize("micros", [1, 2, 8])
def test_global_loss_follows_the_buffer_rule(corpus_and_data, tmp_path, micros):
    real = one_step(corpus_and_data, tmp_path / "real", ranks=1, per_micro=ROWS // micros, weights=LBL)
    torch.manual_seed(0)
    model = Transformer(NET)
    buffered, pooled, _ = by_hand(model, step_rows(corpus_and_data, 0), micros)
    expected, other = (gradients(model, loss) for loss in (buffered, pooled))
    routers = [name for name in real if "router" in name]
    assert distance({n: expected[n] for n in routers}, real) < 2e-6
    if micros > 1:
        assert distance({n: expected[n] for n in routers}, other) > 1e-3, "buffer and pooled loss are told apart"


def buffer_distance(model: Transformer, batches, micros: int) -> dict[str, object]:
    """How far the buffer's loss is from the pooled loss.

    `at`: mean |difference| of a micro-batch's loss at each place in the buffer; `loss` and `gradient`: of the whole step,
    relative. Averaged over `batches`.
    """
    at, loss, gradient = torch.zeros(micros), [], []
    routers = {n for n, _ in model.named_parameters() if "router" in n}
    for batch in batches:
        buffered, pooled, distances = by_hand(model, batch, micros)
        at += distances / len(batches)
        loss.append(float(((buffered - pooled).abs() / pooled).detach()))
        a, b = (gradients(model, x) for x in (pooled, buffered))
        flat = [torch.cat([g[n].flatten() for n in sorted(routers)]) for g in (a, b)]
        gradient.append(float((flat[0] - flat[1]).norm() / flat[0].norm()))
    return {"at": at.tolist(), "loss": sum(loss) / len(loss), "gradient": sum(gradient) / len(gradient)}


def test_buffer_comes_nearer_to_the_pooled_loss_as_it_fills(corpus_and_data):
    torch.manual_seed(0)
    model = Transformer(NET)
    found = buffer_distance(model, [step_rows(corpus_and_data, step) for step in range(12)], micros=8)
    at = found["at"]
    assert at[0] > at[2] > at[5] > at[7]
    assert at[7] == pytest.approx(0, abs=1e-6)  # the last micro-batch sees everything
    assert 0 < found["loss"] < 0.1
    assert buffer_distance(model, [step_rows(corpus_and_data, 0)], micros=1)["gradient"] == pytest.approx(0, abs=1e-6)
