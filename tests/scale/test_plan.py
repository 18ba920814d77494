"""What the planner counts: parameters, FLOPs, bytes on the wire, time; and what it says to what cannot be."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sigma_lite import cli
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.runfile import load_run
from sigma_lite.scale import cost, traffic
from sigma_lite.scale.cluster import BUILT_IN, built_in, load_cluster
from sigma_lite.scale.forecast import forecast, suggestion
from sigma_lite.scale.layout import PRECISIONS, Layout, choices, layout_of, why_not
from sigma_lite.scale.memory import fits, memory, peak
from sigma_lite.scale.plan import k_before_and_after
from sigma_lite.scale.table import as_table, duration, size_of

ROOT = Path(__file__).parents[2]
FULL = ROOT / "scaled_configs" / "sigma_moe_tiny.yaml"
MIXED = PRECISIONS["bf16-mixed"]


@pytest.fixture(scope="module")
def full():
    return load_run([FULL])


# ---------------------------------------------------------------------------------------------------------- counting


def test_flops_are_those_of_the_matrices_that_a_token_meets(full):
    """Against a count by hand: 2 FLOPs for each multiply-add, all of them again twice in the backward pass."""
    D, V, H, G, C, E, F, L, S = 1536, 151_936, 16, 4, 96, 96, 768, 56, 4096
    layer = 2 * D * H * C + 2 * D * G * C + D * E + 3 * D * F
    flops = traffic.flops_per_token(full.net, (1,) * L, S)
    assert flops.matrices == 2 * L * layer
    assert flops.head == 2 * V * D
    positions = sum(range(1, S + 1)) / S  # that a token sees on average
    assert flops.attention == pytest.approx(2 * 2 * L * positions * H * C, rel=1e-3)
    assert flops.training == 3 * flops.forward


def test_more_experts_cost_exactly_their_matrices(full):
    before, after = k_before_and_after(full)
    more = traffic.flops_per_token(full.net, before, 4096).forward - traffic.flops_per_token(full.net, after, 4096).forward
    assert more == 2 * 32 * 3 * 1536 * 768  # 40 instead of 8 in the first eight layers


def test_a_row_travels_four_times_to_ranks_that_do_not_hold_its_expert():
    net = ModelConfig(n_layers=2, d_model=128, n_experts=8)
    node = load_cluster("h100-node")
    for ranks in (2, 4, 8):
        layout = Layout(8, ranks, sharded=True, imbalance=1.0)
        sent = traffic.exchanged(net, 1000, (2, 1), layout, MIXED, node)
        assert sent.intra == pytest.approx(1000 * 3 * 128 * 2 * 4 * (ranks - 1) / ranks)
        assert sent.inter == 0
    even = Layout(16, 16, sharded=True, imbalance=1.0)
    far = traffic.exchanged(net, 1000, (2, 1), even, MIXED, node.resized(nodes=2))
    assert far.inter == pytest.approx(1000 * 3 * 128 * 2 * 4 / 2), "half of the ranks are on the other node"
    assert traffic.exchanged(net, 1000, (2, 1), Layout(8, 1, sharded=True), MIXED, node) == (0, 0)


def test_sharing_experts_out_saves_the_gathering_of_their_weights(full):
    """Law: with all ranks of a node along the expert axis, the experts' weights stay where they are."""
    node, experts = load_cluster("h100-node"), full.net.ledger().experts
    alone = traffic.gathered(full.net, Layout(8, 8, sharded=True), MIXED, node)
    for ranks in (1, 2, 4):
        gathered = traffic.gathered(full.net, Layout(8, ranks, sharded=True), MIXED, node)
        assert gathered.intra - alone.intra == pytest.approx(experts / ranks * (2 * 2 + 4) * (1 - ranks / 8))
    assert traffic.gathered(full.net, Layout(1, 1), MIXED, node) == (0, 0)


