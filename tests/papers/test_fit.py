"""A balancer and the parts beside it: pairs that would learn something else are refused, in a sentence, before any work."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import tiny
import torch
from samples import NET
from test_all import class_of

from sigma_lite import cli
from sigma_lite.balance.balancer import Balancer, GlobalLBL, WithBias
from sigma_lite.balance.losses import expert_counts, load_balancing_loss, load_share
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.balance.scale_free import ScaleFreeLBL
from sigma_lite.config import BalanceConfig, ConfigError, SparsityConfig
from sigma_lite.convert.stored import KeptRouter
from sigma_lite.identity import identify
from sigma_lite.lab import EXPERIMENTS
from sigma_lite.model import Parts, Router, Routing
from sigma_lite.papers.adamoe import NullLBL, NullRouter, null_load_balancing_loss
from sigma_lite.papers.alf import QuantileBalancing
from sigma_lite.papers.base import Assigned
from sigma_lite.papers.choice import ExpertChoice
from sigma_lite.papers.deepseek_v4 import SqrtSoftplus
from sigma_lite.papers.hash import Hashed
from sigma_lite.papers.kmeans import OnlineKMeans
from sigma_lite.papers.latency import LatencyCV, LatencyLBL, Mixed
from sigma_lite.papers.latent import Latent
from sigma_lite.papers.moduleformer import MutualInformation
from sigma_lite.papers.moge import Grouped
from sigma_lite.papers.remoe import L1, ReLURouter
from sigma_lite.papers.rounding import Rounded
from sigma_lite.papers.shinka import Shinka
from sigma_lite.papers.simbal import SimBal, WithRows
from sigma_lite.papers.smebu import SMEBU
from sigma_lite.papers.threshold import Above, Thresholds
from sigma_lite.runfile import load_run, overlay
from sigma_lite.train.module import SigmaLit


def module(own=None, balance: BalanceConfig = BalanceConfig(), net=NET, **parts) -> SigmaLit:  # noqa: B008
    return SigmaLit(net, balance=balance, custom_balance=own, parts=Parts(**parts))


def some(cls: type, **settings) -> functools.partial:
    return functools.partial(cls, **settings)


BIAS = BalanceConfig(loss="none", bias="sign")
DIVIDES = dataclasses.replace(NET, renormalise=True)
REFUSED = {
    "null experts and the default": ({"router": NullRouter}, "GlobalLBL.. does not see the 8 null experts of NullRouter"),
    "null experts and a bias": ({"router": NullRouter, "balance": BIAS}, "does not see the 8 null experts"),
    "null experts and a paper": ({"router": NullRouter, "own": Shinka()}, "custom_balance: sigma_lite.papers.adamoe.N"),
    "null experts, SMEBU": ({"router": NullRouter, "own": SMEBU()}, "learn to choose nothing"),
    "other nulls": ({"router": some(NullRouter, nulls=16), "own": NullLBL()}, "NullLBL.nulls=8. beside .* with 16 null"),
    "no nulls": ({"own": NullLBL()}, "beside a Router with 0 null experts: give both the same number"),
    "null experts, both": ({"router": NullRouter, "own": WithBias(NullLBL(), "sign")}, "does not see the 8 null experts"),
    "ReLU and the default": ({"router": ReLURouter}, "half of all experts .*papers.remoe.L1"),
    "ReLU and no loss": ({"router": ReLURouter, "balance": BalanceConfig(weight=0.0)}, "Balancer.. does not thin out"),
    "L1 of a softmax": ({"own": L1(4)}, "no gates of Router: set model.parts.router: sigma_lite.papers.remoe.ReLURouter"),
    "L1 and another K": ({"router": ReLURouter, "own": L1()}, "L1.k=1.0. beside net.top_k=4"),
    "thresholds of nobody": ({"router": Above, "balance": BIAS}, "sets no thresholds"),
    "thresholds as a bias": ({"own": Thresholds(4)}, "no bias for the top K of Router: set model.parts.router"),
    "thresholds of another K": ({"router": Above, "own": Thresholds()}, "Thresholds.k=1. beside net.top_k=4"),
    "rows that nobody shows": ({"own": SimBal()}, "set model.parts.router: sigma_lite.papers.simbal.WithRows"),
    "rows inside": ({"own": WithBias(SimBal(), "sign")}, "SimBal sees the router's rows"),
    "quantiles of groups": ({"router": Grouped, "own": QuantileBalancing()}, "Grouped chooses in another way"),
    "quantiles of assignments": ({"router": Assigned, "own": QuantileBalancing()}, "Assigned chooses in another way"),
    "quantiles of rounded loads": ({"router": Rounded, "own": QuantileBalancing()}, "Rounded chooses in another way"),
    "quantiles of other scores": ({"router": SqrtSoftplus, "own": QuantileBalancing()}, "by, which is sqrt-softplus"),
    "quantiles of sigmoids": ({"own": QuantileBalancing("sigmoid")}, "is not what Router chooses by, which is softmax"),
    "quantiles of divided gates": ({"net": DIVIDES, "own": QuantileBalancing()}, "set net.renormalise=false"),
    "unequal kinds": ({"experts": some(Mixed, full=2), "own": LatencyLBL()}, r"Mixed has kinds of \[2, 6\] experts"),
    "three kinds": ({"experts": Mixed, "own": LatencyCV((3, 2, 1, 1))}, r"4 kinds .* Mixed has kinds of \[4, 4\]"),
    "kinds that do not divide": ({"own": LatencyLBL((3, 2, 1))}, "3 kinds do not divide 8 experts"),
    "a bias on tokens' places": ({"router": ExpertChoice, "balance": BIAS}, "moves? a bias that changes no choice"),
    "logits of minus infinity": ({"router": some(KeptRouter, kept=[8, 4]), "own": ScaleFreeLBL()}, "mean and the spread"),
    "the same and a bias": (
        {"router": some(KeptRouter, kept=[8, 4]), "own": WithBias(ScaleFreeLBL(), "sign")}, "set balance.loss: global"
    ),
    "a bias on an assignment": ({"router": Assigned, "balance": BIAS}, "evens loads out whatever the bias is"),
    "a bias where experts are missing": ({"router": some(KeptRouter, kept=[8, 4]), "balance": BIAS}, "this layer has 4"),
    "a bias on a hash": ({"router": Hashed, "own": SMEBU()}, "the token's id decides"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_pair_that_would_learn_something_else_is_refused(name):
    given, sentence = REFUSED[name]
    with pytest.raises(ConfigError, match=sentence):
        module(**given).require_fit()


class Mine(Balancer):
    """Of a reader."""


class MyNulls(NullRouter):
    """Of a reader too."""


@pytest.mark.parametrize("given", [
    {"router": some(NullRouter, nulls=3), "own": NullLBL(3)},
    {"router": NullRouter, "balance": BalanceConfig(loss="none")},
    {"router": NullRouter, "balance": BalanceConfig(weight=0.0)},
    {"router": NullRouter, "own": MutualInformation()},
    {"router": some(NullRouter, nulls=0)},
    {"router": NullRouter, "own": Mine()},
    {"router": NullRouter, "own": lambda routing, f_E: routing.probs.sum()},
    {"router": MyNulls, "own": NullLBL()},
    {"router": ReLURouter, "own": L1(4)},
    {"router": ReLURouter, "own": L1(3.5)},
    {"router": Above, "own": Thresholds(4)},
    {"router": WithRows, "own": WithBias(SimBal(), "sign")},
    {"own": QuantileBalancing()},
    {"router": OnlineKMeans, "balance": BIAS},
    {"router": Grouped, "balance": BIAS},
    {"router": Rounded, "balance": BIAS},
    {"router": ExpertChoice},
    {"experts": Mixed, "own": LatencyLBL()},
    {"own": LatencyLBL((3, 2, 1, 1))},
])  # fmt: skip
def test_pairs_that_work_are_taken(given):
    module(**given).require_fit()


def test_every_arm_of_the_lab_fits():
    """All recorded experiments can be made again."""
    seen = set()
    for experiment in EXPERIMENTS.values():
        for arm in experiment.arms:
            model = arm.patch.get("model", {})
            if not model.keys() & {"parts", "custom_balance"} or arm.name in seen:
                continue
            seen.add(arm.name)
            net = {"n_experts": 96, "n_heads": 2}
            patch = {"model": {key: value for key, value in model.items() if key != "sparsity"}}
            run = load_run([], overlay(tiny.settings(model__sparsity=None, model__net=net), patch))
            own = run.custom_balance
            if isinstance(own, dict):
                own = class_of(own["class_path"])(**own.get("init_args", {}))
            SigmaLit(run.net, balance=run.balance, custom_balance=own, parts=run.parts).require_fit()
    assert len(seen) > 25


def test_asking_changes_no_random_number_and_no_fingerprint():
    """What begins a run stays the same to the bit; and a refusal that is reworded makes no other run of an old one."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    module(NullLBL(), router=NullRouter).require_fit()
    assert torch.equal(torch.get_rng_state(), before)

    def reworded(self, balancer: object) -> None:
        raise ConfigError("another sentence")

    was = identify(NullRouter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NullRouter, "must_fit", reworded)
        assert identify(NullRouter) == was


