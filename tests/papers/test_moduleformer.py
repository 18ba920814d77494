"""Mutual information of token and expert: closed forms, and gradients derived on paper."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from samples import NET, routing, skewed, sure
from torch import Tensor

from sigma_lite.config import ConfigError
from sigma_lite.convert.distil import descend, mean_lbl
from sigma_lite.convert.rebuild import named_parts
from sigma_lite.data.rows import Batch
from sigma_lite.model import KeyValueCache, Parts, Transformer
from sigma_lite.model.parts import as_parts
from sigma_lite.papers.moduleformer import (
    Concentrate,
    Grow,
    MutualInformation,
    StickBreaking,
    load_concentration_loss,
    mutual_information_loss,
    new_weights,
    stick_breaking,
)
from sigma_lite.papers.shinka import Shinka


@pytest.mark.parametrize("E", [4, 96])
def test_mutual_information_closed_forms(E):
    """-log E: sure and even. 0: flat, or one expert for all. Between: -log 2 when two experts share all tokens."""
    even = torch.eye(E).repeat(3, 1)
    assert mutual_information_loss(even).item() == pytest.approx(-math.log(E), rel=1e-5)
    assert mutual_information_loss(torch.full((9, E), 1 / E)).item() == pytest.approx(0, abs=1e-5)
    assert mutual_information_loss(torch.eye(E)[:1].repeat(9, 1)).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information_loss(torch.eye(E)[:2].repeat(9, 1)).item() == pytest.approx(-math.log(2), rel=1e-5)


def test_mutual_information_of_token_and_expert_written_out():
    """sum over pairs of p(t, e) log p(t, e) / (p(t) p(e)), with p(t) = 1 / T."""
    p = skewed(5, 7).detach().softmax(-1).double()
    joint, marginal = p / 7, p.mean(0)
    information = sum(float(q * (q / (m / 7)).log()) for row in joint for q, m in zip(row, marginal, strict=True))
    assert mutual_information_loss(p).item() == pytest.approx(-information, rel=1e-9)


def test_gradient_of_mutual_information():
    """d/dp_te = (log P_e - log p_te) / T: nothing is counted, so tokens are pushed apart directly."""
    probs = skewed().softmax(-1)
    (gradient,) = torch.autograd.grad(mutual_information_loss(probs), probs)
    torch.testing.assert_close(gradient, (probs.mean(0).log() - probs.log()).detach() / 200, rtol=1e-4, atol=1e-8)


def test_probabilities_that_underflow_have_a_finite_gradient():
    for own in (MutualInformation(), Shinka()):
        logits = sure(torch.zeros(9, dtype=torch.int64), 4).float().requires_grad_()
        (gradient,) = torch.autograd.grad(own.loss(*routing(logits)), logits)
        assert gradient.isfinite().all()


def test_minimising_it_makes_tokens_sure_and_experts_even():
    """Not perfectly even: a token that is sure has no gradient left, whoever has too many."""
    torch.manual_seed(0)
    logits = (0.1 * torch.randn(64, 8) + torch.linspace(0, 1, 8)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = mutual_information_loss(logits.softmax(-1))
        loss.backward()
        optimizer.step()
    assert logits.softmax(-1).amax(1).min() > 0.95
    assert -math.log(8) <= loss.item() < 0.97 * -math.log(8)


# ---------------------------------------------------------------------------------------------- stick-breaking attention


def stick_of_one(z_QK: Tensor, visible: Tensor) -> Tensor:
    """The formula as loops: from the query backwards, each key takes its part of what is left."""
    a = torch.zeros_like(z_QK)
    for q in range(len(z_QK)):
        rest = 1.0
        for j in reversed(range(z_QK.shape[1])):
            if visible[q, j]:
                a[q, j] = rest * z_QK[q, j].sigmoid()
                rest = rest * (1 - z_QK[q, j].sigmoid())
    return a


def test_stick_breaking_is_a_loop_and_its_rows_sum_to_at_most_one():
    z = 2 * torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    documents = causal & (torch.arange(7)[:, None] // 3 == torch.arange(7) // 3)
    for visible in (causal, documents):
        a = stick_breaking(z, visible)
        for b in range(2):
            for h in range(3):
                torch.testing.assert_close(a[b, h], stick_of_one(z[b, h], visible))
        assert a.sum(-1).max() <= 1 + 1e-12 and (a[..., ~visible] == 0).all()
    sure = stick_breaking(torch.full((1, 1, 4, 4), 40.0), causal[:4, :4])
    torch.testing.assert_close(sure[0, 0], torch.eye(4), msg="each fitting key takes all: the nearest has it")


def test_its_model_is_causal_keeps_documents_apart_and_takes_a_cache():
    torch.manual_seed(0)
    net = dataclasses.replace(NET, n_layers=2)
    model = Transformer(net, Parts(attention=functools.partial(StickBreaking, chosen=1))).eval()
    ids = torch.randint(0, 50, (1, 9))
    other, documents = ids.clone(), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    other[0, 2] = (ids[0, 2] + 1) % 50
    whole, changed = model(ids).logits, model(other).logits
    torch.testing.assert_close(whole[:, :2], changed[:, :2])
    assert (whole[:, 3:] - changed[:, 3:]).abs().amax(-1).min() > 1e-5
    apart = [model(x, documents_BS=documents).logits[:, 4:] for x in (ids, other)]
    torch.testing.assert_close(*apart)
    cache = [KeyValueCache() for _ in range(2)]
    pieces = [model(ids[:, part], cache=cache).logits for part in (slice(0, 5), slice(5, 6), slice(6, 9))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)


def test_a_token_uses_the_heads_that_it_chose():
    """A head that was not chosen changes nothing; the sum over heads equals a loop over head experts."""
    torch.manual_seed(0)
    attention = Transformer(NET, Parts(attention=functools.partial(StickBreaking, chosen=1))).blocks[0].attention
    x, causal = torch.randn(1, 6, 16), torch.ones(6, 6, dtype=torch.bool).tril()
    gates = attention.gates(x)
    assert ((gates > 0).sum(-1) == 1).all() and gates.argmax(-1).unique().numel() == 2
    expected = torch.zeros(1, 6, 16)
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        z = (x @ attention.query.weight[rows].T) @ (x @ attention.key.weight.T).transpose(1, 2) / 8**0.5
        y = stick_breaking(z[:, None], causal)[:, 0] @ (x @ attention.value.weight.T)
        expected += gates[..., head : head + 1] * (y @ attention.out.weight[:, rows].T)
    torch.testing.assert_close(attention(x, None), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="chosen=3: must lie in 1..2"):
        StickBreaking(NET, chosen=3)


def test_load_concentration_is_zero_where_one_expert_does_all():
    assert load_concentration_loss(torch.eye(8)[:1].repeat(5, 1)).item() == pytest.approx(0, abs=1e-6)
    assert load_concentration_loss(torch.eye(8)).item() == pytest.approx(math.log(8))


# ------------------------------------------------------------------------------------------------ new and fewer modules


def text(kind: int, seed: int = 0, rows: int = 8, S: int = 16) -> Batch:
    """Two languages over the same 50 tokens: in one a token is followed by the next, in the other by its triple."""
    ids = torch.randint(0, 50, (rows, 1), generator=torch.Generator().manual_seed(seed))
    for _ in range(S):
        ids = torch.cat([ids, (ids[:, -1:] + 1 if kind == 0 else ids[:, -1:] * 3 + 7) % 50], 1)
    zeros = torch.zeros(rows, S, dtype=torch.long)
    return Batch(ids[:, :-1], ids[:, 1:], zeros, zeros.to(torch.uint8), zeros.int() + 1, zeros[:, 0] - 1)


def learn(model: Transformer, kind: int, steps: int, learns, lr: float = 1e-2) -> None:
    def loss_of(batch: Batch):
        loss, routings = model.loss(batch.ids_BS, batch.targets_BS)
        return loss + 0.01 * mean_lbl(routings), loss

    descend(model, [text(kind, seed) for seed in range(8)], steps, loss_of, learns=learns, lr=lr)


@torch.no_grad()
def nats(model: Transformer, kind: int) -> float:
    batch = text(kind, seed=99)
    return model.loss(batch.ids_BS, batch.targets_BS)[0].item()


@pytest.fixture(scope="module")
def taught() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(NET, top_k=2))
    learn(model, 0, 120, model.parameters(), lr=3e-2)
    assert nats(model, 0) < 0.5 < 3 < nats(model, 1)
    return model


def test_new_modules_learn_and_old_ones_stay(taught):
    grown = Grow(experts=8)(taught, [])
    assert grown.config.n_experts == 16 and grown.blocks[0].moe.experts.weights()[0].shape[0] == 16
    before = {name: weight.clone() for name, weight in grown.state_dict().items()}
    learn(grown, 1, 3, new_weights(grown))
    moved = {name for name, weight in grown.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name, _ in grown.named_parameters() if ".new_" in name}
    old = taught.state_dict()
    assert all(torch.equal(before[name], old[name]) for name in old if "bias" not in name)
    again = Transformer(grown.config, as_parts(named_parts(grown.parts)))
    again.load_state_dict(grown.state_dict())
    assert not again.blocks[0].moe.experts.w13.requires_grad and again.blocks[0].moe.experts.new_w13.requires_grad


def test_what_the_old_modules_knew_can_be_had_back(taught):
    """Whatever the new ones have learned: without them the model is the one before, to the last digit of a float."""
    grown, batch = Grow(experts=8)(taught, []), text(0)
    learn(grown, 1, 3, new_weights(grown), lr=3e-2)
    for block in grown.blocks:
        block.moe.router.scores = lambda z: z.masked_fill(torch.arange(16) >= 8, -torch.inf).softmax(-1)
    with torch.no_grad():
        torch.testing.assert_close(grown(batch.ids_BS).logits, taught(batch.ids_BS).logits)


def test_concentration_lowers_the_entropy_of_loads_and_half_is_pruned(taught):
    """That pruning then costs less is not asserted: on these toy languages it does not (0.45 nats without, 0.50 with)."""
    rows = [text(0, seed) for seed in range(2)]
    plain, few = (Concentrate(keep=1.0, weight=weight, steps=20, lr=2e-2)(taught, rows) for weight in (0.0, 1.0))

    def spread(model: Transformer) -> float:
        with torch.no_grad():
            routings = model(text(0, 50).ids_BS).routings
        return float(torch.stack([load_concentration_loss(r.probs) for r in routings]).mean())

    assert spread(few) < spread(plain) - 0.2
    half = Concentrate(keep=0.5, weight=1.0, steps=1)(taught, rows)
    assert half.config.n_experts == 4 and len(half.blocks[0].moe.experts.w13) == 4


def test_what_cannot_grow_says_why(taught):
    with pytest.raises(ConfigError, match="this model has its own"):
        Grow()(Grow()(taught, []), [])
    with pytest.raises(ConfigError, match="experts=0: must be at least 1"):
        Grow(experts=0)(taught, [])
