"""Sums of whole multiples of a small unit: equal to float64 sums, in any order, and honest about what is no number."""

from __future__ import annotations

import math

import pytest
import torch

from sigma_lite.balance.bits import BitsPerByte
from sigma_lite.balance.exact import UNIT, lost, whole
from sigma_lite.balance.metrics import ExpertLoad, entropy
from sigma_lite.model import Routing


def losses(seed: int, rows: int = 400, length: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    nats_BS = -torch.rand(rows, length, generator=draw).log() * 2.5  # as costs are spread: many small, a few large
    targets_BS = torch.randint(0, 300, (rows, length), generator=draw)
    targets_BS[torch.rand(rows, length, generator=draw) < 0.1] = -100
    return nats_BS, targets_BS, torch.randint(0, 9, (rows, length), generator=draw)


def routing(probs_TE: torch.Tensor) -> Routing:
    best = probs_TE.topk(1)
    return Routing(probs=probs_TE, ids=best.indices, gates=best.values, logits=probs_TE.log())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_bits_per_byte_are_those_of_float64(scale):
    nats_BS, targets_BS, bytes_BS = losses(0)
    metric, scored_BS = BitsPerByte(), targets_BS != -100
    metric.update(scale * nats_BS, targets_BS, bytes_BS)
    wanted = float((scale * nats_BS)[scored_BS].double().sum()) / math.log(2) / int(bytes_BS[scored_BS].sum())
    assert metric.compute()["bits_per_byte"] == pytest.approx(wanted, rel=1e-8)  # measured: 2e-10, and 1e-9 at 1e-3


def test_a_sum_does_not_depend_on_how_it_was_cut():
    nats_BS, targets_BS, bytes_BS = losses(1)
    values = []
    for cut in ([400], [1] * 400, [137, 200, 63]):
        metric = BitsPerByte()
        for piece in zip(*(t.split(cut) for t in (nats_BS, targets_BS, bytes_BS)), strict=True):
            metric.update(*piece)
        values.append(metric.compute())
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("cost", [math.nan, math.inf])
def test_one_cost_that_is_no_number_shows(cost):
    nats_BS, targets_BS, bytes_BS = losses(2, rows=2)
    nats_BS[targets_BS == -100] = math.nan  # of tokens that are not scored, nobody asks
    metric = BitsPerByte()
    metric.update(nats_BS, targets_BS, bytes_BS)
    assert math.isfinite(metric.compute()["nats_per_token"])
    nats_BS[targets_BS != -100] = cost
    metric.update(nats_BS, targets_BS, bytes_BS)
    assert math.isnan(metric.compute()["nats_per_token"]) and math.isnan(metric.compute()["bits_per_byte"])


def test_small_numbers_are_half_a_unit_off_at_most():
    x = torch.tensor([0.0, 1.0, -2.5, 1e-9, 2.0**20, math.inf, math.nan])
    assert whole(x).tolist() == [0, 2**28, -(2**28) * 5 // 2, 0, 2**48, 0, 0]
    assert lost(x).tolist() == [0, 0, 0, 0, 0, 1, 1]
    y = torch.rand(1000)
    assert ((whole(y).double() * UNIT - y.double()).abs() <= UNIT / 2).all()


def test_a_window_of_probabilities_is_that_of_float64():
    draw, load = torch.Generator().manual_seed(3), ExpertLoad(2, 96)
    probs = [torch.randn(2, 2048, 96, generator=draw).mul(3).softmax(-1) for _ in range(20)]
    for p_LTE in probs:
        load.update([routing(p_TE) for p_TE in p_LTE])
    whole_LTE = torch.cat(probs, 1).double()
    assert torch.allclose(load.load()["P"].double(), whole_LTE.mean(1), rtol=3e-7, atol=0)
    assert torch.allclose(load.load()["router_entropy"].double(), entropy(whole_LTE).mean(1), rtol=1e-6, atol=0)
    p = probs[0].clone()
    p[1, 0] = math.nan
    load.update([routing(p_TE) for p_TE in p])
    assert load.load()["P"][1].isnan().all() and load.load()["P"][0].isfinite().all()
