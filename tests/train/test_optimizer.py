"""Optimizer and schedule are parts: named in yaml, refused by name, and gone on with like AdamW's state."""

from __future__ import annotations

import importlib
import math
import signal
from pathlib import Path

import pytest
import tiny
import torch
from test_resume import before, same
from test_start import ONE, PLATEAU, fit, said
from tiny import child, ending, state

from sigma_lite import record
from sigma_lite.config import ConfigError, ModelConfig, OptimConfig
from sigma_lite.model import Transformer
from sigma_lite.runfile import from_mapping
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.muon import Muon, orthogonalised
from sigma_lite.train.optim import optimizer_of, own_identities, schedule_of
from sigma_lite.train.schedules import cosine, linear, wsd

NET = from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_rate_of_zero_keeps_the_routers_to_the_bit(name):
    model = Transformer(NET)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = optimizer_of(model, OptimConfig(optimizer=name, lr=1e-2, router_lr=0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert still == [n for n in before if "router" in n] and len(still) == NET.n_layers
    with pytest.raises(ConfigError, match="router_lr=-1"):
        OptimConfig(router_lr=-1)


# --------------------------------------------------------------------------------------------------------- schedules


def test_linear_is_the_decay_that_begins_where_the_warmup_ends():
    optim = OptimConfig(warmup_steps=10, decay_fraction=0.9)
    for step in range(101):
        line, plateau = (schedule(step, total_steps=100, optim=optim) for schedule in (linear, wsd))
        assert line == pytest.approx(plateau, abs=1e-12), step


def test_cosine_in_closed_form():
    optim = OptimConfig(warmup_steps=20, final_lr_ratio=0.1)
    value = {step: cosine(step, total_steps=120, optim=optim) for step in (0, 9, 20, 45, 70, 120, 500)}
    halfway = 1 - 0.9 * 0.5 * (1 - math.cos(math.pi / 4))
    assert value == pytest.approx({0: 1 / 20, 9: 0.5, 20: 1, 45: halfway, 70: 0.55, 120: 0.1, 500: 0.1})


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize(
    "optim", [{"warmup_steps": 0}, {"warmup_steps": 50}, {"final_lr_ratio": 1.0}, {"decay_fraction": 0.0}]
)
def test_a_schedule_is_a_share_of_the_peak_at_any_step(name, optim):
    optim = OptimConfig(schedule=name, **optim)
    values = [schedule_of(optim)(step, total_steps=40, optim=optim) for step in range(41)]
    assert all(0 < value <= 1 for value in values)
    after = values[optim.warmup_steps :]
    assert after == sorted(after, reverse=True)


# -------------------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(5, 16, 8), (5, 8, 16), (5, 8, 8)])
def test_a_stacked_update_is_torchs_over_a_loop_of_experts(shape):
    """Bitwise, over steps with momentum and decay; one expert never gets a gradient, one gets a tiny one."""
    stacked = torch.nn.Parameter(torch.randn(shape))
    alone = [torch.nn.Parameter(slice_MN.clone()) for slice_MN in stacked.detach()]
    ours = Muon([{"params": [stacked], "matrices": True, "weight_decay": 0.1}], lr=0.02)
    torchs = torch.optim.Muon(alone, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        stacked.grad = torch.randn(shape) * torch.tensor([1.0, 1e-6, 0.0, 50.0, 1.0]).view(-1, 1, 1)
        for parameter, part in zip(alone, stacked.grad, strict=True):
            parameter.grad = part.clone()
        ours.step()
        torchs.step()
    assert torch.equal(stacked, torch.stack([*alone]))


def test_an_orthogonalised_matrix_keeps_its_directions():
    """U S V^T becomes nearly U V^T: the same singular vectors, values near 1; nothing stays nothing."""
    g_EMN = torch.randn(3, 8, 32)
    u, _, vt = torch.linalg.svd(g_EMN, full_matrices=False)
    found = orthogonalised(g_EMN, dtype=torch.float32)
    core = u.mT @ found @ vt.mT
    values = core.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (core - torch.diag_embed(values)).abs().max() < 1e-4
    assert torch.allclose(orthogonalised(7 * g_EMN, dtype=torch.float32), found, atol=1e-5)
    assert not orthogonalised(torch.zeros(2, 4, 4)).any()


def test_attention_and_experts_are_orthogonalised_and_the_rest_is_adamws():
    torch.manual_seed(0)
    optim = OptimConfig(optimizer="muon", router_lr=2.0)
    twins = [Transformer(NET), Transformer(NET)]
    muon, adam = optimizer_of(twins[0], optim), optimizer_of(twins[1], OptimConfig(router_lr=2.0))
    for (_, one), (_, other) in zip(*(twin.named_parameters() for twin in twins), strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    before = {name: parameter.detach().clone() for name, parameter in twins[0].named_parameters()}
    muon.step()
    adam.step()
    other = dict(twins[1].named_parameters())
    for name, parameter in twins[0].named_parameters():
        state = muon.state[parameter]
        matrix = name.endswith((".query.weight", ".key.weight", ".value.weight", ".out.weight", "w13", "w2"))
        assert ("momentum_buffer" in state) == matrix and ("exp_avg" in state) != matrix, name
        assert parameter.grad is not None
        if not matrix:
            assert torch.equal(parameter, other[name]), name
            continue
        update = (before[name] * (1 - 0.003 * 0.1) - parameter.detach()).float()
        rms = update.square().mean((-2, -1)).sqrt() / 0.003
        assert rms.min() > 0.1 and rms.max() < 0.25, (name, rms)  # AdamW's is about 0.2 (2502.16982)


@pytest.mark.parametrize(("options", "words"), [
    ({"class_path": "torch.optim.Muon"}, "Muon only supports 2D parameters.*`optimizer: muon` takes each expert's matrix"),
    ({"class_path": "muon", "init_args": {"dtype": "float16"}}, "give momentum in"),
    ({"class_path": "torch.nn.Linear"}, "is no torch.optim.Optimizer"),
    ({"class_path": "torch.optim.Adamm"}, "torch.optim has no Adamm; did you mean 'Adam'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        optimizer_of(Transformer(NET), OptimConfig(optimizer=options))


def test_a_scheduler_with_a_state_is_refused():
    with pytest.raises(ConfigError, match="changes the rate by a state: give a function"):
        schedule_of(OptimConfig(schedule="torch.optim.lr_scheduler.CosineAnnealingLR"))


# -------------------------------------------------------------------------------------------------------------- runs

OWN = '''
import torch


class Signs(torch.optim.Optimizer):
    """Moves by the sign of the gradient, with a momentum."""

    def __init__(self, params, lr, keep=0.5):
        super().__init__(params, {"lr": lr, "keep": keep})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["keep"])
                    p.sub_(average.sign(), alpha=group["lr"])
        return loss


def stairs(step, *, total_steps, optim, height=0.5):
    return height ** (4 * step // total_steps)
'''
STRANGER = {
    "model__optim__optimizer": {"class_path": "strange_optim.Signs", "init_args": {"keep": 0.25}},
    "model__optim__schedule": {"class_path": "strange_optim.stairs", "init_args": {"height": 0.25}},
}


def put(text: str, monkeypatch) -> None:
    """As a process of its own would: what it has imported before is forgotten."""
    Path("strange_optim.py").write_text(text)
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(__import__("sys").modules, "strange_optim", raising=False)
    importlib.invalidate_caches()


def test_a_strangers_optimizer_and_schedule_are_named_from_yaml(place, monkeypatch, capsys):
    put(OWN, monkeypatch)
    changes = {**PLATEAU, **STRANGER, "model__optim__decay_fraction": None}
    fit("run", trainer__max_steps=10, **changes)
    steps = record.read("run/record.jsonl", "step")
    assert [e["lr"] for e in steps] == [0.003 * 0.25 ** (4 * step // 10) for step in range(10)]
    held = state("run")["optimizer_states"][0]
    assert {tuple(entry) for entry in held["state"].values()} == {("average",)}
    assert {group["keep"] for group in held["param_groups"]} == {0.25}
    config = record.read("run/record.jsonl", "run")[0]["config"]
    assert config["custom_optimizer"]["class"] == "strange_optim.Signs" and "custom_schedule" in config
    optim = from_mapping(OptimConfig, config["optim"], "optim")
    assert own_identities(optim)["custom_optimizer"] == config["custom_optimizer"]  # torch has replaced its `step` meanwhile
    put(OWN.replace('"""Moves by', '"""It moves by'), monkeypatch)
    assert own_identities(optim)["custom_optimizer"] == config["custom_optimizer"]
    put(OWN.replace("average.sign()", "average.sign() * 2"), monkeypatch)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    fit("run", trainer__max_steps=10, refused=True, **changes)
    assert "custom_optimizer=strange_optim.Signs(keep=0.25), whose code has changed since" in said(capsys)


@pytest.mark.parametrize(("key", "value", "answer"), [
    ("optimizer", "moun", "optim.optimizer='moun' does not exist: give `class_path: MODULE.NAME` for your own, or did you"
     " mean 'muon'?"),
    ("schedule", "cosin", "did you mean 'cosine'?"),
    ("optimizer", 3, "model.optim.optimizer=3: expected str or dict"),
    ("optimizer", {"class_path": "torch.optim.AdamWW"}, "did you mean `class_path: torch.optim.AdamW`?"),
    ("optimizer", {"class_path": "muon", "init_args": {"momentun": 0.9}}, "did you mean 'momentum'?"),
    ("optimizer", {"class_path": "muon", "init_args": {"iterations": 0.5}}, "iterations=0.5: expected int"),
    ("optimizer", {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}, "lr is given to it already"),
    ("optimizer", {"class_pat": "muon"}, "unknown key optim.optimizer.class_pat; did you mean 'class_path'?"),
    ("schedule", {"class_path": "sigma_lite.train.schedules.cosin"}, "has no attribute 'cosin'"),
    ("shedule", "cosine", "did you mean 'schedule'?"),
])  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest(place, capsys, key, value, answer):
    fit("run", refused=True, **{f"model__optim__{key}": value})
    assert answer in said(capsys)
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["muon", "stranger", "adafactor"])
def test_killed_with_another_optimizer_it_goes_on_bitwise(place, monkeypatch, kind):
    put(OWN, monkeypatch)
    one = {"model__optim__optimizer": "muon", "model__optim__schedule": "cosine"}
    other = {
        "model__optim__optimizer": "torch.optim.Adafactor",
        "model__optim__schedule": "linear",
    }  # moments of other shapes
    changes = PLATEAU | {"muon": one, "stranger": STRANGER, "adafactor": other}[kind] | {"trainer__max_steps": 15}
    fit("whole", **changes)
    tiny.write_config(place, "killed.yaml", trainer__default_root_dir="killed", **changes)
    for step in (7, 12):
        trap = before(Diary, "on_train_batch_end", lambda self, t, *_, s=step: t.global_step == s)
        assert ending(child(["fit", "-c", "killed.yaml"], trap)) == -signal.SIGKILL
    assert ending(child(["fit", "-c", "killed.yaml"])) == 0
    same(state("killed"), state("whole"))


def test_muon_is_extended_too(place):
    """State, rates and step counts: 5 -> 10 steps are 10 from the start, but for the validation at the end of 5."""
    changes = {**PLATEAU, "model__optim__optimizer": "muon", "trainer__val_check_interval": None}
    fit("longer", trainer__max_steps=5, **changes)
    fit("longer", "--extend", trainer__max_steps=10, **changes)
    fit("whole", trainer__max_steps=10, **changes)
    longer, whole = state("longer"), state("whole")
    for found in (longer, whole):
        del found["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    same(longer, whole)


def test_an_older_checkpoint_was_made_by_adamw_with_its_schedule(place):
    """Settings of before these could be chosen: the default is what they meant."""
    fit("run", **ONE)
    settings = state("run")["settings"]
    assert settings["optim"].pop("optimizer") == "adamw" and settings["optim"].pop("schedule") == "wsd"
    from sigma_lite.train.settings import completed

    assert completed(settings)["optim"] == {**settings["optim"], "optimizer": "adamw", "schedule": "wsd"}


def test_muon_trains(place):
    """From 5.71 nats a token; measured after 60 steps at this rate: 1.60, 1.48 and 2.05 with seeds 0, 1 and 2."""
    changes = {"trainer__max_steps": 60, "save__every": 60, "trainer__val_check_interval": 60, "model__sparsity": None}
    fit("run", **changes, model__optim__optimizer="muon", model__optim__lr=0.006)
    assert record.read("run/record.jsonl", "validation")[-1]["nats_per_token"] < 2.3
