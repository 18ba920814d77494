"""ModuleFormer (2306.04640): balance by mutual information, without counting; stick-breaking attention with head experts.

The paper's: both, new modules for new text while old ones stay as they are, and load concentration before pruning. Ours:
what the docstrings below call ours. Confidence: the code of the loss and of the attention was read; of growing and pruning
there is text only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_lite.balance.balancer import Balancer
from sigma_lite.balance.losses import mean_over_tokens
from sigma_lite.balance.metrics import entropy
from sigma_lite.config import ModelConfig, require
from sigma_lite.convert.distil import descend
from sigma_lite.convert.rebuild import rebuilt
from sigma_lite.convert.stored import one_expert
from sigma_lite.data.rows import Batch
from sigma_lite.model import KeyValueCache, NamedRouting, Router, Routing, Transformer, of_tokens
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.experts import Experts
from sigma_lite.model.rotary import Rotation
from sigma_lite.model.router import logits_of
from sigma_lite.model.weights import Weight, into_stream, passing
from sigma_lite.papers.compression import Prune


def mutual_information_loss(probs_TE: Tensor) -> Tensor:
    """mean_t H(p_t) - H(mean_t p_t) = -I(token; expert), in nats (2306.04640; `MI loss` of its code).

    The first term asks each token to be sure, the second asks all tokens together to use every expert. Nothing is counted,
    so the whole loss has a gradient; but it sees no loads either, only probabilities.

    Args:
        probs_TE: probabilities over all experts, [T, E].

    Returns: scalar in -log E .. 0. Sure and even: -log E. Flat for each token, or all sure of the same expert: 0.
    """
    each = entropy(probs_TE).sum() / max(len(probs_TE), 1)
    return each - entropy(mean_over_tokens(probs_TE))


class MutualInformation(Balancer):
    """`mutual_information_loss` of each layer and micro-batch. The marginal is the micro-batch's own: f is not used."""

    assumes = Assumes()

    def loss(self, routing: Routing, f_E: Tensor) -> Tensor:
        return mutual_information_loss(routing.probs)


def stick_breaking(logits_BHQK: Tensor, visible: Tensor) -> Tensor:
    """Attention weights a_qj = sigmoid(z_qj) prod_{j < l <= q} (1 - sigmoid(z_ql)), [B, H, Q, K].

    Read from the present backwards: each key breaks a piece off what is left of a stick of length 1. So a row sums to at
    most 1, the nearest fitting key gets most, and no positions have to be told.

    Args:
        logits_BHQK: z.
        visible: bool, to be spread over [B, H, Q, K]: keys that a query may see, itself the last of them.
    """
    left = F.logsigmoid(-logits_BHQK).masked_fill(~visible, 0.0)  # log of what a key leaves of the stick
    later = F.pad(left.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))  # of the keys behind j, up to the query
    return (F.logsigmoid(logits_BHQK) + later).exp().masked_fill(~visible, 0.0)


class StickBreaking(nn.Module):
    """Stick-breaking attention whose heads are experts: each token chooses some query heads; all share the key heads.

    A head has its own query and output matrix, which is ModuleFormer's attention module; a head that was not chosen has
    gate 0. Ours: all heads are computed and then gated, so nothing is saved; the choice is the attention's own, and no
    balance loss sees it; the paper's sums over attention and feed-forward modules. Gates are the softmax over all heads.

    Args:
        chosen: heads of each token; None: all, ungated.
    """

    assumes = Assumes(parameters="a router over heads, if they are chosen")

    def __init__(self, config: ModelConfig, chosen: int | None = None):
        super().__init__()
        D, H, G, C = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        require(chosen is None or 1 <= chosen <= H, f"chosen={chosen}: must lie in 1..{H}, the number of query heads")
        self.head_dim, self.chosen = C, chosen
        self.query, self.out = nn.Linear(D, H * C, bias=False), nn.Linear(H * C, D, bias=False)
        self.key, self.value = nn.Linear(D, G * C, bias=False), nn.Linear(D, G * C, bias=False)
        self.own_weights = {f"{name}.weight": passing(D) for name in ("query", "key", "value")}
        self.own_weights["out.weight"] = passing(H * C, into_stream(config.n_layers))
        if chosen is not None:
            self.router = nn.Linear(D, H, bias=False)
            self.own_weights["router.weight"] = Weight(config.router_init_std, routes=True)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, mask_BSS: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """As `Attention`; `rotation` is not used: nearer keys come first by themselves."""
        q, k, v = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if cache is not None:
            k, v = cache.append(k, v)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        if mask_BSS is None:
            mask_BSS = torch.ones(1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        logits = (q @ k.transpose(-1, -2)).float() / self.head_dim**0.5
        y_BHSC = stick_breaking(logits, mask_BSS[:, None]).to(v.dtype) @ v
        if self.chosen is not None:
            y_BHSC = y_BHSC * self.gates(x_BSD).transpose(1, 2)[..., None].to(v.dtype)
        return self.out(y_BHSC.transpose(1, 2).flatten(2))

    def gates(self, x_BSD: Tensor) -> Tensor:
        """[B, S, H] fp32: the softmax over heads, 0 outside of the `chosen` best."""
        probs_BSH = logits_of(x_BSD, self.router.weight).softmax(-1)
        best = probs_BSH.topk(self.chosen or 1, dim=-1)
        return torch.zeros_like(probs_BSH).scatter(-1, best.indices, best.values)


class Queries(NamedRouting):
    """Which query heads each token chose."""

    of = "queries"


class HeadExperts(StickBreaking):
    """The same, and the choice of heads is a routing as that of experts is: "layer 3 queries".

    Balance losses then sum over attention and feed-forward choices, as the paper's does, and the diary holds the heads'
    loads. What moves a bias still moves the experts' routers only.
    """

    def __init__(self, config: ModelConfig, chosen: int = 1):
        super().__init__(config, chosen)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, mask_BSS: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Queries]:
        """As `StickBreaking`, and who chose which heads."""
        logits_TH = logits_of(x_BSD, self.router.weight).flatten(0, 1)
        probs_TH = logits_TH.softmax(-1)
        best = probs_TH.topk(self.chosen, dim=-1)
        heads = Queries(probs_TH, best.indices, best.values, logits_TH)
        return super().forward(x_BSD, rotation, mask_BSS, cache), heads


