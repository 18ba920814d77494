"""A bias inside real training: moved once a step, from all tokens of the step, the same everywhere, and resumed."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sigma_lite import cli
from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.bias import bias_step
from sigma_lite.balance.losses import load_balancing_loss
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint
from sigma_lite.config import BalanceConfig, CorpusConfig, ModelConfig, RowsConfig
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.data.shards import load
from sigma_lite.model import Transformer
from sigma_lite.runfile import from_mapping
from sigma_lite.train.module import SigmaLit

ROWS = 8
NET = dataclasses.replace(from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net"), router_init_std=0.2)
BIAS = BalanceConfig(loss="none", bias="sign", bias_rate=0.01)


class Watch(pl.Callback):
    """After every micro-batch: how many tokens each expert of each layer got, and the bias; written at the end."""

    def __init__(self, folder: Path):
        self.folder, self.counts, self.bias, self.terms = folder, [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        counts = [torch.bincount(r.ids.flatten(), minlength=NET.n_experts) for r in outputs["routings"]]
        self.counts.append(torch.stack(counts))
        self.bias.append(module.model.bias_LE)
        self.terms.append(torch.stack([outputs["terms"]["balance"], outputs["loss"].detach()]))

    def on_train_end(self, trainer, module):
        seen = {name: torch.stack(getattr(self, name)) for name in ("counts", "bias", "terms")}
        save_file(seen, self.folder / f"seen-{trainer.global_rank}")


def train(data: Path, out: Path, balance: BalanceConfig, own: Balancer | None = None, *, ranks=1, per_micro=4, steps=3):
    """What each rank saw, over a few optimizer steps of a real Trainer."""
    out.mkdir()
    corpus = from_mapping(CorpusConfig, {**tiny.SETTINGS["data"]["corpus"], "vocab_size": 300}, "corpus")
    rows = RowsConfig(length=32, per_step=ROWS, per_micro=per_micro)
    datamodule = TokenDataModule(dataclasses.replace(corpus, dir=str(data / "prepared")), rows)
    datamodule.prepare_data, datamodule.prepared = lambda: None, load(data / "prepared")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = tiny.bare_trainer(out, ranks, steps=steps, micros=rows.accumulation(ranks), callbacks=[Watch(out)])
        trainer.fit(SigmaLit(NET, balance=balance, custom_balance=own), datamodule=datamodule)
    return [load_file(out / f"seen-{rank}") for rank in range(ranks)]


def test_the_bias_moves_once_a_step_by_the_loads_of_the_whole_step(corpus_and_data, tmp_path):
    """Four micro-batches a step: nothing moves inside it, and the pooled counts decide, not the last micro-batch's."""
    (seen,) = train(corpus_and_data, tmp_path / "run", BIAS, per_micro=2)
    counts, bias = (seen[name].view(3, 4, NET.n_layers, NET.n_experts) for name in ("counts", "bias"))
    assert (counts.sum(-1) == 2 * 32).all()
    before = torch.zeros(NET.n_layers, NET.n_experts)
    for step in range(3):
        assert all(torch.equal(bias[step, micro], before) for micro in range(3))
        before = before + bias_step(counts[step].sum(0), "sign", 0.01)
        torch.testing.assert_close(bias[step, 3], before)
    last_only = bias_step(counts[:, 3], "sign", 0.01).sum(0)
    assert not torch.equal(last_only, before), "pooled and last micro-batch agree here, so the test would show nothing"


def test_the_bias_is_the_same_on_every_rank_and_as_on_one(corpus_and_data, tmp_path, port):
    one = train(corpus_and_data, tmp_path / "1", BIAS, steps=2)[0]
    two = train(corpus_and_data, tmp_path / "2", BIAS, ranks=2, per_micro=2, steps=2)
    assert not torch.equal(two[0]["counts"], two[1]["counts"]), "each rank has rows of its own"
    assert torch.equal(two[0]["bias"], two[1]["bias"])
    assert torch.equal(two[0]["counts"] + two[1]["counts"], one["counts"]), "the same tokens, the same choices"
    assert torch.equal(two[0]["bias"], one["bias"]) and one["bias"][-1].any()


