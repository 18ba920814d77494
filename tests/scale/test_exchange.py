"""What travels in a layer and who waits for it: messages, bytes and host waits of each way to exchange tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from sigma_lite.balance.balancer import Balancer, GlobalLBL
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.scale import expert_parallel
from sigma_lite.scale.counted import Messages
from sigma_lite.scale.layout import StrategyConfig
from sigma_lite.scale.padded import owners, places, rows_of_room
from sigma_lite.scale.shard import make_mesh, shard
from sigma_lite.train.optim import total_norm

L, D, T = 2, 16, 48
NET = ModelConfig(
    vocab_size=50, n_layers=L, d_model=D, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, d_expert=8, router_init_std=0.3
)
WAYS = {
    "plain": {},
    "recompute": {"recompute": True},
    "3 parts": {"exchange_parts": 3},
    "padded": {"capacity": 1.5},
    "padded, recompute": {"capacity": 1.5, "recompute": True},
}


def loss_of(model: Transformer, rank: int, balancer: Balancer | None = None) -> torch.Tensor:
    ids_BS = torch.randint(0, NET.vocab_size, (4, T // 4), generator=torch.Generator().manual_seed(rank))
    lm, routings = model.loss(ids_BS, ids_BS.roll(-1, 1))
    return Objective(balancer or GlobalLBL(), 0.1, 0.0, L)(lm, routings, PooledCounts(), len(ids_BS)).total


def laid_out(**options) -> Transformer:
    torch.manual_seed(5)
    with torch.device("meta"):
        model = Transformer(NET)
    shard(model, make_mesh("cpu", 2, 2), **options)
    return model


class Histogram(Balancer):
    """Counts something beside the loads."""

    def statistics(self, routings):
        return torch.stack([torch.histc(r.probs, 10).long() for r in routings])


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict[str, Messages]]:
    def count(model, rank, balancer=None):
        loss_of(model, rank, balancer).backward()  # FSDP's first step has messages of its own
        with Messages() as messages:
            loss_of(model, rank, balancer).backward()
        return {"calls": messages.calls, "sent": messages.sent, "waits": messages.waits}

    def work(rank: int) -> dict:
        found = {name: count(laid_out(**options), rank) for name, options in WAYS.items()}
        return found | {"histogram": count(laid_out(), rank, Histogram())}

    return on_ranks(2, work, tmp_path_factory.mktemp("seen"))


def test_messages_and_waits_of_a_step(seen):
    """Of each layer: sizes once, rows out and back, forward and backward; recomputation sends rows, and nobody waits."""
    for rank in seen:
        calls = {name: rank[name]["calls"]["all-to-all"] / L for name in WAYS}
        assert calls == {"plain": 5, "recompute": 7, "3 parts": 13, "padded": 5, "padded, recompute": 8}
        waits = {name: rank[name]["waits"] / L for name in WAYS}
        assert waits == {"plain": 1, "recompute": 1, "3 parts": 1, "padded": 0, "padded, recompute": 0}


def test_bytes_of_a_step(seen):
    """Parts carry the same bytes as the whole, recomputation 6 / 4 of the rows, padding 1.5 times an even share always."""
    row, sizes = D * 4, 8 * 8  # fp32 rows; one int64 for each expert
    all_ranks = {name: sum(rank[name]["sent"]["all-to-all"] for rank in seen) / L for name in WAYS}
    rows = 2 * T * row
    assert all_ranks["plain"] == 4 * rows + 2 * sizes
    assert all_ranks["recompute"] == 6 * rows + 2 * sizes
    assert all_ranks["3 parts"] == 4 * rows + 3 * 2 * sizes
    for rank in seen:
        assert rank["padded"]["sent"]["all-to-all"] / L == 4 * 1.5 * T * row + sizes


def test_counts_and_statistics_are_one_sum_over_ranks(seen):
    """One message a micro-batch for all layers, whatever the balancer counts beside the loads."""
    assert [rank["plain"]["calls"]["all-reduce"] for rank in seen] == [1, 1]
    assert [rank["histogram"]["calls"]["all-reduce"] for rank in seen] == [1, 1]


def test_experts_compute_while_other_parts_travel(tmp_path):
    """Forward and backward: when a part is computed, the messages of the next are on their way."""

    def work(rank: int) -> list[str]:
        model, events = laid_out(exchange_parts=2), []
        send, compute = dist.all_to_all_single, model.blocks[0].moe.experts.in_parts

        class Seen:
            def __init__(self, work):
                self.work = work

            def wait(self):
                events.append("arrive")
                return self.work.wait()

        def sending(out, rows, *args, **kwargs):
            if kwargs.get("async_op"):
                events.append("send")
                return Seen(send(out, rows, *args, **kwargs))
            return send(out, rows, *args, **kwargs)

        class Marked(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                events.append("experts")
                return x.clone()

            @staticmethod
            def backward(ctx, dx):
                events.append("experts back")
                return dx

        def marked(parts, each):
            return compute(parts, lambda n, x, run: each(n, x, lambda x, ids, gates: Marked.apply(run(x, ids, gates))))

        dist.all_to_all_single, model.blocks[0].moe.experts.in_parts = sending, marked
        lm, _ = model.loss(*[torch.arange(24).view(2, 12)] * 2)
        lm.backward()
        return events

    forward = ["send", "send", "arrive", "experts", "send", "arrive", "experts", "send", "arrive", "arrive"]
    backward = ["send", "send", "arrive", "experts back", "send", "arrive", "experts back", "send", "arrive", "arrive"]
    plain = [event for event in forward if event != "experts"]
    for events in on_ranks(2, work, tmp_path):
        assert events == [*forward, *plain, *plain, *backward]


def test_rows_that_do_not_fit_make_the_step_no_number(tmp_path):
    """On all ranks, though the rows of one of them would fit; a validation is not padded."""

    def work(rank: int) -> tuple[float, float, float]:
        model = laid_out(capacity=1.0)
        model.set_bias(torch.tensor([10.0] + [0.0] * 7).expand(L, 8))
        with torch.no_grad():
            validation = float(loss_of(model, rank))
        loss_of(model, rank).backward()
        return validation, float(total_norm(p.grad for p in model.parameters())), float(loss_of(laid_out(), rank).detach())

    for validation, norm, _ in on_ranks(2, work, tmp_path):
        assert validation == pytest.approx(validation) and norm != norm


def test_places_and_owners():
    """Rows for three ranks with room for four each: sorted rows keep their order, and empty places belong to anybody."""
    place_N, fits = places(torch.tensor([3, 0, 4]), 4, 7)
    assert place_N.tolist() == [0, 1, 2, 8, 9, 10, 11] and fits
    assert not places(torch.tensor([3, 0, 4]), 3, 7)[1]
    assert owners(torch.tensor([[1, 2], [0, 0], [4, 0]]), 4).tolist() == [0, 1, 1, 1, *[1] * 4, *[0] * 4]
    assert [rows_of_room(48, 4, capacity) for capacity in (1, 1.3, 4, 9)] == [12, 16, 48, 48]


def test_sizes_are_asked_for_again_outside_of_a_recomputation():
    first, second = expert_parallel.agreed_once()
    with first:
        expert_parallel._AGREED.get().told.append(["sizes"])
    for _ in range(2):  # a second backward pass through a kept graph begins at the first layer again
        with second:
            assert next(expert_parallel._AGREED.get().again) == ["sizes"]
    assert expert_parallel._AGREED.get() is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exchange_parts": 0}, "exchange_parts=0: must be at least 1"),
        ({"capacity": 0.5}, "capacity=0.5: must be 1 or more"),
        ({"capacity": 2.0, "exchange_parts": 2}, "choose one"),
        ({"expert_parallel": 1, "exchange_parts": 2}, "with expert_parallel=1 none do"),
    ],
)
def test_ways_that_cannot_be(given, words):
    with pytest.raises(ConfigError, match=words):
        StrategyConfig(**{"expert_parallel": 2} | given)
    assert dataclasses.asdict(StrategyConfig())["capacity"] is None
