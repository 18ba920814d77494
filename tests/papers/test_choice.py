"""Expert choice: loads are equal, and the future can be read from the past."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from samples import NET, routed

from sigma_lite.balance.losses import expert_counts
from sigma_lite.model import Parts, Router, Transformer
from sigma_lite.papers.choice import ExpertChoice, capacity, most_bits


@pytest.mark.parametrize("K", [1, 2, 4])
def test_every_expert_has_its_share_and_its_best_tokens(K):
    routing = routed(ExpertChoice(dataclasses.replace(NET, top_k=K)), T=64)
    assert expert_counts(routing.ids, 8).tolist() == [8 * K] * 8
    for expert in range(8):
        mine = (routing.ids == expert).any(1).nonzero()[:, 0]
        assert set(mine.tolist()) == set(routing.probs[:, expert].topk(8 * K).indices.tolist())
    kept = routing.ids >= 0
    assert torch.equal(routing.gates[kept], routing.probs.gather(1, routing.ids.clamp(min=0))[kept])
    assert kept.sum(1).unique().numel() > 1, "tokens have unequally many experts"


def test_one_token_alone_goes_to_every_expert():
    assert [capacity(T, 96, 1) for T in (1, 96, 4096, 0)] == [1, 1, 43, 0]
    assert routed(ExpertChoice(dataclasses.replace(NET, top_k=1)), T=1).ids.shape == (1, 8)


def changed_by_the_last_token(router: type) -> torch.Tensor:
    """Which of the nine earlier positions have other logits when only the tenth token is another."""
    torch.manual_seed(0)
    model, ids = Transformer(dataclasses.replace(NET, top_k=1), Parts(router=router)), torch.arange(10)[None]
    other = ids.clone()
    other[0, 9] = 33
    return (model(ids).logits - model(other).logits)[0, :9].abs().amax(-1) > 1e-4


def test_a_later_token_changes_an_earlier_ones_output():
    assert changed_by_the_last_token(ExpertChoice).any() and not changed_by_the_last_token(Router).any()


def test_the_future_can_be_read():
    """Two tokens, one expert that takes one of them. The first one's slot tells without error which kind follows: one bit,
    about the token that the first one has to predict."""
    router = ExpertChoice(dataclasses.replace(NET, n_experts=2, top_k=1))
    future = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(0))
    read = []
    for kind in future:
        scores = torch.tensor([[0.5, 0.5], [0.9, 0.1] if kind else [0.1, 0.9]])
        read.append(int(router.choose(scores)[0, 0] == 1))  # expert 0 took the later token, so the earlier has expert 1
    assert read == future.tolist()
    assert most_bits(2, 1) >= 1 > log_odds(2, 1) == 0, "what 2408.15664 prints is no bound from above: it says 0 bits here"


def log_odds(E: int, K: int) -> float:
    return K * math.log2((1 - K / E) / (K / E))


@pytest.mark.parametrize(("E", "K"), [(2, 1), (16, 2), (96, 1), (8, 3)])
def test_the_experts_of_a_token_tell_at_most_the_entropy_of_their_choices(E, K):
    """Sum over all 2^E sets of experts, where that can be done; and the printed term is less by E log2(1 / (1 - R))."""
    R = K / E
    assert most_bits(E, K) == pytest.approx(log_odds(E, K) + E * math.log2(1 / (1 - R)))
    assert most_bits(E, K) > log_odds(E, K) + 0.4
    if E <= 16:
        sets = (math.comb(E, n) * (p := R**n * (1 - R) ** (E - n)) * -math.log2(p) for n in range(E + 1))
        assert most_bits(E, K) == pytest.approx(sum(sets))


def test_the_numbers_of_the_docstring():
    assert [round(log_odds(16, 2), 2), round(most_bits(16, 2), 2), most_bits(2, 1)] == [5.61, 8.70, 2]
    assert most_bits(4, 4) == 0, "all experts: nothing is chosen"
