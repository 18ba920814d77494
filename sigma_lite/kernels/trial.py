"""Is a compiled kernel right on this machine? A small layer against the float64 loop, before any result is believed.

A compiler that this code does not choose can be wrong on one kind of machine only, and silently: one version gave wrong
input gradients on one GPU (linkedin/Liger-Kernel, pull request 1294).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sigma_lite.kernels.loop import grouped_swiglu_loop

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # of ||ours - exact|| / ||exact||
NAMES = ("y", "dx", "dgates", "dw13", "dw2")


def wrong_results(run: Callable[..., list[Tensor]], device: torch.device, dtype: torch.dtype, **sizes: int) -> str:
    """What `run(x, ids, gates, w13, w2, dy)` gets wrong, such as "dx by 3.0e-01"; "" if nothing.

    `run` returns the output and the gradients of x, gates, w13 and w2.
    """
    errors = trial_errors(run, device, dtype, **sizes)
    return ", ".join(f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE[dtype])


def trial_errors(
    run: Callable[..., list[Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    T: int,
    D: int,
    F: int,
    E: int = 4,
    K: int = 2,
) -> dict[str, float]:
    """Relative error of the output and of each gradient. Uneven loads, and one expert without tokens."""
    random = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=random)  # noqa: E731
    ids = torch.multinomial(torch.arange(E).float().expand(T, E), K, generator=random)  # expert 0 is never drawn
    tensors = (new(T, D), new(T, K), new(E, 2 * F, D) / D**0.5, new(E, D, F) / F**0.5)
    x, gates, w13, w2 = (t.to(device, dtype) for t in tensors)
    ids, dy = ids.to(device), new(T, D).to(device, dtype)
    apart = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # from a layer that is being checkpointed
    with torch.inference_mode(False), torch.enable_grad(), apart:
        ours = run(x, ids, gates, w13, w2, dy)
        x, gates, w13, w2 = leaves = [t.double().requires_grad_() for t in (x, gates, w13, w2)]
        y = grouped_swiglu_loop(x, ids, gates, w13, w2)
        exact = [y, *torch.autograd.grad(y, leaves, dy.double())]
    return {
        name: float((a.detach().double() - b.detach()).norm() / b.detach().norm())
        for name, a, b in zip(NAMES, ours, exact, strict=True)
    }
