"""Window statistics: counted by hand, additive over updates, saved and restored."""

import math

import pytest
import torch

from sigma_lite.balance.metrics import ExpertLoad, entropy, load_deviation
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.model import Routing


def routing(ids, E=4):
    ids = torch.tensor(ids)
    probs = torch.nn.functional.one_hot(ids[:, 0], E).float() * 0.7 + 0.075
    return Routing(probs, ids, probs.gather(1, ids), probs.log())


def test_deviation_of_known_shares():
    high, low = load_deviation(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.3, 0.2, 0.0]]))
    assert high.tolist() == [0, 3, 1] and low.tolist() == [0, -1, -1]


def test_entropy_bounds():
    assert entropy(torch.tensor([1.0, 0, 0])) == 0
    assert entropy(torch.full((96,), 1 / 96)).item() == pytest.approx(math.log(96), rel=1e-5)


def test_two_updates_equal_one_of_both():
    first, second = [routing([[0], [1], [1]])], [routing([[2], [2], [2]])]
    apart, together = ExpertLoad(1, 4), ExpertLoad(1, 4)
    apart.update(first)
    apart.update(second)
    together.update([routing([[0], [1], [1], [2], [2], [2]])])
    for name, value in together.load().items():
        torch.testing.assert_close(apart.load()[name], value)
    load = together.load()
    torch.testing.assert_close(load["f"], torch.tensor([[1 / 6, 2 / 6, 3 / 6, 0]]))
    assert load["dead"].tolist() == [1] and load["max_deviation"].tolist() == [1] and load["min_deviation"].tolist() == [-1]
    assert load["P"].sum().item() == pytest.approx(1)


def test_layers_may_have_different_k():
    load = ExpertLoad(2, 4)
    load.update([routing([[0, 1], [2, 3]]), routing([[0], [0]])])
    assert load.load()["f"].tolist() == [[0.25] * 4, [1, 0, 0, 0]]


def test_the_buffer_pools_micro_batches_and_forgets_at_the_step():
    pooled = PooledCounts()
    assert pooled.add(torch.tensor([[4, 0]])).tolist() == [[1, 0]]
    assert pooled.add(torch.tensor([[0, 4]])).tolist() == [[0.5, 0.5]], "the second micro-batch sees both"
    pooled.reset()
    assert pooled.add(torch.tensor([[0, 4]])).tolist() == [[0, 1]]