def test_few_tokens_travel_to_experts_and_many_let_the_experts_travel():
    """Closed form: at top-1 both move the same bytes with 3 E F tokens a device and step, whatever the width."""
    E, F, node = 96, 768, load_cluster("h100-node")
    for width in (1536, 512):
        net = ModelConfig(n_layers=1, d_model=width, n_experts=E, d_expert=F)
        shared_out, gathered = (Layout(8, ranks, sharded=True, imbalance=1.0) for ranks in (8, 1))
        weights = traffic.gathered(net, gathered, MIXED, node).intra - traffic.gathered(net, shared_out, MIXED, node).intra
        for tokens, less in ((3 * E * F * 9 // 10, True), (3 * E * F * 11 // 10, False)):
            assert (traffic.exchanged(net, tokens, (1,), shared_out, MIXED, node).intra < weights) == less


def test_a_step_lasts_as_long_as_its_parts_say(full):
    node = load_cluster("h100-node").resized(nodes=8)
    layout = dataclasses.replace(layout_of(full, node), imbalance=1.0)
    before, after = k_before_and_after(full)
    for k in (before, after):
        fast, slow = (cost.step(full, layout, node, k, craft) for craft in cost.CRAFT["gpu"])
        assert fast.seconds < slow.seconds
        assert max(fast.compute, fast.network) + fast.optimizer <= fast.seconds
        assert slow.seconds == pytest.approx(slow.compute + slow.network + slow.optimizer), "nothing overlaps"
    # without waiting or moving, MFU is the share of the peak that was put in
    flops = traffic.flops_per_token(full.net, after, full.rows.length)
    done = flops.training + flops.forward - flops.head  # recomputation is no model FLOP, and leaves the head out
    only = cost.mfu(full, layout, node, after, slow.compute * flops.training / done)
    assert only == pytest.approx(cost.CRAFT["gpu"][1].compute)


def test_recomputation_multiplies_the_layers_once_more_and_not_the_head():
    """Against torch's own count of matrix products; the experts' kernel and attention are not among them."""
    net = ModelConfig(vocab_size=640, n_layers=3, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, d_expert=8)
    ids, counted = torch.randint(net.vocab_size, (2, 32)), []
    for recompute in (False, True):
        model = Transformer(net)
        for block in model.blocks if recompute else ():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        with FlopCounterMode(display=False) as flops:
            model.loss(ids, ids.roll(-1, 1))[0].backward()
        counted.append(flops.get_total_flops())
    counts = net.ledger()
    assert counted[1] - counted[0] == 2 * ids.numel() * (counts.attention + counts.router)


def test_the_fullest_device_is_waited_for_in_memory_traffic_and_time(full):
    """Law: `imbalance` multiplies its rows, so its exchange and its experts' work and memory, and nothing without experts
    apart. Nobody gets more than all rows."""
    node = load_cluster("h100-node").resized(nodes=8)
    k, plain = k_before_and_after(full)[0], cost.CRAFT["gpu"][1]

    def parts(imbalance: float, ranks: int = 8) -> tuple[float, float, int]:
        layout = Layout(64, ranks, 16, recompute=True, sharded=True, imbalance=imbalance)
        sent = traffic.wire(full, layout, node, k)["tokens_to_experts"]
        return sum(sent), cost.step(full, layout, node, k, plain).compute, peak(memory(full, layout, node, k))

    even, uneven = parts(1.0), parts(2.0)
    assert uneven[0] == pytest.approx(2 * even[0])
    flops, experts = traffic.flops_per_token(full.net, k, full.rows.length), 2 * full.net.ledger(k).active_experts
    layers = 4 * (flops.forward - flops.head)
    assert uneven[1] / even[1] == pytest.approx((layers + 4 * experts + 3 * flops.head) / (layers + 3 * flops.head))
    assert uneven[2] > even[2]
    assert parts(8.0) == parts(100.0) and parts(1.0, ranks=1) == parts(4.0, ranks=1)


def test_optimizer_moves_28_bytes_a_parameter_in_fp32(full):
    assert traffic.optimizer_bytes(full, Layout(1)) == 28 * full.net.ledger().total


# ------------------------------------------------------------------------------------------------------------ memory


def test_sharding_divides_what_it_shards(full):
    node = load_cluster("h100-node")
    k = k_before_and_after(full)[0]
    one, eight = (memory(full, Layout(n, 1, 1, sharded=True), node.resized(devices_per_node=n), k) for n in (1, 8))
    for item in ("weights", "gradients", "adamw_moments"):
        assert eight[item] == pytest.approx(one[item] / 8, rel=1e-6)
    assert eight["activations"] == one["activations"], "each device has rows of its own"


def test_the_suggestion_fits_can_be_run_and_is_not_slower_than_another_that_fits(full):
    node = load_cluster("h100-node").resized(nodes=8)
    best = suggestion(full, node)
    assert why_not(full.net, full.rows, best) == ""
    k, plain = k_before_and_after(full)[0], cost.CRAFT["gpu"][1]
    able = [layout for layout in choices(full, node) if fits(memory(full, layout, node, k), node)]
    fastest = min(cost.step(full, layout, node, k, plain).seconds for layout in able)
    assert cost.step(full, best, node, k, plain).seconds < 1.1 * fastest
    assert any(layout.expert_parallel != best.expert_parallel for layout in able), "there was something to choose"


def test_what_does_not_fit_is_told_how_many_nodes_would_do(full, tmp_path):
    small = tmp_path / "small.yaml"
    small.write_text((BUILT_IN / "h100-node.yaml").read_text("utf-8").replace("memory_gib: 79.6", "memory_gib: 12"))
    facts = forecast(full, str(small), nodes=1)
    enough = facts["fits_from_nodes"]
    assert not facts["fits"] and facts["suggested"] is None and enough > 1
    for nodes in (enough // 2, enough):
        assert (suggestion(full, load_cluster(str(small)).resized(nodes=nodes)) is not None) == (nodes == enough)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(8, 3, 1, sharded=True), "does not divide 8 devices"),
        (Layout(10, 5, 1, sharded=True), "does not divide n_experts=96"),
        (Layout(8, 8, 3, sharded=True), "does not divide into 8 devices x per_micro=3"),
        (Layout(5 * 1024, 1, 1, sharded=True), "cannot be cut into 5120 pieces"),
    ],
)
def test_layouts_that_cannot_be_run_are_named(full, layout, words):
    assert words in why_not(full.net, full.rows, layout)
    assert why_not(full.net, full.rows, Layout(8, 8, 2, sharded=True)) == ""


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command_says_the_same_to_people_and_programs(tmp_path, capsys):
    path = tiny.write_config(tmp_path)
    cli.main(["plan", "-c", str(path), "--cluster", "laptop", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] and facts["initial"]["peak_bytes"] == sum(facts["initial"]["memory"].values())
    assert facts["run"]["steps"] == 12 and facts["run"]["tokens"] == 12 * 8 * 32
    cli.main(["plan", "-c", str(path), "--cluster", "laptop"])
    printed = capsys.readouterr().out
    for text in (size_of(facts["initial"]["peak_bytes"]), duration(facts["run"]["hours"]), "it fits", "assumed"):
        assert text in printed


def test_it_answers_without_torch(tmp_path):
    """`plan` must be instant: importing torch or Lightning would take seconds."""
    path = tiny.write_config(tmp_path)
    code = (
        "import sys; from sigma_lite import cli; cli.main(sys.argv[1:]);"
        "sys.exit(','.join(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code, "plan", "-c", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", built_in())
def test_every_built_in_machine_plans_and_names_its_sources(name, full):
    cluster = load_cluster(name)
    assert "assumed" in {cluster.source(f) for f in ("price_per_hour", "nodes")}
    assert all(len(source) > 10 for source in cluster.sources.values())
    single = dataclasses.replace(full, trainer={})
    if choices(single, cluster):
        assert as_table(forecast(single, name))


MACHINES = {
    "kind: gpu\nmemory_gb: 3\npeak_tflops: 1\nmemory_gbps: 1": ("memory_gb", "did you mean 'memory_gib'"),
    "kind: gpu": ("lacks memory_gib, peak_tflops, memory_gbps", "h100.yaml"),
    "kind: tpu\nmemory_gib: 3\npeak_tflops: 1\nmemory_gbps: 1": ("'tpu'", "did you mean 'gpu'"),
    "kind: gpu\nmemory_gib: -3\npeak_tflops: 1\nmemory_gbps: 1": ("memory_gib=-3", "greater than 0"),
    "kind: gpu\nmemory_gib: much\npeak_tflops: 1\nmemory_gbps: 1": ("memory_gib='much'", "expected float"),
    "kind: gpu\nmemory_gib: 3\npeak_tflops: 1\nmemory_gbps: 1\nnodes: 2": ("inter_node_gbps is missing", "2 nodes"),
    "kind: gpu\nmemory_gib: 3\npeak_tflops: 1\nmemory_gbps: 1\nsources: {peak_flops: x}": ("peak_flops", "peak_tflops"),
    "kind: gpu\nmemory_gib: 3\npeak_tflops: 1\nmemory_gbps: 1\nsources: [x]": ("sources", "group"),
}


@pytest.mark.parametrize("text", MACHINES)
def test_a_bad_machine_is_refused_with_the_nearest_fix(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_cluster(str(path))
    for word in MACHINES[text]:
        assert word in str(error.value)


def test_bad_wishes_are_refused_with_the_nearest_fix(tmp_path, full):
    with pytest.raises(ConfigError, match="'h10' does not exist; did you mean 'h100'"):
        load_cluster("h10")
    with pytest.raises(ConfigError, match="trainer.devices=16, but a node of cluster 'h100-node' has 8"):
        forecast(dataclasses.replace(full, trainer={"devices": 16}), "h100-node")
    with pytest.raises(ConfigError, match="--nodes 0"):
        forecast(full, "h100-node", nodes=0)
    with pytest.raises(ConfigError, match="precision=8-true: choose 32-true or bf16-mixed"):
        forecast(dataclasses.replace(full, trainer={"precision": "8-true"}), "h100")
    with pytest.raises(ConfigError, match="rows.per_step=1024 does not divide into 24 devices"):
        forecast(full, "h100-node", nodes=3)
