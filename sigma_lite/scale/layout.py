"""How a run is laid out: number formats, and which device holds and does what. The planner's reading of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sigma_lite.config import ModelConfig, RowsConfig, require
from sigma_lite.lightning_keys import PRECISIONS as NAMES
from sigma_lite.lightning_keys import require_precision
from sigma_lite.reading import imported
from sigma_lite.runfile import RunConfig, from_mapping
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

    @property
    def half(self) -> bool:
        """Whether products are of 16-bit numbers, which flash attention needs."""
        return self.compute < 4


PRECISIONS = {"32-true": Precision("32-true", 4, 4, 4), "bf16-mixed": Precision("bf16-mixed", 4, 2, 4)}


def precision_named(given: object) -> Precision:
    """What `trainer.precision` means; Lightning's default is 32-true. Raises ConfigError for one that is not trained in."""
    require_precision(given)
    return PRECISIONS[NAMES[given]]


def precision_of(run: RunConfig) -> Precision:
    return precision_named(run.trainer.get("precision"))


@dataclass(frozen=True)
class StrategyConfig:
    """The arguments of scale/strategy.py's ExpertParallel, which says what they mean."""

    expert_parallel: int = 1
    recompute: bool = False
    compile_attention: bool = False
    timeout_s: float = 1800.0
    process_group_backend: str | None = None
    exchange_parts: int = 1
    capacity: float | None = None
    replan_every: int = 0
    copies: int = 0
    planner: str = "sigma_lite.papers.eplb.plan"

    def __post_init__(self) -> None:
        require(self.expert_parallel >= 1, f"expert_parallel={self.expert_parallel}: must be at least 1 rank")
        parts, capacity = self.exchange_parts, self.capacity
        require(
            parts >= 1,
            f"exchange_parts={parts}: must be at least 1; with 2 or more, one part travels while another is computed",
        )
        if capacity is not None:
            require(
                1 <= capacity < math.inf,
                f"capacity={capacity}: must be 1 or more. {self.expert_parallel}, the value of expert_parallel, always"
                " suffices; null sends messages of the size that is needed",
            )
            require(parts == 1, f"exchange_parts={parts} and capacity={capacity}: padded messages are not cut; choose one")
        require(
            self.expert_parallel > 1 or (parts == 1 and capacity is None),
            "exchange_parts and capacity say how tokens travel, and with expert_parallel=1 none do; leave them out",
        )
        self._check_placement()
        require(self.timeout_s > 0, f"timeout_s={self.timeout_s}: must be greater than 0 seconds")

    def _check_placement(self) -> None:
        every, copies = self.replan_every, self.copies
        require(every >= 0, f"replan_every={every}: must be a number of steps, or 0 for never")
        require(copies >= 0, f"copies={copies}: must be 0 or more spots of each rank")
        require(every > 0 or not copies, f"copies={copies} are placed by recorded loads: set replan_every, such as 100")
        if every:
            require(self.expert_parallel > 1, f"replan_every={every} moves experts between ranks: expert_parallel=1 has one")
            imported(self.planner, "planner")  # a function such as sigma_lite.papers.eplb.plan


def strategy_config(strategy: object) -> StrategyConfig | None:
    """The arguments that `trainer.strategy` gives, None where it is not this package's.

    Raises ConfigError for an argument that does not exist (naming the nearest) or cannot be.
    """
    group = strategy if isinstance(strategy, Mapping) else {"class_path": strategy}
    for key in group:
        require(key in ("class_path", "init_args", "dict_kwargs"), f"unknown key trainer.strategy.{key}; write init_args")
    path = str(group.get("class_path"))
    if not path.startswith("sigma_lite.") and path != STRATEGY.rpartition(".")[2]:
        return None
    require(path in (STRATEGY, STRATEGY.rpartition(".")[2]), f"trainer.strategy={path} does not exist; write {STRATEGY}")
    return from_mapping(StrategyConfig, group.get("init_args") or {}, where="trainer.strategy.init_args")


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


def why_not(net: ModelConfig, rows: RowsConfig, layout: Layout) -> str:
    """Why this layout cannot be run, with the nearest that can; "" where it can. The rules are scale/shard.py's."""
    ranks, experts = layout.devices, layout.expert_parallel
    if ranks % experts:
        return f"expert_parallel={experts} does not divide {ranks} devices; choose from {_divisors(ranks)}"
    if net.n_experts % experts:
        return f"expert_parallel={experts} does not divide n_experts={net.n_experts}; choose from {_divisors(net.n_experts)}"
    for name, size in (("d_model", net.d_model), ("2 d_expert", 2 * net.d_expert)):
        if layout.sharded and size % layout.data:
            return f"{name}={size} cannot be cut into {layout.data} pieces, one for each device that shares an expert"
    for size in rows.sizes:
        if size % (ranks * layout.per_micro):
            whose = f"rows.{rows.named(size)}" if size == rows.per_step else rows.named(size)
            return f"{whose} does not divide into {ranks} devices x per_micro={layout.per_micro}"
    return ""


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def devices_wanted(run: RunConfig) -> int | None:
    """Devices of a node that `trainer.devices` asks for: a number, a list, or either as text; None: all there are."""
    given = run.trainer.get("devices")
    if isinstance(given, str) and given.strip("-, 0123456789") == "" and given.strip():
        numbers = [int(n) for n in given.split(",") if n.strip()]
        given = numbers if "," in given else numbers[0]
    if isinstance(given, Sequence) and not isinstance(given, str):
        return len(given)
    return given if isinstance(given, int) and given > 0 else None


def place(run: RunConfig, cluster: Cluster, nodes: int | None) -> Cluster:
    """The part of the cluster that the run uses: `trainer.num_nodes` and `devices` win where they are numbers."""
    wanted = run.trainer.get("num_nodes")
    return cluster.resized(nodes or (wanted if isinstance(wanted, int) else None), devices_wanted(run))


def layout_of(run: RunConfig, cluster: Cluster, imbalance: float = IMBALANCE) -> Layout:
    """What the config says: one device, or the strategy of this package with its arguments."""
    ours = strategy_config(run.trainer.get("strategy"))
    args = ours or StrategyConfig()
    return Layout(
        devices=cluster.devices,
        expert_parallel=args.expert_parallel,
        per_micro=run.rows.per_micro,
        recompute=args.recompute,
        sharded=ours is not None,
        imbalance=args.capacity or imbalance,  # padded messages carry so many rows, however even they are
    )


def choices(run: RunConfig, cluster: Cluster, imbalance: float = IMBALANCE) -> list[Layout]:
    """Every layout of these devices that can be run, with 1, 2, 4 ... rows a micro-batch."""
    found = []
    for expert in _divisors(cluster.devices):
        for power in range(run.rows.per_step.bit_length()):
            for recompute in (False, True):
                several = cluster.devices > 1 or recompute
                layout = Layout(cluster.devices, expert, 2**power, recompute, several, imbalance)
                if not why_not(run.net, run.rows, layout) and not (run.parts and several):  # which no strategy serves
                    found.append(layout)
    return found
