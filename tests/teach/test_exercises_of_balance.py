"""What the solutions of chapters 4, 8, 9 and 11 claim. That they pass and mistakes are named: test_check.py."""

from __future__ import annotations

import importlib

import pytest
import torch

from sigma_lite.config import ModelConfig
from sigma_lite.model.router import Router
from sigma_lite.teach import predict
from sigma_lite.teach.exercises import chapter_04, chapter_08, chapter_09, chapter_11

guesses = importlib.import_module("sigma_lite.teach.predict")  # the package has a function of that name


@pytest.mark.parametrize("k", [1, 2, 6])
def test_the_gradient_that_the_chapter_derives(k):
    logits_TE = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    ids_TK, tau = logits_TE.topk(k).indices, 0.4
    p_TE = (logits_TE / tau).softmax(-1)
    fhat_E, pbar = p_TE.mean(0), p_TE.gather(1, ids_TK).sum(1).mean()
    loss = 6 * fhat_E.square().sum() / pbar
    slope_TE = (2 * 6 * fhat_E - loss * torch.zeros_like(p_TE).scatter(1, ids_TK, 1.0)) / pbar
    by_hand = p_TE * (slope_TE - (p_TE * slope_TE).sum(1, keepdim=True)) / (9 * tau)
    torch.testing.assert_close(by_hand, chapter_08.gradient(logits_TE, ids_TK, tau))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_bounds_of_the_top1_loss_that_the_chapter_proves(k):
    """1 for balanced and sure, E / K for flat, E for all sure of one expert, whatever K is."""
    E = 8
    sure = torch.full((E, E), -60.0)
    for token in range(E):
        sure[token, [(token + i) % E for i in range(k)]] = 0.0
    values = {"sure": sure, "flat": torch.zeros(E, E), "collapsed": 60.0 * torch.eye(E)[:1].expand(E, E)}
    losses = {name: chapter_08.pooled(logits[None], k).item() for name, logits in values.items()}
    assert losses == pytest.approx({"sure": 1, "flat": E / k, "collapsed": E}, rel=1e-4)


def test_stages_hold_from_their_first_step_on():
    plan = [(0, (8, 4)), (5, (2,)), (9, ())]
    lists = [chapter_11.stages(step, plan, 3) for step in range(10)]
    assert lists == [(8, 4, 1)] * 5 + [(2, 1, 1)] * 4 + [(1, 1, 1)]


def test_spread_of_a_bias_that_always_moves_the_same_way():
    counts_NE = torch.tensor([[5, 3, 1]]).expand(4, 3)
    torch.testing.assert_close(chapter_09.spreads(counts_NE, 0.5), torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("k", [1, 3])
def test_the_router_that_readers_write_is_the_packages(k):
    package = Router(ModelConfig(n_experts=6, d_model=8, top_k=k))
    x_TD, weight_ED = torch.randn(5, 8), torch.randn(6, 8)
    wanted = torch.func.functional_call(package, {"weight": weight_ED}, x_TD)
    gates_TK, ids_TK = chapter_04.router(x_TD, weight_ED, k)
    torch.testing.assert_close(gates_TK, wanted.gates)
    torch.testing.assert_close(chapter_04.gates(wanted.logits, k), wanted.gates)
    assert torch.equal(ids_TK, wanted.ids)


def test_a_fair_gap_bounds_who_can_be_reached():
    """An expert further below the top bias than the fair gap gets fewer tokens than a fair share."""
    score_TE = torch.rand(40, 5, generator=torch.Generator().manual_seed(0))
    bias_E = torch.zeros(5)
    gap = chapter_09.fair_gap(score_TE, bias_E + torch.tensor([1e-9, 0, 0, 0, 0]))
    bias_E[0] = gap + 1e-4
    counts_E = torch.bincount(chapter_09.choose(score_TE, bias_E)[0], minlength=5)
    assert (counts_E[1:] < 40 / 5).all()


def test_a_guess_is_kept_when_its_cell_is_run_again():
    first = predict("how many?", ["one", "two"])
    first.children[1].value = "two"
    assert predict("how many?", ["one", "two"]).guess == "two"
    assert predict("how many?", ["none"]).guess is None and predict("another?", ["one", "two"]).guess is None


def test_a_comparison_follows_a_guess_that_comes_late_also_from_a_cell_run_again():
    first = predict("how late?", ["one", "two"])
    shown = first.compare("1.5")
    assert "none yet" in shown.value
    first.children[1].value = "two"
    assert ">two<" in shown.value and "1.5" in shown.value
    predict("how late?", ["one", "two"]).children[1].value = "one"
    assert ">one<" in shown.value
    predict("how early?", ["one", "two"]).children[1].value = "two"
    assert ">one<" in shown.value


def test_a_guess_is_found_again_by_another_kernel(tmp_path, monkeypatch):
    file = tmp_path / "data" / "guesses.json"
    monkeypatch.setenv(guesses.GUESSES, str(file))
    predict("tomorrow?", ["one", "two"]).children[1].value = "two"
    predict("and then?", ["one", "two"]).children[1].value = "one"
    monkeypatch.setattr(guesses, "_kept", {})
    assert predict("tomorrow?", ["one", "two"]).guess == "two" and predict("and then?", ["one", "two"]).guess == "one"


@pytest.mark.parametrize("content", ["", "[1]", "null", '{"a', b"\xff"])
def test_a_damaged_file_of_guesses_disturbs_nobody(tmp_path, monkeypatch, content):
    file = tmp_path / "guesses.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv(guesses.GUESSES, str(file))
    monkeypatch.setattr(guesses, "_kept", {})
    question = predict("damaged?", ["one", "two"])
    question.children[1].value = "two"
    monkeypatch.setattr(guesses, "_kept", {})
    assert predict("damaged?", ["one", "two"]).guess == "two"


def test_guesses_that_cannot_be_written_stay_in_the_kernel(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(guesses.GUESSES, str(tmp_path / "file" / "guesses.json"))
    predict("nowhere?", ["one", "two"]).children[1].value = "two"
    assert predict("nowhere?", ["one", "two"]).guess == "two"