def test_a_part_that_cannot_be_made_without_memory_is_asked_when_there_is_a_model():
    """A reader's router that looks at its numbers while it is made."""

    class Looks(ReLURouter):
        def __init__(self, config):
            super().__init__(config)
            self.first = float(torch.zeros(1).sum())

    made = module(router=Looks)
    made.configure_model()
    with pytest.raises(ConfigError, match="half of all experts"):
        made.require_fit()


def test_fit_refuses_it_before_the_data_is_looked_at(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parts = {"router": "sigma_lite.papers.adamoe.NullRouter"}
    tiny.write_config(tmp_path, model__parts=parts, model__sparsity=None, model__net__top_k=2, data__corpus__path="nowhere")
    assert tiny.refused(cli.main, "fit", "-c", "tiny.yaml") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sigma-lite: GlobalLBL() does not see the 8 null experts") and "\n" not in error
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]


# ------------------------------------------------------------------------------------------------------------ why it is so


def test_a_loss_of_counts_is_least_where_nothing_works():
    """All probability on 8 null columns: the usual loss is 0, which balance cannot reach; 8 of 16 nulls taken for experts
    give 0 as well. With the right number it costs (n + m) / m."""
    for m in (8, 16):
        probs = torch.zeros(30, 8 + m)
        probs[:, 8 : 8 + 8] = 1 / 8
        nobody = torch.full((30, 1), -1)
        f_E = load_share(PooledCounts().add(expert_counts(nobody, 8 + m)[None])[0])
        assert load_balancing_loss(probs, nobody, f_E) == GlobalLBL().loss(routing(probs, nobody), f_E) == 0
        assert null_load_balancing_loss(probs, nobody, m).item() == pytest.approx((8 + m) / m)
        if m == 16:
            assert null_load_balancing_loss(probs, nobody, 8).item() == 0


def routing(probs: torch.Tensor, ids: torch.Tensor) -> Routing:
    return Routing(probs, ids, torch.zeros_like(ids, dtype=torch.float32), probs.log())


def test_the_usual_router_fits_whatever_the_settings_name():
    for loss in ("global", "micro", "sequence", "top1", "none"):
        for bias in ("none", "sign", "proportional"):
            module(balance=BalanceConfig(loss=loss, bias=bias), router=some(Router)).require_fit()


HEADS = {
    "thresholds": ({"router": Above, "own": Thresholds(4)}, (8,), "thresholds decide"),
    "ReLUs": ({"router": ReLURouter, "own": L1(4)}, (8,), "ReLUs decide"),
    "a norm after one gate": ({"experts": Latent}, (1,), "keep_scale: true"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_a_part_cannot_follow_is_refused_before_any_step(name):
    given, head, sentence = HEADS[name]
    module(**given).configure_model()
    own, parts = given.get("own"), Parts(**{name: part for name, part in given.items() if name != "own"})
    run = SigmaLit(NET, sparsity=SparsityConfig(head=head, switch_step=3), custom_balance=own, parts=parts)
    with pytest.raises(ConfigError, match=sentence):
        run.configure_model()
