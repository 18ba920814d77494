"""Experts that compute elsewhere than they are stored: the same gradients, and as many rows a rank as the planner says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from sigma_lite.balance.balancer import GlobalLBL, counts_of
from sigma_lite.balance.objective import Objective
from sigma_lite.balance.pooled import PooledCounts, sum_over_ranks
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.model.experts import Experts
from sigma_lite.papers import eplb
from sigma_lite.scale.copies import Copies
from sigma_lite.scale.counted import Messages
from sigma_lite.scale.layout import StrategyConfig
from sigma_lite.scale.placement import identity, makespan, near_home, rank_loads
from sigma_lite.scale.shard import make_mesh, place, shard
from sigma_lite.train.callbacks.replan import Replan

L, E, R, P = 2, 8, 4, 12
NET = ModelConfig(
    vocab_size=50, n_layers=L, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=E, d_expert=8, router_init_std=0.3
)
IDS = torch.randint(0, NET.vocab_size, (4, 8, 16), generator=torch.Generator().manual_seed(3))  # of each rank
BIAS = torch.tensor([0.3, 0.2, 0.0, 0.0, 0.0, 0.05, 0.0, 0.0]).expand(L, E)  # two experts get most rows
WAYS = {"EPLB": {}, "snake": {}, "moved": {}, "twice on a rank": {}, "EPLB, recompute": {"recompute": True}}
WAYS |= {"EPLB, 2 parts": {"exchange_parts": 2}, "EPLB, padded": {"capacity": 4.0}}


def gradients(model: Transformer, ids_BS: torch.Tensor) -> dict[str, torch.Tensor]:
    model.set_k((2, 1))
    model.set_bias(BIAS)
    lm, routings = model.loss(ids_BS, ids_BS.roll(-1, 1))
    Objective(GlobalLBL(), 0.1, 0.1, L)(lm, routings, PooledCounts(), len(ids_BS)).total.backward()
    found = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
    return found | {"counts": sum_over_ranks(counts_of(routings))}


def laid_out(expert_ranks: int, **options) -> tuple[Transformer, object]:
    torch.manual_seed(5)
    with torch.device("meta"):
        model = Transformer(NET)
    mesh = make_mesh("cpu", R, expert_ranks)
    shard(model, mesh, **options)
    return model, mesh


@pytest.fixture(scope="module")
def one() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return gradients(Transformer(NET), IDS.flatten(0, 1))


def placement(way: str, loads_LE: np.ndarray, ranks: int) -> np.ndarray:
    if way == "moved":  # no copies, nobody at home
        return np.tile(np.roll(np.arange(E), 3), (L, 1))
    if way == "twice on a rank":
        return identity(loads_LE, ranks, P)
    return near_home((eplb.snake if way == "snake" else eplb.plan)(loads_LE, ranks, P), E, ranks)


@pytest.fixture(scope="module")
def found(one, tmp_path_factory) -> list[dict]:
    loads = one["counts"].double().numpy()

    def work(rank: int) -> dict:
        seen = {}
        for expert_ranks in (4, 2):
            for way, given in WAYS.items():
                options = {k: v for k, v in given.items() if k != "recompute"}
                model, mesh = laid_out(expert_ranks, **given)
                experts_LP = placement(way.split(",")[0], loads, expert_ranks)
                place(model, mesh, experts_LP, **options)
                rows = []
                for block in model.blocks if not given else ():
                    block.moe.experts.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))
                seen[way, expert_ranks] = gradients(model, IDS[rank]), experts_LP, rows
        return seen

    return on_ranks(R, work, tmp_path_factory.mktemp("placed"))


@pytest.mark.parametrize("expert_ranks", [4, 2])
@pytest.mark.parametrize("way", WAYS)
def test_copies_change_no_gradient(one, found, way, expert_ranks):
    """Copies' gradients come home and add up: those of one process to 1e-6 of each tensor's norm, on 4 ranks and 2 x 2."""
    for rank in found:
        grads = rank[way, expert_ranks][0]
        assert torch.equal(grads["counts"], one["counts"])
        for name in one.keys() - {"counts"}:
            assert (grads[name] - one[name]).norm() <= 1e-6 * one[name].norm(), name


def test_the_fullest_rank_has_as_many_rows_as_the_planner_says(one, found):
    """The makespan falls by the planner's factor. A copy is off by at most half a row for each rank that sends."""
    loads = one["counts"].double().numpy()
    stored = makespan(identity(loads, R, E), loads, R)
    for way in ("EPLB", "snake"):
        planned = found[0][way, R][1]
        rows_LR = np.array([rank[way, R][2] for rank in found]).T
        said_LR = rank_loads(planned, loads, R)
        assert rows_LR.sum(1).tolist() == loads.sum(1).tolist()
        assert (np.abs(rows_LR - said_LR) <= R * P / R / 2).all(), (rows_LR, said_LR)
        factor = stored / (rows_LR.max(1) / rows_LR.mean(1))
        print(way, "stored", stored, "planned", makespan(planned, loads, R), "was", rows_LR.max(1) / rows_LR.mean(1))
        assert factor == pytest.approx(stored / makespan(planned, loads, R), rel=0.05)
        assert (factor > 1.3).all()


