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
from sigma_lite.model import KeyValueCache, Parts, Transformer
from sigma_lite.papers.moduleformer import (
    MutualInformation,
    StickBreaking,
    load_concentration_loss,
    mutual_information_loss,
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
