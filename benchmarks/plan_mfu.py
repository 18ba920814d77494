"""The planner's law of training speed against published runs on H100: what is fitted, and what is then predicted.

Published: NVIDIA-NeMo/Megatron-Bridge (docs/performance-summary-archive.md; skills on MoE overlap and dispatch) and
NVIDIA/Megatron-LM pull request 5728, in TFLOP/s for each GPU. All of them force balanced routing.

Fitted, three numbers to three: the share of the peak and the overlap of a tuned system, from Qwen3-30B-A3B on 16 H100
without (244.0) and with (299.4) overlapped exchange, and the share of a plain one, from GPT-OSS-120B on 64 (163.0). That a
plain one hides nothing is set.
Predicted from these, with nothing fitted: Qwen3-235B-A22B and DeepSeek-V3, of which the latter ran in FP8.
SIGMA-MoE 200B's 21.08 % MFU (2512.13488) cannot be predicted: shape and accelerator are not published.

    python benchmarks/plan_mfu.py
"""

from __future__ import annotations

from dataclasses import dataclass

from sigma_lite.config import ModelConfig
from sigma_lite.scale.cluster import load_cluster
from sigma_lite.scale.cost import CRAFT, Craft, network_seconds, together
from sigma_lite.scale.traffic import Wire, flops_per_token

SEQUENCE = 4096
NVIDIA = {"vocab_size": 151_936, "n_kv_heads": 4, "head_dim": 128, "n_experts": 128, "top_k": 8, "tie_embeddings": False}
QWEN_30B = ModelConfig(n_layers=48, d_model=2048, n_heads=32, d_expert=768, **NVIDIA)
QWEN_235B = ModelConfig(n_layers=94, d_model=4096, n_heads=64, d_expert=1536, **NVIDIA)


@dataclass(frozen=True)
class Published:
    """A run, with what its exchange needs: bytes are bf16, and a row goes once to each node, as their dispatchers do."""

    name: str
    flops: float  # of one token, forward and backward: the published TFLOP/s over the published tokens/s
    layers: int  # with experts
    width: int
    k: int
    expert_parallel: int
    nodes_of_a_token: int  # most nodes that one token's experts may lie on
    tflops: float
    note: str


RUNS = (
    Published("Qwen3-30B-A3B, 16 H100", 241e12 / 10494, 48, 2048, 8, 16, 2, 299.4, "fitted"),
    Published("GPT-OSS-120B, 64 H100", 163e12 / 5993, 36, 2880, 4, 8, 1, 163.0, "fitted (plain)"),
    Published("Qwen3-235B-A22B, 256 H100", 178e12 / 1204, 94, 4096, 8, 32, 4, 302.0, "predicted"),
    Published("DeepSeek-V3, 1024 H100", 338e12 / 1297, 58, 7168, 8, 64, 4, 338.0, "predicted in BF16; it ran in FP8"),
)
WITHOUT_OVERLAP = 244.0  # TFLOP/s of the first
H100 = load_cluster("h100-node").resized(nodes=8)


def exchange_seconds(run: Published) -> float:
    """Of one token: 4 times over the wire; to other nodes once each, then on to the experts there."""
    nodes = max(1, run.expert_parallel // 8)
    reached = min(nodes * (1 - (1 - 1 / nodes) ** run.k), run.nodes_of_a_token)
    inter = reached * (1 - 1 / nodes)
    intra = run.k * (1 - 1 / run.expert_parallel) - inter
    row = 4 * run.layers * run.width * 2
    return network_seconds(Wire(intra * row, inter * row), H100)


def tflops(run: Published, craft: Craft) -> float:
    """What the law says for each GPU at a level of craft."""
    compute = run.flops / (H100.peak_tflops * 1e12 * craft.compute)
    return run.flops / together(compute, exchange_seconds(run), craft.overlap) / 1e12


def fit() -> tuple[Craft, Craft]:
    """(tuned, plain) from the fitted rows."""
    first, plain = RUNS[0], RUNS[1]
    network = exchange_seconds(first)
    compute = first.flops / (WITHOUT_OVERLAP * 1e12) - network
    hidden = 1 - (first.flops / (first.tflops * 1e12) - compute) / network
    peak = H100.peak_tflops * 1e12
    share = plain.flops / peak / (plain.flops / (plain.tflops * 1e12) - exchange_seconds(plain))
    return Craft(first.flops / peak / compute, hidden), Craft(share, 0.0)


def counted(net: ModelConfig) -> float:
    """FLOPs of one token by our own ledger, to compare with the published ratio."""
    return flops_per_token(net, (net.top_k,) * net.n_layers, SEQUENCE).training


def main() -> None:
    print("fitted:", *(f"{c.compute:.3f} of the peak, {c.overlap:.2f} of the exchange hidden;" for c in fit()))
    print("in use:", *(f"{c.compute:.3f} of the peak, {c.overlap:.2f} of the exchange hidden;" for c in CRAFT["gpu"]))
    for net, run in ((QWEN_30B, RUNS[0]), (QWEN_235B, RUNS[2])):
        print(f"{run.name:28s} {counted(net) / 1e9:6.1f} GFLOP a token by our ledger, {run.flops / 1e9:6.1f} published")
    for run in RUNS:
        low, high = (tflops(run, craft) for craft in reversed(CRAFT["gpu"]))
        print(f"{run.name:28s} {low:4.0f} to {high:4.0f} TFLOP/s by the law, {run.tflops:4.0f} published   {run.note}")


if __name__ == "__main__":
    main()
