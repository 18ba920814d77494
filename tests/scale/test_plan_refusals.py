"""`plan` refuses what `fit` refuses, with the same sentence, and says which of config, command and cluster it follows."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from sigma_lite import cli
from sigma_lite.checkpoint import newest_checkpoint
from sigma_lite.config import ConfigError
from sigma_lite.data.stream import token_dtype
from sigma_lite.lightning_keys import TAKERS
from sigma_lite.runfile import load_run
from sigma_lite.scale import keeping, strategy
from sigma_lite.scale.cluster import load_cluster
from sigma_lite.scale.forecast import forecast
from sigma_lite.scale.layout import PRECISIONS, STRATEGY, Layout, StrategyConfig, place
from sigma_lite.scale.table import as_table
from sigma_lite.scale.traffic import exchanged
from sigma_lite.signatures import parameters
from sigma_lite.train.callbacks.save import Save

FULL = Path(__file__).parents[2] / "scaled_configs" / "sigma_moe_tiny.yaml"


def ours(**args) -> dict:
    return {"class_path": STRATEGY, "init_args": args}


REFUSED = {
    "unknown key of the trainer": {"trainer__max_step": 8},
    "unknown key of save": {"save__evry": 8},
    "unknown key of the guard": {"spike_guard__treshold": 8},
    "text for the end": {"trainer__max_steps": "many"},
    "text for a guard's number": {"spike_guard__threshold": "high"},
    "a number for a group": {"trainer": 3},
    "no end": {"trainer__max_steps": None},
    "negative end": {"trainer__max_steps": -5},
    "no step": {"trainer__max_steps": 0},
    "scaled gradients": {"trainer__precision": "16-mixed"},
    "rounded weights": {"trainer__precision": "bf16-true"},
    "a precision that is not": {"trainer__precision": "7"},
    "an accelerator that is not": {"trainer__accelerator": "warp"},
    "no device": {"trainer__devices": 0},
    "no node": {"trainer__num_nodes": 0},
    "micro-batches chosen": {"trainer__accumulate_grad_batches": 4},
    "validation in epochs": {"trainer__val_check_interval": 0.5},
    "saves that do not divide": {"save__every": 5},
    "one checkpoint": {"save__keep": 1},
    "no worker": {"data__num_workers": -1},
    "misspelt argument of the strategy": {"trainer__strategy": ours(expert_paralel=2)},
    "text for an argument": {"trainer__strategy": ours(expert_parallel="two")},
    "no expert rank": {"trainer__strategy": ours(expert_parallel=0)},
    "no patience": {"trainer__strategy": ours(timeout_s=0)},
    "misspelt strategy": {"trainer__strategy": {"class_path": STRATEGY + "s"}},
    "misspelt group": {"trainer__strategy": {"class_path": STRATEGY, "args": {}}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_plan_and_fit_refuse_with_the_same_sentence(place, capsys, name):
    tiny.write_config(place, "bad.yaml", **REFUSED[name])
    said = []
    for command in ("plan", "fit"):
        assert tiny.refused(cli.main, command, "-c", "bad.yaml") == 2, command
        said.append(capsys.readouterr().err.strip())
    assert said[0] == said[1] and "\n" not in said[0]
    ((key, value),) = REFUSED[name].items()
    inner = value.get("init_args", {}) if isinstance(value, dict) else {}
    assert any(word in said[0] for word in (key.split("__")[-1], *inner)), said[0]


def test_the_strategy_takes_what_is_checked():
    made = inspect.signature(strategy.ExpertParallel).parameters
    fields = {field.name: field.default for field in dataclasses.fields(StrategyConfig)}
    assert {name: parameter.default for name, parameter in made.items()} == fields


def test_arguments_read_from_source_are_those_of_the_classes():
    import lightning.pytorch as pl

    from sigma_lite.train.callbacks.spike_guard import SpikeGuard

    for section, cls in {"trainer": pl.Trainer, "save": Save, "spike_guard": SpikeGuard}.items():
        assert list(parameters(TAKERS[section])) == list(inspect.signature(cls).parameters)


# --------------------------------------------------------------------------------------------------------- who wins


def planned(changes: dict, *args) -> dict:
    run = load_run([FULL])
    return forecast(dataclasses.replace(run, trainer={**run.trainer, **changes}), *args)


@pytest.mark.parametrize(
    ("changes", "args", "words"),
    [
        ({}, ("h100-node",), "trainer.num_nodes=8 of the config wins over nodes: 1"),
        ({}, ("h100-node", 4), "--nodes 4 wins over trainer.num_nodes=8"),
        ({"devices": 4}, ("h100-node",), "trainer.devices=4 of the config wins over 8"),
        ({"devices": "4"}, ("h100-node",), "trainer.devices=4 of the config wins over 8"),
        ({"devices": [0, 1, 2, 3]}, ("h100-node",), "wins over 8"),
        ({"devices": "auto"}, ("h100-node",), "trainer.devices=auto names no number: all 8 devices"),
        ({"devices": -1}, ("h100-node",), "trainer.devices=-1 names no number"),
        ({"strategy": "ddp"}, ("h100-node",), "trainer.strategy=ddp would hold the whole model on each of 8 nodes"),
        ({"strategy": None}, ("h100-node",), "trainer.strategy=auto would hold the whole model"),
        ({"accelerator": "cpu"}, ("h100-node",), "trainer.accelerator=cpu, but the devices of cluster 'h100-node' are gpus"),
    ],
)
def test_a_plan_says_what_it_does_not_follow(changes, args, words):
    facts = planned(changes, *args)
    assert any(words in note for note in facts["notes"]), facts["notes"]
    assert words in as_table(facts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"custom_balance": {"class_path": "mine.Loss"}}, "model.custom_balance is not planned"),
        ({"trainer": {"max_time": "01:00:00:00"}}, "trainer.max_time is not planned"),
        ({"trainer": {"strategy": ours(expert_parallel=8, compile_attention=True)}}, "compile_attention is not planned"),
        ({"trainer": {"num_nodes": 6, "strategy": ours(expert_parallel=3)}}, "some exchanges cross nodes"),
    ],
)
def test_a_plan_says_what_it_leaves_out(changes, words):
    run = load_run([FULL])
    rows = dataclasses.replace(run.rows, per_step=48 * 16)
    given = {"custom_balance": changes.get("custom_balance"), "trainer": {**run.trainer, **changes.get("trainer", {})}}
    facts = forecast(dataclasses.replace(run, rows=rows, **given), "h100-node")
    assert any(words in note for note in facts["notes"]), facts["notes"]


def test_ranks_that_do_not_fill_nodes_evenly_send_to_others():
    """Of a group of three on nodes of eight, one may lie on a node of its own."""
    node, net = load_cluster("h100-node").resized(nodes=3), load_run([FULL]).net
    sent = exchanged(net, 1000, (1,) * net.n_layers, Layout(24, 3, sharded=True), PRECISIONS["bf16-mixed"], node)
    assert sent.intra == 0 < sent.inter


def test_a_plan_that_follows_everything_notes_nothing():
    assert planned({"num_nodes": 1}, "h100-node")["notes"] == []
    assert "NOTE" not in as_table(planned({"num_nodes": 1}, "h100-node"))


def test_devices_as_text_and_as_a_list_are_counted():
    node, run = load_cluster("h100-node"), load_run([FULL])
    for devices, count in (("4", 4), ([0, 1, 2, 3], 4), ("0,1,2,3", 4), ("auto", 8), (-1, 8), ("-1", 8), (4, 4), (None, 8)):
        asked = dataclasses.replace(run, trainer={"devices": devices})
        assert place(asked, node, None).devices == count, devices


def test_an_accelerator_without_a_known_machine_needs_one():
    with pytest.raises(ConfigError, match="trainer.accelerator=mps: describe yours"):
        planned({"accelerator": "mps"})


@pytest.mark.parametrize("imbalance", ["0.5", "nan", "inf"])
def test_an_imbalance_that_cannot_be_is_refused(tmp_path, capsys, imbalance):
    path = tiny.write_config(tmp_path)
    assert tiny.refused(cli.main, "plan", "-c", str(path), "--imbalance", imbalance) == 2
    assert f"--imbalance {imbalance}: must be 1" in capsys.readouterr().err


def test_imbalance_is_printed_and_can_be_chosen(capsys):
    for args, text in (((), "1.5 times its share"), (("--imbalance", "1.1"), "1.1 times its share")):
        cli.main(["plan", "-c", str(FULL), "--cluster", "h100-node", *args])
        assert text in capsys.readouterr().out
    cli.main(["plan", "-c", str(FULL), "--cluster", "h100-node", "--imbalance", "20"])
    assert "20 times its share, of 8 devices 8 at most" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ what is kept


def test_a_checkpoint_is_as_large_as_planned(finished):
    """Weights and two moments; the rest, loads of a window that is under way and names, is kilobytes."""
    run = load_run([tiny.write_config(finished, "planned.yaml")])
    size = newest_checkpoint(finished / "run").stat().st_size
    planned = keeping.checkpoint_bytes(run)
    assert planned < size < planned + 100_000
    facts = keeping.checkpoints(run, Layout(), load_cluster("laptop"), 1.0)
    assert facts["written"] == 6 and facts["on_disk"] == 3 and facts["disk_bytes"] == 3 * planned


def test_checkpoints_are_planned_by_what_save_says():
    run = load_run([FULL])
    node = load_cluster("h100-node").resized(nodes=8)
    layout = Layout(64, 8, 16, True, sharded=True)
    facts = keeping.checkpoints(run, layout, node, 5.0)
    assert facts["checkpoint_bytes"] == 12 * run.net.ledger().total
    assert facts["write_seconds"] == pytest.approx(facts["checkpoint_bytes"] / 5e9)
    assert facts["stop_seconds"] >= 5.0 + 2 * facts["write_seconds"], "the one under way, and its own"
    more = dataclasses.replace(run, save={**run.save, "keep": 4, "milestones": [250, 500, 10**9]})
    kept = keeping.checkpoints(more, layout, node, 5.0)
    assert kept["on_disk"] == 8 and kept["written"] == facts["written"] + 1
    held = keeping.checkpoints(dataclasses.replace(run, save={"every": 500}), layout, node, 5.0)
    own = facts["checkpoint_bytes"] / 64
    assert facts["host_bytes"] == pytest.approx(8 * (own + keeping.PART), rel=1e-6)
    assert held["host_bytes"] == 8 * 2 * keeping.PART and not held["in_background"]


def test_a_copy_beside_training_is_taken_from_a_cpus_own_memory(tmp_path):
    plain, beside = (load_run([tiny.write_config(tmp_path, save__in_background=b)]) for b in (False, True))
    more = [forecast(run, "laptop")["initial"]["peak_bytes"] for run in (plain, beside)]
    assert more[1] - more[0] == keeping.checkpoint_bytes(plain)


def test_data_on_disk_is_what_was_prepared_or_what_will_be_read(place):
    run = load_run([tiny.write_config(place)])
    ready = forecast(run, "laptop")["data"]
    stored = sum(path.stat().st_size for path in Path("prepared").glob("*.bin"))
    manifest = json.loads(Path("prepared/manifest.json").read_text())
    assert ready["prepared_tokens"] == manifest["train_tokens"] and ready["tokens_read"] == 12 * 8 * 32
    assert stored <= ready["disk_bytes"] < stored + 20_000
    assert ready["passes"] == pytest.approx(12 * 8 * 32 / manifest["train_tokens"])
    before = forecast(load_run([tiny.write_config(place, data__corpus__dir="new")]), "laptop")["data"]
    assert before["disk_bytes"] == 12 * 8 * 32 * 3 and before["prepared_tokens"] is None
    for vocab in (300, 2**16, 2**16 + 1):
        assert keeping.token_bytes(vocab) == np.dtype(token_dtype(vocab)).itemsize + 1


def test_a_price_has_a_currency(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: gpu\nmemory_gib: 80\npeak_tflops: 100\nmemory_gbps: 100\nprice_per_hour: 2\n")
    with pytest.raises(ConfigError, match="currency is missing"):
        load_cluster(str(path))
    path.write_text(path.read_text() + "currency: EUR\n")
    assert " EUR at 2 a device and hour" in as_table(forecast(load_run([tiny.write_config(tmp_path)]), str(path)))
