"""What holds for every paper: a test and an arm of its own, words on what it assumes, steps that train, refusals by name."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import tiny
import torch

from sigma_lite import papers
from sigma_lite.balance.objective import Objective, objective
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ConfigError
from sigma_lite.lab import EXPERIMENTS
from sigma_lite.lab.experiment import Arm
from sigma_lite.lab.family import PAPERS
from sigma_lite.model import Transformer
from sigma_lite.model.assumes import UNSAID, Assumes, assumed
from sigma_lite.model.parts import as_parts
from sigma_lite.runfile import RunConfig, load_run, overlay
from sigma_lite.scale.shard import refuse_custom
from sigma_lite.serve.hf import to_qwen3_moe
from sigma_lite.train.optim import adamw

FILES = sorted(file.stem for file in Path(papers.__file__).parent.glob("[!_]*.py"))
arms = pytest.mark.parametrize("arm", PAPERS, ids=lambda arm: arm.name)


def class_of(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def named(arm: Arm) -> list[dict]:
    model = arm.patch.get("model", {})
    own = [model["custom_balance"]] if "custom_balance" in model else []
    return own + list(model.get("parts", {}).values())


def made(arm: Arm) -> tuple[Transformer, Objective, RunConfig]:
    """The arm's model and objective at the size of the tests."""
    run = load_run([], overlay(tiny.settings(model__sparsity=None), dict(arm.patch)))
    own = run.custom_balance and class_of(run.custom_balance["class_path"])(**run.custom_balance.get("init_args", {}))
    torch.manual_seed(0)
    model = Transformer(run.net, as_parts(run.parts))
    return model, objective(run.balance, run.net.n_layers, own), run


@pytest.mark.parametrize("file", FILES)
def test_each_paper_has_a_test_and_an_arm_of_its_own(file):
    """A paper on systems, which has no part and no balancer of its own, has no arm: it changes no loss."""
    assert Path(__file__).with_name(f"test_{file}.py").is_file()
    module = importlib.import_module(f"sigma_lite.papers.{file}")
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    family = [one for arm in EXPERIMENTS["family"].arms for one in named(arm)]
    has_an_arm = any(one["class_path"].startswith(f"sigma_lite.papers.{file}.") for one in family)
    assert has_an_arm == any(assumed(kind) is not UNSAID for kind in own)


@arms
def test_an_arm_says_what_it_assumes(arm):
    assert all(isinstance(assumed(class_of(one["class_path"])), Assumes) for one in named(arm))
    assert UNSAID not in [assumed(class_of(one["class_path"])) for one in named(arm)]


@arms
def test_an_arm_trains(arm):
    """Losses are finite and fall on a batch that is seen again and again; every weight has a gradient or needs none."""
    model, losses, run = made(arm)
    ids = torch.randint(0, run.net.vocab_size, (4, 13), generator=torch.Generator().manual_seed(0))
    optimizer, pooled, found = adamw(model, run.optim), PooledCounts(), []
    for step in range(8):
        optimizer.zero_grad()
        lm, routings = model.loss(ids[:, :-1], ids[:, 1:])
        result = losses(lm, routings, pooled, 4)
        result.total.backward()
        missing = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        assert not missing
        optimizer.step()
        moved = losses.balancer.next_bias(model.bias_LE, pooled.statistics, step)
        if moved is not None:
            model.set_bias(moved)
        pooled.reset()
        found.append(lm.item())
        assert result.total.isfinite() and all(r.probs.isfinite().all() and (r.gates >= 0).all() for r in routings)
        assert all(((r.ids >= -1) & (r.ids < run.net.n_experts)).all() for r in routings)
    assert found[-1] < found[0] - 0.1


@arms
def test_what_the_arm_keeps_is_in_its_checkpoint(arm):
    """Two steps, all state into a new object, two more: bitwise as four steps in one go."""

    def steps(first: int, last: int, model, losses, run, optimizer) -> None:
        pooled = PooledCounts()
        for step in range(first, last):
            ids = torch.randint(0, run.net.vocab_size, (4, 13), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            losses(*model.loss(ids[:, :-1], ids[:, 1:]), pooled, 4).total.backward()
            optimizer.step()
            moved = losses.balancer.next_bias(model.bias_LE, pooled.statistics, step)
            if moved is not None:
                model.set_bias(moved)
            pooled.reset()

    whole, losses, run = made(arm)
    optimizer = adamw(whole, run.optim)
    steps(0, 4, whole, losses, run, optimizer)
    begun, losses, run = made(arm)
    optimizer = adamw(begun, run.optim)
    steps(0, 2, begun, losses, run, optimizer)
    gone_on, again, _ = made(arm)
    gone_on.load_state_dict(begun.state_dict())
    again.balancer.load_state_dict(losses.balancer.state_dict())
    resumed = adamw(gone_on, run.optim)
    resumed.load_state_dict(optimizer.state_dict())
    steps(2, 4, gone_on, again, run, resumed)
    state = gone_on.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in whole.state_dict().items())


@pytest.mark.parametrize("arm", [a for a in PAPERS if "parts" in a.patch["model"]], ids=lambda arm: arm.name)
def test_who_cannot_serve_an_arm_says_its_name(arm):
    """An arm of a balancer alone is served like any other: its counts are pooled."""
    model, _, _ = made(arm)
    with pytest.raises(ConfigError, match=f"does not serve .*{next(iter(model.parts.custom))}"):
        refuse_custom(model.parts.custom)
    with pytest.raises(ConfigError, match="has its own"):
        to_qwen3_moe(model)
