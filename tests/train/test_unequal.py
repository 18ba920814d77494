"""One step, however it is cut, where micro-batches and ranks have unequal numbers of tokens: conversations, and rewards.

What fills rows up is in no loss of a router and in no load.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import load_file
from test_gradients import NET, Grab, distance

from sigma_lite import loop
from sigma_lite.balance.balancer import GlobalLBL, SequenceLBL, WithBias, counts_of
from sigma_lite.balance.losses import load_balancing_loss, z_loss
from sigma_lite.balance.objective import Objective
from sigma_lite.config import BalanceConfig, CorpusConfig, RewardConfig, RowsConfig
from sigma_lite.data.datamodule import TokenDataModule
from sigma_lite.data.rows import IGNORED, Batch, together
from sigma_lite.data.shards import load, prepare
from sigma_lite.model import Routing, Transformer
from sigma_lite.train.callbacks.data_stages import DataStages
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.callbacks.load_recorder import LoadRecorder
from sigma_lite.train.callbacks.throughput import Throughput
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.reward import Reinforcement

ROWS = 8
CONVERSATIONS = RewardConfig()
REWARDS = RewardConfig(answers=4, max_new_tokens=5)


@pytest.fixture(scope="module")
def corpus(corpus_and_data, tmp_path_factory) -> CorpusConfig:
    """Problems whose answers have 1 to 40 tokens."""
    tokenizer = str(corpus_and_data / "prepared" / "tokenizer.json")
    tasks = {"source": "tasks", "tasks": ["add2", "sort9", "reverse3"], "max_documents": 120, "heldout": 0.1}
    made = CorpusConfig(**tasks, vocab_size=300, tokenizer=tokenizer, dir=str(tmp_path_factory.mktemp("problems") / "data"))
    prepare(made, progress=False)
    return made


def data_of(corpus: CorpusConfig, per_micro: int) -> TokenDataModule:
    module = TokenDataModule(corpus, RowsConfig(length=96, per_step=ROWS, per_micro=per_micro, packed=False))
    module.prepare_data = lambda: None
    module.prepared = load(corpus.dir)
    return module


class Clock(Throughput):
    """Leaves how many tokens it has counted."""

    def __init__(self, out: Path):
        super().__init__()
        self.out = out

    def on_train_end(self, trainer, module) -> None:
        (self.out / f"tokens-{trainer.global_rank}").write_text(str(self.tokens))


def one_step(corpus, out: Path, weights: dict, *, ranks=1, per_micro=ROWS, loss="global", reward=CONVERSATIONS) -> dict:
    """Gradients of one step through a real Trainer, the same on both ranks where there are two."""
    out.mkdir(parents=True)
    torch.manual_seed(0)
    module = SigmaLit(NET, balance=BalanceConfig(loss=loss, window_tokens=1), reward=reward)
    module.objective.term_weights = weights
    data = data_of(corpus, per_micro)
    trainer = tiny.bare_trainer(
        out, ranks, steps=1, micros=data.rows.accumulation(ranks), callbacks=[Clock(out), Grab(out), LoadRecorder()]
    )
    trainer.fit(module, datamodule=data)
    found = [load_file(out / f"gradients-{rank}") for rank in range(ranks)]
    assert all(torch.equal(found[0][name], other[name]) for name in found[0] for other in found)
    return found[0]


def tokens(out: Path) -> set[int]:
    """What each rank's clock counted over all ranks: the same."""
    return {int(path.read_text()) for path in out.glob("tokens-*")}


def rows_of_step(corpus: CorpusConfig) -> Batch:
    """The first step's rows, drawn without Lightning."""
    data = data_of(corpus, ROWS)
    rows = data.training_rows()
    return next(iter(rows.values())).__getitems__(data.training_order(rows).rows(0).tolist())