def load_concentration_loss(probs_TE: Tensor) -> Tensor:
    """H(mean_t p_t): minimised, few experts do the work and the others can be pruned, 0 .. log E.

    The paper's load concentration, before it prunes for a task. Its equation was not to be had: this form is ours.
    """
    return entropy(mean_over_tokens(probs_TE))


# ------------------------------------------------------------------------------------------------ new and fewer modules


class GrownExperts(Experts):
    """The first `old` experts are constants; those behind them learn."""

    assumes = Assumes(parameters="none for old experts")

    def __init__(self, config: ModelConfig, old: int):
        require(1 <= old < config.n_experts, f"old={old}: must lie in 1..{config.n_experts - 1}, so that some are new")
        super().__init__(dataclasses.replace(config, n_experts=old, top_k=1, renormalise=False))
        for name in ("w13", "w2"):
            weight = getattr(self, name).requires_grad_(False)
            self.register_parameter(f"new_{name}", nn.Parameter(weight.new_empty(config.n_experts - old, *weight.shape[1:])))
            self.own_weights[f"new_{name}"] = self.own_weights[name]

    def weights(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.w13, self.new_w13]), torch.cat([self.w2, self.new_w2])

    def active_parameters(self, k: int) -> int:
        """Of k experts, old or new."""
        return k * one_expert(self)


class GrownRouter(Router):
    """The same for a router's rows."""

    assumes = Assumes(parameters="none for old rows")

    def __init__(self, config: ModelConfig, old: int):
        super().__init__(config)
        E, D = self.weight.shape
        self.weight = nn.Parameter(self.weight.new_empty(old, D), requires_grad=False)
        self.new_weight = nn.Parameter(self.weight.new_empty(E - old, D))
        self.own_weights["new_weight"] = self.own_weights["weight"]

    def forward(self, x_TD: Tensor) -> Routing:
        return self.routing(logits_of(x_TD, torch.cat([self.weight, self.new_weight])))


@dataclass(frozen=True)
class Grow:
    """New experts beside the old ones of each layer, which stay as they are, as do their router rows.

    For text of another kind: what the model knows lies in weights that no step moves. Attention and embedding learn on when
    the new run is trained; `new_weights` are those that the paper trains. New rows begin as a router's do.
    """

    experts: int = 8  # that are added to each layer
    seed: int = 0

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        own, old = ", ".join({"router", "experts"} & set(model.parts.custom)), model.config.n_experts
        require(not own, f"this model has its own {own}: only usual experts behind a usual router can have new ones beside")
        require(self.experts >= 1, f"experts={self.experts}: must be at least 1")
        router, experts = (functools.partial(part, old=old) for part in (GrownRouter, GrownExperts))
        parts = dataclasses.replace(model.parts, router=router, experts=experts)
        config = dataclasses.replace(model.config, n_experts=old + self.experts)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            grown = rebuilt(model, config, parts)
        for block, was in zip(grown.blocks, model.blocks, strict=True):
            block.moe.router.bias[:old] = was.moe.router.bias
        return grown


def new_weights(model: Transformer) -> list[nn.Parameter]:
    """Of the modules that `Grow` has added."""
    return [weight for name, weight in model.named_parameters() if name.rpartition(".")[2].startswith("new_")]


@dataclass(frozen=True)
class Concentrate:
    """Train routers and experts on the rows so that few experts serve them, then prune the rest.

    Language-model loss plus `weight` times the layers' mean `load_concentration_loss`; then as papers.compression.Prune.
    """

    keep: float = 0.5  # share of each layer's experts that stay
    weight: float = 0.1
    steps: int = 40
    lr: float = 1e-3

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        require(self.weight >= 0, f"weight={self.weight}: must be 0 or more")
        few = rebuilt(model)

        def loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
            lm, routings = few.loss(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
            probs = [routing.probs for routing in of_tokens(routings, batch.own_T)]
            return lm + self.weight * torch.stack([load_concentration_loss(of_layer) for of_layer in probs]).mean(), lm

        learns = [weight for block in few.blocks for weight in block.moe.parameters() if weight.requires_grad]
        descend(few, rows, self.steps, loss_of, learns=learns, lr=self.lr)
        return Prune(self.keep)(few, rows) if self.keep < 1 else few