def test_weights_that_travel(tmp_path):
    """Only distinct experts, once to each rank, with sizes that nobody has to tell: no host waits for them."""

    def work(rank: int) -> tuple:
        expert_P = np.array([0, 1, 0, 2, 0, 4, 6, 6, 3, 5, 7, 0])  # 8 experts, 4 ranks of 3 spots
        copies = Copies(expert_P, E, dist.group.WORLD, torch.device("cpu"))
        stored = (torch.arange(2.0) + 2 * rank)[:, None].expand(2, 3).clone().requires_grad_()
        with Messages() as messages:
            there = copies.fetch(stored)
            there.backward(torch.full_like(there, 1.0 + rank))
        ids = torch.tensor([[0], [0], [0], [0], [0], [1], [6], [6]])
        return there[:, 0].tolist(), stored.grad[:, 0].tolist(), messages.waits, copies.spread(ids)[:, 0].tolist()

    found = on_ranks(R, work, tmp_path)
    assert [there for there, *_ in found] == [[0, 1, 0], [2, 0, 4], [6, 6, 3], [5, 7, 0]]
    assert [grad for _, grad, *_ in found] == [[1 + 1 + 2 + 4, 1], [2, 3], [2, 4], [3 + 3, 4]]
    assert [waits for *_, waits, _ in found] == [0] * R
    turns = [0, 2, 4, 11]
    for rank, (*_, spots) in enumerate(found):
        assert spots == [*(turns[(n + rank) % 4] for n in range(5)), 1, *(6 + (n + rank) % 2 for n in range(2))]


def test_bf16_gradients_of_copies_add_up_in_fp32(tmp_path):
    """256 + 1 + 1 + 1 = 259, which bf16 rounds to 260; added one by one in bf16 it stays 256."""

    def work(rank: int) -> list[float]:
        copies = Copies(np.array([0, 1, 2, 3, 0, 4, 0, 6, 5, 7, 0, 6]), E, dist.group.WORLD, torch.device("cpu"))
        stored = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
        there = copies.fetch(stored)
        assert there.dtype == torch.bfloat16
        there.backward(torch.full_like(there, 256.0 if rank == 0 else 1.0))
        return stored.grad[:, 0].tolist()

    assert on_ranks(R, work, tmp_path)[0] == [260, 256]


