"""Balance losses of other papers: closed forms, gradients derived on paper, and their names in yaml."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from sigma_lite import cli, record
from sigma_lite.balance.losses import expert_counts, load_balancing_loss, load_share
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Routing
from sigma_lite.papers.moduleformer import MutualInformation, mutual_information_loss
from sigma_lite.papers.shinka import LISTING, PRINTED, Shinka, concentration, missing_share
from sigma_lite.runfile import from_mapping
from sigma_lite.train.module import SigmaLit

NET = from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")


def routing(logits: Tensor, K: int = 1) -> tuple[Routing, Tensor]:
    probs = logits.softmax(-1)
    ids = probs.topk(K).indices
    return Routing(probs, ids, probs.gather(1, ids), logits), load_share(expert_counts(ids, logits.shape[1]))


def sure(ids: Tensor, E: int) -> Tensor:
    return torch.nn.functional.one_hot(ids, E) * 1e4


def skewed(E: int = 16, T: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(T, E, generator=generator) + 2 * torch.randn(E, generator=generator)).requires_grad_()


# ------------------------------------------------------------------------------------------------------------ Shinka


def test_both_thresholds_are_those_of_the_paper():
    """Formula and listing at E = 64: 0.001 and 0.01, ten times as much."""
    assert [x / 64 for x in (PRINTED, LISTING)] == pytest.approx([0.001, 0.01])
    assert Shinka().threshold == LISTING


@pytest.mark.parametrize("E", [8, 64])
@pytest.mark.parametrize("threshold", [PRINTED, LISTING])
def test_shinka_closed_forms(E, threshold):
    """Balanced: the LBL and nothing else. Collapsed: E and the hinge of E - 1 empty experts at full strength, 1.5."""
    balanced, collapsed = torch.arange(4 * E) % E, torch.zeros(4 * E, dtype=torch.int64)
    own = Shinka(threshold)
    assert own.loss(*routing(sure(balanced, E).float())).item() == pytest.approx(1)
    expected = E + 0.1 * 1.5 * threshold * (1 - 1 / E)
    assert own.loss(*routing(sure(collapsed, E).float())).item() == pytest.approx(expected, rel=1e-6)
    flat = Routing(torch.full((9, E), 1 / E), torch.zeros(9, 1, dtype=torch.int64), torch.zeros(9, 1), torch.zeros(9, E))
    blind = own.loss(flat, torch.eye(E)[0]).item()
    assert blind == pytest.approx(1 + 0.1 * 0.5 * threshold * (1 - 1 / E)), "the blind spot stays: s is least when P is flat"


def test_the_two_thresholds_see_different_experts():
    """Loads of 0, 0.3 and 0.9 of an even share: printed tau starts at 0.064, the listing's at 0.64."""
    f = torch.tensor([0.0, 0.3, 0.9, 2.8]) / 4
    assert missing_share(f, PRINTED).item() == pytest.approx(0.064 / 4)
    assert missing_share(f, LISTING).item() == pytest.approx((0.64 + 0.34) / 4)
    assert missing_share(torch.full((4,), 0.25), 1.0).item() == 0


def test_concentration_runs_from_half_to_one_and_a_half():
    assert concentration(torch.full((64,), 1 / 64)).item() == pytest.approx(0.5)
    assert concentration(torch.eye(64)[3]).item() == pytest.approx(1.5)


@pytest.mark.parametrize("K", [1, 2])
def test_all_gradient_of_the_hinge_flows_through_the_concentration(K):
    """d/dP_e = strength * missing * (1 + log P_e) / log E: it flattens P, and knows nothing of which expert starves."""
    routed, f = routing(skewed(), K)
    P = routed.probs.mean(0)
    own, lbl = Shinka().loss(routed, f), load_balancing_loss(routed.probs, routed.ids, f)
    (gradient,) = torch.autograd.grad(own - lbl, routed.probs, retain_graph=True)
    missing = missing_share(f, LISTING).item()
    expected = 0.1 * missing * (1 + P.log()) / math.log(16) / 200
    assert missing > 0.1
    torch.testing.assert_close(gradient, expected.detach().expand(200, 16), rtol=1e-3, atol=1e-8)


