"""From one run to the next: a longer one, branches of a trunk, and weights for another run."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_resume import before, diary, same
from tiny import child, ending

from sigma_lite import cli, record
from sigma_lite.balance.bias import spread
from sigma_lite.checkpoint import (
    checkpoints,
    newest_checkpoint,
    read_checkpoint,
    read_settings,
    write_checkpoint,
)
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.run import RunCLI

PLATEAU = {"model__sparsity": None, "trainer__val_check_interval": 5, "save__every": 5, "model__optim__decay_fraction": 0.0}
DECAY = {**PLATEAU, "model__optim__decay_fraction": 0.5}


def fit(name: str, *words: str, refused: bool = False, **changes) -> None:
    """`fit` of the tiny config, with changes, in folder NAME."""
    tiny.write_config(Path(), f"{name}.yaml", trainer__default_root_dir=name, **changes)
    if refused:
        assert tiny.refused(cli.main, "fit", "-c", f"{name}.yaml", *words) == 2
    else:
        with RunCLI(["fit", "-c", f"{name}.yaml", *words]) as run:  # without a sample and a report
            assert run.finished


def said(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def entries(run: str, *events: str) -> list[dict]:
    """The diary without samples and the event that says where the run comes from."""
    return [e for e in diary(Path(run)) if e["kind"] != "sample" and e.get("what") not in events]


@pytest.fixture(scope="module")
def twenty(corpus_and_data, tmp_path_factory) -> Path:
    """A folder with runs of 20 steps that knew from the start that they would have so many."""
    folder = tmp_path_factory.mktemp("twenty")
    shutil.copytree(corpus_and_data, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, changes in (("plateau", PLATEAU), ("decay", DECAY)):
            fit(name, trainer__max_steps=20, **changes)
    return folder


def test_a_finished_run_is_extended_on_its_plateau(place, twenty, capsys):
    """10 -> 20 steps are 20 from the start, bitwise: weights, moments, loops, loads, diary."""
    fit("plateau", trainer__max_steps=10, **PLATEAU)
    fit("plateau", trainer__max_steps=20, refused=True, **PLATEAU)
    assert "trainer.max_steps=10, this config says 20: add --extend to go on" in said(capsys)
    fit("plateau", "--extend", trainer__max_steps=20, **PLATEAU)
    same(tiny.state("plateau"), tiny.state(twenty / "plateau"))
    assert entries("plateau", "extended") == entries(twenty / "plateau")
    event = record.read("plateau/record.jsonl", "event")
    assert [(e["step"], e["what"], e["why"]) for e in event] == [(10, "extended", "from step 10, to 20 steps")]
    fit("plateau", "--extend", trainer__max_steps=20, **PLATEAU)  # and once more changes nothing
    assert [e["step"] for e in record.read("plateau/record.jsonl", "run")] == [0, 10]


@pytest.mark.slow
def test_a_run_that_has_decayed_is_extended_from_its_plateau(place, twenty, capsys):
    """Its end stays, as a run of its own; killed on the way, the same command goes on."""
    fit("decay", trainer__max_steps=10, **DECAY)
    ended = tiny.state("decay"), diary(Path("decay"))
    tiny.write_config(place, "longer.yaml", trainer__default_root_dir="decay", trainer__max_steps=20, **DECAY)
    command = ["fit", "-c", "longer.yaml", "--extend"]
    for trap in (
        before(shutil, "copyfileobj"),
        before(Diary, "on_train_start"),
        before(Diary, "on_train_batch_end", lambda self, t, *_: t.global_step == 7),
        before(Diary, "on_train_batch_end", lambda self, t, *_: t.global_step == 13),
    ):
        assert ending(child(command, trap)) == -signal.SIGKILL
    assert ending(child(command)) == 0
    same(tiny.state("decay"), tiny.state(twenty / "decay"))
    assert entries("decay", "extended") == entries(twenty / "decay")
    assert [p.name for p in checkpoints("decay")] == ["step=000015.safetensors", "step=000020.safetensors"]
    aside = Path("decay/ended-at-000010")
    same(tiny.state(aside), ended[0])
    assert diary(aside) == ended[1]
    cli.main(["report", str(aside)])
    cli.main(["generate", str(aside), "--max-new-tokens", "3"])


def test_what_cannot_be_extended_says_what_can_be_done(place, capsys):
    fit("run", "--extend", refused=True, trainer__max_steps=5, **PLATEAU)
    assert "run holds no checkpoint, so there is nothing to extend: leave --extend out" in said(capsys)
    changes = {**PLATEAU, "model__optim__schedule": "cosine", "model__optim__decay_fraction": None}
    fit("run", trainer__max_steps=5, **changes)
    files = tiny.snapshot(Path("run"))
    fit("run", "--extend", trainer__max_steps=10, refused=True, **changes)
    assert "run cannot be extended to trainer.max_steps=10: from step 3 on" in (words := said(capsys))
    assert "checkpoints are of steps 5" in words and "--branch_from=run/checkpoints/step=000005" in words
    fit("run", "--extend", trainer__max_steps=10, model__optim__lr=0.001, refused=True, **changes)
    assert "optim.lr=0.003, this config says 0.001" in (words := said(capsys)) and "--branch_from=run goes on" in words
    fit("run", "--extend", trainer__max_steps=1, save__every=1, **{k: v for k, v in changes.items() if k != "save__every"},
        refused=True)  # fmt: skip
    assert "--extend makes a run longer" in said(capsys)
    fit("run", trainer__max_steps=5, model__net__n_experts=4, refused=True, **changes)
    assert "net.n_experts=8, this config says 4" in (words := said(capsys)) and "--init_from=run takes its weights" in words
    assert tiny.snapshot(Path("run")) == files


@pytest.mark.parametrize("end", [15, 10])
def test_decays_branch_from_one_trunk(place, twenty, end):
    """Each is the run that would have decayed there from the start: the trunk's past is its own."""
    shutil.copytree(twenty / "plateau", "trunk")
    shutil.rmtree("trunk/checkpoints")
    fit("other", trainer__max_steps=5, **PLATEAU)
    shutil.copytree("other/checkpoints", "trunk/checkpoints")
    trunk = tiny.snapshot(Path("trunk"))
    decays = {**PLATEAU, "model__optim__decay_fraction": (end - 5) / end, "trainer__max_steps": end}
    fit("decay", "--branch_from=trunk", **decays)
    fit("whole", **decays)
    same(tiny.state("decay"), tiny.state("whole"))
    assert entries("decay", "branched") == entries("whole")
    assert tiny.snapshot(Path("trunk")) == trunk
    parent = read_settings(newest_checkpoint("decay"))["parent"]
    assert (parent["how"], parent["run"], parent["checkpoint"], parent["step"]) == (
        "branch_from", "trunk", "step=000005.safetensors", 5,
    )  # fmt: skip
    assert parent["changed"]["optim.decay_fraction"] == [0.0, (end - 5) / end]
    assert record.read("decay/record.jsonl", "run")[-1]["config"]["parent"] == parent


