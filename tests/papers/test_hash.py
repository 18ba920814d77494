"""Hash routing: the same expert for a token wherever it stands, and loads that are token frequencies."""

from __future__ import annotations

import torch
from samples import NET

from sigma_lite.balance.losses import expert_counts
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.hash import Hashed, hashed, splitmix64


def test_the_hash_is_splitmix64():
    """The first numbers of the generator that starts at 0, as its reference prints them."""
    found = [int(x) % 2**64 for x in splitmix64(torch.arange(3))]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_token_has_one_expert_whatever_stands_beside_it():
    torch.manual_seed(0)
    model = Transformer(NET, Parts(router=Hashed))
    model.set_k([1, 1])
    ids = torch.randint(0, 50, (4, 30))
    layers = [r.ids[:, 0] for r in model(ids).routings]
    for experts in layers:
        for token in ids.unique():
            assert experts[ids.flatten() == token].unique().numel() == 1
    assert not torch.equal(*layers), "layers hash differently"
    assert not [name for name, _ in model.named_parameters() if "router" in name]


def test_loads_are_even_over_ids_and_as_uneven_as_frequencies_over_text():
    """96 experts, 9600 ids: 100 each, scattered by sqrt(100). One token of 30 % gives its expert at least 30 %."""
    counts = expert_counts(hashed(torch.arange(9600), 96), 96).float()
    assert counts.mean() == 100 and 8 < counts.std() < 12
    text = torch.arange(1000).where(torch.arange(1000) >= 300, 7)
    ids = hashed(text, 96)
    assert expert_counts(ids, 96)[int(hashed(torch.tensor([7]), 96))] >= 300


def test_k_experts_are_distinct_and_share_one():
    routing = Hashed(NET)(torch.randn(40, 16), torch.arange(40))
    assert all(row.unique().numel() == 4 for row in routing.ids)
    assert torch.equal(routing.gates.sum(1), torch.ones(40)) and torch.equal(routing.probs.sum(1), torch.ones(40))