def test_while_nobody_starves_it_is_the_global_loss():
    routed, _ = routing(skewed())
    even = torch.full((16,), 1 / 16)
    terms = [Shinka().loss(routed, even), load_balancing_loss(routed.probs, routed.ids, even)]
    assert torch.equal(*terms)
    assert torch.equal(*(torch.autograd.grad(term, routed.probs, retain_graph=True)[0] for term in terms))


@pytest.mark.parametrize("hinge", ["probs", "straight_through"])
def test_our_variants_lift_the_starved(hinge):
    """Beside the paper's gradient, -strength * s / T for each starved expert and 0 for the others."""
    routed, f = routing(skewed())
    P = routed.probs.mean(0)
    own, paper = Shinka(hinge=hinge).loss(routed, f), Shinka().loss(routed, f)
    starved = (P if hinge == "probs" else f) < LISTING / 16
    assert 0 < starved.sum() < 16
    (gradient,) = torch.autograd.grad(own, routed.probs, retain_graph=True)
    through_s = 0.1 * missing_share(P if hinge == "probs" else f, LISTING) * (1 + P.log()) / math.log(16)
    expected = (16 * f + through_s - 0.1 * concentration(P) * starved) / 200
    torch.testing.assert_close(gradient, expected.detach().expand(200, 16), rtol=1e-4, atol=1e-7)
    if hinge == "straight_through":
        torch.testing.assert_close(own, paper, msg="its value is the paper's")


@pytest.mark.parametrize("wrong", [{"threshold": 64.0}, {"threshold": -1.0}, {"hinge": "count"}])
def test_shinka_refuses(wrong):
    with pytest.raises(ConfigError, match="must lie in 0..1|did you mean 'counts'"):
        Shinka(**wrong)


# -------------------------------------------------------------------------------------------------------- ModuleFormer


@pytest.mark.parametrize("E", [4, 96])
def test_mutual_information_closed_forms(E):
    """-log E: sure and even. 0: flat, or one expert for all. Between: -log 2 when two experts share all tokens."""
    even = torch.eye(E).repeat(3, 1)
    assert mutual_information_loss(even).item() == pytest.approx(-math.log(E), rel=1e-5)
    assert mutual_information_loss(torch.full((9, E), 1 / E)).item() == pytest.approx(0, abs=1e-5)
    assert mutual_information_loss(torch.eye(E)[:1].repeat(9, 1)).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information_loss(torch.eye(E)[:2].repeat(9, 1)).item() == pytest.approx(-math.log(2), rel=1e-5)


def test_mutual_information_of_token_and_expert_written_out():
    """sum over pairs of p(t, e) log p(t, e) / (p(t) p(e)), with p(t) = 1 / T."""
    p = skewed(5, 7).detach().softmax(-1).double()
    joint, marginal = p / 7, p.mean(0)
    information = sum(float(q * (q / (m / 7)).log()) for row in joint for q, m in zip(row, marginal, strict=True))
    assert mutual_information_loss(p).item() == pytest.approx(-information, rel=1e-9)


def test_gradient_of_mutual_information():
    """d/dp_te = (log P_e - log p_te) / T: nothing is counted, so tokens are pushed apart directly."""
    probs = skewed().softmax(-1)
    (gradient,) = torch.autograd.grad(mutual_information_loss(probs), probs)
    torch.testing.assert_close(gradient, (probs.mean(0).log() - probs.log()).detach() / 200, rtol=1e-4, atol=1e-8)


def test_probabilities_that_underflow_have_a_finite_gradient():
    for own in (MutualInformation(), Shinka()):
        logits = sure(torch.zeros(9, dtype=torch.int64), 4).float().requires_grad_()
        (gradient,) = torch.autograd.grad(own.loss(*routing(logits)), logits)
        assert gradient.isfinite().all()


def test_minimising_it_makes_tokens_sure_and_experts_even():
    """Not perfectly even: a token that is sure has no gradient left, whoever has too many."""
    torch.manual_seed(0)
    logits = (0.1 * torch.randn(64, 8) + torch.linspace(0, 1, 8)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = mutual_information_loss(logits.softmax(-1))
        loss.backward()
        optimizer.step()
    assert logits.softmax(-1).amax(1).min() > 0.95
    assert -math.log(8) <= loss.item() < 0.97 * -math.log(8)


# ------------------------------------------------------------------------------------------------------------- by name


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