@pytest.mark.slow
def test_a_branch_with_another_rate_and_other_text_survives_kills(place, capsys):
    """From the trunk's newest checkpoint until it has one of its own; then the trunk may go."""
    fit("trunk", trainer__max_steps=5, **PLATEAU)
    shutil.copytree("text", "more")
    Path("more/zz.py").write_text("def last(y):\n    return y\n" * 40)
    changes = {**PLATEAU, "model__optim__lr": 0.001, "model__optim__router_lr": 2.0, "trainer__max_steps": 15}
    other = {"data__corpus__path": "more", "data__corpus__dir": "prepared-more"}
    fit("refused", "--branch_from=trunk", refused=True, **changes, **other)  # prepared with a tokenizer of its own
    assert "was trained with another tokenizer than this run's data has" in said(capsys)
    assert not checkpoints("refused")
    changes |= {"data__rows__seed": 5, "data__rows__per_step": 4}
    fit("whole", "--branch_from=trunk", **changes)
    tiny.write_config(place, "killed.yaml", trainer__default_root_dir="killed", branch_from="trunk", **changes)
    for step in (7, 12):
        trap = before(Diary, "on_train_batch_end", lambda self, t, *_, s=step: t.global_step == s)
        assert ending(child(["fit", "-c", "killed.yaml"], trap)) == -signal.SIGKILL
    shutil.rmtree("trunk")
    assert ending(child(["fit", "-c", "killed.yaml"])) == 0
    same(tiny.state("killed"), tiny.state("whole"))
    assert entries("killed") == entries("whole")
    steps = record.read("killed/record.jsonl", "step")
    assert [(e["step"], e["lr"]) for e in steps][4:6] == [(5, 0.003), (6, 0.001)]
    assert [e["tokens"] for e in steps][4:6] == [5 * 8 * 32, 5 * 8 * 32 + 4 * 32]
    groups = tiny.state("killed")["optimizer_states"][0]["param_groups"]
    assert [g["lr"] for g in groups] == [0.001, 0.001, 0.002]
    fit("killed", "--branch_from=other", refused=True, **changes)
    assert "killed holds a run that began from trunk, this config says branch_from=other" in said(capsys)


