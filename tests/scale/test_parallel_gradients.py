"""However a model is laid out over ranks, one step has the same gradients. Losses would not tell: AdamW hides factors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from sigma_lite.balance.balancer import GlobalLBL
from sigma_lite.balance.losses import load_share
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.kernels.plan import routing_plan
from sigma_lite.model import Transformer
from sigma_lite.scale.expert_parallel import agree, exchange
from sigma_lite.scale.shard import check_grid, make_mesh, shard
from sigma_lite.train.optim import clip_gradients, total_norm

NET = ModelConfig(
    vocab_size=50, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, d_expert=8, router_init_std=0.3
)
ROWS, LENGTH = 8, 12
# ranks, of them along the expert axis, and what else is asked for
LAYOUTS = [*((*grid, "") for grid in ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))), (4, 2, "recompute"), (4, 2, "bf16")]
LAYOUTS += [(4, 2, "3 parts"), (4, 4, "3 parts, recompute"), (4, 2, "padded"), (4, 4, "padded, recompute")]
OPTIONS = {"recompute": {"recompute": True}, "bf16": {"compute_dtype": torch.bfloat16}}
OPTIONS |= {"3 parts": {"exchange_parts": 3}, "padded": {"capacity": 4.0}}


def gradients(model: Transformer, rank: int, ranks: int, bf16: bool = False) -> dict[str, Tensor]:
    """Of a loss with every term, over this rank's rows, in two micro-batches; K = 2 in layer 0 and 1 in layer 1."""
    model.set_k((2, 1))
    ids = torch.randint(0, NET.vocab_size, (2, ranks, ROWS // ranks, LENGTH), generator=torch.Generator().manual_seed(3))
    objective, pooled = Objective(GlobalLBL(), weight=1.0, z_weight=0.1, n_layers=NET.n_layers), PooledCounts()
    for ids_BS in ids[:, rank]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # it keeps cast weights: one forward pass, no longer
            lm, routings = model.loss(ids_BS, ids_BS.roll(-1, 1))
        (objective(lm, routings, pooled, len(ids_BS)).total / 2).backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()} | {"f": load_share(pooled.counts_LE)}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def laid_out(ranks: int, expert_ranks: int, **options) -> Transformer:
    torch.manual_seed(5)
    with torch.device("meta"):
        model = Transformer(NET)
    shard(model, make_mesh("cpu", ranks, expert_ranks), **options)
    return model


def one_device() -> Transformer:
    torch.manual_seed(5)
    return Transformer(NET)


def norms(model: Transformer, limit: float) -> tuple[float, dict[str, Tensor]]:
    """The gradient's norm, and the gradient clipped to `limit`."""
    norm = total_norm(p.grad for p in model.parameters())
    clip_gradients(model.parameters(), norm, limit)
    return float(norm), {name: whole(p.grad) for name, p in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).norm() / a[n].double().norm()) for n in a)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """Weights, gradients, norm and clipped gradients of every layout, from each rank; one launch for each number of them."""

    def work(rank: int) -> dict:
        found = {}
        for ranks, expert_ranks, variant in LAYOUTS:
            if ranks == dist.get_world_size():
                options = {k: v for word in filter(None, variant.split(", ")) for k, v in OPTIONS[word].items()}
                model = laid_out(ranks, expert_ranks, **options)
                weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
                grads = gradients(model, rank, ranks, variant == "bf16")
                found[ranks, expert_ranks, variant] = weights, grads, *norms(model, 0.5)
        return found

    all_ranks = [on_ranks(ranks, work, tmp_path_factory.mktemp(f"ranks-{ranks}")) for ranks in (2, 4)]
    return {layout: [found[layout] for found in ranks] for ranks in all_ranks for layout in ranks[0]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_neither_weights_nor_gradients(measured, layout):
    model, bf16 = one_device(), layout[2] == "bf16"
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = gradients(model, 0, 1, bf16)
    norm, clipped = norms(model, 0.5)
    assert norm > 0.5, "nothing would be clipped"
    near = 0.1 if bf16 else 1e-5  # bf16 sums in another order send some tokens elsewhere
    for found_weights, found_grads, found_norm, found_clipped in measured[layout]:
        assert all(torch.equal(expected[name], found_weights[name]) for name in expected)
        assert torch.allclose(grads["f"], found_grads["f"], rtol=0, atol=0.02 if bf16 else 0), "global-batch shares"
        assert distance(grads, found_grads) < near
        assert found_norm == pytest.approx(norm, rel=near)
        assert distance(clipped, found_clipped) < near


def test_rows_arrive_in_order_and_gradients_return(tmp_path):
    """Uneven traffic, and ranks that get or send nothing: every row comes back to its place, it and its gradient twice."""
    counts_REE = torch.tensor([[3, 0, 2], [0, 0, 4], [1, 0, 0]])  # [from, to]; nobody sends to rank 1

    def work(rank: int):
        group = dist.group.WORLD
        ids_T1 = torch.arange(6).repeat_interleave(counts_REE[rank].repeat_interleave(2))[
            :, None
        ]  # two experts a rank, alike
        [traffic] = agree([routing_plan(ids_T1, 6)], group)
        sent, received = (2 * counts_REE[rank]).tolist(), (2 * counts_REE[:, rank]).tolist()
        assert (traffic.sent_R, traffic.received_R) == (sent, received)
        rows = torch.arange(sum(sent) * 4.0).view(-1, 4).add(100 * rank).requires_grad_()
        there = exchange(rows, traffic.sent_R, traffic.received_R, group)
        back = exchange(there * 2, traffic.received_R, traffic.sent_R, group)
        back.backward(rows.detach())
        return rows.detach(), back.detach(), rows.grad, there.detach(), traffic.expert_M

    found = on_ranks(3, work, tmp_path)
    for rows, back, grad, *_ in found:
        assert torch.equal(back, 2 * rows) and torch.equal(grad, 2 * rows)
    assert found[1][3].shape == (0, 4)
    assert found[0][3][:, 0].tolist() == [0, 4, 8, 12, 16, 20, 200, 204]  # from itself, then from rank 2
    assert found[0][4].tolist() == [0, 0, 0, 1, 1, 1, 0, 1]


def test_a_rank_without_tokens_takes_part(tmp_path):
    """All tokens choose expert 0: the other ranks' experts get none, yet nobody waits for ever and gradients are right."""

    def collapse(model: Transformer) -> Transformer:
        model.set_bias(torch.tensor([10.0] + [0.0] * 7).expand(2, 8))
        return model

    found = on_ranks(2, lambda rank: gradients(collapse(laid_out(2, 2)), rank, 2), tmp_path)
    one = gradients(collapse(one_device()), 0, 1)
    assert float(one["blocks.1.moe.experts.w2"][1:].norm()) == 0 < float(one["blocks.1.moe.experts.w2"][0].norm())
    for grads in found:
        assert distance(one, grads) < 1e-5


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"expert_parallel=3 does not divide the 4 rank"):
        make_mesh("cpu", 4, 3)
    with pytest.raises(ConfigError, match=r"expert_parallel=16 does not divide n_experts=8"):
        check_grid(NET, 1, 16)
    with pytest.raises(ConfigError, match=r"d_model=16 cannot be cut into 3"):
        check_grid(NET, 3, 2)


def test_shares_are_not_all_alike(measured):
    """Otherwise a loss that forgot to pool over ranks would pass."""
    f_LE = measured[4, 4, ""][0][1]["f"]
    assert f_LE.max() > 2 * f_LE.min() and math.isclose(float(f_LE[0].sum()), 1, rel_tol=1e-6)
