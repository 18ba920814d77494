"""Dense2MoE (2510.09094): a trained dense model becomes a shared expert and small routed ones, and learns to be as good.

The paper's, for a diffusion transformer: rank hidden units by Taylor importance, give the best to a shared expert, deal the
rest to 12 experts of which 2 work; then distil in three stages: the shared expert alone, the experts and their router with
a balance loss, groups of blocks of which only some run (Mixture of Blocks). Ours: the same for a language model. A unit is a
row of the gate, a row of the up and a column of the down projection of SwiGLU; the loss of calibration is that of language
modelling; the third stage skips single blocks, token by token. All experts, each with gate 1, are the dense layer exactly.
Beside it: upcycling, which copies the whole layer into every expert (2212.05055), and has to make copies differ (Drop-
Upcycling, 2502.19261). Confidence: text about the paper, which agrees in two places; no code of its authors is known.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sigma_lite.config import nearest, require
from sigma_lite.convert.distil import distil
from sigma_lite.convert.rebuild import rebuilt, units
from sigma_lite.data.rows import Batch
from sigma_lite.model import Parts, Routing, Transformer
from sigma_lite.model.dispatch import for_router
from sigma_lite.papers.shared import WithShared

ORDERS = ("taylor", "magnitude", "random")


def taylor_importance(model: Transformer, rows: Sequence[Batch]) -> Tensor:
    """|sum over a unit's weights of w dL/dw|, summed over batches: [L, F], 0 or more. The model is dense and stays as it is.

    To first order, by how much the loss would move if all of the unit's weights shrank by the same small share.
    """
    total = [torch.zeros(block.moe.experts.w2.shape[2]) for block in model.blocks]
    for batch in rows:
        loss, _ = model.loss(batch.ids_BS, batch.targets_BS, documents_BS=batch.documents_BS)
        pairs = [(block.moe.experts.w13, block.moe.experts.w2) for block in model.blocks]
        gradients = torch.autograd.grad(loss, [weight for pair in pairs for weight in pair])
        for layer, (w13, w2) in enumerate(pairs):
            slopes = (units(w[0].detach(), v[0].detach()) for w, v in ((w13, w2), gradients[2 * layer : 2 * layer + 2]))
            w_FU, g_FU = slopes
            total[layer] += (w_FU * g_FU).sum(1).abs()
    return torch.stack(total)


def importance(model: Transformer, rows: Sequence[Batch], by: str, seed: int) -> Tensor:
    """What units are ranked by, [L, F]: Taylor importance, the sum of absolute weights, or numbers drawn with a seed."""
    require(by in ORDERS, f"by={by!r}: {nearest(by, ORDERS)}")
    if by == "taylor":
        require(bool(rows), "by=taylor needs rows to calibrate on")
        return taylor_importance(model, rows)
    weights = [units(b.moe.experts.w13[0], b.moe.experts.w2[0]).detach().abs().sum(1) for b in model.blocks]
    magnitude_LF = torch.stack(weights)
    return magnitude_LF if by == "magnitude" else torch.rand(magnitude_LF.shape, generator=_seeded(seed))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class TaylorSplit:
    """Split every dense feed-forward layer into a shared expert, made of its most important units, and routed ones.

    Every expert has F / (shared + experts) units. Routed experts' outputs are multiplied by their number, since a gate
    begins near 1 / experts: with all of them at work and a flat router the model is the dense one.
    """

    experts: int = 12  # routed ones
    shared: int = 4  # how many experts wide the shared one is
    top_k: int = 2  # of the routed ones, for each token; may change at any time
    by: str = "taylor"  # taylor | magnitude | random: how units are ranked
    seed: int = 0  # of the random ranking and of the router

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        _require_dense(model)
        F, parts = model.config.d_expert, self.experts + self.shared
        for name in ("experts", "shared", "top_k"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        require(
            F % parts == 0, f"d_expert={F} units cannot be dealt to {self.shared} + {self.experts} experts: choose others"
        )
        config = dataclasses.replace(model.config, n_experts=self.experts, d_expert=F // parts, top_k=self.top_k)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            split = rebuilt(model, config, Parts(experts=functools.partial(WithShared, shared=self.shared)))
        for layer, order_F in enumerate(importance(model, rows, self.by, self.seed).argsort(dim=1, descending=True)):
            self._fill(split.blocks[layer].moe.experts, model.blocks[layer].moe.experts, order_F)
        return split

    @torch.no_grad()
    def _fill(self, split: WithShared, dense: nn.Module, order_F: Tensor) -> None:
        (w13_XD,), (w2_DF,) = dense.w13, dense.w2
        gate_FD, up_FD = w13_XD.chunk(2)
        first = len(order_F) * self.shared // (self.shared + self.experts)
        dealt_EF = order_F[first:].view(-1, self.experts).T  # in turn, so that experts begin equally important
        for target, own_EF, scale in ((split.shared, order_F[None, :first], 1), (split.routed, dealt_EF, self.experts)):
            target.w13.copy_(torch.cat([gate_FD[own_EF], up_FD[own_EF]], 1))
            target.w2.copy_(w2_DF[:, own_EF].transpose(0, 1) * scale)


def _require_dense(model: Transformer) -> None:
    E, own = model.config.n_experts, ", ".join(model.parts.custom)
    require(E == 1 and not own, f"only a dense model can be split, this one has {own or f'{E} experts'}: give n_experts=1")


def set_k(model: Transformer, k: int) -> None:
    """Routed experts per token from now on, in every layer; 0: the shared expert works alone."""
    most = model.config.n_experts
    require(0 <= k <= most, f"k={k}: must lie in 0..{most}")
    for block in model.blocks:
        block.moe.router.set_k(k)
        block.moe.dispatch = (model.parts.dispatch or for_router(block.moe.router)) if k else nowhere


def nowhere(x_TD: Tensor, routing: Routing, experts: nn.Module) -> Tensor:
    """A dispatch that asks no expert: not every kernel takes tokens that have chosen none."""
    return torch.zeros_like(x_TD)


@dataclass(frozen=True)
class Dense2MoE(TaylorSplit):
    """Split, then distil from the dense model: first the shared experts alone, then routed experts and routers.

    Every step takes a batch of the rows that the surgery is given, in turn.
    """

    shared_steps: int = 40  # of the first stage
    routed_steps: int = 80  # of the second
    lr: float = 1e-3
    balance: float = 1e-2  # weight of the layers' mean LBL

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        split = super().__call__(model, rows)
        experts = [block.moe.experts for block in split.blocks]
        set_k(split, 0)
        distil(split, model, rows, self.shared_steps, learns=_weights(e.shared for e in experts), lr=self.lr)
        set_k(split, self.top_k)
        learns = _weights([*(e.routed for e in experts), *(block.moe.router for block in split.blocks)])
        distil(split, model, rows, self.routed_steps, learns=learns, lr=self.lr, balance=self.balance)
        return split


def _weights(modules) -> list[nn.Parameter]:
    return [weight for module in modules for weight in module.parameters()]


@dataclass(frozen=True)
class Upcycle:
    """Every expert begins as a copy of the dense layer; a share of its units is drawn anew, or copies would stay equal.

    With `fresh=0` all experts are the same network: what a router does cannot matter, and its gradient through the choice
    is 0. Gates are divided by their sum, so that the model begins as the dense one; for `top_k=1` that cannot be, and w2 is
    multiplied by the number of experts instead.
    """

    experts: int = 8
    top_k: int = 2
    fresh: float = (
        0.5  # share of each expert's units that begin anew: from normal numbers of the layer's own mean and spread
    )
    seed: int = 0

    def __call__(self, model: Transformer, rows: Sequence[Batch]) -> Transformer:
        _require_dense(model)
        require(0 <= self.fresh <= 1, f"fresh={self.fresh}: must lie in 0..1")
        shares = {"n_experts": self.experts, "top_k": self.top_k, "renormalise": self.top_k > 1}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            many = rebuilt(model, dataclasses.replace(model.config, **shares))
        generator = _seeded(self.seed)
        with torch.no_grad():
            for block, old in zip(many.blocks, model.blocks, strict=True):
                for expert in range(self.experts):
                    self._copy(block.moe.experts, old.moe.experts, expert, generator)
        return many

    def _copy(self, new: nn.Module, old: nn.Module, expert: int, generator: torch.Generator) -> None:
        w13_XD, w2_DF = old.w13[0].clone(), old.w2[0].clone()
        F = w2_DF.shape[1]
        drawn = torch.randperm(F, generator=generator)[: round(self.fresh * F)]
        for weight in (w13_XD[:F], w13_XD[F:], w2_DF.T):
            mean, std = weight.mean(), weight.std()
            weight[drawn] = torch.randn(len(drawn), weight.shape[1], generator=generator) * std + mean
        new.w13[expert].copy_(w13_XD)
        new.w2[expert].copy_(w2_DF * (1 if self.top_k > 1 else self.experts))