def test_moments_are_found_by_name_when_groups_change(place):
    """Routers get a group of their own: each parameter keeps its moments."""
    fit("trunk", trainer__max_steps=5, **PLATEAU)
    fit("branch", "--branch_from=trunk", trainer__max_steps=10, model__optim__router_lr=3.0, **PLATEAU, refused=False)
    moments = [tiny.state(run)["optimizer_states"][0]["state"] for run in ("trunk", "branch")]
    shapes = [[tuple(entry["exp_avg"].shape) for entry in side.values()] for side in moments]
    assert shapes[0] != shapes[1] and sorted(shapes[0]) == sorted(shapes[1])
    assert shapes[1][-2:] == [(8, 32), (8, 32)]
    assert all(float(entry["step"]) == 10 for entry in moments[1].values())


def test_a_branch_may_be_of_other_rows_and_choices_where_the_weights_fit(place):
    """Context extension: rows of another length under another RoPE base, with two experts per token."""
    fit("trunk", trainer__max_steps=5, **PLATEAU)
    net = {"model__net__rope_theta": 20000.0, "model__net__top_k": 2, "data__rows__length": 64, "data__rows__per_step": 4}
    fit("branch", "--branch_from=trunk", trainer__max_steps=10, **net, **PLATEAU)
    steps = record.read("branch/record.jsonl", "step")
    assert [e["k"] for e in steps][4:6] == [[1, 1], [2, 2]]
    changed = read_settings(newest_checkpoint("branch"))["parent"]["changed"]
    assert changed["net.rope_theta"] == [10000.0, 20000.0] and changed["rows.length"] == [32, 64]


def test_a_bias_that_nothing_moves_any_more_is_kept_and_said(place):
    """From a loss-free parent onto a loss: the parent's bias decides on, to the bit, and the diary says it."""
    bias = {"model__balance": {"loss": "none", "bias": "sign", "bias_rate": 0.1}}
    short = {**PLATEAU, "save__every": 1, "trainer__val_check_interval": None}
    fit("trunk", trainer__max_steps=2, **short, **bias)
    fit("frozen", "--branch_from=trunk", trainer__max_steps=3, **short)
    fit(
        "goes_on",
        "--branch_from=trunk",
        trainer__max_steps=3,
        **short,
        model__balance={**bias["model__balance"], "weight": 1.0},
    )
    fit("taken", "--init_from=trunk", trainer__max_steps=1, **short)
    trunk, frozen, goes_on, taken = (biases(name) for name in ("trunk", "frozen", "goes_on", "taken"))
    assert trunk.abs().max() >= 0.1 and torch.equal(frozen, trunk) and torch.equal(taken, trunk)
    assert not torch.equal(goes_on, trunk)
    sentence = f"the routers' bias is kept, and nothing moves it: up to {float(spread(trunk).max()):.3g} between experts"
    for name, what in (("frozen", "branched"), ("taken", "weights taken")):
        (event,) = [e for e in record.read(f"{name}/record.jsonl", "event") if e["what"] == what]
        assert sentence in event["why"]
    assert "routers' bias" not in Path("goes_on/record.jsonl").read_text()


