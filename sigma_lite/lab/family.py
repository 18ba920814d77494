"""The family: one arm for each paper, all on the same tokens. Adding a paper is one entry of PAPERS.

Every arm is at one expert per token, as Sigma-MoE-Tiny is, unless its paper cannot be: then its name says how many.

The protocol, by which a row may stand beside the others: the scale's model, text, tokens, steps, learning rate and seeds;
only router, experts, attention, dispatch, balancer and their settings may differ. Every arm is compared with BASE over the
same seeds, made on the same machine, by held-out bits per byte at the end; intervals are Student's, 95 %. A change of any
of this is another PROTOCOL, and rows of two protocols are never put together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sigma_lite.lab.experiment import Arm

Named = str | tuple[str, Mapping[str, Any]]
"""A class of sigma_lite.papers, "file.Class", or that and its settings."""
NO_LOSS = {"loss": "none"}
PROTOCOL = "1"
BASE = "LBL, K = 1"


def paper(
    name: str,
    description: str,
    *,
    balancer: Named | None = None,
    balance: Mapping[str, Any] | None = None,
    net: Mapping[str, Any] | None = None,
    **parts: Named,
) -> Arm:
    """An arm of classes of sigma_lite.papers.

    Args:
        balancer: instead of the scale's global-batch LBL.
        balance, net: settings laid over the scale's.
        parts: router, experts or attention, instead of the model's own.
    """
    model: dict[str, Any] = {}
    if balancer is not None:
        model["custom_balance"] = _class(balancer)
    if parts:
        model["parts"] = {part: _class(named) for part, named in parts.items()}
    given = {"balance": balance, "net": net}
    return Arm(name, description, {"model": {**model, **{key: dict(value) for key, value in given.items() if value}}})


def _class(named: Named) -> dict[str, Any]:
    path, settings = (named, {}) if isinstance(named, str) else named
    return {"class_path": f"sigma_lite.papers.{path}", **({"init_args": dict(settings)} if settings else {})}


PAPERS = (
    paper("frozen router", "the usual router whose random weights no step moves: the floor", router="fixed.Frozen"),
    paper("quantile balancing", "a bias at which each expert alone would have its share", balancer="alf.QuantileBalancing"),
    paper(
        "grouped experts, K = 4 in 4 groups",
        "one expert of each group: devices are even by construction, experts are not",
        router=("moge.Grouped", {"groups": 4}),
        net={"top_k": 4},
    ),
    paper(
        "null experts, K = 2 of 96 + 96",
        "half of the choices do nothing: one expert per token on average, more for some",
        router=("adamoe.NullRouter", {"nulls": 96}),
        balancer=("adamoe.NullLBL", {"nulls": 96}),
        net={"top_k": 2},
    ),
    paper("hash routing", "the token's id decides; no router is learned", router="hash.Hashed", balance=NO_LOSS),
    paper(
        "hash routing, experts 96 times smaller at first",
        "as little of the stream as under a router's first gates: a control",
        router="hash.Hashed",
        balance=NO_LOSS,
        net={"expert_gain": 1 / 96},
    ),
    paper(
        "hash routing, gate 1/96",
        "as little of each expert, all through training, as a router that stays unsure: a control",
        router="gates.Small",
        balance=NO_LOSS,
    ),
    paper(
        "LBL, gate 1", "a learned choice whose expert counts in full, as in hash routing: a control", router="gates.Whole"
    ),
    paper(
        "expert choice",
        "each expert takes its best tokens: even, and it sees the future",
        router="choice.ExpertChoice",
        balance=NO_LOSS,
    ),
    paper(
        "Sinkhorn",
        "an even plan for the batch in training, of which each token takes its largest entry; greedy in evaluation",
        router="base.Assigned",
        balance=NO_LOSS,
    ),
    paper(
        "expert threshold",
        "an expert takes what exceeds a running quantile of its scores",
        router="threshold.Above",
        balancer="threshold.Thresholds",
    ),
    paper(
        "SimBal",
        "router rows orthogonal to each other; no loads are seen. With 96 rows of 64 numbers it cannot reach 0",
        router="simbal.WithRows",
        balancer="simbal.SimBal",
    ),
    paper(
        "ReMoE",
        "ReLU gates; a penalty thins them out from half of all experts to one per token on average",
        router="remoe.ReLURouter",
        balancer="remoe.L1",
        balance={"weight": 1.0, "z_weight": 0.0},
    ),
    paper(
        "online K-means",
        "the centroid with the largest cosine; no router is learned",
        router="kmeans.OnlineKMeans",
        balance={"loss": "none", "bias": "sign"},
    ),
    paper(
        "sqrt-softplus scores",
        "scores without an upper end, and a loss-free bias",
        router=("deepseek_v4.SqrtSoftplus", {"renormalise": False}),
        balance={"loss": "none", "bias": "sign"},
    ),
    paper(
        "hashed low layers",
        "the same, but the lowest three layers choose by the token's id",
        router=("deepseek_v4.HashedLow", {"renormalise": False}),
        balance={"loss": "none", "bias": "sign"},
    ),
    paper("shared expert", "one more expert, which every token visits", experts="shared.WithShared"),
    paper(
        "LatentMoE",
        "experts of half the width between two matrices that all share",
        experts=("latent.Latent", {"keep_scale": True}),
    ),
    paper("token rounding", "loads rounded to multiples of 16 in training", router="rounding.Rounded"),
    paper("SMEBU", "a loss-free bias with soft steps and momentum", balancer="smebu.SMEBU"),
    paper(
        "shift experts, balanced by cost",
        "half of the experts have two thirds of the width and weights that are powers of two; a fair share is 40 to 60",
        experts=("latency.Mixed", {"shift_width": 32}),
        balancer=("latency.LatencyLBL", {"latency": [6.0, 4.0]}),
    ),
    paper(
        "stick-breaking heads",
        "attention without positions, whose heads are experts: one of two for each token",
        attention=("moduleformer.StickBreaking", {"chosen": 1}),
    ),
)
