"""The routing explorer: what it says is what the model does, and what it calls more than chance is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from sigma_lite import cli
from sigma_lite.config import ConfigError
from sigma_lite.data.kinds import KINDS
from sigma_lite.data.tokenizer import token_strings
from sigma_lite.report.explore import page
from sigma_lite.serve import explore, marked
from sigma_lite.serve.marked import Text, at_hand, heldout, route, texts
from sigma_lite.serve.specialise import favourites, information, specialisation
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import StorageError

CODE = 'def rule(x):\n    """Add 1."""\n    return x + 1  # größe\n' * 3


@pytest.fixture
def trained(finished, monkeypatch) -> Trained:
    monkeypatch.chdir(finished)
    return Trained("run")


# ---------------------------------------------------------------------------------------------------------- text in rows


def test_held_out_rows_cost_what_validation_recorded(trained):
    whole = heldout(trained)
    nats = float(route(trained, whole).nats_T.double().sum())
    entries = [json.loads(line) for line in Path("run/record.jsonl").read_text().splitlines()]
    recorded = [entry for entry in entries if entry["kind"] == "validation"][-1]["bits_per_byte"]
    assert nats / np.log(2) / int(whole.bytes_BS.sum()) == pytest.approx(recorded, rel=1e-6)
    some = heldout(trained, tokens=96)
    assert some.ids_BS.shape == (3, 32) and "3 of" in some.source
    for row in some.ids_BS:
        assert (whole.ids_BS == row).all(1).any()


def test_inputs_and_targets_have_marks_of_their_own(trained):
    for found in (
        heldout(trained),
        texts(trained, [Text(CODE, "a.py", "code"), Text("Some words.", "b.txt", "prose")], "two"),
    ):
        same = found.targets_BS[:, :-1] == found.ids_BS[:, 1:]
        assert same.any()
        assert (found.target_kinds_BS[:, :-1] == found.kinds_BS[:, 1:])[same].all()
        assert (found.target_domains_BS[:, :-1] == found.domains_BS[:, 1:])[same].all()
        assert ((found.ids_BS == trained.end_of_text) == (found.kinds_BS == 0)).all()
    assert found.domains == ("code", "prose") and set(found.domains_BS.unique().tolist()) == {-1, 0, 1}
    assert int(found.bytes_BS.sum()) == len(CODE.encode()) + len("Some words.")


def test_text_is_taken_from_where_there_is_some(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished)
    assert "held-out text in prepared" in at_hand(Trained("run"), None, 100).source
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    alone = Trained("run")
    found = at_hand(alone, None, 2000)
    assert "of this Python's library" in found.source and found.ids_BS.numel() >= 2000
    with pytest.raises(StorageError, match="no finished data"):
        at_hand(alone, tmp_path, 100)


# -------------------------------------------------------------------------------------------------------- more than chance


def rows(rng: np.random.Generator, B: int = 40, S: int = 32, G: int = 4) -> torch.Tensor:
    """Labels that run on: stretches of 8 tokens."""
    return torch.from_numpy(rng.integers(0, G, (B, S // 8)).repeat(8, axis=1))


def test_an_expert_of_a_label_is_found_and_none_where_there_is_none():
    rng = np.random.default_rng(0)
    labels = rows(rng)
    of_label, of_chance = labels.flatten()[:, None], rows(rng, G=6).flatten()[:, None]
    found = specialisation(of_label, labels, E=6, G=4)
    assert found.bits == pytest.approx(found.entropy) and found.p < 0.01
    assert sorted(found.pairs()) == [(g, g) for g in range(4)]
    assert found.counts_EG[4:].sum() == 0
    chance = specialisation(of_chance, labels, E=6, G=4)
    assert chance.pairs() == [] and chance.p > 0.05 and chance.bits < 0.1


def test_neighbours_are_not_counted_as_proof():
    """Both run on for whole rows, independently: the test for independent draws is sure, and wrong."""
    rng, wrong, surest = np.random.default_rng(1), 0, 0
    for _ in range(20):
        labels, ids = (torch.from_numpy(rng.integers(0, 3, (20, 1)).repeat(64, axis=1)) for _ in range(2))
        found = specialisation(ids.flatten()[:, None], labels, E=3, G=3, deals=100)
        wrong += found.p <= 0.05
        surest += 2 * np.log(2) * found.counts_EG.sum() * found.bits > 9.5  # G test, 4 degrees of freedom, 5 %
    assert wrong <= 4 and surest >= 18


def test_empty_slots_and_labels_do_not_count():
    ids = torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 0]])
    found = specialisation(ids, torch.tensor([[0, 1], [1, -1]]), E=3, G=2, deals=5)
    assert found.counts_EG.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert information(np.zeros((3, 2), int)) == 0
    assert information(np.array([[5, 0], [0, 5]])) == pytest.approx(1)


def test_favourites_are_neither_rare_nor_common_to_all():
    tokens = torch.tensor([7] * 20 + [8] * 20 + [9] + [7] * 20)
    ids = torch.tensor([[0]] * 20 + [[1]] * 21 + [[1]] * 20)
    first, second = favourites(ids, tokens, E=2)
    assert [one.token for one in second] == [8, 9, 7], "7 goes everywhere, 9 is rare"
    assert (second[0].count, second[0].of_token, second[0].of_expert) == (20, 1, pytest.approx(20 / 41))
    assert first[0].token == 7 and first[0].of_token == 0.5


# ------------------------------------------------------------------------------------------------------------- the page


def test_facts_are_what_the_model_does(trained):
    known = explore.experts(trained, heldout(trained, tokens=500))
    found = explore.facts(trained, CODE, known, "some text", "a.py")
    ids = trained.prompt_ids(CODE)
    assert (
        "".join(word for word, _, _ in found["tokens"][1:6]) == CODE[: len("".join(w for w, _, _ in found["tokens"][1:6]))]
    )
    first = torch.tensor([ids[:32]])
    with torch.no_grad():
        logits, routings = trained.model(first)
    assert [layer[:32] for layer in found["experts"]] == [routing.ids.tolist() for routing in routings]
    assert len(found["experts"][0]) == len(found["tokens"]) == len(ids) > 64, "the last token and later rows too"
    assert found["tokens"][0][2] is None
    cost = -logits[0, 4].log_softmax(-1)[ids[5]]
    assert found["tokens"][5][2] == pytest.approx(float(cost), abs=1e-3)
    kinds = {word.strip(): KINDS[kind] for word, kind, _ in found["tokens"]}
    assert kinds["def"] == "keyword" and kinds["<|endoftext|>"] == "special"
    assert sum(one["slots"] for one in known[0]) == heldout(trained, tokens=500).ids_BS.numel()
    assert "\\xc3" in {word for word, _, _ in found["tokens"]} or "ö" in {word for word, _, _ in found["tokens"]}
    with pytest.raises(ConfigError, match="and 4000 can be shown"):
        explore.facts(trained, CODE * 200, known, "some text")


def test_the_vocabulary_is_read_once_for_a_whole_page(trained, monkeypatch):
    read = []
    monkeypatch.setattr("sigma_lite.serve.trained.token_strings", lambda words: read.append(words) or token_strings(words))
    known = explore.experts(trained, heldout(trained, tokens=64))
    explore.facts(trained, CODE, known, "held-out text")
    assert len(read) == 1


def test_a_text_cannot_end_its_page(trained):
    known = [[{"slots": 0, "tokens": [], "kinds": []}] * 8] * 2
    text = page(explore.facts(trained, "</script><b>&", known, "<i>here</i>"), "<run>")
    assert text.count("</script>") == 2 and "<i>" not in text and "<run>" not in text
    assert "default-src 'none'" in text and "http://" not in text and "https://" not in text


def test_the_command(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text(CODE)
    cli.main(["explore", "run", "--file", "a.py", "--tokens", "500"])
    assert capsys.readouterr().out.split() == ["explore", "run/routing.html"]
    held = Path("run/routing.html").read_text("utf-8")
    assert "modules of this Python&#x27;s library" in held
    cli.main(["explore", "run", "--out", "b.html", "--tokens", "300", "--data", str(finished / "prepared")])
    assert "held-out text in" in Path("b.html").read_text("utf-8")
    for wrong in (["--text", "a", "--file", "a.py"], ["--tokens", "0"], ["--file", "none.py"]):
        assert tiny.refused(cli.main, "explore", "run", *wrong) == 2


def test_how_many_rows_a_pass_has_changes_nothing(trained, monkeypatch):
    monkeypatch.setattr(marked, "ROWS", 1)
    one = route(trained, heldout(trained, tokens=100))
    monkeypatch.setattr(marked, "ROWS", 64)
    assert all(
        torch.equal(a, b) for a, b in zip(one.experts, route(trained, heldout(trained, tokens=100)).experts, strict=True)
    )