def biases(run: str) -> torch.Tensor:
    weights = read_checkpoint(newest_checkpoint(run))["state_dict"]
    return torch.stack([value for name, value in sorted(weights.items()) if name.endswith("router.bias")])


def test_what_a_branch_cannot_change(place, capsys):
    fit("trunk", trainer__max_steps=5, **PLATEAU)
    fit("branch", "--branch_from=trunk", trainer__max_steps=10, model__net__n_experts=4, refused=True, **PLATEAU)
    assert "net.n_experts=8, this config says 4: a branch keeps weights and moments; --init_from" in said(capsys)
    fit("branch", "--branch_from=trunk", trainer__max_steps=10, model__optim__optimizer="muon", refused=True, **PLATEAU)
    assert "the state of optim.optimizer=torch.optim.AdamW" in said(capsys)
    fit("branch", "--branch_from=trunk", trainer__max_steps=5, refused=True, **PLATEAU)
    assert "is of step 5, not before trainer.max_steps=5" in said(capsys)
    fit("branch", "--branch_from=trunk/checkpoints/step=000004.safetensors", refused=True)
    assert "does not exist: did you mean 'trunk/checkpoints/step=000005.safetensors'?" in said(capsys)
    fit("branch", "--branch_from=nowhere", refused=True)
    assert "branch_from=nowhere holds no checkpoint" in said(capsys)
    fit("branch", "--branch_from=trunk", "--init_from=trunk", refused=True)
    assert "branch_from and init_from: give one" in said(capsys)
    fit("branch", "--brunch_from=trunk", refused=True)
    fit("branch", refused=True, brunch_from="trunk")
    assert "unknown key 'brunch_from'; did you mean 'branch_from'?" in said(capsys)
    fit("branch", "--init_from=trunk", "--new_weights=bgin", refused=True)
    assert "new_weights='bgin': did you mean 'begin'?" in said(capsys)
    assert not Path("branch").exists()


# ------------------------------------------------------------------------------------------------------- weights only


ONE = {**PLATEAU, "save__every": 1, "trainer__max_steps": 1, "trainer__val_check_interval": None}


def test_weights_are_taken_and_nothing_else(place):
    """The first step's loss is the parent's next one, moments and step begin at 0; the parent is named in the ledger."""
    fit("parent", trainer__max_steps=5, **PLATEAU)
    fit("own", "--init_from=parent", data__rows__seed=9, **ONE)
    fit("next", "--branch_from=parent", data__rows__seed=9, **{**ONE, "trainer__max_steps": 6})
    found = tiny.state("own")
    assert found["global_step"] == 1
    assert {float(entry["step"]) for entry in found["optimizer_states"][0]["state"].values()} == {1.0}
    started = record.read("own/record.jsonl", "run")[0]["config"]["parent"]
    assert (started["how"], started["run"], started["step"]) == ("init_from", "parent", 5)
    assert started["new"] == started["left"] == [] and len(started["sha256"]) == 64
    assert read_settings(newest_checkpoint("own"))["parent"] == started
    weights = read_checkpoint(newest_checkpoint("parent"))["state_dict"]
    moved = max(float((found["state_dict"][name] - weights[name]).abs().max()) for name in weights)
    assert 0 < moved < 2 * 0.003 / 2  # one step of Adam at half the rate


