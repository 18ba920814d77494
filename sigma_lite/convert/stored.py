"""Experts that are kept in fewer bytes than they are multiplied with, and layers that have fewer of them.

Each is a part that a yaml can name. What a class keeps says how many bytes it takes; `weights` says what is multiplied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sigma_lite.balance.balancer import Balancer, WithBias, moves_after_a_step
from sigma_lite.balance.scale_free import ScaleFreeLBL
from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Router, Routing
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.experts import Experts
from sigma_lite.model.weights import into_stream, passing
from sigma_lite.serve.quantised import dequantise, quantise

BITS = (4, 8, 16)


def packed(integers: Tensor) -> Tensor:
    """Two numbers of -8 .. 7 in a byte: uint8 [..., C / 2], the even ones in the low half."""
    low, high = ((integers[..., place::2] & 15).to(torch.uint8) for place in (0, 1))
    return low | high << 4


def unpacked(bytes_: Tensor) -> Tensor:
    """int8 of twice as many columns."""
    halves = torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(-2).to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


class Quantised(Experts):
    """Experts in integers of 8 or 4 bits with a scale for each row, or in bfloat16. They do not learn; the rest may.

    Args:
        bits: 16 (bfloat16), 8, or 4, of which two share a byte.
        group: numbers of a row that share a scale; 0: the whole row.
    """

    assumes = Assumes(parameters="none; experts are constants")

    def __init__(self, config: ModelConfig, bits: int = 8, group: int = 0):
        super().__init__(config)
        require(bits in BITS, f"bits={bits}: choose from {', '.join(map(str, BITS))}")
        self.bits, self.group = bits, group
        weights = {name: getattr(self, name).detach() for name in ("w13", "w2")}
        self.own_weights = {}
        for name, weight in weights.items():
            fits = weight.shape[2] % (group or 1) == 0 and (bits != 4 or weight.shape[2] % 2 == 0)
            require(fits, f"group={group}: must divide the rows of {name}, which have {weight.shape[2]} numbers")
            delattr(self, name)
            self._register(name, torch.zeros(weight.shape, device=weight.device))

    def _register(self, name: str, weight: Tensor) -> None:
        for buffer, value in self._kept(name, weight).items():
            self.register_buffer(buffer, value)

    def _kept(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        if self.bits == 16:
            return {f"{name}_q": weight.bfloat16()}
        integers, scale = quantise(weight, self.bits, self.group)
        return {f"{name}_q": packed(integers) if self.bits == 4 else integers, f"{name}_scale": scale}

    def keep(self, w13: Tensor, w2: Tensor) -> None:
        """Take these weights, rounded."""
        for name, weight in (("w13", w13), ("w2", w2)):
            for buffer, value in self._kept(name, weight).items():
                getattr(self, buffer).copy_(value)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self._back("w13"), self._back("w2")

    def active_parameters(self, k: int) -> int:
        """Numbers of k experts as they are multiplied, without scales. They are constants: no parameter is among them."""
        in_one = 2 if self.bits == 4 else 1
        return k * in_one * (self.w13_q[0].numel() + self.w2_q[0].numel())

    def _back(self, name: str) -> Tensor:
        kept = getattr(self, f"{name}_q")
        if self.bits == 16:
            return kept.float()
        return dequantise(unpacked(kept) if self.bits == 4 else kept, getattr(self, f"{name}_scale"))


class LowRank(Experts):
    """Each matrix of an expert as a product of two thin ones, which learn.

    Args:
        rank: of both matrices. Saves where rank < rows x columns / (rows + columns).
    """

    assumes = Assumes(parameters="two thin matrices instead of each wide one")

    def __init__(self, config: ModelConfig, rank: int = 16):
        super().__init__(config)
        E, F2, D = self.w13.shape
        require(1 <= rank <= min(D, F2 // 2), f"rank={rank}: must lie in 1..{min(D, F2 // 2)}, the lesser of both widths")
        del self.w13, self.w2
        shapes = {"w13_left": (F2, rank), "w13_right": (rank, D), "w2_left": (D, rank), "w2_right": (rank, F2 // 2)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(E, *shape)))
        outer = passing(rank, into_stream(config.n_layers) * config.expert_gain)
        self.own_weights = {"w13_left": passing(rank), "w13_right": passing(D)}
        self.own_weights |= {"w2_left": outer, "w2_right": passing(F2 // 2)}

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.w13_left @ self.w13_right, self.w2_left @ self.w2_right

    @torch.no_grad()
    def keep(self, w13: Tensor, w2: Tensor) -> None:
        """The nearest products, by singular values; each factor gets the root of them."""
        for name, weight in (("w13", w13), ("w2", w2)):
            left, right = getattr(self, f"{name}_left"), getattr(self, f"{name}_right")
            U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
            root = S[:, : left.shape[2]].sqrt()
            left.copy_(U[:, :, : left.shape[2]] * root[:, None])
            right.copy_(root[:, :, None] * V[:, : left.shape[2]])


class Mapped(Experts):
    """Several of a router's experts are one and the same network: fewer are stored than can be chosen.

    Args:
        kept: networks that are stored.
    """

    assumes = Assumes()

    def __init__(self, config: ModelConfig, kept: int):
        require(1 <= kept <= config.n_experts, f"kept={kept}: must lie in 1..n_experts={config.n_experts}")
        super().__init__(dataclasses.replace(config, n_experts=kept, top_k=1, renormalise=False))
        self.register_buffer("place_E", torch.arange(config.n_experts) % kept)  # the network of each expert

    def forward(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return super().forward(x_TD, self.place_E[ids_TK], gates_TK)

    def active_parameters(self, k: int) -> int:
        """Of k experts: a share of what is stored would be of fewer experts than the router has."""
        return k * one_expert(self)


class KeptExperts(Experts):
    """Another number of experts in each layer; `kept` of them in layer l."""

    assumes = Assumes()

    def __init__(self, config: ModelConfig, kept: Sequence[int], layer: int = 0):
        super().__init__(dataclasses.replace(config, n_experts=kept[layer], top_k=1, renormalise=False))

    def active_parameters(self, k: int) -> int:
        """Of k experts: this layer's share of the router's columns says nothing about them."""
        return k * one_expert(self)


def one_expert(experts: Experts) -> int:
    """Parameters of one stored expert."""
    return experts.w13[0].numel() + experts.w2[0].numel()


class KeptRouter(Router):
    """Of `n_experts` columns only the first `kept` of this layer can be chosen, whatever their bias.

    The others have logit -inf and probability 0.
    """

    assumes = Assumes(k="at most the experts of the smallest layer")

    def __init__(self, config: ModelConfig, kept: Sequence[int], layer: int = 0):
        super().__init__(config)
        require(len(kept) == config.n_layers, f"kept={list(kept)}: give one number for each of {config.n_layers} layers")
        low, E = min(kept), config.n_experts
        require(config.top_k <= low and max(kept) <= E, f"kept={list(kept)}: each must lie in {config.top_k}..{E}")
        self.kept, self.least = kept[layer], low

    def routing(self, logits_TE: Tensor) -> Routing:
        return super().routing(self._open(logits_TE))

    def choose(self, scores_TE: Tensor) -> Tensor:
        return super().choose(self._open(scores_TE))

    def _open(self, x_TE: Tensor) -> Tensor:
        """-inf in every column but the first `kept`."""
        outside_E = torch.arange(x_TE.shape[1], device=x_TE.device) >= self.kept
        return x_TE.masked_fill(outside_E, -torch.inf)

    def must_fit(self, balancer: Balancer) -> None:
        inner = balancer.inner if isinstance(balancer, WithBias) else balancer
        require(
            not isinstance(inner, ScaleFreeLBL),
            f"{inner} takes the mean and the spread of logits, and KeptRouter has logits of -inf, for experts that a layer"
            " does not have: set balance.loss: global",
        )
        require(
            self.kept == len(self.weight) or not moves_after_a_step(balancer),
            f"{balancer} compares loads with an even share of {len(self.weight)} experts, and this layer has {self.kept}:"
            " set balance.bias: none, or a balancer of losses only",
        )

    def set_k(self, k: int) -> None:
        require(k <= self.least, f"{k} experts per token: a layer has only {self.least}")
        super().set_k(k)


class Skipping(Router):
    """Choices after the first are dropped where their score is below `beta` times the first one's: 1 .. K are left.

    Scores are without the bias: a bias that is the same for all experts changes nothing.
    """

    leaves_empty = True
    assumes = Assumes(k="2 or more")

    def __init__(self, config: ModelConfig, beta: float = 0.5):
        super().__init__(config)
        require(0 <= beta <= 1, f"beta={beta}: must lie in 0..1; 0 drops nothing, 1 all but the first")
        self.beta = beta

    def choose(self, scores_TE: Tensor) -> Tensor:
        ids_TK = scores_TE.topk(self.top_k, dim=-1).indices
        own_TK = (scores_TE - self.bias).gather(1, ids_TK)
        weak_TK = own_TK < self.beta * own_TK[:, :1]
        weak_TK[:, 0] = False
        return ids_TK.masked_fill(weak_TK, -1)


class TopP(Router):
    """As many experts as it takes for their scores, without the bias, to reach the sum `p`: at least one and at most K."""

    leaves_empty = True
    assumes = Assumes(k="2 or more")

    def __init__(self, config: ModelConfig, p: float = 0.5):
        super().__init__(config)
        require(0 < p <= 1, f"p={p}: must lie in (0, 1]")
        self.p = p

    def choose(self, scores_TE: Tensor) -> Tensor:
        ids_TK = scores_TE.topk(self.top_k, dim=-1).indices
        own_TK = (scores_TE - self.bias).gather(1, ids_TK)
        before_TK = own_TK.cumsum(1) - own_TK
        return ids_TK.masked_fill(before_TK >= self.p, -1)
