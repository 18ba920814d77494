"""A router that no step moves."""

from __future__ import annotations

import torch
from samples import NET

from sigma_lite.config import OptimConfig
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.fixed import Frozen
from sigma_lite.train.optim import adamw


def test_a_frozen_router_begins_as_the_learned_one_and_no_step_moves_it():
    torch.manual_seed(0)
    plain = Transformer(NET)
    torch.manual_seed(0)
    frozen = Transformer(NET, Parts(router=Frozen))
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(plain(ids).logits, frozen(ids).logits)
    before = {name: weight.clone() for name, weight in frozen.named_parameters()}
    optimizer = adamw(frozen, OptimConfig(lr=1e-2))
    frozen.loss(ids, ids)[0].backward()
    optimizer.step()
    moved = {name for name, weight in frozen.named_parameters() if not torch.equal(weight, before[name])}
    assert before.keys() - moved == {f"blocks.{layer}.moe.router.weight" for layer in range(2)}
