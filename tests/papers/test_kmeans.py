"""Online K-means: it finds clusters, stands still in evaluation, and learns nothing by gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from samples import NET

from sigma_lite.config import ConfigError
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.kmeans import OnlineKMeans

ONE = dataclasses.replace(NET, top_k=1)


def test_one_update_written_out():
    router, x = OnlineKMeans(ONE, keep=0.9), torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    before = F.normalize(router.weight.clone(), dim=-1)
    raw = router.weight.clone()
    ids, unit = router(x).ids[:, 0], F.normalize(x, dim=-1)
    assert torch.equal(ids, (unit @ before.T).argmax(1)), "the largest cosine"
    for expert in range(8):
        mine = unit[ids == expert]
        expected = 0.9 * before[expert] + 0.1 * mine.mean(0) if len(mine) else raw[expert]
        torch.testing.assert_close(router.weight[expert], expected)


def test_it_finds_the_clusters_that_it_begins_near():
    """Eight directions with noise, centroids begun a little off: after 30 batches each lies on its own."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(8, 16, generator=generator), dim=-1)
    router = OnlineKMeans(ONE, keep=0.7)
    router.weight.copy_(F.normalize(centres + 0.15 * torch.randn(8, 16, generator=generator), dim=-1))

    def cosines() -> torch.Tensor:
        return F.cosine_similarity(router.weight, centres)

    begun = cosines()
    for _ in range(30):
        kind = torch.randint(0, 8, (200,), generator=generator)
        router(centres[kind] + 0.1 * torch.randn(200, 16, generator=generator))
    assert begun.min() < 0.93 and cosines().min() > 0.98


def test_it_moves_in_training_only_and_has_no_parameters():
    torch.manual_seed(0)
    model, ids = Transformer(ONE, Parts(router=OnlineKMeans)), torch.arange(20).view(2, 10)
    assert not [name for name, _ in model.named_parameters() if "router" in name]
    first = {name: value.clone() for name, value in model.state_dict().items() if "router.weight" in name}
    assert len(first) == 2
    model.eval()(ids)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in first.items())
    model.train()(ids)
    assert not any(torch.equal(model.state_dict()[name], value) for name, value in first.items())


def test_refusals():
    for wrong, words in (({"keep": 1.0}, "without 1"), ({"temperature": 0}, "greater than 0")):
        with pytest.raises(ConfigError, match=words):
            OnlineKMeans(ONE, **wrong)
