"""Each module says how its own weights begin and whether they decay; what that gives is what recorded runs began with."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re

import pytest
import torch
from torch import nn

from sigma_lite.config import ModelConfig, OptimConfig
from sigma_lite.model import Transformer
from sigma_lite.model.weights import Weight, weight_of
from sigma_lite.train.optim import parameter_groups

SMALL = ModelConfig(
    vocab_size=64, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, n_experts=8, d_expert=16, expert_gain=3.0
)
SHAPES = {
    "tied": SMALL,
    "untied": dataclasses.replace(SMALL, tie_embeddings=False, router_init_std=0.3, init_std=0.1),
    "no attention below": dataclasses.replace(SMALL, attention_from_layer=2),
}


def begun_with(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """The rule by names from which all runs recorded before the modules said it began."""
    weight = torch.empty(shape)
    if weight.dim() == 1:
        return weight.fill_(1)
    into_stream = 1 / math.sqrt(2 * config.n_layers)
    std = {"embedding.weight": config.init_std, "router.weight": config.router_init_std}.get(
        ".".join(name.split(".")[-2:]), 1 / math.sqrt(shape[-1])
    )
    std *= into_stream if name.endswith("out.weight") else 1
    std *= into_stream * config.expert_gain if name.endswith("experts.w2") else 1
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return weight.normal_(0, std, generator=generator)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_seed_begins_bitwise_as_recorded_runs_did(config):
    torch.manual_seed(5)
    for name, parameter in Transformer(config).named_parameters():
        assert torch.equal(parameter, begun_with(config, name, parameter.shape, 5)), name


@pytest.mark.parametrize("router_lr", [1.0, 0.1])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_groups_of_the_optimizer_are_those_of_recorded_runs(config, router_lr):
    model = Transformer(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(router_lr=router_lr, weight_decay=0.2, lr=1e-2))
    found = {names[p]: (group["weight_decay"], group.get("lr")) for group in groups for p in group["params"]}
    assert list(found) != [] and len(found) == len(names)
    for name, parameter in model.named_parameters():
        decays = ("attention." in name or ".experts." in name) and parameter.dim() > 1
        own_rate = 1e-2 * 0.1 if name.endswith("router.weight") and router_lr != 1 else None
        assert found[name] == (0.2 if decays else 0.0, own_rate), name
    order = list(names.values())
    for group in groups:  # a checkpoint's moments are numbered by this order
        places = [order.index(names[p]) for p in group["params"]]
        assert places == sorted(places)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_every_parameter_is_declared_by_the_module_that_holds_it_or_the_one_around(config):
    model = Transformer(config)
    for name, _ in model.named_parameters():
        assert isinstance(weight_of(model, name), Weight)
    for prefix, module in model.named_modules():
        for own in getattr(module, "own_weights", {}):
            full = f"{prefix}.{own}".lstrip(".")
            assert isinstance(model.get_parameter(full), nn.Parameter), f"{full} is declared and does not exist"


def test_a_part_without_rules_is_refused_and_one_with_rules_brings_them():
    class Shared(nn.Module):
        def __init__(self, std: float | None):
            super().__init__()
            self.matrix = nn.Parameter(torch.zeros(4, 4))
            if std is not None:
                self.own_weights = {"matrix": Weight(std, decays=True)}

    model = Transformer(SMALL)
    model.blocks[1].moe.shared = Shared(None)
    with pytest.raises(ValueError, match=r"no module says how blocks\.1\.moe\.shared\.matrix begins .* let Shared set"):
        model.reset_parameters()
    with pytest.raises(ValueError, match="let Shared set"):
        parameter_groups(model, OptimConfig())
    model.blocks[1].moe.shared = Shared(0.5)
    model.reset_parameters()
    assert 0.2 < model.blocks[1].moe.shared.matrix.std() < 0.8
    decayed = parameter_groups(model, OptimConfig())[0]
    assert decayed["weight_decay"] and any(p is model.blocks[1].moe.shared.matrix for p in decayed["params"])


def test_what_fields_say_of_initialisation_is_so():
    """`init_std` is the embedding's alone, `expert_gain` the experts' output's alone."""

    def changed(**settings) -> set[str]:
        models = []
        for config in (SMALL, dataclasses.replace(SMALL, **settings)):
            torch.manual_seed(0)
            models.append(dict(Transformer(config).named_parameters()))
        return {re.sub(r"^blocks.\d+.", "", name) for name in models[0] if not torch.equal(models[0][name], models[1][name])}

    assert changed(init_std=0.5) == {"embedding.weight"}
    assert changed(expert_gain=2.0) == {"moe.experts.w2"}
    assert changed(router_init_std=0.5) == {"moe.router.weight"}
