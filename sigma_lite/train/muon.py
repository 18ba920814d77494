"""Muon (Keller Jordan, 2024; at scale: 2502.16982): the update of a matrix is its momentum with all singular values near 1.

torch.optim.Muon (torch 2.13) takes matrices only: it refuses the experts' [E, M, N], of which each slice is a matrix of its
own, it has no rule for embeddings, norms and routers, and it would orthogonalise each rank's piece of a sharded matrix. The
iteration here is the same, over all experts at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's: steep at 0, so that 5 iterations are enough


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with `matrices`, AdamW for all others. The learning rate means the same for both.

    A matrix's update has the root mean square of AdamW's (0.2 times the rate, 2502.16982), so a rate tuned for AdamW is a
    start. An expert that got no token has no gradient and moves by its momentum; one that got a single token moves as far
    as any other, because its update has the same size. Gate and up projection of an expert are one matrix here, as they
    are stored.

    Args:
        params: groups of parameters, as `parameter_groups` makes them.
        momentum: share of the running sum of gradients that stays after each step.
        nesterov: look ahead: use gradient + momentum * sum in the place of the sum.
        iterations: Newton-Schulz steps; after 5, singular values lie in 0.65..1.2, but the smallest stay smaller.
        dtype: in which these are done; float32 for a reference.
        adamw: lr, weight_decay, betas, eps: see torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Any,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        dtype: str = "bfloat16",
        **adamw: Any,
    ):
        if not 0 <= momentum < 1 or iterations < 1 or dtype not in ("bfloat16", "float32"):
            raise ValueError(
                f"momentum={momentum}, iterations={iterations}, dtype={dtype!r}: give momentum in [0, 1), at least one"
                " iteration, and bfloat16 or float32"
            )
        super().__init__(params, **adamw)
        self.momentum, self.nesterov, self.iterations, self.dtype = momentum, nesterov, iterations, getattr(torch, dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, p.grad) for group in self.param_groups if group.get("matrices") for p in self._move(group)]
        for parameter, _ in moved:
            parameter.grad = None  # AdamW passes over it
        super().step()
        for parameter, gradient in moved:
            parameter.grad = gradient
        return loss

    def _move(self, group: dict[str, Any]) -> list[Tensor]:
        """One step of the group's parameters; returns those that had a gradient."""
        moved = [p for p in group["params"] if p.grad is not None]
        for parameter in moved:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW looks for one when a state is loaded
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            average = state["momentum_buffer"].lerp_(parameter.grad, 1 - self.momentum)
            update = torch.lerp(parameter.grad, average, self.momentum) if self.nesterov else average
            rows, columns = parameter.shape[-2:]
            update = whole_matrices(update, lambda g: orthogonalised(g, self.iterations, self.dtype).to(g.dtype))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)
        return moved


def orthogonalised(g_XMN: Tensor, iterations: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """U V^T of each matrix U S V^T, approximately: singular values near 1, where S is not 0. [M, N] or [E, M, N].

    Newton-Schulz: x -> a x + (b x x^T + c (x x^T)^2) x acts on the singular values alone.
    """
    a, b, c = COEFFICIENTS
    tall = g_XMN.shape[-2] > g_XMN.shape[-1]
    x = (g_XMN.mT if tall else g_XMN).to(dtype)
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).view(-1, *x.shape[-2:])  # without a gradient: 0
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).view_as(g_XMN)


def whole_matrices(update: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` on matrices that lie in pieces on several ranks (DTensor): each rank gathers those of which it has a piece.

    What cuts the first dimension of [E, M, N] cuts no matrix, so an expert never leaves the ranks that share its storage.
    """
    if not isinstance(update, DTensor):
        return work(update)
    whole = [
        Replicate() if isinstance(placement, Shard) and placement.dim >= update.dim() - 2 else placement
        for placement in update.placements
    ]
    gathered = update.redistribute(placements=whole)
    done = work(gathered.to_local())
    again = DTensor.from_local(done, update.device_mesh, whole, shape=update.shape, stride=update.stride())
    return again.redistribute(placements=update.placements)
