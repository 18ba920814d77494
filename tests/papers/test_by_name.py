"""Balancers of papers as yaml names them: recorded with their settings, told apart, refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from sigma_lite import cli, record
from sigma_lite.config import ModelConfig
from sigma_lite.papers.moduleformer import MutualInformation
from sigma_lite.papers.shinka import LISTING, PRINTED
from sigma_lite.runfile import from_mapping
from sigma_lite.train.module import SigmaLit

NET = from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")


def test_a_run_names_them_with_their_settings(place, capsys):
    """A balancer within a balancer, from yaml; and other settings are another run."""
    shinka = {"class_path": "sigma_lite.papers.shinka.Shinka", "init_args": {"threshold": PRINTED}}
    both = {"class_path": "sigma_lite.balance.balancer.WithBias", "init_args": {"inner": shinka, "rule": "sign"}}
    common = {"trainer__max_steps": 2, "model__sparsity": None}
    tiny.write_config(place, "own.yaml", model__custom_balance=both, **common)
    cli.main(["fit", "-c", "own.yaml"])
    (start,) = record.read(Path("run/record.jsonl"), "run")
    recorded = start["config"]["custom_balance"]
    assert recorded["class"] == "sigma_lite.balance.balancer.WithBias" and ":" in recorded["code"]
    inner, *others = recorded["settings"].values()
    assert inner["settings"] == {"threshold": 0.064, "strength": 0.1, "hinge": "counts"}
    assert others == ["sign", 0.001, "none", False]
    assert all(entry["terms"]["balance"] >= 1 for entry in record.read(Path("run/record.jsonl"), "step"))
    shinka["init_args"]["threshold"] = LISTING
    tiny.write_config(place, "other.yaml", model__custom_balance=both, **common)
    assert tiny.refused(cli.main, "fit", "-c", "other.yaml") == 2
    said = capsys.readouterr().err
    assert "holds a run with custom_balance=sigma_lite.balance" in said and "threshold=0.064" in said and "=0.64" in said


@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        (
            {"class_path": "sigma_lite.papers.shinka.Shinka", "init_args": {"treshold": 1}},
            "Option 'treshold' is not accepted",
        ),
        ({"class_path": "sigma_lite.papers.shinka.Shinka", "init_args": {"threshold": 64}}, "so it must lie in 0..1"),
        ({"class_path": "sigma_lite.papers.shinka.Shinkaa"}, "has no attribute 'Shinkaa'"),
    ],
)
def test_a_balancer_that_cannot_be_is_refused_in_a_sentence(place, capsys, own, complaint):
    tiny.write_config(place, "wrong.yaml", model__custom_balance=own)
    assert tiny.refused(cli.main, "fit", "-c", "wrong.yaml") == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("sigma-lite: model.custom_balance: ") and complaint in sentence


def test_named_without_settings():
    assert (
        SigmaLit(NET, custom_balance=MutualInformation()).settings()["custom_balance"]["class"].endswith("MutualInformation")
    )


def test_a_part_named_without_settings_is_made_by_the_model(place):
    """Not by the parser, which once handed over a router of 96 experts for a model of 8."""
    router = {"router": {"class_path": "sigma_lite.papers.choice.ExpertChoice"}}
    tiny.write_config(place, "own.yaml", model__parts=router, trainer__max_steps=2, model__sparsity=None)
    cli.main(["fit", "-c", "own.yaml"])
    (start,) = record.read(Path("run/record.jsonl"), "run")
    assert start["config"]["parts.router"]["class"] == "sigma_lite.papers.choice.ExpertChoice"
    assert "settings" not in start["config"]["parts.router"] or not start["config"]["parts.router"]["settings"]
    (end,) = record.read(Path("run/record.jsonl"), "validation")
    assert len(end["f"][0]) == 8
