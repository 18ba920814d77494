"""Parameters of parts are counted on the meta device: equal to the formula for a usual model, and to what is built."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from torch import nn

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.convert.write import ledger
from sigma_lite.model import Parts, Router, Transformer
from sigma_lite.model.experts import Experts
from sigma_lite.model.parts import as_parts
from sigma_lite.runfile import RunConfig, load_run
from sigma_lite.scale.forecast import forecast
from sigma_lite.scale.parameters import counted, shape_of
from sigma_lite.scale.plan import plan as plan_of
from sigma_lite.train.module import SigmaLit

NET = ModelConfig(
    vocab_size=50, n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=8, d_expert=16, top_k=2
)
SHAPES = {
    "usual": NET,
    "untied": dataclasses.replace(NET, tie_embeddings=False),
    "two layers without attention": dataclasses.replace(NET, attention_from_layer=2),
    "dense": dataclasses.replace(NET, n_experts=1, top_k=1),
}
PAPERS, STORED = "sigma_lite.papers.", "sigma_lite.convert.stored."
EXPERTS = {
    "shared": {"class_path": PAPERS + "shared.WithShared", "init_args": {"shared": 2}},
    "latent": {"class_path": PAPERS + "latent.Latent", "init_args": {"width": 4}},
    "two sizes": {"class_path": PAPERS + "latency.Mixed", "init_args": {"shift_width": 8}},
    "fewer than are chosen among": {"class_path": STORED + "Mapped", "init_args": {"kept": 3}},
    "fewer in some layers": {"class_path": STORED + "KeptExperts", "init_args": {"kept": [3, 5, 8]}},
    "one new": {"class_path": PAPERS + "moduleformer.GrownExperts", "init_args": {"old": 7}},
}
PARTS = {f"experts: {name}": {"experts": part} for name, part in EXPERTS.items()} | {
    "null experts": {"router": {"class_path": PAPERS + "adamoe.NullRouter", "init_args": {"nulls": 4}}},
    "groups": {"router": {"class_path": PAPERS + "moge.Grouped", "init_args": {"groups": 2}}},
    "hash": {"router": PAPERS + "hash.Hashed"},
    "heads": {"attention": PAPERS + "moduleformer.HeadExperts"},
    "blocks": {"stack": {"class_path": "sigma_lite.convert.blocks.SkippedBlocks", "init_args": {"size": 3}}},
}


@pytest.mark.parametrize("net", SHAPES.values(), ids=SHAPES)
def test_counting_gives_the_formula(net):
    ks = [None, (1,) * 3] if net.n_experts == 1 else [None, (1, 4, 2)]
    for k in ks:
        assert counted(net, Parts()).ledger(k) == net.ledger(k)


def test_twenty_billion_parameters_are_counted_without_memory():
    net = ModelConfig.preset("sigma_moe_tiny")
    assert counted(net, {"experts": "sigma_lite.model.experts.Experts"}).ledger() == net.ledger()


@pytest.mark.parametrize("given", PARTS.values(), ids=PARTS)
def test_a_model_with_parts_has_as_many_as_counted(given):
    ledger, model = counted(NET, given).ledger(), Transformer(NET, as_parts(given))
    assert ledger.total == sum(weight.numel() for weight in model.parameters())
    assert ledger.experts == sum(w.numel() for block in model.blocks for w in block.moe.experts.parameters())
    assert 0 < ledger.active_experts < ledger.experts


def test_what_a_token_uses_of_experts():
    """K of E of what is cut into experts, and all that every token visits."""
    one, D, L = 3 * 16 * 16, 16, 3
    active = {name: counted(NET, {"experts": part}).ledger().active_experts for name, part in EXPERTS.items()}
    assert active["shared"] == L * (2 + 2) * one
    assert active["latent"] == L * (2 * 3 * 4 * 16 + 2 * D * 4 + 4)
    assert active["two sizes"] == L * 2 * (one + one // 2) // 2, "on average over both sizes"
    for stored in ("fewer than are chosen among", "fewer in some layers", "one new"):
        assert active[stored] == L * 2 * one, "a token uses K experts, however many are stored"


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rounded_experts_are_used_as_others_are(bits):
    """They are constants, so they are no parameters, but a token goes through them."""
    experts = {"class_path": STORED + "Quantised", "init_args": {"bits": bits}}
    ledger = counted(NET, {"experts": experts}).ledger((1, 4, 2))
    assert ledger.experts == 0 and ledger.active_experts == NET.ledger((1, 4, 2)).active_experts


@pytest.mark.parametrize("experts", ["latent", "shared", "fewer than are chosen among"])
def test_a_run_and_a_converted_model_record_what_is_counted(experts):
    """Of the first of these a formula that knows no parts made less than 0 active parameters."""
    parts = {"experts": EXPERTS[experts]}
    module, shape = SigmaLit(NET, parts=parts), counted(NET, parts)
    module.configure_model()
    assert module.shape.ledger((1, 4, 2)) == shape.ledger((1, 4, 2)) != NET.ledger((1, 4, 2))
    counts, found = shape.ledger(), ledger(module.model)
    assert (found["total"], found["non_embedding"]) == (counts.total, counts.non_embedding)
    assert found["active_target"] == counts.active == plan_of(RunConfig(net=module.shape))["active_params_target"] > 0
    assert shape_of(Transformer(NET)) is NET


class Says(Experts):
    def active_parameters(self, k: int) -> int:
        return 7 * k


class Eager(Router):
    """Looks at numbers when it is built, which the meta device has not."""

    def __init__(self, config):
        super().__init__(config)
        self.largest = float(torch.ones(3).max())


def test_experts_may_say_what_a_token_uses():
    assert counted(NET, Parts(experts=Says)).ledger((1, 2, 3)).active_experts == 7 * 6


def test_what_cannot_be_built_unseen_is_named():
    with pytest.raises(ConfigError, match="model.parts.router: the parameters cannot be counted, because"):
        counted(NET, Parts(router=Eager))


def plan(place, parts, **changes):
    return forecast(load_run([tiny.write_config(place, "own.yaml", model__parts=parts, **changes)]))


def test_memory_follows_what_is_counted(tmp_path):
    """Weights, gradients and moments to the byte; and the plan says what it does not know, by name."""
    usual, shared = plan(tmp_path, None), plan(tmp_path, {"experts": PAPERS + "shared.WithShared"})
    more = 2 * 3 * 32 * 16  # one expert more in each of two layers
    assert shared["total_params"] - usual["total_params"] == shared["expert_params"] - usual["expert_params"] == more
    assert shared["active_params_target"] - usual["active_params_target"] == more
    for item, times in {"weights": 1, "gradients": 1, "adamw_moments": 2}.items():
        assert shared["target"]["memory"][item] - usual["target"]["memory"][item] == 4 * times * more
    assert any("model.parts.experts: parameters are counted, the rest is a guess" in note for note in shared["notes"])
    assert not any("guess" in note for note in usual["notes"])
    assert shared["suggested"] and not shared["suggested"]["sharded"], "no strategy serves a part of one's own"


def test_parts_on_several_devices_are_refused_by_name(tmp_path):
    parts = {"experts": PAPERS + "shared.WithShared"}
    with pytest.raises(ConfigError, match="model.parts.experts on .*planned on one device"):
        plan(tmp_path, parts, trainer__devices=2)
    with pytest.raises(ConfigError, match="ExpertParallel does not serve model.parts.experts"):
        plan(tmp_path, parts, trainer__strategy={"class_path": "sigma_lite.scale.strategy.ExpertParallel"})


def test_a_module_that_is_no_part_of_ours_is_counted_too(tmp_path):
    class Lookup(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.table = nn.Parameter(torch.empty(5, config.d_model))
            self.own_weights = {}

    ledger = counted(NET, Parts(experts=Lookup)).ledger()
    assert ledger.experts == ledger.active_experts == 3 * 5 * 16
