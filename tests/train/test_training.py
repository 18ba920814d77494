"""Steps: what they compute, what they refuse, and what is written about them."""

from __future__ import annotations

import copy
import functools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from sigma_lite import cli, record
from sigma_lite.balance.bits import BitsPerByte
from sigma_lite.balance.losses import expert_counts, load_balancing_loss, load_share, z_loss
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint
from sigma_lite.config import ConfigError, ModelConfig, OptimConfig, RowsConfig
from sigma_lite.data.rows import Rows, heldout_loader, train_loader
from sigma_lite.data.shards import load
from sigma_lite.model import Transformer
from sigma_lite.model.transformer import cross_entropy
from sigma_lite.runfile import from_mapping
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.callbacks.spike_guard import SpikeGuard
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.optim import adamw, warmup_stable_decay

NET = from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")


def entries(run: Path, kind: str) -> list[dict]:
    return record.read(run / "record.jsonl", kind)


# --------------------------------------------------------------------------------------------------------- the diary


def test_a_step_entry_is_the_mean_over_its_micro_batches(finished):
    """Step 1 again, without Lightning: two micro-batches of four rows, K = [2, 1], the buffer of pooled counts."""
    prepared, rows = load(finished / "prepared"), RowsConfig(length=32, per_step=8, per_micro=4)
    torch.manual_seed(0)
    model = Transformer(NET)
    model.set_k((2, 1))
    batches = list(train_loader(Rows(prepared.train, prepared.token_bytes, 32), rows, steps=1))
    counts, terms = 0, {"lm": [], "balance": [], "z": []}
    for batch in batches:
        lm, routings = model.loss(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
        counts = counts + torch.stack([expert_counts(r.ids, 8) for r in routings])
        lbl = [load_balancing_loss(r.probs, r.ids, f) for r, f in zip(routings, load_share(counts), strict=True)]
        terms["lm"].append(lm.item())
        terms["balance"].append(torch.stack(lbl).mean().item())
        terms["z"].append(torch.stack([z_loss(r.logits) for r in routings]).mean().item())
    assert len(batches) == 2
    entry = entries(finished / "run", "step")[0]
    for name, values in terms.items():
        assert entry["terms"][name] == pytest.approx(sum(values) / 2, rel=1e-6)
    for name, weight in {"lm": 1.0, "balance": 2 * 1e-2, "z": 2 * 1e-3}.items():  # terms are means over two layers
        assert entry["weighted"][name] == pytest.approx(weight * entry["terms"][name], rel=1e-12)
    assert entry["loss"] == pytest.approx(sum(entry["weighted"].values()), rel=1e-12)


def test_the_schedule_switches_inside_the_run(finished):
    steps = entries(finished / "run", "step")
    assert [e["k"] for e in steps] == 6 * [[2, 1]] + 6 * [[1, 1]]
    assert steps[5]["active_params"] - steps[6]["active_params"] == 3 * 32 * 16
    (event,) = entries(finished / "run", "event")
    assert (event["step"], event["what"]) == (6, "sparsity switch") and "[2, 1] -> [1, 1]" in event["why"]


def test_the_lbl_is_measured_whatever_is_trained(place):
    """With no balance loss the balance term is 0, and the diary shows the LBL all the same."""
    cli.main(["fit", "-c", "tiny.yaml", "--trainer.max_steps=4", "--model.balance.loss=none"])
    for entry in entries(Path("run"), "step"):
        assert entry["terms"]["balance"] == entry["weighted"]["balance"] == 0 and entry["lbl"] > 0.5
    shutil.rmtree("run")
    cli.main(["fit", "-c", "tiny.yaml", "--trainer.max_steps=4"])
    for entry in entries(Path("run"), "step"):
        assert entry["lbl"] == pytest.approx(entry["terms"]["balance"]), "the global LBL, trained and measured"


def test_learning_rates_of_the_diary(finished):
    optim = OptimConfig(lr=0.003, warmup_steps=2)
    for entry in entries(finished / "run", "step"):
        factor = warmup_stable_decay(entry["step"] - 1, total_steps=12, optim=optim)
        assert entry["lr"] == pytest.approx(0.003 * factor)


def test_load_windows(finished):
    """700 tokens are three steps of 256; shares are of slots, so they sum to 1 in every layer."""
    loads = entries(finished / "run", "load")
    assert [(e["step"], e["tokens"]) for e in loads] == [(3, 768), (6, 768), (9, 768), (12, 768)]
    for entry in loads:
        for row in (*entry["f"], *entry["P"]):
            assert sum(row) == pytest.approx(1, abs=1e-4) and len(row) == 8
        for f, P, lbl in zip(entry["f"], entry["P"], entry["lbl"], strict=True):
            assert lbl == pytest.approx(8 * sum(a * b for a, b in zip(f, P, strict=True)), abs=1e-4)
        assert all(0 <= h <= math.log(8) + 1e-6 for h in entry["router_entropy"])


def test_the_start_is_written_down(finished):
    (start,) = entries(finished / "run", "run")
    assert start["command"] == "sigma-lite fit -c tiny.yaml" and start["step"] == 0
    assert start["ledger"]["active_target"] == NET.ledger().active
    assert start["ledger"]["active_initial"] == NET.ledger((2, 1)).active
    assert start["config"]["rows"]["per_step"] == 8 and start["data"]["train_tokens"] > 1000


def test_overrides_reach_the_diary_and_validation_need_not_divide(place):
    """The ledger counts the model that runs; a run whose end has no validation of its own gets one, once."""
    cli.main(
        ["fit", "-c", "tiny.yaml", "--trainer.max_steps", "4", "--trainer.val_check_interval=3", "--model.net.n_experts=4"]
    )
    assert entries(Path("run"), "run")[0]["ledger"]["total"] == sum(
        p.numel() for p in Transformer(ModelConfig(**{**tiny.SETTINGS["model"]["net"], "n_experts": 4})).parameters()
    )
    assert [e["step"] for e in entries(Path("run"), "validation")] == [3, 4]
    assert [e["step"] for e in entries(Path("run"), "sample")] == [4]


# ---------------------------------------------------------------------------------------------------------- held-out


def test_a_balance_loss_of_ones_own_by_name(place, monkeypatch):
    """Ten lines in a file, named on the command line, and the run says that it used them."""
    Path("my_idea.py").write_text("def flat(routing, f_E):\n    return len(f_E) * routing.probs.mean(0).square().sum()\n")
    monkeypatch.syspath_prepend(str(place))
    tiny.write_config(place, "own.yaml", trainer__max_steps=2, model__sparsity=None)
    cli.main(["fit", "-c", "own.yaml", "--model.custom_balance", "my_idea.flat"])
    assert entries(Path("run"), "run")[0]["config"]["custom_balance"]["class"] == "my_idea.flat"
    assert all(1 <= e["terms"]["balance"] < 1.1 for e in entries(Path("run"), "step"))


def test_a_balance_loss_without_a_name_is_still_written_down():
    own = functools.partial(lambda scale, routing, f_E: scale * routing.probs.sum(), 2.0)
    recorded = SigmaLit(NET, custom_balance=own).settings()["custom_balance"]
    assert "<lambda>" in recorded["class"] and recorded["settings"] == {"0": 2.0}
    assert SigmaLit(NET).settings()["custom_balance"] is None


def test_held_out_measures_agree(finished, monkeypatch, capsys):
    """validate, test, predict and the diary's last entry are one number, and predict's file holds its parts."""
    monkeypatch.chdir(finished)
    wanted = entries(Path("run"), "validation")[-1]
    for command in ("validate", "test"):
        cli.main([command, "-c", "tiny.yaml"])
        assert str(wanted["bits_per_byte"])[:9] in capsys.readouterr().out
    cli.main(["predict", "-c", "tiny.yaml", "--trainer.default_root_dir=run"])
    found = load_file("run/predictions.safetensors")
    Path("run/predictions.safetensors").unlink()
    prepared = load("prepared")
    rows = Rows(prepared.heldout, prepared.token_bytes, 32, padded=True)
    batches = list(heldout_loader(rows, RowsConfig(length=32, per_step=8, per_micro=4)))
    assert torch.equal(found["ids"], torch.cat([b.ids_BS for b in batches]))
    assert torch.equal(found["kinds"], torch.cat([b.kinds_BS for b in batches]))
    scored = torch.cat([b.targets_BS for b in batches]) != -100
    assert (found["nats"][~scored] == 0).all()
    n_bytes = prepared.manifest["heldout_bytes"]
    assert found["nats"].double().sum() / math.log(2) / n_bytes == pytest.approx(wanted["bits_per_byte"], rel=1e-6)
    assert found["nats"].double().sum() / scored.sum() == pytest.approx(wanted["nats_per_token"], rel=1e-6)
    assert found["experts"].shape == (len(rows), 2, 32) and found["experts"].min() >= 0 and found["experts"].max() < 8


def test_bits_per_byte_by_hand():
    metric = BitsPerByte()
    nats = torch.tensor([[math.log(2), 3 * math.log(2)], [math.log(2), 99.0]])
    targets, n_bytes = torch.tensor([[5, 0], [7, -100]]), torch.tensor([[3, 0], [1, 8]])
    metric.update(nats[:1], targets[:1], n_bytes[:1])
    metric.update(nats[1:], targets[1:], n_bytes[1:])
    values = metric.compute()
    assert float(values["bits_per_byte"]) == pytest.approx((1 + 3 + 1) / 4)  # the end of a document costs, and has no byte
    assert float(values["nats_per_token"]) == pytest.approx(5 * math.log(2) / 3)


def test_loss_and_nats_agree(finished):
    model, prepared = Transformer(NET), load(finished / "prepared")
    batch = Rows(prepared.heldout, prepared.token_bytes, 32, padded=True).__getitems__(
        [0, 1, len(prepared.heldout) // 32 - 1]
    )
    lm, _ = model.loss(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
    x, _ = model.backbone(batch.ids_BS, documents_BS=batch.documents_BS)
    nats = cross_entropy(x.flatten(0, 1), model.head.weight, batch.targets_BS.flatten(), "none")
    assert (nats.sum() / (batch.targets_BS != -100).sum()).item() == pytest.approx(lm.item(), rel=1e-6)


# --------------------------------------------------------------------------------------------------------- optimizer


def test_warmup_stable_decay_in_closed_form():
    optim = OptimConfig(warmup_steps=10, decay_fraction=0.5, final_lr_ratio=0.1)

    def factor(step):
        return warmup_stable_decay(step, total_steps=100, optim=optim)

    assert [factor(s) for s in (0, 4, 9, 10, 49, 50)] == pytest.approx([0.1, 0.5, 1, 1, 1, 1])
    assert [factor(s) for s in (60, 75, 94, 95, 99)] == pytest.approx([0.8, 0.5, 0.12, 0.1, 0.1])
    flat = OptimConfig(warmup_steps=0, decay_fraction=0.0)
    assert {warmup_stable_decay(s, total_steps=100, optim=flat) for s in range(100)} == {1.0}


def test_adamw_groups():
    """Attention and expert matrices decay; norms, embedding and router do not. Nothing is lost or given twice."""
    model = Transformer(NET)
    optimizer = adamw(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        kept = "norm" in name or name == "embedding.weight" or name.endswith("router.weight")
        assert decay[id(parameter)] == (0.0 if kept else 0.3), name
    assert all(group["fused"] for group in optimizer.param_groups)


# -------------------------------------------------------------------------------------------------------- spike guard


@pytest.fixture
def watched(monkeypatch):
    """States after each step, and a dictionary of factors on the loss by the number of the step that is made."""
    states, factors = {}, {}
    end, step = Diary.on_train_batch_end, SigmaLit.training_step

    def on_train_batch_end(self, trainer, module, *args):
        end(self, trainer, module, *args)
        optimizer = trainer.optimizers[0].state_dict()["state"]
        states[trainer.global_step] = copy.deepcopy((module.model.state_dict(), optimizer))

    def training_step(self, batch, batch_idx):
        result = step(self, batch, batch_idx)
        return result | {"loss": result["loss"] * factors.get(self.trainer.global_step + 1, 1.0)}

    monkeypatch.setattr(Diary, "on_train_batch_end", on_train_batch_end)
    monkeypatch.setattr(SigmaLit, "training_step", training_step)
    return states, factors


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b)


def test_spike_guard_skips_and_goes_on(place, watched):
    states, factors = watched
    factors |= {1: math.nan, 5: math.inf, 9: 1e8}  # the switch at step 6 makes the guard learn anew in steps 7 and 8
    guard = ["--spike_guard.memory=2", "--spike_guard.threshold=60"]
    cli.main(["fit", "-c", "tiny.yaml", *guard, "--model.balance.bias=sign"])  # a bias is state too
    for step in (5, 9):
        for was, now in zip(states[step - 1], states[step], strict=True):
            assert equal(was, now), f"step {step} changed something"
    assert states[1][1] == {}, "no state before the first step that counts"
    for step in (2, 3, 4, 6, 7, 8):
        assert not equal(states[step - 1][0], states[step][0]), f"step {step} changed nothing"
    events = [e for e in entries(Path("run"), "event") if e["what"] == "step skipped"]
    assert [e["step"] for e in events] == [0, 4, 8]
    assert "nan" in events[0]["why"] and "is above" in events[2]["why"]
    assert all(torch.isfinite(v).all() for v in states[12][0].values())
    assert [e["step"] for e in entries(Path("run"), "step")] == list(range(1, 13))
    saved = read_checkpoint(newest_checkpoint("run"))["callbacks"]
    assert next(v for k, v in saved.items() if "SpikeGuard" in k)["seen"] == 6


def test_spike_guard_gives_up(place, watched, capsys):
    """Patience ends the run with one sentence; its last checkpoint stays, and the same command goes on from it."""
    states, factors = watched
    factors |= {step: math.nan for step in range(6, 13)}
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml", "--spike_guard.patience=2") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sigma-lite: 2 steps in a row refused at step 6") and "lower optim.lr" in error
    assert newest_checkpoint("run").name == "step=000006.safetensors"
    factors.clear()
    cli.main(["fit", "-c", "tiny.yaml", "--spike_guard.patience=2", "--trainer.val_check_interval=12"])
    assert newest_checkpoint("run").name == "step=000012.safetensors"


def test_spike_guard_judges():
    guard = SpikeGuard(threshold=8, memory=20)
    assert "nan" in guard.judge(math.nan) and "inf" in guard.judge(math.inf)
    assert not any(guard.judge(1.0 + 0.1 * math.sin(i)) for i in range(200))
    state = guard.state_dict()
    assert "above" in guard.judge(100.0)
    guard.load_state_dict(state)
    other = SpikeGuard(threshold=8, memory=20)
    assert not other.judge(100.0)  # nothing is known yet
    other.load_state_dict(state)
    assert other.judge(100.0) == guard.judge(100.0)
    assert not guard.judge(1.3) and not guard.judge(0.01)  # small is never a spike


def test_rows_that_do_not_fit_are_named_where_there_is_a_capacity():
    """Padded messages make such a step NaN: a lower learning rate would not help."""
    said = []
    for capacity in (1.25, None):
        strategy = SimpleNamespace(travel={"exchange_parts": 1, "capacity": capacity}, expert_parallel=4)
        trainer = SimpleNamespace(global_step=0, gradient_clip_val=1.0, callbacks=[], strategy=strategy)
        module = SimpleNamespace(gradient_norm=lambda: math.nan)
        with pytest.raises(ConfigError) as refused:
            SpikeGuard(patience=1).on_before_optimizer_step(trainer, module, None)
        said.append(str(refused.value))
    assert "trainer.strategy has capacity=1.25, which may be too small; 4 always fits, null pads nothing" in said[0]
    assert "lower optim.lr" in said[1] and "capacity" not in said[1]


def test_a_step_without_a_gradient_teaches_the_spike_guard_nothing():
    """Such as one of rewards whose groups are all dead: its logarithm would be -28, and anything would pass for long."""
    guard = SpikeGuard()
    ordinary(guard, 200)
    before = guard.state_dict()
    assert not guard.judge(0.0) and guard.state_dict() == before
    assert guard.judge(100.0)


def ordinary(guard: SpikeGuard, steps: int, level: float = 1.0, noise: float = 0.02, **clip: float) -> int:
    """How many of these norms the guard refuses: `level` times a noise whose logarithm deviates by `noise`."""
    generator = torch.Generator().manual_seed(0)
    norms = level * torch.exp(noise * torch.randn(steps, generator=generator))
    return sum(bool(guard.judge(norm, **clip)) for norm in norms.tolist())


def test_spike_guard_refuses_no_ordinary_step():
    """Quiet norms far below the clip limit, then harmless ones of up to seven times as much."""
    guard = SpikeGuard()
    assert ordinary(guard, 300, level=0.1) == 0
    assert ordinary(guard, 20, level=0.6) == 0, "six times the usual is within the reach of any deviation"
    guard = SpikeGuard()
    ordinary(guard, 300, level=0.01)
    assert ordinary(guard, 100, level=0.9, noise=0.01, clip=1.0) == 0, "as small as clipping would make it"
    guard = SpikeGuard()
    ordinary(guard, 300, level=0.01)
    assert guard.judge(2.0, clip=1.0) == "gradient norm 2 is above 1"


def test_a_level_that_lasts_is_accepted_and_a_single_spike_hardly_moves_the_guard():
    guard = SpikeGuard()
    ordinary(guard, 300)
    before = guard.state_dict()
    assert guard.judge(1e6) and guard.mean == pytest.approx(before["mean"], abs=0.02) and guard.judge(20.0)
    guard = SpikeGuard()
    ordinary(guard, 300)
    refused = ordinary(guard, 200, level=30.0)
    assert 0 < refused < 10, "a lasting shift is another level, and not a bad batch"
    assert ordinary(guard, 100, level=30.0) == 0


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_every_parameter_is_in_one_group_and_routers_keep_their_rate(factor):
    model, optim = Transformer(NET), OptimConfig(lr=1e-3, router_lr=factor)
    groups = adamw(model, optim).param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        decays = ("attention." in name or ".experts." in name) and parameter.dim() > 1
        rate = 1e-3 * factor if name.endswith("router.weight") else 1e-3
        assert rates[id(parameter)] == (pytest.approx(rate), optim.weight_decay if decays else 0.0), name


def test_a_switch_of_sparsity_is_no_spike(place, watched):
    """From K = 2 to K = 1 is another model; what was usual before it says nothing. A spike right after it is none."""
    _, factors = watched
    factors |= dict.fromkeys(range(7, 13), 1e5)
    guard = ["--spike_guard.memory=4", "--spike_guard.threshold=30"]
    cli.main(["fit", "-c", "tiny.yaml", *guard])  # switches at step 6
    assert not [e for e in entries(Path("run"), "event") if e["what"] == "step skipped"]
    assert [e["step"] for e in entries(Path("run"), "event") if e["what"] == "sparsity switch"] == [6]
    shutil.rmtree("run")
    cli.main(["fit", "-c", "tiny.yaml", *guard, "--model.sparsity.switch_step=13"])  # never: now they are spikes
    assert [e for e in entries(Path("run"), "event") if e["what"] == "step skipped"][0]["step"] == 6


def test_a_window_of_loads_ends_where_the_experts_per_token_change(place):
    """A window of three steps over the switch at step 6 would count two steps with K = 2 as loads of K = 1."""
    cli.main(["fit", "-c", "tiny.yaml", "--model.balance.window_tokens=1000"])  # of 256 a step, so four steps
    loads = entries(Path("run"), "load")
    assert [(e["step"], e["tokens"], e["k"]) for e in loads] == [
        (4, 1024, [2, 1]),
        (6, 512, [2, 1]),
        (10, 1024, [1, 1]),
    ]


@pytest.mark.parametrize("wrong", [{"threshold": 2.0}, {"patience": 0}, {"memory": 1}])
def test_spike_guard_settings(wrong):
    with pytest.raises(ConfigError):
        SpikeGuard(**wrong)


def test_only_our_lines_are_printed(place, capfd):
    """No warning, no tip, no bar that breaks up another: a log file of a run is readable."""
    shutil.rmtree("run", ignore_errors=True)
    cli.main(["fit", "-c", "tiny.yaml", "--trainer.max_steps=4"])
    out, err = capfd.readouterr()
    assert err and all(line.startswith("training: ") for line in err.splitlines()), err
    assert "held-out" in out and "report" in out