@pytest.mark.slow
def test_a_killed_start_takes_them_again(place):
    fit("parent", trainer__max_steps=5, **PLATEAU)
    fit("whole", init_from="parent", **PLATEAU, trainer__max_steps=10)
    tiny.write_config(place, "killed.yaml", trainer__default_root_dir="killed", init_from="parent", **PLATEAU,
                      trainer__max_steps=10)  # fmt: skip
    for step in (3, 8):
        trap = before(Diary, "on_train_batch_end", lambda self, t, *_, s=step: t.global_step == s)
        assert ending(child(["fit", "-c", "killed.yaml"], trap)) == -signal.SIGKILL
    assert ending(child(["fit", "-c", "killed.yaml"])) == 0
    same(tiny.state("killed"), tiny.state("whole"))
    assert entries("killed") == entries("whole")


def test_another_tokenizer_is_refused(place, capsys):
    """Before anything is done, where the data is there; after it is prepared, where it is not."""
    fit("parent", trainer__max_steps=5, **PLATEAU)
    other = {"data__corpus__path": "more", "data__corpus__dir": "prepared-more"}
    Path("more").mkdir()
    for n in range(12):
        Path(f"more/{n}.py").write_text(f"class Other{n}:\n    value = {n}\n\n    def get(self):\n        return {n}\n" * 5)
    for _ in range(2):
        fit("own", "--init_from=parent", refused=True, **ONE, **other)
        assert "was trained with another tokenizer than this run's data has" in said(capsys)
        assert not checkpoints("own") and not Path("own/record.jsonl").exists()
    checkpoint = read_checkpoint(newest_checkpoint("parent"))
    del checkpoint["TokenDataModule"]["tokenizer sha256"]  # as an imported model: its tokenizer lies beside it
    write_checkpoint(newest_checkpoint("parent"), checkpoint)
    fit("own", "--init_from=parent", **ONE)
    Path("parent/tokenizer.json").unlink()
    shutil.rmtree("own")
    fit("own", "--init_from=parent", refused=True, **ONE)
    assert "which tokenizer" in said(capsys)


def test_new_parts_are_named_and_begin_anew_when_that_is_said(place, capsys):
    fit("parent", trainer__max_steps=5, **PLATEAU)
    more = {"model__net__n_experts": 12, "model__net__tie_embeddings": False}
    fit("own", "--init_from=parent", refused=True, **ONE, **more)
    words = said(capsys)
    assert "this model has others: blocks.0.moe.experts.w13" not in words
    assert "model.blocks.0.moe.experts.w13 [12, 32, 32], there [8, 32, 32]" in words
    assert "Add --new_weights=begin" in words and "and 4 more" in words
    assert not checkpoints("own")
    fit("own", "--init_from=parent", "--new_weights=begin", **{**ONE, "model__optim__lr": 1e-12}, **more)
    parent = record.read("own/record.jsonl", "run")[0]["config"]["parent"]
    assert [n for n in parent["new"] if "blocks.1" in n] == [
        f"model.blocks.1.moe.{name}" for name in ("experts.w13", "experts.w2", "router.bias", "router.weight")
    ]
    event = record.read("own/record.jsonl", "event")[0]
    assert event["what"] == "weights taken" and event["why"].startswith("from step 5 of parent; model.blocks.0")
    was, now = (read_checkpoint(newest_checkpoint(run))["state_dict"] for run in ("parent", "own"))
    for name in now.keys() - {*parent["new"]}:
        assert torch.allclose(was[name], now[name], atol=1e-9), name
    fit("fresh", **{**ONE, "model__optim__lr": 1e-12}, **more)
    fresh = read_checkpoint(newest_checkpoint("fresh"))["state_dict"]
    for name in parent["new"]:
        assert torch.allclose(fresh[name], now[name], atol=1e-9), name


def test_words_of_a_start_change_no_other_command(place, capsys):
    fit("parent", trainer__max_steps=5, **PLATEAU)
    tiny.write_config(place, "own.yaml", trainer__default_root_dir="parent", extend=True, **PLATEAU, trainer__max_steps=5)
    cli.main(["validate", "-c", "own.yaml"])
    cli.main(["fit", "-c", "own.yaml"])
    cli.main(["plan", "-c", "own.yaml"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for word in ("--extend", "--branch_from", "--init_from", "--new_weights"):
        assert word in said
    assert "sigma_lite.train.built" in sys.modules
