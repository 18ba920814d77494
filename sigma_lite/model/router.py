"""The router: one linear layer and a softmax in FP32. The gate is the probability BEFORE top-k.

Sigma-MoE-Tiny (2512.16248) and every other top-1 model depend on that order. Softmax over the chosen experts only would
make the gate of a single winner exactly 1: a constant, through which the language-model loss cannot reach the router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_lite.config import ModelConfig
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.weights import Weight

TINY = torch.finfo(torch.float32).tiny  # sigmoids of logits below -104 are all 0, and 0 / 0 would be NaN


class Routing(NamedTuple):
    """What a router decided for T tokens. Returned, never stored: losses and metrics are computed at the top."""

    probs: Tensor  # [T, E] fp32 softmax over all experts (or the sigmoids divided by their sum); each row sums to 1
    ids: Tensor  # [T, K] int64 chosen experts, best first; -1: an empty slot, where a router leaves some
    gates: Tensor  # [T, K] fp32 scores of the chosen, in 0..1; not renormalised unless set so: K may change, not their scale
    logits: Tensor  # [T, E] fp32; -inf: an expert that this layer does not have

    def with_tensors(self, **given: Tensor) -> Routing:
        """Another that has these of the four tensors. What a subclass holds besides, such as its name, stays."""
        changed = self._replace(**given)
        for name, value in getattr(self, "__dict__", {}).items():
            setattr(changed, name, value)
        return changed

    def each(self, change: Callable[[Tensor], Tensor]) -> Routing:
        """Another whose four tensors are changed, such as to those of fewer tokens."""
        return self.with_tensors(**{name: change(tensor) for name, tensor in self._asdict().items()})


class NamedRouting(Routing):
    """A routing of what is no expert, such as of attention heads: "layer 3 queries". A subclass says `of` what.

    Layer and kind are no fields: callers take any routing apart into four tensors.
    """

    layer = 0  # the block says it
    of = "heads"

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.of}"


def of_experts(routings: Sequence[Routing]) -> list[Routing]:  # one a layer: [L]
    return [routing for routing in routings if not isinstance(routing, NamedRouting)]


def of_others(routings: Sequence[Routing]) -> list[NamedRouting]:
    return [routing for routing in routings if isinstance(routing, NamedRouting)]


def of_tokens(routings: Sequence[Routing], own_T: Tensor | None) -> Sequence[Routing]:
    """What was decided for some of the tokens, bool [T]; None: for all."""
    return routings if own_T is None else [routing.each(lambda tensor: tensor[own_T]) for routing in routings]


class Router(nn.Module):
    """Score every expert, choose the `top_k` best, and gate them with their scores.

    `top_k` may change between steps (progressive sparsification): the gates keep their scale, no weight changes.
    `bias` decides the choice only, never the gate (loss-free balance, 2408.15664); it has no gradient and is 0 unless a
    balancer moves it. The weight does not decay: that would flatten the logits, which lowers the balancing loss without
    balancing anything.

    Most papers override `choose` alone, some `gate` or `scores` too. A subclass may have more columns than there are
    experts: those from `config.n_experts` on belong to no expert, and the width of a router is that of its `probs`.
    """

    bias: Tensor
    layer = 0  # which layer's router this is; the model says it
    leaves_empty = False  # whether `choose` may return -1: its tokens then go through `dispatch.ragged`
    reads_tokens = False  # whether `forward` takes the tokens' ids as well: forward(x_TD, tokens_T)
    assumes = Assumes()

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.own_weights = {"weight": Weight(config.router_init_std, routes=True)}
        self.register_buffer("bias", torch.zeros(config.n_experts))
        self.top_k, self.score, self.sums_to_one = config.top_k, config.router_score, config.renormalise

    def forward(self, x_TD: Tensor) -> Routing:
        return self.routing(logits_of(x_TD, self.weight))

    def routing(self, logits_TE: Tensor) -> Routing:
        """What follows from the logits: scores, choice, gates."""
        scores_TE = self.scores(logits_TE)
        ids_TK = self.choose(scores_TE.detach() + self.bias)
        probs_TE = scores_TE if self.score == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=TINY)
        return Routing(probs_TE, ids_TK, self.gate(scores_TE, ids_TK), logits_TE)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """What experts are chosen by, and gated with: [T, E] fp32, 0 or more."""
        return logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Experts of each token, int64 [T, K], best first, distinct; -1 for a slot that stays empty, if `leaves_empty`.

        Args:
            scores_TE: scores and bias, without gradient.
        """
        return scores_TE.topk(self.top_k, dim=-1).indices

    def gate(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Weight of each choice, [T, K]: its score without the bias, divided by their sum if so set; 0 for an empty slot."""
        if not self.leaves_empty:
            gates_TK = scores_TE.gather(1, ids_TK)
        else:
            gates_TK = scores_TE.gather(1, ids_TK.clamp(min=0)).where(ids_TK >= 0, 0.0)
        return gates_TK / gates_TK.sum(-1, keepdim=True).clamp(min=TINY) if self.sums_to_one else gates_TK

    def set_k(self, k: int) -> None:
        """Choose `k` experts from now on. A subclass that cannot raises ConfigError."""
        self.top_k = k

    def must_fit(self, balancer: Any) -> None:
        """ConfigError for a balancer beside which this router would learn something else; asked before any work."""


def logits_of(x: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """[..., D] -> [..., E], fp32 under autocast too: bf16 logits would change about 1 % of top-1 choices."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight_ED.float(), bias_E)


def slots(chosen_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """Ids of what each token chose, best first, int64 [T, most that one has, at least 1]; -1 where it has no more."""
    width = max(1, int(chosen_TE.sum(1).max())) if len(chosen_TE) else 1
    ids_TK = scores_TE.masked_fill(~chosen_TE, -torch.inf).topk(width, dim=-1).indices
    return ids_TK.where(chosen_TE.gather(1, ids_TK), -1)