@pytest.mark.parametrize("ranks", [2, 4])
def test_bf16_copies_have_the_gradient_of_one_process(tmp_path, ranks):
    """Off by no more than bf16 must round: each rank's part once, because it travels; their sum once; the other sum once."""
    shape = dataclasses.replace(NET, n_experts=ranks)
    x_RTD = torch.randn(ranks, 64, NET.d_model, generator=torch.Generator().manual_seed(1)).bfloat16()
    copies_of_0 = np.concatenate([[rank, 0] for rank in range(ranks)])  # on every rank, on rank 0 twice

    def experts(first: int = 0, count: int = ranks) -> Experts:
        """These of the same experts, in bf16."""
        torch.manual_seed(5)
        made = {name: torch.randn(w.shape) * 0.5 for name, w in Experts(shape).named_parameters()}
        own = Experts(dataclasses.replace(NET, n_experts=count))
        own.load_state_dict({name: w[first : first + count] for name, w in made.items()})
        return own.bfloat16()

    def slopes(own: Experts, x_TD: torch.Tensor, spot: int) -> list[torch.Tensor]:
        """Of the first expert that is stored here."""
        y_TD = own(x_TD, torch.full((len(x_TD), 1), spot), torch.ones(len(x_TD), 1, dtype=x_TD.dtype))
        return [g[0].double() for g in torch.autograd.grad(y_TD.float().pow(2).sum(), list(own.parameters()))]

    def work(rank: int) -> list[torch.Tensor]:
        own = experts(rank, 1)
        own.fetch = Copies(copies_of_0, ranks, dist.group.WORLD, torch.device("cpu")).fetch
        return slopes(own, x_RTD[rank], spot=1)

    summed = on_ranks(ranks, work, tmp_path)[0]
    together = slopes(experts(), x_RTD.flatten(0, 1), spot=0)
    parts = [slopes(experts(), x_TD, spot=0) for x_TD in x_RTD]
    for got, one, *each in zip(summed, together, *parts, strict=True):
        rounding = 2**-8 * (got.abs() + one.abs() + sum(part.abs() for part in each))
        assert ((got - one).abs() <= rounding).all()
        assert (got - one).norm() < 2**-8 * one.norm()


class Steps:
    """As much of a run as `Replan` asks for: 2 experts per token before step 4, then 1; loads turn round there."""

    def __init__(self):
        self.strategy = self.net = self
        self.expert_parallel, self.copies, self.planner = 2, 0, "sigma_lite.papers.eplb.plan"
        self.n_layers, self.n_experts, self.callbacks = 1, 4, []
        self.global_step, self.placed, self.pooled = 0, [], self

    def k_at(self, step: int) -> tuple[int]:
        return (2,) if step < 4 else (1,)

    @property
    def counts_LE(self) -> torch.Tensor:
        return torch.tensor([[60, 0, 60, 0] if self.global_step < 4 else [30, 30, 0, 0]])

    def place(self, experts_LP) -> None:
        self.placed.append((self.global_step, None if experts_LP is None else experts_LP.tolist()))

    def run(self, replan: Replan, first: int, last: int) -> None:
        for self.global_step in range(first, last):
            replan.on_before_optimizer_step(self, self, None)


def test_a_switch_of_sparsity_is_planned_for_at_once_and_from_its_own_loads():
    """Two counts of 60, 0, 60, 0 would keep 0 and 2 apart; of the new loads 0 and 1 must be."""
    run, replan = Steps(), Replan(10)
    replan.on_fit_start(run, run)
    run.run(replan, 0, 20)
    assert [step for step, _ in run.placed] == [0, 4, 14]
    (placed,) = run.placed[1][1]
    assert {0, 1} not in ({*placed[:2]}, {*placed[2:]}), placed
    killed, goes_on = Steps(), Replan(10)
    goes_on.on_fit_start(killed, killed)
    killed.run(goes_on, 0, 4)
    saved, goes_on = goes_on.state_dict(), Replan(10)
    goes_on.load_state_dict(saved)
    goes_on.on_fit_start(killed, killed)
    killed.run(goes_on, 4, 20)
    assert killed.placed[-2:] == run.placed[-2:], "a kill just before the switch changes nothing"
    goes_on.load_state_dict({name: value for name, value in saved.items() if name != "k"})  # of a checkpoint before this


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"copies": 2}, "copies=2 are placed by recorded loads: set replan_every"),
        ({"copies": -1}, "copies=-1"),
        ({"replan_every": -1}, "replan_every=-1"),
        ({"replan_every": 10, "expert_parallel": 1}, "expert_parallel=1"),
        ({"replan_every": 10, "planner": "sigma_lite.papers.eplb.snaek"}, "did you mean 'snake'"),
    ],
)
def test_settings_that_cannot_be(given, words):
    with pytest.raises(ConfigError, match=words):
        StrategyConfig(**{"expert_parallel": 2} | given)
