"""What experts know: costs add up to the whole's, and an expert that is left out is not chosen, nor missed for ever."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sigma_lite import cli
from sigma_lite.config import ConfigError
from sigma_lite.data.kinds import KINDS
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.hash import Hashed
from sigma_lite.serve.ablate import ablated, agreement, without
from sigma_lite.serve.evaluate import evaluate
from sigma_lite.serve.inside import costs, map_of_experts, worth
from sigma_lite.serve.likelihood import costs_by
from sigma_lite.serve.marked import heldout, route
from sigma_lite.serve.trained import Trained


@pytest.fixture
def trained(finished, monkeypatch) -> Trained:
    monkeypatch.chdir(finished)
    return Trained("run")


def added(by: dict) -> tuple[float, int]:
    nats = sum(own["nats_per_token"] * own["tokens"] for own in by.values())
    return nats, sum(own["bytes"] for own in by.values())


def test_kinds_and_domains_cost_together_what_validation_recorded(trained):
    found = costs(trained, None, None)
    entries = [json.loads(line) for line in Path("run/record.jsonl").read_text().splitlines()]
    recorded = [entry for entry in entries if entry["kind"] == "validation"][-1]["bits_per_byte"]
    assert found["bits_per_byte"] == pytest.approx(recorded, rel=1e-6)
    nats, size = added(found["by"]["kind"])
    assert nats / math.log(2) / size == pytest.approx(recorded, rel=1e-6)
    assert {"keyword", "identifier", "special"} <= found["by"]["kind"].keys()
    assert "bits_per_byte" not in found["by"]["kind"]["special"]


def test_costs_by_name_are_sums():
    nats, sizes, names = np.array([1.0, 2, 3, 4]), np.array([1, 0, 2, 4]), ["a", "b", "a", None]
    found = costs_by(nats, sizes, names)
    assert list(found) == ["a", "b"], "the most first"
    assert found["a"] == {"tokens": 2, "bytes": 3, "nats_per_token": 2.0, "bits_per_byte": 4 / math.log(2) / 3}
    assert found["b"] == {"tokens": 1, "bytes": 0, "nats_per_token": 2.0}


def test_a_document_is_scored_by_kind_and_domain(trained, tmp_path):
    rows = [
        {"text": "def rule(x):\n    return x  # größe\n" * 3, "name": "a.py", "domain": "code"},
        {"text": "Some words.", "domain": "prose"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(trained, path)
    for by in found["by"].values():
        nats, size = added(by)
        assert nats / math.log(2) / size == pytest.approx(found["bits_per_byte"], rel=1e-6)
    assert found["by"]["domain"].keys() == {"code", "prose"}
    assert {"keyword", "comment", "text"} <= found["by"]["kind"].keys()


# ------------------------------------------------------------------------------------------------------------- ablation


def test_an_expert_that_is_left_out_gives_its_tokens_to_the_next_best(trained):
    marked = heldout(trained, tokens=200)
    base, router = route(trained, marked), trained.model.blocks[0].moe.router
    busiest = int(base.experts[0].mode(0).values[0])
    with torch.no_grad():
        scores = trained.model(marked.ids_BS, documents_BS=marked.documents_BS).routings[0].probs
    with without(router, busiest):
        changed = route(trained, marked)
    own = (base.experts[0] == busiest)[:, 0]
    assert own.any() and not (changed.experts[0] == busiest).any()
    assert torch.equal(changed.experts[0][~own], base.experts[0][~own]), "other tokens of this layer keep theirs"
    second = scores.topk(2).indices[:, 1]
    assert torch.equal(changed.experts[0][own, 0], second[own])
    again = route(trained, marked)
    assert torch.equal(again.nats_T, base.nats_T) and not router.bias.any(), "and it is back afterwards"


def test_every_expert_that_works_is_left_out_once(trained):
    marked = heldout(trained, tokens=200)
    base = route(trained, marked)
    found = {(layer, expert): rise for layer, expert, rise in ablated(trained, marked, base)}
    assert found.keys() == {(layer, e) for layer, ids in enumerate(base.experts) for e in ids.unique().tolist()}
    (layer, expert), rise_T = next(iter(found.items()))
    with without(trained.model.blocks[layer].moe.router, expert):
        assert torch.equal((route(trained, marked).nats_T - base.nats_T).double(), rise_T)


def test_an_error_in_the_block_brings_the_expert_back(trained):
    router = trained.model.blocks[0].moe.router
    with pytest.raises(RuntimeError), without(router, 2):
        assert router.bias[2] == -math.inf
        raise RuntimeError
    assert not router.bias.any()


def test_who_cannot_spare_an_expert_says_so(trained):
    marked = heldout(trained, tokens=64)
    trained.model.set_k((8, 1))
    with pytest.raises(ConfigError, match="layer 0 chooses 8 of 8 experts"):
        next(ablated(trained, marked, route(trained, marked)))
    net = dataclasses.replace(trained.model.config)
    trained.model = Transformer(net, Parts(router=Hashed)).eval()
    with pytest.raises(ConfigError, match="Hashed"):
        next(ablated(trained, marked, route(trained, marked)))


def test_agreement_is_high_where_those_suffer_who_were_served():
    shares = np.eye(4)
    assert agreement(shares, 0.5 * shares, np.full(4, 30)) == pytest.approx(1)
    assert agreement(shares, -shares, np.full(4, 30)) == pytest.approx(-1)
    assert math.isnan(agreement(shares, shares, np.array([30, 1, 1, 1]), least=40))


def test_worth_and_map_are_json_and_say_how_much_they_saw(trained):
    found = worth(trained, None, 300)
    json.dumps(found)
    assert sum(found["tokens"][0]) <= 10 * 32 and found["rows"] == 9
    for tokens, rise in zip(found["tokens"][0], found["on_own"][0], strict=True):
        assert (rise is None) == (tokens == 0)
    mapped = map_of_experts(trained, None, 600)
    json.dumps(mapped)
    counts = np.array(mapped["layers"][0]["kind"]["counts"])
    assert counts.shape == (8, len(KINDS)) and counts.sum() == mapped["rows"] * 32
    for expert, kind, slots, z in mapped["layers"][0]["kind"]["pairs"]:
        assert counts[expert, kind] == slots and z > 3


def test_results_are_kept_beside_the_record_and_drawn(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copytree(finished / "prepared", tmp_path / "prepared")
    monkeypatch.chdir(tmp_path)
    record = Path("run/record.jsonl").read_bytes()
    cli.main(["report", "run"])
    plain = Path("run/report.html").read_text("utf-8")
    assert "What experts know" not in plain
    cli.main(["eval", "run", "heldout", "specialisation", "ablation", "sigma_choice", "--tokens", "300"])
    seen = capsys.readouterr()
    assert "bits_kind by layer" in seen.out and "agreement_kind by layer" in seen.out and "report run` draws it" in seen.err
    assert Path("run/record.jsonl").read_bytes() == record
    kept = [json.loads(line) for line in Path("run/evals.jsonl").read_text().splitlines()]
    assert [entry["task"] for entry in kept] == ["heldout", "specialisation", "ablation", "sigma_choice"]
    assert {entry["step"] for entry in kept} == {12}
    cli.main(["report", "run"])
    page = Path("run/report.html").read_text("utf-8")
    assert "What experts know" in page and "acc norm" in page
    for name in ("costs", "specialised", "worth"):
        assert f'data-figure="{name}"' in page