class EachLayer(Balancer):
    """The loss of layer l is l + 1, so that a mean or sum over layers can be told."""

    def losses(self, routings, f_LE, n_rows):
        return torch.stack([0 * load_balancing_loss(r.probs, r.ids) + l + 1 for l, r in enumerate(routings)])


def test_a_weight_is_per_layer(corpus_and_data, tmp_path):
    """The term is the mean over layers, 1.5; what it adds to the loss is weight * (1 + 2), the sum, as in Megatron."""
    weights = {"z_weight": 0.0}
    runs = {
        weight: train(corpus_and_data, tmp_path / str(weight), BalanceConfig(weight=weight, **weights), EachLayer(), steps=1)
        for weight in (0.0, 0.5)
    }
    terms = {weight: seen["terms"] for weight, (seen,) in runs.items()}  # [micro, (balance, loss)]; loss / accumulation
    assert (terms[0.5][:, 0] == 1.5).all()
    torch.testing.assert_close((terms[0.5] - terms[0.0])[:, 1], torch.full((2,), 0.5 * (1 + 2) / 2))


def test_the_bias_is_saved_and_resumed_exactly(place):
    """Take the last checkpoint away and give the same command: the same bytes, the bias among them."""
    config = tiny.write_config(
        place, "bias.yaml", trainer__max_steps=4, model__sparsity=None, model__balance__bias="proportional"
    )
    cli.main(["fit", "-c", config.name])
    whole = load_file(newest_checkpoint("run"))
    newest_checkpoint("run").unlink()
    middle = load_file(newest_checkpoint("run"))
    cli.main(["fit", "-c", config.name])
    again = load_file(newest_checkpoint("run"))
    biases = [name for name in whole if name.endswith("router.bias")]
    assert len(biases) == NET.n_layers and whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert all(not torch.equal(middle[name], whole[name]) and middle[name].any() for name in biases)


MOMENTUM = """
import torch
from sigma_lite.balance.balancer import Balancer

class Momentum(Balancer):
    def __init__(self):
        self.momentum = torch.zeros(2, 8)
    def next_bias(self, bias_LE, pooled, step):
        self.momentum = 0.5 * self.momentum + 0.01 * (pooled.float().mean(1, keepdim=True) - pooled).sign()
        return bias_LE + self.momentum
    def state_dict(self):
        return {"momentum": self.momentum}
    def load_state_dict(self, state):
        self.momentum = state["momentum"]
"""


def test_a_balancers_own_state_is_saved_and_resumed_exactly(place, monkeypatch):
    """Without its momentum the resumed run would move the bias otherwise."""
    Path("my_momentum.py").write_text(MOMENTUM)
    monkeypatch.syspath_prepend(str(place))
    own = {"class_path": "my_momentum.Momentum"}
    config = tiny.write_config(place, "own.yaml", trainer__max_steps=8, model__sparsity=None, model__custom_balance=own)
    cli.main(["fit", "-c", config.name])
    whole = read_checkpoint(newest_checkpoint("run"))
    newest_checkpoint("run").unlink()
    assert read_checkpoint(newest_checkpoint("run"))["balancer"]["momentum"].any()
    cli.main(["fit", "-c", config.name])
    again = read_checkpoint(newest_checkpoint("run"))
    assert torch.equal(whole["balancer"]["momentum"], again["balancer"]["momentum"])
    assert all(torch.equal(whole["state_dict"][name], again["state_dict"][name]) for name in whole["state_dict"])


def test_a_bias_belongs_to_a_model_and_needs_no_gradient():
    model = Transformer(NET)
    with torch.no_grad():
        model.set_bias(torch.arange(16.0).view(2, 8))
    assert model.bias_LE.tolist() == torch.arange(16.0).view(2, 8).tolist()
    other = Transformer(NET)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.bias_LE, model.bias_LE) and not model.bias_LE.requires_grad
    copied = model.bias_LE
    copied += 1
    assert model.bias_LE[0, 0] == 0, "what is read is a copy"
    with pytest.raises(ValueError, match=r"expected \[L, E\] = \[2, 8\]"):
        model.set_bias(torch.zeros(3, 8))
