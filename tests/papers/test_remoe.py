"""ReMoE: continuous routing, the coefficient's law, and that it reaches the wanted number of experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import NET, routed

from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.config import ConfigError
from sigma_lite.model import Routing
from sigma_lite.papers.remoe import L1, ReLURouter


def routing_of(logits: torch.Tensor) -> tuple[Routing, torch.Tensor]:
    router = ReLURouter(dataclasses.replace(NET, n_experts=logits.shape[1], top_k=1))
    routing = router.routing(logits)
    return routing, load_share(expert_counts(routing.ids, logits.shape[1]))


def test_an_expert_works_where_its_logit_is_above_zero_and_enters_with_gate_zero():
    routing = routed(ReLURouter(NET))
    for t in range(60):
        kept = routing.ids[t] >= 0
        assert set(routing.ids[t][kept].tolist()) == set((routing.logits[t] > 0).nonzero()[:, 0].tolist())
        assert torch.equal(routing.gates[t][kept], routing.logits[t][routing.ids[t][kept]])
    assert 3 < (routing.ids >= 0).sum(1).float().mean() < 5, "half of the experts before anything is learnt"


def test_the_penalty_is_the_l1_norm_weighted_by_load():
    """Even loads at K experts: the plain L1 norm of a token, times the coefficient. Its gradient is largest for the busy."""
    logits = torch.eye(8).repeat(3, 1).requires_grad_() * 2 - 1
    routing, f = routing_of(logits)
    assert L1(k=1, start=0.5).loss(routing, f).item() == pytest.approx(0.5)
    busy = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, 1.0]], requires_grad=True)
    routing, f = routing_of(busy)
    (gradient,) = torch.autograd.grad(L1(k=1, start=1.0).loss(routing, f), busy)
    # 4 slots of 3 tokens: loads 2 * 3/4 * 4/3 = 2 and 2 * 1/4 * 4/3 = 2/3, over 3 tokens
    torch.testing.assert_close(gradient, torch.tensor([[2 / 3, 0], [2 / 3, 0], [2 / 3, 2 / 9]]))


@pytest.mark.parametrize(("slots", "factor"), [(11, 1.2), (10, 1.0), (9, 1 / 1.2)])
def test_the_coefficient_grows_with_too_many_experts_and_falls_with_too_few(slots, factor):
    own, pooled = L1(k=1), torch.tensor([[slots, 0, 10]])
    assert own.next_bias(torch.zeros(1, 2), pooled, 0) is None
    assert own.coefficient == pytest.approx(1e-8 * factor)
    again = L1(k=1)
    again.load_state_dict(own.state_dict())
    assert again.coefficient == own.coefficient
    with pytest.raises(ConfigError, match="momentum of another balancer"):
        again.load_state_dict({"momentum": torch.zeros(1)})


def test_it_thins_out_a_dense_router_to_k_experts():
    """Logits alone, without a task: from 4 of 8 experts a token to near 1, every expert still in use."""
    logits = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    own, optimizer = L1(k=1), torch.optim.SGD([logits], lr=5.0)
    per_token = []
    for step in range(250):
        routing, f = routing_of(logits)
        per_token.append((routing.ids >= 0).sum().item() / 400)
        optimizer.zero_grad()
        own.loss(routing, f).backward()
        optimizer.step()
        own.next_bias(torch.zeros(1, 8), own.statistics([routing]), step)
    assert per_token[0] > 3.5 and min(per_token[-50:]) > 0.3 and max(per_token[-50:]) < 1.6
