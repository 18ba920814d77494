"""What experts.py and gpu.py time: shapes and routings, the variants, and the least time a GPU could need for each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_lite.kernels import BACKENDS, choose_backend, grouped_swiglu

INPUTS = 4  # input sets in turn, so that no variant finds its input in a cache
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
NAMES = ("y", "dx", "dgates", "dw13", "dw2")
OURS = ("grouped", "triton", "cuda")


class Shape(NamedTuple):
    E: int  # experts
    T: int  # tokens
    D: int  # width
    F: int  # expert width
    K: int = 1
    routing: str = "multinomial"

    def __str__(self) -> str:
        return f"E={self.E} T={self.T} D={self.D} F={self.F} K={self.K}, {self.routing}"


SIGMA = Shape(96, 8192, 1536, 768)
TOY = Shape(96, 8192, 128, 64)
# By importance: when time runs out, what stands last is not run, and the record says so.
SHAPES = (
    SIGMA,
    SIGMA._replace(T=32768, K=8),
    SIGMA._replace(T=32768),
    SIGMA._replace(K=8),
    TOY,
    SIGMA._replace(routing="zipf"),
    TOY._replace(T=16384, D=256, F=128),
    SIGMA._replace(T=32768, K=8, routing="zipf"),
    TOY._replace(T=16384, D=512, F=256),
    SIGMA._replace(routing="one expert"),
    Shape(128, 32768, 2048, 768, 8),  # Qwen3-30B-A3B, the shape that Liger, SonicMoE and VeOmni publish
    SIGMA._replace(routing="balanced"),
)
GROWTH = tuple(Shape(E, 8192, 128, 128) for E in (8, 32, 96, 192))
DRY = (Shape(4, 24, 16, 16), Shape(3, 16, 16, 16, 2, "zipf"))


def route(shape: Shape, random: torch.Generator) -> Tensor:
    """ids [T, K] on the CPU, distinct within a token."""
    E, T, _, _, K, routing = shape
    if routing == "balanced":
        return (torch.randperm(T, generator=random)[:, None] * K + torch.arange(K)) % E
    if routing == "one expert":
        return torch.arange(K).expand(T, K).clone()
    weights = torch.ones(E) if routing == "multinomial" else 1 / torch.arange(1.0, E + 1)
    return torch.multinomial(weights.expand(T, E), K, generator=random)


class Problem:
    """Random weights and INPUTS inputs, on the device; the same for all variants."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        random = torch.Generator().manual_seed(0)
        on_device = torch.Generator(device).manual_seed(0)
        E, T, D, F, K, _ = shape

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, generator=on_device, device=device) * scale).to(dtype)

        self.shape, self.dtype = shape, dtype
        self.w13, self.w2 = normal(E, 2 * F, D, scale=D**-0.5), normal(E, D, F, scale=F**-0.5)
        self.inputs = [
            (
                normal(T, D),
                route(shape, random).to(device),
                torch.rand(T, K, generator=random).to(device, dtype),
                normal(T, D),
            )
            for _ in range(INPUTS)
        ]

    def leaves(self, number: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        x, _, gates, _ = self.inputs[number % INPUTS]
        return [t.detach().to(dtype or self.dtype).requires_grad_() for t in (x, gates, self.w13, self.w2)]

    def forward(self, run: Callable, number: int) -> Tensor:
        x, ids, gates, _ = self.inputs[number % INPUTS]
        with torch.no_grad():
            return run(x, ids, gates, self.w13, self.w2)

    def both(self, run: Callable, number: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Output and gradients of x, gates, w13 and w2, all new tensors, as after `zero_grad(set_to_none=True)`."""
        _, ids, _, dy = self.inputs[number % INPUTS]
        leaves = self.leaves(number, dtype)
        y = run(leaves[0], ids, *leaves[1:])
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def floor_seconds(shape: Shape, flops: float, bytes_per_second: float, backward: bool, size: int = 2) -> float:
    """Least time for useful work: arithmetic at the measured matrix rate, or each operand moved once at the copy rate.

    Forward reads x and the weights, writes y and the pre-activations z; backward reads dy, x, z and the weights, and
    writes dx and the gradients of the weights (shared roofline: 6 T K D F and 18 T K D F operations).
    """
    E, T, D, F, K, _ = shape
    weights, rows, z = 3 * E * D * F, T * D, T * K * 2 * F
    numbers = weights + 2 * rows + z + ((2 * weights + 3 * rows + z) if backward else 0)
    operations = (18 if backward else 6) * T * K * D * F
    return max(operations / flops, numbers * size / bytes_per_second)


def variants(problem: Problem, device: torch.device, slow: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """(what can run, why the rest cannot). `slow` adds the per-expert loops."""
    runs: dict[str, Callable] = {}
    reasons: dict[str, str] = {}
    for name in (*OURS, *(("loop", "naive") if slow else ())):
        try:
            if name not in BACKENDS:
                raise ValueError("no such backend in this version")
            choose_backend(problem.inputs[0][0], problem.w13, name)
            runs[name] = lambda x, ids, gates, w13, w2, name=name: grouped_swiglu(x, ids, gates, w13, w2, backend=name)
        except ValueError as error:
            reasons[name] = str(error)
    others = {
        "transformers grouped_mm": transformers_experts,
        "scattermoe, one copy of w13 included": _scattermoe,
        "liger": _liger,
    }
    others |= {"transformers eager": transformers_experts} if slow else {}
    for name, make in others.items():
        try:
            if device.type != "cuda" and make is not transformers_experts:
                raise ImportError("needs a GPU")
            runs[name] = make(problem.shape, name, device)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {str(error)[:200]}"
    for module in ("megablocks", "sonicmoe"):
        installed = importlib.util.find_spec(module) is not None
        reasons[module] = "installed, but this script has no adapter for it" if installed else "not installed"
    return runs, reasons


def transformers_experts(shape: Shape, name: str, device: torch.device) -> Callable:
    """Their module ("transformers eager", ...) with our tensors as its parameters; built on `meta`, it takes no memory."""
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = transformers.Qwen3MoeConfig(
        hidden_size=shape.D, moe_intermediate_size=shape.F, num_experts=shape.E, num_experts_per_tok=shape.K
    )
    config._experts_implementation = name.split()[1]
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    return lambda x, ids, gates, w13, w2: torch.func.functional_call(
        module, {"gate_up_proj": w13, "down_proj": w2}, (x, ids, gates)
    )


def _scattermoe(shape: Shape, name: str, device: torch.device) -> Callable:
    """The first half of their rows is the up projection, ours the gate: the swap costs a copy, which their time includes."""
    from scattermoe.mlp import GLUMLP

    module = GLUMLP(shape.D, shape.F, shape.E, shape.K).to(device)

    def run(x, ids, gates, w13, w2):
        gate, up = w13.chunk(2, dim=1)
        weights = {"experts.weight": torch.cat((up, gate), 1), "output_experts.weight": w2}
        return torch.func.functional_call(module, weights, (x, gates, ids))

    return run


def _liger(shape: Shape, name: str, device: torch.device) -> Callable:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return lambda x, ids, gates, w13, w2: LigerFusedMoEFunction.apply(x, w13, w2, ids.int(), gates)
