"""The planner's law of training speed against published runs: what is fitted, and what is then predicted.

Fitted, three numbers to three: the share of the peak and the overlap of a tuned system, from Qwen3-30B-A3B on 16 H100
without (244.0) and with (299.4 TFLOP/s) overlapped exchange, and the share of a plain one, from GPT-OSS-120B on 64 H100
(163). That a plain one hides nothing is set.

Predicted from these, with nothing fitted. The rows were written down before the law was asked about them, by one rule: all
rows of NVIDIA's tables of mixtures of experts whose precision is given as BF16; the two runs that an earlier version of this
file predicted, one of them in FP8; and torchtitan's BF16 rows of FSDP2, the method that our own strategy uses. A row is
reproduced when it lies between the planner's slow and fast end. Not all do.

Sources: NVIDIA-NeMo/Megatron-Bridge docs/performance-summary-archive.md (its releases in brackets), NVIDIA/Megatron-LM pull
request 5728, pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md. NVIDIA's runs force balanced routing.

    python benchmarks/plan_mfu.py
"""

from __future__ import annotations

from dataclasses import dataclass

from sigma_lite.config import ModelConfig, RowsConfig
from sigma_lite.runfile import RunConfig
from sigma_lite.scale import cost
from sigma_lite.scale.cluster import Cluster, load_cluster
from sigma_lite.scale.cost import CRAFT, Craft, network_seconds, together
from sigma_lite.scale.layout import Layout
from sigma_lite.scale.traffic import Wire, flops_per_token

SEQUENCE = 4096
NVIDIA = {"vocab_size": 151_936, "n_kv_heads": 4, "head_dim": 128, "n_experts": 128, "top_k": 8, "tie_embeddings": False}
QWEN_30B = ModelConfig(n_layers=48, d_model=2048, n_heads=32, d_expert=768, **NVIDIA)
QWEN_235B = ModelConfig(n_layers=94, d_model=4096, n_heads=64, d_expert=1536, **NVIDIA)
LLAMA_8B = ModelConfig(
    vocab_size=128_256, n_layers=32, d_model=4096, n_heads=32, n_kv_heads=8, head_dim=128, n_experts=1, d_expert=14_336,
    tie_embeddings=False,
)  # fmt: skip

# One direction of NVLink 5 is 900 GB/s; adapters of 400 Gbit/s, with B300 and GB300 of 800. A rack of 72 is one node. Peaks
# are NVIDIA's dense BF16: half of the 360 PFLOP/s of a rack over its 72, half of the 36 of a node over its 8.
BLACKWELL = {"kind": "gpu", "memory_gib": 180, "memory_gbps": 8000, "intra_node_gbps": 900, "nodes": 8}
SYSTEMS = {
    "H100": load_cluster("h100-node").resized(nodes=8),
    "B200": Cluster(peak_tflops=2250, devices_per_node=8, inter_node_gbps=50, **BLACKWELL),
    "B300": Cluster(peak_tflops=2250, devices_per_node=8, inter_node_gbps=100, **BLACKWELL),
    "GB200": Cluster(peak_tflops=2500, devices_per_node=72, inter_node_gbps=50, **BLACKWELL),
    "GB300": Cluster(peak_tflops=2500, devices_per_node=72, inter_node_gbps=100, **BLACKWELL),
}


@dataclass(frozen=True)
class Exchange:
    """What one token's exchange needs: bytes are bf16, and a row goes once to each node, as their dispatchers do."""

    layers: int  # with experts
    width: int
    k: int
    nodes: int = 64  # most nodes that one token's experts may lie on


QWEN3_30B, QWEN3_235B = Exchange(48, 2048, 8), Exchange(94, 4096, 8)
GPT_OSS, DEEPSEEK = Exchange(36, 2880, 4), Exchange(58, 7168, 8, nodes=4)


@dataclass(frozen=True)
class Published:
    name: str
    system: str
    model: Exchange
    expert_parallel: int
    tflops: float  # for each GPU
    flops: float  # of one token, forward and backward: published TFLOP/s over published tokens/s
    note: str = ""


