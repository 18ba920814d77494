"""Tokens in two steps, and an embedding in slices (SE-MoE): the numbers of the flat exchange and of one process, and what
travels over which link, counted on four ranks in two nodes and by law."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.scale.counted import Messages
from sigma_lite.scale.shard import make_mesh, shard
from sigma_lite.scale.split_embedding import SplitEmbedding, sent_by_all_reduce, sent_by_slices
from sigma_lite.scale.two_level import flat_links, pays_below, regrouped, two_level, two_level_links

R, G, L, D, T, V = 4, 2, 2, 16, 24, 50  # ranks, places of a node, and a model
NET = ModelConfig(
    vocab_size=V, n_layers=L, d_model=D, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, top_k=2, d_expert=8,
    router_init_std=0.3,
)  # fmt: skip


def rows_of(rank: int) -> torch.Tensor:
    return torch.randint(0, V, (2, T // 2), generator=torch.Generator().manual_seed(rank))


def step(model: Transformer, ids_BS: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Gradients of the mean loss of all ranks, as far as this rank has them, and the choices of each layer."""
    model.zero_grad()
    lm, routings = model.loss(ids_BS, ids_BS.roll(-1, 1))
    lm.backward()
    local = {name: getattr(p.grad, "to_local", lambda p=p: p.grad)().clone() for name, p in model.named_parameters()}
    return local, [routing.ids for routing in routings]


