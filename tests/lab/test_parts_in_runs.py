"""A router of one's own in a real run: from yaml, resumed bitwise, told from another, compared in the lab; or refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import small
import tiny
import torch

from sigma_lite import cli, lab, record
from sigma_lite.checkpoint import checkpoints, newest_checkpoint, read_checkpoint
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.lab.experiment import Arm, run_dir
from sigma_lite.model import Parts, Router, Transformer
from sigma_lite.model.parts import as_parts
from sigma_lite.runfile import from_mapping, load_run
from sigma_lite.scale.forecast import forecast
from sigma_lite.scale.shard import refuse_custom
from sigma_lite.serve.hf import to_qwen3_moe
from sigma_lite.serve.trained import Trained
from sigma_lite.train.module import SigmaLit

NET = from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")
MINE = """
import torch
from sigma_lite.model import Router

class Second(Router):
    leaves_empty = True
    def __init__(self, config, skip: int = 1):
        super().__init__(config)
        self.skip = skip
    def choose(self, scores_TE):
        ids_TK = scores_TE.topk(self.top_k + self.skip).indices[:, self.skip:]
        return ids_TK.where(scores_TE.amax(-1, keepdim=True) > 0.126, -1)
"""


class Last(Router):
    def choose(self, scores_TE):
        return super().choose(-scores_TE)


def own(place: Path, monkeypatch, text: str = MINE, **settings: int) -> dict:
    """As a process of its own would import it: what it has imported before is forgotten."""
    (place / "my_router.py").write_text(text)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "my_router", raising=False)
    shutil.rmtree(place / "__pycache__", ignore_errors=True)
    router = {"class_path": "my_router.Second", **({"init_args": settings} if settings else {})}
    return {
        "model__parts": {"router": router},
        "model__sparsity": None,
        "trainer__max_steps": 4,
        "trainer__val_check_interval": 4,
    }


def test_a_router_from_yaml_is_resumed_bitwise_and_told_from_an_edited_one(place, monkeypatch, capsys):
    tiny.write_config(place, "own.yaml", **own(place, monkeypatch, skip=2))
    cli.main(["fit", "-c", "own.yaml"])
    (start,) = record.read(Path("run/record.jsonl"), "run")
    assert start["config"]["parts.router"]["class"] == "my_router.Second" and ":" in start["config"]["parts.router"]["code"]
    assert start["config"]["parts.router"]["settings"] == {"skip": 2}
    assert record.read(Path("run/record.jsonl"), "sample"), "the end of a run writes text with the same parts"
    whole = read_checkpoint(newest_checkpoint("run"))["state_dict"]
    for path in checkpoints("run")[1:]:
        path.unlink()
    cli.main(["fit", "-c", "own.yaml"])
    again = read_checkpoint(newest_checkpoint("run"))["state_dict"]
    assert len(record.read(Path("run/record.jsonl"), "run")) == 2
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    capsys.readouterr()
    for change, words in (({"skip": 1}, "parts.router=my_router.Second"), ({}, "parts.router=my_router.Second")):
        tiny.write_config(place, "other.yaml", **own(place, monkeypatch, **change))
        assert tiny.refused(cli.main, "fit", "-c", "other.yaml") == 2
        assert f"holds a run with {words}" in capsys.readouterr().err
    own(place, monkeypatch, MINE.replace("0.126", "0.127"))
    assert tiny.refused(cli.main, "fit", "-c", "own.yaml") == 2
    assert "my_router.Second(skip=2), whose code has changed since" in capsys.readouterr().err
    tiny.write_config(place, "plain.yaml", model__sparsity=None, trainer__max_steps=4)
    assert tiny.refused(cli.main, "validate", "-c", "plain.yaml") == 2
    assert "holds a model with parts.router=" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"run has parts.router=my_router.Second\(skip=2\): give it"):
        Trained("run")


def test_without_parts_nothing_is_recorded_of_them(finished):
    (start, *_) = record.read(finished / "run/record.jsonl", "run")
    assert not [name for name in start["config"] if "parts" in name]
    assert SigmaLit(NET).settings().keys() == {"net", "sparsity", "balance", "optim", "custom_balance"}


NOTEBOOK = """
from sigma_lite.model import Router