FITTED = (
    Published("Qwen3-30B-A3B, 16 GPUs", "H100", QWEN3_30B, 16, 299.4, 241e12 / 10494, "fitted (tuned)"),
    Published("GPT-OSS-120B, 64 GPUs [26.02]", "H100", GPT_OSS, 8, 163.0, 163e12 / 5993, "fitted (plain)"),
)
WITHOUT_OVERLAP = 244.0  # TFLOP/s of the first
PREDICTED = (
    Published("Qwen3-30B-A3B, 16 GPUs, median [5728]", "H100", QWEN3_30B, 16, 240.5, 241e12 / 10494, "the fitted setting"),
    Published("GPT-OSS-120B, 64 GPUs [25.11]", "H100", GPT_OSS, 8, 153.0, 153e12 / 5630, "near the fitted setting"),
    Published("Qwen3-235B-A22B, 256 GPUs [5728]", "H100", QWEN3_235B, 32, 302.0, 178e12 / 1204),
    Published("DeepSeek-V3, 1024 GPUs [25.09]", "H100", DEEPSEEK, 64, 338.0, 338e12 / 1297, "ran in FP8"),
    Published("GPT-OSS-120B, 64 GPUs [25.11]", "B200", GPT_OSS, 8, 223.0, 223e12 / 8213),
    Published("GPT-OSS-120B, 64 GPUs [26.02]", "B200", GPT_OSS, 64, 219.0, 219e12 / 8047),
    Published("GPT-OSS-120B, 64 GPUs [26.02]", "B300", GPT_OSS, 64, 228.0, 228e12 / 8359),
    Published("GPT-OSS-120B, 64 GPUs [26.02]", "GB200", GPT_OSS, 64, 428.0, 428e12 / 15784),
    Published("GPT-OSS-120B, 64 GPUs [26.02]", "GB300", GPT_OSS, 64, 527.0, 527e12 / 19412),
    Published("GPT-OSS-120B, 64 GPUs, 8k [25.11]", "GB200", GPT_OSS, 64, 488.0, 488e12 / 15876),
    Published("GPT-OSS-120B, 64 GPUs, 8k [25.11]", "GB300", GPT_OSS, 64, 565.0, 565e12 / 18347),
    Published("Qwen3-235B-A22B, 256 GPUs [25.11]", "GB200", QWEN3_235B, 32, 728.0, 728e12 / 4916),
    Published("Qwen3-235B-A22B, 256 GPUs [25.11]", "GB300", QWEN3_235B, 16, 907.0, 907e12 / 6131),
    Published("DeepSeek-V3, 256 GPUs [25.11]", "GB200", DEEPSEEK, 64, 782.0, 782e12 / 3139),
    Published("DeepSeek-V3, 256 GPUs [25.11]", "GB300", DEEPSEEK, 32, 961.0, 961e12 / 3848),
)
DENSE = {  # torchtitan, Llama 3.1 8B, FSDP2, 2 rows of 8,192 a GPU: (GPUs, tokens/s of each)
    "Llama 3.1 8B, 8 GPUs, FSDP2": (8, 5762),
    "Llama 3.1 8B, 8 GPUs, FSDP2, compiled": (8, 6667),
    "Llama 3.1 8B, 128 GPUs, FSDP2": (128, 5605),
    "Llama 3.1 8B, 128 GPUs, FSDP2, compiled": (128, 6514),
}
LOOKED_AT = """Also read, and above the fast end whatever their layout (37 % of the peak): Mixtral 8x7B on H100, 468 TFLOP/s
(Megatron Core's README); Mixtral 8x22B, 49.3 %, and Qwen2-57B-A14B, 39.0 % (2504.14960); dense 7B on H200 with FSDP, 47 to
54 % (KempnerForge). Rows in FP8, MXFP8 and NVFP4, with other peaks, and with dropped tokens were left out by the rule.
SIGMA-MoE 200B's 21.08 % (2512.13488) cannot be predicted: shape and accelerator are not published."""


