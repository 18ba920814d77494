"""Laws of the router: a bias chooses and never gates; and what a layer without attention can know."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import KeyValueCache, Transformer
from sigma_lite.model.router import Router

SMALL = ModelConfig(
    vocab_size=64, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=8, d_expert=16, router_init_std=0.2
)
BOTH = pytest.mark.parametrize("score", ["softmax", "sigmoid"])


def router(score: str, K: int, bias: torch.Tensor | None = None) -> Router:
    made = Router(dataclasses.replace(SMALL, router_score=score, top_k=K))
    torch.nn.init.normal_(made.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    if bias is not None:
        made.bias.copy_(bias)
    return made


def tokens(T: int = 200) -> torch.Tensor:
    return torch.randn(T, 32, generator=torch.Generator().manual_seed(1))


@BOTH
@pytest.mark.parametrize("K", [1, 3, 8])
def test_the_bias_chooses_and_does_not_gate(score, K):
    x, bias = tokens(), torch.linspace(-0.5, 0.5, 8)
    plain, biased = router(score, K)(x), router(score, K, bias)(x)
    score_TE = plain.logits.softmax(-1) if score == "softmax" else plain.logits.sigmoid()
    assert torch.equal(plain.probs, biased.probs) and torch.equal(plain.logits, biased.logits)
    torch.testing.assert_close(biased.gates, score_TE.gather(1, biased.ids))
    torch.testing.assert_close(biased.probs.sum(1), torch.ones(200))
    torch.testing.assert_close(biased.probs, score_TE / score_TE.sum(1, keepdim=True))
    for token in range(0, 200, 20):  # best first, by score + bias
        assert biased.ids[token].tolist() == (score_TE[token] + bias).argsort(descending=True)[:K].tolist()
    assert (plain.ids != biased.ids).any()


@BOTH
def test_the_smallest_logits_are_no_nan(score):
    """At -1000 every sigmoid is 0: the shares of nothing are 0, the softmax's are 1 / E, and no gradient is NaN."""
    made = router(score, 1)
    torch.nn.init.constant_(made.weight, -1000 / 32)
    routing = made(torch.ones(5, 32))
    (gradient,) = torch.autograd.grad((routing.probs.square().sum() + routing.gates.sum()), made.weight)
    assert routing.probs.unique().tolist() == [1 / 8 if score == "softmax" else 0] and torch.isfinite(gradient).all()


@BOTH
def test_a_spread_beyond_the_scores_makes_the_choice_blind_to_the_token(score):
    """Scores lie in (0, 1): the highest bias wins every token once it leads by 1, and then still gates by score."""
    bias = torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0])
    routing = router(score, 1, bias)(tokens())
    assert (routing.ids == 3).all() and len(routing.gates.unique()) > 100


@BOTH
@pytest.mark.parametrize("K", [1, 2])
def test_gradient_reaches_the_router_through_the_gate_and_not_through_the_bias(score, K):
    """The sigmoid's derivative, and the softmax's, of the chosen experts; the bias is no parameter."""
    made, x = router(score, K, torch.linspace(-0.3, 0.3, 8)), tokens(50)
    routing = made(x)
    (gradient,) = torch.autograd.grad(routing.gates.sum(), routing.logits, retain_graph=True)
    chosen, g = torch.zeros(50, 8).scatter_(1, routing.ids, 1.0), routing.gates.detach()
    if score == "sigmoid":
        expected = torch.zeros(50, 8).scatter_(1, routing.ids, g * (1 - g))
    else:
        p = routing.probs.detach()
        expected = p * chosen - p * g.sum(1, keepdim=True)
    torch.testing.assert_close(gradient, expected)
    (to_weight,) = torch.autograd.grad(routing.gates.sum(), made.weight)
    torch.testing.assert_close(to_weight, expected.T @ x)
    assert to_weight.norm() > 1e-3, "at K = 1 too: the gate is not renormalised"
    assert not made.bias.requires_grad and "bias" in made.state_dict() and "bias" not in dict(made.named_parameters())


# --------------------------------------------------------------------------------------------- layers without attention


def model(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(dataclasses.replace(SMALL, **changes)).eval()


def ids(B: int, S: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (B, S), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_below_the_first_attention_a_router_sees_the_token_alone(first):
    """The same token anywhere, after anything, gets the same logits; above, it does not."""
    same_token = ids(6, 10)
    same_token[:, 7] = 5
    same_token[0, 2] = 5  # another place
    routings = model(attention_from_layer=first)(same_token).routings
    for layer, routing in enumerate(routings):
        logits_BSE = routing.logits.view(6, 10, 8)
        seen = torch.cat([logits_BSE[:, 7], logits_BSE[:1, 2]])
        distance = (seen - seen[0]).abs().max()
        assert distance < 1e-5 if layer < first else distance > 1e-3, layer


@pytest.mark.parametrize("first", [1, 3])
def test_cached_generation_equals_reading_everything_without_low_attention(first):
    made, tokens_BS, cache = model(attention_from_layer=first), ids(2, 10), [KeyValueCache() for _ in range(3)]
    pieces = [made(part, cache=cache).logits for part in tokens_BS.split([4, 1, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), made(tokens_BS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_the_ledger_counts_what_is_there(first, tied):
    made = model(attention_from_layer=first, tie_embeddings=tied)
    ledger, there = made.config.ledger(), {name: p.numel() for name, p in made.named_parameters()}
    assert ledger.total == sum(there.values())
    assert ledger.attention == sum(n for name, n in there.items() if ".attention." in name and "norm" not in name)
    assert ledger.norms == sum(n for name, n in there.items() if "norm" in name)


def test_attention_must_begin_inside_the_model():
    with pytest.raises(ConfigError, match=r"attention_from_layer=4: must lie in 0\.\.n_layers=3"):
        dataclasses.replace(SMALL, attention_from_layer=4)
