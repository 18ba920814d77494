"""Between two runs: tokens that change expert, experts without a token, what was forgotten, what frozen routers freeze."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sigma_lite import cli
from sigma_lite.config import ConfigError
from sigma_lite.data.rows import IGNORED
from sigma_lite.data.tasks import encode, problems
from sigma_lite.serve.drift import ROLES, changed, drift, problem_rows, routers_of, tasks_of
from sigma_lite.serve.marked import Routed, route
from sigma_lite.serve.trained import Trained


@pytest.fixture
def pair(finished, monkeypatch) -> tuple[Trained, Trained]:
    monkeypatch.chdir(finished)
    return Trained("run"), Trained("run")


def test_a_run_has_not_moved_from_itself(pair):
    found = drift(*pair, count=5)
    assert found["changed_text"] == found["changed_old_routers_problems"] == [0, 0]
    for name in ("unused_text", "unused_problems", "label_bits_text", "bits_per_byte_text", "nats_per_token_problems"):
        assert found[name]["before"] == found[name]["now"], name
    recorded = [json.loads(line) for line in Path("run/record.jsonl").read_text().splitlines()]
    last = [entry for entry in recorded if entry["kind"] == "validation"][-1]
    whole = drift(*pair, tokens=10**9, count=1)
    assert whole["bits_per_byte_text"]["now"] == pytest.approx(last["bits_per_byte"], rel=1e-6)
    assert whole["unused_text"]["now"] == [sum(f == 0 for f in f_E) for f_E in last["f"]]


def test_other_routers_change_experts_and_put_back_they_do_not(pair):
    """All rows of a router moved on by one: every token changes expert there, and only because of the router."""
    now, before = pair
    router = now.model.blocks[1].moe.router
    with torch.no_grad():
        router.weight.copy_(router.weight.roll(1, 0))
    found = drift(now, before, count=5)
    assert found["changed_text"] == [0, 1] and found["changed_old_routers_text"] == [0, 0]
    assert torch.equal(router.weight, before.model.blocks[1].moe.router.weight.roll(1, 0)), "its own routers are back"


def test_frozen_routers_do_not_freeze_routing(pair):
    """The routers are the same, and what they read is not: tokens change expert all the same."""
    now, before = pair
    with torch.no_grad():
        now.model.embedding.weight.add_(0.05 * torch.randn_like(now.model.embedding.weight))
    found = drift(now, before, count=5)
    assert found["changed_text"] == found["changed_old_routers_text"] and min(found["changed_text"]) > 0.05
    assert found["bits_per_byte_text"]["now"] > found["bits_per_byte_text"]["before"], "noise forgets"


def test_changed_compares_sets_of_experts():
    one = Routed(torch.zeros(4), [torch.tensor([[0, 1], [2, 3], [1, -1], [5, 6]])], [])
    other = Routed(torch.zeros(4), [torch.tensor([[1, 0], [2, 4], [-1, 1], [7, 8]])], [])
    assert changed(one, other, torch.tensor([True, True, True, False])) == [pytest.approx(1 / 3, abs=1e-5)]


def test_problem_rows_are_conversations_whose_answers_are_scored(pair):
    now, _ = pair
    tasks = {"add2": True, "sort3": True}
    read = problem_rows(now, tasks, 6)
    routed = route(now, read.marked)
    for row, one in enumerate([*problems("add2", 6, heldout=True), *problems("sort3", 6, heldout=True)]):
        response = encode(now.tokenizer, one.response)
        targets = read.marked.targets_BS[row]
        assert targets[targets != IGNORED].tolist()[:-1] == response, "and the mark that ends it"
        labels = [ROLES[i] for i in read.labels_BS[row].tolist() if i >= 0]
        assert labels.count("mark") == 4
        assert labels.count("answer") == len(one.answer) and labels.count("steps") == len(response) - len(one.answer)
        whole = now.model.nats(read.marked.ids_BS[row : row + 1, : len(labels)], targets[None, : len(labels)])[0]
        together = routed.nats_T.view(read.labels_BS.shape)[row]
        assert torch.allclose(together[: len(labels)], whole[0], atol=1e-5), "what fills rows up is a document of its own"
    assert read.marked.domains == ("add2", "sort3") and tasks_of(now) == {"add2": True}


def test_other_models_are_not_compared(pair):
    now, before = pair
    now.model.blocks = now.model.blocks[:1]
    with pytest.raises(ConfigError, match="drift: .*2, 8.* before and .*1, 8"):
        drift(now, before)


def test_routers_come_back_after_an_error(pair):
    now, before = pair
    mine = now.model.blocks[0].moe.router.weight.clone()
    with torch.no_grad():
        before.model.blocks[0].moe.router.weight.zero_()
    with pytest.raises(RuntimeError), routers_of(now, before):
        assert not now.model.blocks[0].moe.router.weight.any()
        raise RuntimeError
    assert torch.equal(now.model.blocks[0].moe.router.weight, mine)


def test_the_command_prints_and_keeps_it(pair, tmp_path, capsys):
    import shutil

    shutil.copytree("run", tmp_path / "run")
    cli.main(["eval", str(tmp_path / "run"), "drift", "--against", "run", "--problems", "3", "--tokens", "300"])
    said = capsys.readouterr().out
    assert "changed_text by layer 0.000 0.000" in said and "unused_problems" in said
    kept = json.loads((tmp_path / "run" / "evals.jsonl").read_text().splitlines()[-1])
    assert kept["task"] == "drift" and kept["against"] == "run" and math.isfinite(kept["bits_per_byte_text"]["now"])
    assert cli_fails(["eval", str(tmp_path / "run"), "drift"]), "a run that began from no other needs --against"


def cli_fails(args: list[str]) -> bool:
    try:
        cli.main(args)
    except SystemExit as end:
        return bool(end.code)
    return False