def exchange_seconds(run: Published) -> float:
    """Of one token: 4 times over the wire; to other nodes once each, then on to the experts there."""
    cluster, model = SYSTEMS[run.system], run.model
    nodes = max(1, run.expert_parallel // cluster.devices_per_node)
    reached = min(nodes * (1 - (1 - 1 / nodes) ** model.k), model.nodes)
    inter = reached * (1 - 1 / nodes)
    intra = model.k * (1 - 1 / run.expert_parallel) - inter
    row = 4 * model.layers * model.width * 2
    return network_seconds(Wire(intra * row, inter * row), cluster)


def tflops(run: Published, craft: Craft) -> float:
    """What the law says for each GPU at a level of craft."""
    compute = run.flops / (SYSTEMS[run.system].peak_tflops * 1e12 * craft.compute)
    return run.flops / together(compute, exchange_seconds(run), craft.overlap) / 1e12


def spread(run: Published) -> tuple[float, float]:
    """(slow, fast) TFLOP/s: what the planner would say of this run."""
    fast, slow = (tflops(run, craft) for craft in CRAFT["gpu"])
    return slow, fast


def dense_spread(gpus: int) -> tuple[float, float]:
    """(slow, fast) tokens/s of each GPU by `sigma-lite plan`'s own step, with its traffic of FSDP2 and its AdamW."""
    run = RunConfig(LLAMA_8B, rows=RowsConfig(8192, 2 * gpus, 2), trainer={"precision": "bf16-mixed"})
    cluster, layout = SYSTEMS["H100"].resized(nodes=gpus // 8), Layout(gpus, per_micro=2, sharded=True)
    fast, slow = (cost.step(run, layout, cluster, (1,) * LLAMA_8B.n_layers, craft).seconds for craft in CRAFT["gpu"])
    return 2 * 8192 / slow, 2 * 8192 / fast


def fit() -> tuple[Craft, Craft]:
    """(tuned, plain) from the fitted rows."""
    first, plain = FITTED
    network = exchange_seconds(first)
    compute = first.flops / (WITHOUT_OVERLAP * 1e12) - network
    hidden = 1 - (first.flops / (first.tflops * 1e12) - compute) / network
    peak = SYSTEMS["H100"].peak_tflops * 1e12
    share = plain.flops / peak / (plain.flops / (plain.tflops * 1e12) - exchange_seconds(plain))
    return Craft(first.flops / peak / compute, hidden), Craft(share, 0.0)


def counted(net: ModelConfig) -> float:
    """FLOPs of one token by our own ledger, to compare with the published ratio."""
    return flops_per_token(net, (net.top_k,) * net.n_layers, SEQUENCE).training


def verdict(low: float, value: float, high: float) -> str:
    if low <= value <= high:
        return "inside"
    return f"{value / high - 1:.0%} above the fast end" if value > high else f"{1 - value / low:.0%} below the slow end"


def main() -> None:
    print("fitted:", *(f"{c.compute:.3f} of the peak, {c.overlap:.2f} of the exchange hidden;" for c in fit()))
    print("in use:", *(f"{c.compute:.3f} of the peak, {c.overlap:.2f} of the exchange hidden;" for c in CRAFT["gpu"]))
    for net, run in ((QWEN_30B, FITTED[0]), (QWEN_235B, PREDICTED[2])):
        print(f"{run.name:38s} {counted(net) / 1e9:6.1f} GFLOP a token by our ledger, {run.flops / 1e9:6.1f} published")
    for run in (*FITTED, *PREDICTED):
        low, high = spread(run)
        line = f"{run.name:38s} {run.system:5s} {low:5.0f} to {high:5.0f} TFLOP/s by the law, {run.tflops:4.0f} published"
        print(f"{line}  {verdict(low, run.tflops, high)}{'; ' if run.note else ''}{run.note}")
    for name, (gpus, speed) in DENSE.items():
        low, high = dense_spread(gpus)
        print(f"{name:44s} {low:5.0f} to {high:5.0f} tokens/s planned, {speed} published  {verdict(low, speed, high)}")
    print(LOOKED_AT)


if __name__ == "__main__":
    main()