class Sampled(Router):
    def choose(self, scores_TE):
        return (scores_TE + 0.01).topk(self.top_k).indices
"""


def test_ten_lines_in_a_notebook_train_and_an_edit_is_another_run(place):
    """As an object, and inside settings; the first is bitwise the model's own router, whose choice a constant leaves."""
    found = []
    for text in (NOTEBOOK, NOTEBOOK, NOTEBOOK.replace("+ 0.01", "* -1")):
        namespace = {"__name__": "__main__"}
        exec(text, namespace)
        arms = {"own": Parts(router=namespace["Sampled"])}
        if not found:
            arms |= {"plain": {}, "both": {"model": {"balance": {"weight": 0.0}, "parts": {"router": namespace["Sampled"]}}}}
        results = lab.compare(arms, small.scale(2), runs="runs", results="results", name=f"n{len(found)}")
        found.append({run["arm"]: run for run in results["runs"]})
    assert found[0]["own"]["curve"] == found[0]["plain"]["curve"] != found[2]["own"]["curve"]
    assert found[0]["own"]["seconds"] == found[1]["own"]["seconds"], "found again"
    assert found[0]["both"]["curve"] != found[0]["own"]["curve"]
    assert found[0]["own"]["config"]["parts.router"]["class"] == "__main__.Sampled"
    assert len(list(Path("runs/tiny").iterdir())) == 4


def test_an_arm_names_parts_by_path():
    def arm(path):
        return Arm("x", "", {"model": {"parts": {"router": path}}})

    folders = {
        run_dir(arm(path), small.scale(), 0, Path("runs")).parent
        for path in ("sigma_lite.model.router.Router", {"class_path": "sigma_lite.model.router.Router"}, None)
    }
    assert len(folders) == 3
    with pytest.raises(ConfigError, match="names code that cannot be imported"):
        run_dir(arm("sigma_lite.model.router.Routr"), small.scale(), 0, Path("runs"))


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"ruter": "sigma_lite.model.router.Router"}, "unknown key model.parts.ruter; did you mean 'router'?"),
        ({"router": "sigma_lite.model.router.Routr"}, "sigma_lite.model.router.Router"),
        ({"router": 5}, "model.parts.router=5 is no class"),
        ({"router": {"class_path": "sigma_lite.model.router.Router", "init_args": {"groups": 2}}}, "Option 'groups'"),
    ],
)
def test_a_part_that_cannot_be_is_refused_by_plan_and_fit_alike(tmp_path, monkeypatch, capsys, parts, words):
    monkeypatch.chdir(tmp_path)
    tiny.write_config(tmp_path, "bad.yaml", model__parts=parts)
    for command in ("plan", "fit"):
        assert tiny.refused(cli.main, command, "-c", "bad.yaml") == 2
        assert words in capsys.readouterr().err


def test_who_cannot_serve_a_part_says_its_name(tmp_path):
    model = Transformer(NET, Parts(router=Last))
    with pytest.raises(ConfigError, match="Qwen3-MoE has no place for .* its own router"):
        to_qwen3_moe(model)
    with pytest.raises(ConfigError, match="ExpertParallel does not serve model.parts.router"):
        refuse_custom(model.parts.custom)
    own = {"experts": "sigma_lite.model.experts.Experts"}
    config = tiny.write_config(tmp_path, model__parts=own, trainer__devices=8)
    with pytest.raises(ConfigError, match="model.parts.experts on .*planned on one device"):
        forecast(load_run([config]))


def test_the_strategy_refuses_a_part_before_any_process_starts(place, capsys):
    strategy = {"class_path": "sigma_lite.scale.strategy.ExpertParallel"}
    parts = {"dispatch": "sigma_lite.model.dispatch.ragged"}
    tiny.write_config(place, "own.yaml", model__parts=parts, trainer__strategy=strategy)
    assert tiny.refused(cli.main, "fit", "-c", "own.yaml") == 2
    assert "ExpertParallel does not serve model.parts.dispatch" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"router": 5}, {"ruter": Last}, {"router": {"path": "x"}}, {"router": "no.where.At"}])
def test_an_object_that_is_no_part_is_refused(given):
    with pytest.raises(ConfigError, match=r"parts\.router=|unknown part 'ruter'; did you mean 'router'"):
        as_parts(given)
