"""The planner's bytes on the wire against what ranks really hand to gloo, collective by collective."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from sigma_lite.config import ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.scale import traffic
from sigma_lite.scale.cluster import load_cluster
from sigma_lite.scale.layout import PRECISIONS, Layout
from sigma_lite.scale.shard import make_mesh, shard

NET = ModelConfig(
    vocab_size=64, n_layers=3, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, d_expert=8, router_init_std=0.3
)
RANKS, ROWS, LENGTH, K = 4, 2, 32, (3, 1, 1)
LAYOUTS = [(ep, recompute, bf16) for ep in (1, 2, 4) for recompute in (False, True) for bf16 in (False, True)]


class Collectives(TorchDispatchMode):
    """[name, dtype, elements of the first tensor, of the second] of every collective: outputs come first."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            out, into = (tensor for tensor in args[:2] if isinstance(tensor, torch.Tensor))
            self.seen.append((func.__name__.split(".")[0], out.dtype, out.numel(), into.numel()))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[tuple, list[list[tuple]]]:
    """{layout: the collectives of one micro-batch on each rank}"""

    def work(rank: int) -> dict:
        found = {}
        for ep, recompute, bf16 in LAYOUTS:
            torch.manual_seed(0)
            with torch.device("meta"):
                model = Transformer(NET)
            dtype = torch.bfloat16 if bf16 else None
            shard(model, make_mesh("cpu", RANKS, ep), recompute=recompute, compute_dtype=dtype)
            model.set_k(K)
            ids = torch.randint(NET.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))
            with Collectives() as collectives:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss, _ = model.loss(ids, ids.roll(-1, 1))
                loss.backward()
            found[ep, recompute, bf16] = collectives.seen
        return found

    ranks = on_ranks(RANKS, work, tmp_path_factory.mktemp("traffic"))
    return {layout: [found[layout] for found in ranks] for layout in LAYOUTS}


def planned(ep: int, recompute: bool, bf16: bool, imbalance: float = 1.0):
    layout = Layout(RANKS, ep, ROWS, recompute, sharded=True, imbalance=imbalance)
    number = PRECISIONS["bf16-mixed" if bf16 else "32-true"]
    node = load_cluster("h100-node").resized(devices_per_node=RANKS)
    rows = traffic.exchanged(NET, ROWS * LENGTH, K, layout, number, node)
    return rows.intra, traffic.gathered(NET, layout, number, node).intra


def of_rows(collectives: list[tuple]) -> list[tuple]:
    return [c for c in collectives if c[0] == "alltoall_base_" and c[1] != torch.int64]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_gradients_are_gathered_and_summed_as_planned(seen, layout):
    """A ring of n ranks sends (n - 1) / n of the whole: of what a gather gives, of what a sum takes."""
    for collectives in seen[layout]:
        sent = 0.0
        for name, dtype, out, into in collectives:
            if name in ("_allgather_base_", "_reduce_scatter_base_"):
                whole, piece = max(out, into), min(out, into)
                sent += (whole - piece) * dtype.itemsize
        assert sent == pytest.approx(planned(*layout)[1], rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_travel_as_often_as_planned(seen, layout):
    """Four exchanges a layer, and six with recomputation, which has the forward pass twice. Half bring rows to experts."""
    ep, recompute, bf16 = layout
    for collectives in seen[layout]:
        rows = of_rows(collectives)
        assert len(rows) == (0 if ep == 1 else len(K) * (6 if recompute else 4))
    whole = sum(out * dtype.itemsize for collectives in seen[layout] for _, dtype, out, _ in of_rows(collectives))
    assert whole / RANKS * (ep - 1) / ep == pytest.approx(planned(*layout)[0]), "a rank keeps the rows that are at home"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[0] > 1])
def test_imbalance_is_what_the_fullest_link_carries(seen, layout):
    """With the imbalance that this routing has, the plan is the fullest direction of every exchange, summed."""
    ep, recompute, _ = layout
    exchanges = list(zip(*(of_rows(collectives) for collectives in seen[layout]), strict=True))
    fullest = sum(max(max(out, into) * dtype.itemsize for _, dtype, out, into in ranks) for ranks in exchanges)
    share = sum(sum(out * dtype.itemsize for _, dtype, out, _ in ranks) for ranks in exchanges) / RANKS
    assert fullest > 1.02 * share, "routing is even: nothing is shown"
    assert planned(*layout, imbalance=fullest / share)[0] == pytest.approx(fullest * (ep - 1) / ep)
