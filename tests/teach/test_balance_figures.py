"""The laws behind the figures of the chapters on balance, and the loop that trains their small models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sigma_lite import loop
from sigma_lite.balance.balancer import Balancer, GlobalLBL, MicroLBL
from sigma_lite.balance.losses import load_balancing_loss
from sigma_lite.balance.metrics import ExpertLoad
from sigma_lite.balance.objective import Objective
from sigma_lite.config import CorpusConfig, RowsConfig
from sigma_lite.data.rows import Rows, train_loader
from sigma_lite.data.shards import prepare
from sigma_lite.figures.style import HEAT_MAX
from sigma_lite.teach import plots_domains, plots_load, practice


@pytest.mark.parametrize("agreement", [1.0, 0.3, 0.0, -0.5, -1.0])
@pytest.mark.parametrize("unequal_f, unequal_P", [(1, 1), (0.5, 0.25), (1, 0)])
def test_eight_experts_have_the_stated_loss(agreement, unequal_f, unequal_P):
    f_E, P_E = plots_load.eight_experts(agreement, unequal_f, unequal_P)
    assert np.isclose(f_E.sum(), 1) and np.isclose(P_E.sum(), 1)
    assert f_E.min() >= 0 and P_E.min() >= 0
    assert np.isclose(8 * f_E @ P_E, 1 + 0.375 * agreement * unequal_f * unequal_P)
    assert np.isclose(8 * f_E.max() - 1, 1.75 * unequal_f)
    if unequal_f and unequal_P:
        assert np.isclose(np.corrcoef(f_E, P_E)[0, 1], agreement)


def test_balance_loss_figure_names_loss_and_busiest():
    figure = plots_load.balance_loss_figure([0.75, 0.25], [0.4, 0.6])
    assert "LBL 0.90" in figure.layout.title.text and "+50 %" in figure.layout.title.text
    assert list(figure.data[0].y) == [1.5, 0.5] and list(figure.data[1].y) == [0.8, 1.2]


def test_load_map_keeps_dead_for_the_dead():
    f_LE = [[0.5, 0.4995, 0.0005, 0.0], [0.25] * 4]
    by_number, by_load = (plots_load.load_map(f_LE, "t", order) for order in ("by number", "by load"))
    assert np.array_equal(by_number.data[0].z, [[100, 100, -99, -100], [0, 0, 0, 0]])
    assert "busiest +100 %, 1 dead" in by_number.layout.title.text
    backwards = plots_load.load_map([f_LE[0][::-1]], "t", "by load")
    for figure in (by_load, backwards):
        assert list(figure.data[0].z[0]) == [100, 100, -99, -100]
    assert by_number.data[0].zmin == -100 and by_number.data[0].zmax == HEAT_MAX


@pytest.mark.parametrize("specialised", [0.0, 0.4, 1.0])
def test_two_losses_of_a_specialised_router(specialised):
    f_DE = plots_domains.specialised_router(specialised)
    assert torch.allclose(f_DE.sum(1), torch.ones(4)) and torch.allclose(f_DE.mean(0), torch.full((8,), 1 / 8))
    one, two, four = (plots_domains.two_losses(f_DE, per_micro) for per_micro in (1, 2, 4))
    assert one[1] == pytest.approx(1) and two[1] == pytest.approx(1)
    assert one[0] == pytest.approx(1 + 3 * specialised**2), "4 domains with 2 of 8 experts each: 4 when nothing is shared"
    assert two[0] == pytest.approx(1 + specialised**2)
    assert four[0] == pytest.approx(1), "a micro-batch with all domains is the whole step"
    assert plots_domains.specialisation(f_DE) == pytest.approx(0.75 * specialised)


def test_two_losses_of_any_router():
    f_DE = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)).softmax(1)
    micro, whole = plots_domains.two_losses(f_DE, per_micro=1)
    assert micro == pytest.approx(6 * f_DE.square().sum(1).mean().item())
    assert whole == pytest.approx(6 * f_DE.mean(0).square().sum().item())


def test_global_loss_is_the_mean_over_micro_batches_with_one_share():
    probs_MTE = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(1)).softmax(-1)
    ids_MT1 = probs_MTE.topk(1).indices
    f_E = torch.bincount(ids_MT1.flatten(), minlength=6) / 60
    parts = torch.stack([load_balancing_loss(p, i, f_E) for p, i in zip(probs_MTE, ids_MT1, strict=True)])
    assert torch.allclose(parts.mean(), load_balancing_loss(probs_MTE.flatten(0, 1), ids_MT1.flatten(0, 1)))


def test_domain_map_puts_experts_beside_their_domain():
    f_DE = torch.tensor([[0.1, 0.2, 0.1, 0.6], [0.5, 0.1, 0.3, 0.1]])
    figure = plots_domains.domain_map(f_DE, ["a", "b"], "t")
    assert np.allclose(figure.data[0].z, [[2.4, 0.8, 0.4, 0.4], [0.4, 0.4, 2.0, 1.2]])
    assert list(figure.layout.xaxis.ticktext) == ["3", "1", "0", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    for number in range(12):
        words = " ".join(f"word{number * i % 37}" for i in range(400))
        (folder / f"{number}.txt").write_text(words)
    source = {"source": "files", "path": str(folder), "vocab_size": 280, "heldout": 0.4}
    return prepare(CorpusConfig(dir=str(folder / "data"), **source), progress=False)


SHAPE = {"vocab_size": 280, "n_layers": 2, "d_model": 16, "head_dim": 8, "n_experts": 4, "d_expert": 8}
ROWS = RowsConfig(length=16, per_step=4, per_micro=4)


def test_practice_keeps_a_diary_and_learns(data):
    entries = practice.train(practice.small_model(1, **SHAPE), data, 12, GlobalLBL(), rows=ROWS, window=5)
    steps, loads = ([e for e in entries if e["kind"] == kind] for kind in ("step", "load"))
    assert [e["step"] for e in loads] == [5, 10, 12] and [e["tokens"] for e in loads] == [320, 320, 128]
    assert steps[-1]["terms"]["lm"] < steps[0]["terms"]["lm"]
    for load in loads:
        f_LE, P_LE = torch.tensor(load["f"]), torch.tensor(load["P"])
        assert torch.allclose(f_LE.sum(1), torch.ones(2)) and torch.allclose(P_LE.sum(1), torch.ones(2))
        assert torch.allclose(torch.tensor(load["lbl"]), 4 * (f_LE * P_LE).sum(1))
    assert practice.smooth(entries, n=4)[0] == list(range(4, 13))


def test_a_steps_gradient_does_not_depend_on_how_it_is_cut(data):
    """But for the micro loss, which counts in each micro-batch."""

    def gradient(per_micro, balancer, weight):
        model = practice.small_model(1, **SHAPE)
        rows = RowsConfig(length=16, per_step=4, per_micro=per_micro)
        batches = train_loader(Rows(data.train, data.token_bytes, 16), rows, steps=1)
        objective = Objective(balancer, weight, z_weight=1e-4, n_layers=2)
        (done,) = loop.train(model, batches, objective, steps=1, micros=rows.accumulation(1), clip=math.inf)
        load = ExpertLoad(2, 4)
        for routings in done.routings:
            load.update(routings)
        counts_LE = done.pooled.statistics
        assert counts_LE.sum(1).tolist() == [64, 64] and torch.equal(counts_LE, load.counts_LE)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(4, GlobalLBL(), 0.0)
    assert torch.allclose(whole, gradient(1, GlobalLBL(), 0.0), atol=1e-6) and whole.norm() > 0.1
    assert not torch.allclose(gradient(4, MicroLBL(), 1.0), gradient(1, MicroLBL(), 1.0), atol=1e-4)


def test_practice_moves_the_bias_and_follows_k(data):
    class Up(Balancer):
        def next_bias(self, bias_LE, pooled, step):
            assert pooled.sum(1).tolist() == [64 * k for k in (2, 1)]
            return bias_LE + step

    model = practice.small_model(1, **SHAPE)
    entries = practice.train(model, data, 3, Up(), rows=ROWS, k=lambda step: (2, 1))
    assert entries[-1]["bias"] == [[3.0] * 4] * 2 and model.k_per_layer == (2, 1)