def decided(self, asked, written) -> list[bool]:
    """Whether an answer's tokens add up to an even number; of two problems in three nobody earns anything."""
    G = self.config.answers
    return [sum(asked[n // G][1]) % 3 == 0 and sum(own.tokens) % 2 == 0 for n, own in enumerate(written)]


KINDS = {"conversations": CONVERSATIONS, "rewards": REWARDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_depend_on_its_micro_batches(corpus, tmp_path, monkeypatch, kind):
    """Main loss and z-loss, and a loss of each row where rows are learned from: means over all tokens, or all rows."""
    monkeypatch.setattr(Reinforcement, "rewards", decided)
    main = "lm" if kind == "conversations" else "policy"
    weights = {main: 1.0, "balance": 1.0, "z": 0.1}
    same = {"reward": KINDS[kind], "loss": "sequence" if main == "lm" else "none"}
    whole, *cut = (one_step(corpus, tmp_path / str(m), weights, per_micro=m, **same) for m in (ROWS, 2, 1))
    assert whole["embedding.weight"].abs().max() > 1e-4
    for other in cut:
        assert distance(whole, other) < 2e-5
    if main == "lm":
        assert distance(whole, by_hand(rows_of_step(corpus))) < 2e-5


def by_hand(batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients of lm + mean LBL of a row, summed over layers, + z / 10: real tokens only, a row at a time."""
    torch.manual_seed(0)
    model = Transformer(NET)
    nats, scored, z, real, lbl = 0.0, 0, 0.0, 0, 0.0
    for ids, targets, own in zip(batch.ids_BS, batch.targets_BS, batch.own_BS, strict=True):
        n = int(own.sum())
        logits, routings = model(ids[None, :n])
        nats = nats + torch.nn.functional.cross_entropy(logits[0], targets[:n], reduction="sum")
        scored, real = scored + int((targets != IGNORED).sum()), real + n
        z = z + n * torch.stack([z_loss(r.logits) for r in routings]).mean()
        lbl = lbl + torch.stack([load_balancing_loss(r.probs, r.ids) for r in routings]).mean()
    (nats / scored + lbl / len(batch.ids_BS) + 0.1 * z / real).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_depend_on_its_ranks(corpus, tmp_path, monkeypatch, port, kind):
    """With the global balance loss too, whose f is of all ranks and whose P is a mean over all tokens."""
    monkeypatch.setattr(Reinforcement, "rewards", decided)
    weights = {"lm" if kind == "conversations" else "policy": 1.0, "balance": 1.0, "z": 0.1}
    same = {"reward": KINDS[kind]}
    one = one_step(corpus, tmp_path / "1", weights, **same)
    two = one_step(corpus, tmp_path / "2", weights, ranks=2, per_micro=ROWS // 2, **same)
    assert distance(one, two) < 2e-5
    assert len(tokens(tmp_path / "1")) == 1 and tokens(tmp_path / "1") == tokens(tmp_path / "2")


def test_what_fills_rows_up_is_in_no_load_and_in_no_loss_of_a_router(corpus):
    """Through the loop on one screen: loads, global LBL and z-loss are those of the real tokens, each row by itself."""
    batch = rows_of_step(corpus)
    assert batch.own_BS.float().mean() < 0.8 and (batch.own_BS.int().diff(dim=1) <= 0).all()
    torch.manual_seed(0)
    model = Transformer(NET)
    alone = [model(ids[None, : int(own.sum())]).routings for ids, own in zip(batch.ids_BS, batch.own_BS, strict=True)]
    layers = [Routing(*map(torch.cat, zip(*rows, strict=True))) for rows in zip(*alone, strict=True)]
    lbl = torch.stack([load_balancing_loss(r.probs, r.ids) for r in layers]).mean()
    (done,) = loop.train(model, [batch], Objective(GlobalLBL(), 0.1, 0.1, NET.n_layers), steps=1)
    assert torch.equal(done.pooled.counts_LE, counts_of(layers))
    torch.testing.assert_close(done.losses[0].terms["balance"], lbl)
    torch.testing.assert_close(done.losses[0].terms["z"], torch.stack([z_loss(r.logits) for r in layers]).mean())
    assert done.losses[0].lbl.item() == pytest.approx(lbl.item(), rel=1e-6)


def test_two_micro_batches_of_the_loop_are_those_of_a_run(corpus, tmp_path):
    batch = rows_of_step(corpus)
    cut = [Batch(*(column[part] for column in batch)) for part in (slice(0, 4), slice(4, 8))]
    torch.manual_seed(0)
    model = Transformer(NET)
    losses = Objective(WithBias(SequenceLBL(), "sign"), 0.5, 0.05, NET.n_layers)
    (done,) = loop.train(model, cut, losses, steps=1, micros=2, clip=1e9)
    weights = {"lm": 1.0, "balance": 1.0, "z": 0.1}
    run = one_step(corpus, tmp_path / "run", weights, per_micro=4, loss="sequence")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, run[name], rtol=1e-6, atol=1e-9)
    means = torch.stack([one.terms["lm"] for one in done.losses]).mean()
    with torch.no_grad():
        torch.manual_seed(0)
        whole, _ = Transformer(NET).loss(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
    torch.testing.assert_close(means, whole)


def test_a_micro_batch_without_a_target_adds_nothing():
    """One of text, one without: the mean is over the targets that there are, in fp32 and under autocast."""
    torch.manual_seed(0)
    model = Transformer(NET)
    ids = torch.randint(0, NET.vocab_size, (2, 16))
    nothing = torch.full_like(ids, IGNORED)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            whole, _ = model.loss(ids, ids)
            parts = [model.loss(ids, targets, count=ids.numel() / 2)[0] for targets in (ids, nothing)]
        assert parts[1] == 0
        torch.testing.assert_close((parts[0] + parts[1]) / 2, whole, rtol=1e-5, atol=0)
        grads = torch.autograd.grad(parts[1], list(model.parameters()), allow_unused=True, materialize_grads=True)
        assert not any(g.any() for g in grads)


def test_rows_of_several_batches_keep_what_fills_them_up(corpus):
    packed = rows_of_step(corpus)
    plain = packed._replace(own_BS=None)
    both = together([plain, packed])
    assert both.own_BS[:ROWS].all() and torch.equal(both.own_BS[ROWS:], packed.own_BS)
    assert together([plain, plain]).own_BS is None and both.lengths.tolist() == [96] * ROWS + packed.own_BS.sum(1).tolist()


def test_a_run_of_before_says_where_its_objective_changes(corpus):
    """Resumed by this code, which weighs tokens; one that was weighed so all along, one of plain text, and one that branched
    onto conversations from plain text, say nothing."""
    said = []
    diary = Diary()
    diary.record = SimpleNamespace(write=lambda kind, step, **facts: said.append((kind, step, facts["what"])))
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer = SimpleNamespace(state=state, global_step=4, accumulate_grad_batches=1, callbacks=[diary])
    cases = (True, True, False, 1), (True, False, False, 0), (False, True, False, 0), (True, True, True, 0)
    for unequal, older, branched, expected in cases:
        data = data_of(corpus, ROWS)
        data.trainer, data.unequal = trainer, unequal
        saved = data.state_dict()
        if older:
            saved.pop("weighs", None)
        data.load_state_dict({**saved, **({"branched": True} if branched else {})})
        data.order, trainer.datamodule = data.training_order(), data
        for _ in range(2):
            DataStages().on_train_batch_start(trainer, None, None, 0)
        assert said == [("event", 4, "objective")] * expected
        said.clear()
