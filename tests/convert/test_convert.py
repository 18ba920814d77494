"""`sigma-lite convert`: the new run generates, is evaluated, reports, and is trained by the config that it brings."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch

from sigma_lite import cli, record
from sigma_lite.checkpoint import newest_checkpoint, read_checkpoint, read_settings
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.convert.rebuild import named_parts, rebuilt
from sigma_lite.convert.surgery import available, is_surgery
from sigma_lite.model import Parts, Transformer
from sigma_lite.model.experts import Experts
from sigma_lite.runfile import from_mapping
from sigma_lite.scale.shard import refuse_custom
from sigma_lite.serve.trained import Trained
from sigma_lite.train.run import RunCLI

DENSE = {
    "model__net__n_experts": 1,
    "model__net__d_expert": 32,
    "model__sparsity": None,
    "model__balance": {"loss": "none", "z_weight": 0.0},
    "trainer__max_steps": 4,
    "trainer__default_root_dir": "dense",
}
SPLIT = ("--with", "papers.dense2moe.TaylorSplit", "experts=6", "shared=2", "--rows", "8")


def fit(name: str, **changes) -> None:
    tiny.write_config(Path(), f"{name}.yaml", **changes)
    with RunCLI(["fit", "-c", f"{name}.yaml"]) as run:
        assert run.finished


def said(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_split_run_is_a_run(place, capsys):
    fit("dense", **DENSE)
    before = tiny.snapshot(Path("dense"))
    cli.main(["convert", "dense", "split", *SPLIT])
    assert tiny.snapshot(Path("dense")) == before
    assert "experts 0.02 -> 0.02 MB" in capsys.readouterr().out
    trained = Trained("split")  # whose parts are of this package
    assert trained.model.config.n_experts == 6 and trained.model.k_per_layer == (2, 2)
    cli.main(["generate", "split", "--max-new-tokens", "3"])
    cli.main(["eval", "split", "sigma_choice"])
    cli.main(["report", "split"])
    assert "converted" in Path("split/report.html").read_text("utf-8")
    entries = record.read("split/record.jsonl")
    assert [entry["kind"] for entry in entries] == ["run", "event", "validation"]
    (one,) = entries[0]["config"]["converted"]["surgeries"]
    assert one["settings"]["experts"] == 6 and entries[0]["command"].startswith("sigma-lite convert dense split --with")
    assert entries[0]["ledger"]["total"] == sum(p.numel() for p in trained.model.parameters())
    assert len(entries[2]["f"][0]) == 6

    cli.main(["fit", "-c", "split/run.yaml"])
    event = record.read("split-trained/record.jsonl", "event")[0]
    assert event["what"] == "weights taken" and event["step"] == 0
    assert read_settings(newest_checkpoint("split-trained"))["balance"]["loss"] == "global"
    (end,) = record.read("split-trained/record.jsonl", "validation")[-1:]
    assert end["bits_per_byte"] < entries[2]["bits_per_byte"]
    with pytest.raises(SystemExit):
        cli.main(["export", "split", "out"])
    assert "Qwen3-MoE has no place for parts of your own" in said(capsys)


def test_the_same_words_give_the_same_weights(place, finished):
    for out in ("one", "two"):
        torch.manual_seed(len(out) + (out == "two"))
        cli.main(["convert", str(finished / "run"), out, "--with", "mine.Noise", "--rows", "4"])
    one, two = (read_checkpoint(newest_checkpoint(out))["state_dict"] for out in ("one", "two"))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    scored = record.read("one/record.jsonl", "validation")[0]["bits_per_byte"]
    with RunCLI(
        ["fit", "-c", "one/run.yaml", "--trainer.max_steps=2", "--save.every=2", "--trainer.default_root_dir=onward"]
    ) as run:
        assert run.finished
    cli.main(["export", "one", "folder"])
    assert Path("folder/model.safetensors").is_file()
    here = Trained(finished / "run")
    assert scored != pytest.approx(record.read(finished / "run/record.jsonl", "validation")[-1]["bits_per_byte"], abs=1e-6)
    assert here.model.config == Trained("one").model.config


def test_a_compressed_run_is_a_run_and_a_plain_one_exports(place, finished, capsys):
    run = str(finished / "run")
    cli.main(
        ["convert", run, "small", "--with", "compression.Prune", "keep=0.5", "--with", "compression.Quantise", "--rows", "8"]
    )
    cli.main(["generate", "small", "--max-new-tokens", "3"])
    small, whole = (newest_checkpoint(name).stat().st_size for name in ("small", run))
    assert small < 0.5 * whole, "the whole one holds its optimizer's state as well"
    cli.main(["convert", "small", "plain", "--with", "compression.Plain", "--rows", "1"])
    words = [record.read(f"{name}/record.jsonl", "validation")[0]["bits_per_byte"] for name in ("small", "plain")]
    assert words[0] == words[1]
    cli.main(["export", "plain", "folder"])
    assert '"num_experts": 4' in Path("folder/config.json").read_text("utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["convert", "small", "again", "--with", "compression.Prune"])
    assert "only usual experts behind a usual router can be compressed" in said(capsys)


def test_a_run_whose_tokens_skip_blocks_is_a_run(place, finished):
    """The stack is recorded and found by its name; the same weights generate, and are trained further."""
    words = ["--with", "blocks.MixtureOfBlocks", "size=2", "kept=1", "steps=2", "--rows", "8"]
    cli.main(["convert", str(finished / "run"), "few", *words])
    model = Trained("few").model
    assert model.stack.size == 2 and model.stack.groups[0].router.top_k == 1
    cli.main(["generate", "few", "--max-new-tokens", "3"])
    cli.main(["fit", "-c", "few/run.yaml"])
    before, after = (read_checkpoint(newest_checkpoint(run))["state_dict"] for run in ("few", "few-trained"))
    router = "model.stack.groups.0.router.weight"
    assert before.keys() == after.keys() and not torch.equal(before[router], after[router])
    with pytest.raises(ConfigError, match="does not serve model.parts.stack"):
        refuse_custom(model.parts.custom)


def test_held_out_is_what_validation_says(place, finished):
    """A surgery that does nothing: before and after are the run's own last validation."""
    cli.main(["convert", str(finished / "run"), "same", "--with", "mine.Nothing"])
    (own,) = record.read(finished / "run/record.jsonl", "validation")[-1:]
    (again,) = record.read("same/record.jsonl", "validation")
    assert again["bits_per_byte"] == pytest.approx(own["bits_per_byte"], abs=1e-6)
    torch.testing.assert_close(torch.tensor(again["f"]), torch.tensor(own["f"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(again["P"]), torch.tensor(own["P"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["papers.dense2moe.TaylorSpilt"], "no such surgery; did you mean 'dense2moe.TaylorSplit'"),
        (["dense2moe.TaylorSplit", "expert=6"], "unknown key dense2moe.TaylorSplit.expert; did you mean 'experts'"),
        (["dense2moe.TaylorSplit", "experts=six"], "experts=.six.: expected int"),
        (["dense2moe.TaylorSplit", "experts"], "settings are written key=value"),
        (["dense2moe.TaylorSplit"], "only a dense model can be split, this one has 8 experts"),
        (["sigma_lite.model.Transformer"], "no such surgery"),
        (["torch.nn.Linear"], "a surgery is a dataclass with __call__"),
    ],
)
def test_what_cannot_be_done_says_why(place, finished, capsys, words, complaint):
    with pytest.raises(SystemExit):
        cli.main(["convert", str(finished / "run"), "out", "--with", *words])
    assert re.search(complaint, said(capsys))
    assert not Path("out").exists()


def test_parts_must_be_such_as_a_yaml_can_name():
    model = rebuilt(
        Transformer(from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")),
        parts=Parts(experts=lambda config: Experts(config)),
    )
    with pytest.raises(ConfigError, match="which no yaml can name"):
        named_parts(model.parts)


def test_every_surgery_of_the_package_says_what_it_does():
    found = available()
    assert {"dense2moe.TaylorSplit", "dense2moe.Dense2MoE", "dense2moe.Upcycle"} <= set(found)
    assert all(is_surgery(cls) and cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(") for cls in found.values())


@dataclass(frozen=True)
class Nothing:
    def __call__(self, model, rows):
        return model


@dataclass(frozen=True)
class Noise:
    """What draws draws from torch's seed."""

    std: float = 0.02

    def __call__(self, model, rows):
        other = rebuilt(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += self.std * torch.randn_like(parameter)
        return other


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    """This file under the name that a reader's own would have."""
    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
