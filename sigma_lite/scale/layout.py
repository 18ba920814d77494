"""How a run is laid out: number formats, and which device holds and does what. The planner's reading of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sigma_lite.config import ModelConfig, nearest, require
from sigma_lite.runfile import RunConfig
from sigma_lite.scale.cluster import Cluster

STRATEGY = "sigma_lite.scale.strategy.ExpertParallel"
IMBALANCE = 1.5  # assumed of every exchange: the fullest device in it gets half as many rows again as its share


@dataclass(frozen=True)
class Precision:
    """Bytes of a number, by what it is for. Mixed precision stores and adds in fp32 and multiplies in 16 bits."""

    name: str
    weight: int  # a stored parameter, its gradient, each of its two moments
    compute: int  # an operand of attention, projections and experts
    stream: int  # the residual stream and what norms give out


PRECISIONS = {
    "32-true": Precision("32-true", 4, 4, 4),
    "bf16-mixed": Precision("bf16-mixed", 4, 2, 4),
    "16-mixed": Precision("16-mixed", 4, 2, 4),
    "bf16-true": Precision("bf16-true", 2, 2, 2),
    "16-true": Precision("16-true", 2, 2, 2),
}
ALIASES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "None": "32-true"}


def precision_of(run: RunConfig) -> Precision:
    """What `trainer.precision` means; Lightning's default is 32-true. Raises ConfigError naming the nearest."""
    given = str(run.trainer.get("precision"))
    name = ALIASES.get(given, given)
    require(name in PRECISIONS, f"the planner knows no trainer.precision={given}; {nearest(name, PRECISIONS)}")
    return PRECISIONS[name]


@dataclass(frozen=True)
class Layout:
    """A grid of devices, data x expert, as scale/shard.py makes it; without `sharded` one device holds everything."""

    devices: int = 1
    expert_parallel: int = 1  # devices that share out the experts of a layer
    per_micro: int = 1  # rows in a forward pass of one device
    recompute: bool = False  # activation checkpointing: keep each block's input only
    sharded: bool = False  # FSDP2: weights, gradients and moments are shared out, and gathered layer by layer
    imbalance: float = IMBALANCE  # rows that the fullest device of an exchange gets, relative to its share

    @property
    def data(self) -> int:
        """Devices that share the storage of one expert."""
        return self.devices // self.expert_parallel

    @property
    def fullest(self) -> float:
        """Rows of the fullest device relative to its share: none has more than all, and alone each has its own."""
        return min(self.imbalance, self.expert_parallel)


def obstacle(net: ModelConfig, per_step: int, layout: Layout) -> str:
    """Why this layout cannot be run, with the nearest that can; "" where it can. The rules are scale/shard.py's."""
    ranks, experts, rows = layout.devices, layout.expert_parallel, layout.per_micro
    if ranks % experts:
        return f"expert_parallel={experts} does not divide {ranks} devices; choose from {_divisors(ranks)}"
    if net.n_experts % experts:
        return f"expert_parallel={experts} does not divide n_experts={net.n_experts}; choose from {_divisors(net.n_experts)}"
    for name, size in (("d_model", net.d_model), ("2 d_expert", 2 * net.d_expert)):
        if layout.sharded and size % layout.data:
            return f"{name}={size} cannot be cut into {layout.data} pieces, one for each device that shares an expert"
    if per_step % (ranks * rows):
        return f"rows.per_step={per_step} does not divide into {ranks} devices x per_micro={rows}"
    return ""


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def place(run: RunConfig, cluster: Cluster, nodes: int | None) -> Cluster:
    """The part of the cluster that the run uses: `trainer.num_nodes` and `devices` win where they are numbers."""
    counts = [run.trainer.get(name) for name in ("num_nodes", "devices")]
    wanted, devices = (n if isinstance(n, int) and n > 0 else None for n in counts)
    return cluster.resized(nodes or wanted, devices)


def layout_of(run: RunConfig, cluster: Cluster) -> Layout:
    """What the config says: one device, or the strategy of this package with its arguments."""
    strategy = run.trainer.get("strategy")
    path = strategy.get("class_path") if isinstance(strategy, Mapping) else strategy
    ours = str(path).rpartition(".")[2] == STRATEGY.rpartition(".")[2]
    args = (strategy.get("init_args") or {}) if ours and isinstance(strategy, Mapping) else {}
    return Layout(
        devices=cluster.devices,
        expert_parallel=int(args.get("expert_parallel", 1)),
        per_micro=run.rows.per_micro,
        recompute=bool(args.get("recompute", False)),
        sharded=ours,
    )


def choices(run: RunConfig, cluster: Cluster) -> list[Layout]:
    """Every layout of these devices that can be run, with 1, 2, 4 ... rows a micro-batch."""
    found = []
    for expert in _divisors(cluster.devices):
        for power in range(run.rows.per_step.bit_length()):
            for recompute in (False, True):
                several = cluster.devices > 1 or recompute
                layout = Layout(cluster.devices, expert, 2**power, recompute, sharded=several)
                if not obstacle(run.net, run.rows.per_step, layout):
                    found.append(layout)
    return found