def travelling(work) -> list[tuple[int, int, int]]:
    """(from, to, rows) of every message with sizes of its own that `work` sends from this rank, itself left out."""
    found, original, me = [], dist.all_to_all_single, dist.get_rank()

    def spied(out, given, received=None, sent=None, group=None, **options):
        if sent:
            ranks = dist.get_process_group_ranks(group)
            found.extend((me, to, rows) for to, rows in zip(ranks, sent, strict=True) if to != me)
        return original(out, given, received, sent, group=group, **options)

    dist.all_to_all_single = spied
    try:
        work()
    finally:
        dist.all_to_all_single = original
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    def work(rank: int) -> dict:
        torch.manual_seed(5)
        with torch.device("meta"):
            model = Transformer(NET)
        shard(model, make_mesh("cpu", R, R))
        ids_BS, found = rows_of(rank), {}
        for way in ("flat", "two steps"):
            if way == "two steps":
                mesh = init_device_mesh("cpu", (R // G, G), mesh_dim_names=("node", "place"))
                for block in model.blocks:
                    block.moe.dispatch = two_level(mesh, NET.n_experts)
            gradients, chosen = step(model, ids_BS)
            found[way] = {"gradients": gradients, "sent": travelling(lambda: step(model, ids_BS)), "chosen": chosen}

        torch.manual_seed(5)
        net = dataclasses.replace(NET, tie_embeddings=False)
        alone = Transformer(net)
        model = Transformer(net)
        model.embedding = SplitEmbedding(model.embedding.weight, dist.group.WORLD)
        step(model, ids_BS)
        with Messages() as messages:
            gradients, _ = step(model, ids_BS)
        together = torch.cat([rows_of(r) for r in range(R)])
        found["slices"] = {
            "mine": gradients["embedding.weight"] / R,  # each rank's loss is a mean over its own tokens
            "expected": step(alone, together)[0]["embedding.weight"].chunk(R, 1)[rank],
            "rows": torch.equal(model.embedding(ids_BS), alone.embedding(ids_BS)),
            "messages": messages,
        }
        return found

    return on_ranks(R, work, tmp_path_factory.mktemp("seen"))


def sends(seen: list[dict]) -> torch.Tensor:
    """Rows from each rank to each, by the choices, both layers together."""
    of_rank = [torch.cat([ids.flatten() for ids in rank["flat"]["chosen"]]) for rank in seen]
    return torch.stack([torch.bincount(ids // (NET.n_experts // R), minlength=R) for ids in of_rank])


def test_two_steps_compute_what_one_computes(seen):
    """Bitwise, for rows arrive in the same order: every gradient on every rank."""
    for rank in seen:
        flat, two = rank["flat"]["gradients"], rank["two steps"]["gradients"]
        assert flat.keys() == two.keys() and all(torch.equal(flat[name], two[name]) for name in flat)
        assert all(gradient.abs().sum() > 0 for gradient in flat.values())


def test_rows_and_messages_on_each_link_are_those_of_the_law(seen):
    """Out and back, forward and backward: four exchanges of each row. Between nodes half of the messages, as many rows."""
    sends_RR = sends(seen)
    for way, law in (("flat", flat_links), ("two steps", two_level_links)):
        sent = [message for rank in seen for message in rank[way]["sent"]]
        near = sum(rows for a, b, rows in sent if a // G == b // G)
        far = [(a, b, rows) for a, b, rows in sent if a // G != b // G]
        expected = law(sends_RR, G)
        assert (near, sum(rows for *_, rows in far)) == (4 * expected.near_rows, 4 * expected.far_rows)
        assert len(far) == 4 * L * expected.far_messages
        assert way == "flat" or all(a % G == b % G for a, b, _ in far), "only ranks of one place talk between nodes"
    flat, two = flat_links(sends_RR, G), two_level_links(sends_RR, G)
    assert flat.far_rows == two.far_rows > 0 and flat.far_messages == G * two.far_messages
    assert flat.near_rows < two.near_rows


def test_slices_have_the_gradient_of_one_process_and_no_dense_sum(seen):
    """What travels: ids, slices forth, their gradients back; no all-reduce."""
    for rank in seen:
        found = rank["slices"]
        assert found["rows"] and found["mine"].shape == (V, D // R)
        assert (found["mine"] - found["expected"]).norm() < 1e-6 * found["expected"].norm()
        messages = found["messages"]
        assert dict(messages.calls) == {"all-gather": 1, "all-to-all": 2} and messages.sent["all-gather"] == 8 * T
        handed = messages.sent["all-to-all"] // 4  # fp32 numbers, a rank's own part among them
        assert handed * (R - 1) // R == sent_by_slices(T, D, R)


# ------------------------------------------------------------------------------------------------------------- laws


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 50))
def test_even_loads(nodes, per_node, each):
    """The table of scale/two_level.py, and what it makes of seconds."""
    ranks = nodes * per_node
    sends_RR = torch.full((ranks, ranks), each)
    flat, two = flat_links(sends_RR, per_node), two_level_links(sends_RR, per_node)
    assert flat.far_rows == two.far_rows == ranks * each * (ranks - per_node)
    assert flat.near_rows == ranks * each * (per_node - 1) and two.near_rows == nodes * flat.near_rows
    assert flat.far_messages == ranks * (ranks - per_node) == per_node * two.far_messages
    latency, near_gbps, far_gbps, row = 5e-6, 450.0, 50.0, 4096

    def seconds(links) -> float:
        near, far = links.near_rows * row / near_gbps / 1e9, links.far_rows * row / far_gbps / 1e9
        return (near + far + links.far_messages * latency) / ranks

    if nodes > 1 and per_node > 1:
        assert (seconds(two) < seconds(flat)) == (each * row < pays_below(latency, near_gbps))


def test_a_message_of_two_megabytes():
    """5 microseconds at 450 GB/s are 2.25 MB: longer flat messages are better sent at once."""
    assert pays_below(5e-6, 450) == pytest.approx(2.25e6)


def test_blocks_are_put_into_the_other_order():
    rows_N1 = torch.arange(10)[:, None]
    sizes_PQ = torch.tensor([[1, 2, 0], [3, 0, 4]])
    assert regrouped(rows_N1, sizes_PQ).flatten().tolist() == [0, 3, 4, 5, 1, 2, 6, 7, 8, 9]
    again = regrouped(regrouped(rows_N1, sizes_PQ), sizes_PQ.T)
    assert torch.equal(again, rows_N1)


def test_slices_pay_where_tokens_are_fewer_than_the_vocabulary():
    for ranks in (2, 4, 8):
        for tokens in (100, 4096, 10**6):
            pays = sent_by_slices(tokens, 64, ranks) < sent_by_all_reduce(4096, 64, ranks)
            assert pays == (tokens < 4096)
    net = ModelConfig.preset("sigma_moe_tiny")
    assert sent_by_slices(4096, net.d_model, 8) * 37 < sent_by_all_reduce(net.vocab_size, net.d_model, 8)


def test_a_width_that_cannot_be_cut(tmp_path):
    def work(rank: int) -> None:
        with pytest.raises(ConfigError, match="d_model=5 cannot be cut into 2 equal slices"):
            SplitEmbedding(torch.zeros(3, 5), dist.group.WORLD)

    on_ranks(2, work, tmp_path)
