"""What a run would run on: devices, their memory and speed, the links between them, and a price.

Descriptions are yaml, the built-in ones in clusters/. Every figure has a source or is an assumption, and says which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sigma_lite.config import nearest, require
from sigma_lite.runfile import from_mapping, read_yaml

BUILT_IN = Path(__file__).parent / "clusters"
ASSUMED = "assumed"


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices. Rates are the maker's, one direction; what is reached of them is in cost.py."""

    kind: str  # gpu | cpu: which efficiencies and which kernels' memory are expected
    memory_gib: float  # of one device, as its driver reports it
    peak_tflops: float  # of one device: dense bf16 matrix products (cpu: fp32)
    memory_gbps: float  # GB/s between one device and its memory
    nodes: int = 1
    devices_per_node: int = 1
    intra_node_gbps: float = 0.0  # GB/s one way between devices of a node, for each device; 0: there is one device
    inter_node_gbps: float = 0.0  # GB/s one way between nodes, for each device; 0: there is one node
    disk_gbps: float = 1.0  # GB/s that all devices together write to the disk of the run
    host_gib: float = 0.0  # memory of a node besides its devices'; 0: not described
    local_disk_gib: float = 0.0  # of a node, fast enough to keep weights on; 0: not described
    price_per_hour: float = 0.0  # of one device
    currency: str = ""  # of the price
    sources: dict = field(default_factory=dict)  # {figure: where it comes from}
    name: str = ""

    def __post_init__(self) -> None:
        require(self.kind in ("gpu", "cpu"), f"cluster kind {self.kind!r}: {nearest(self.kind, ('gpu', 'cpu'))}")
        for name in ("memory_gib", "peak_tflops", "memory_gbps", "nodes", "devices_per_node", "disk_gbps"):
            require(getattr(self, name) > 0, f"cluster {name}={getattr(self, name)}: must be greater than 0")
        for name, many in (("intra_node_gbps", self.devices_per_node > 1), ("inter_node_gbps", self.nodes > 1)):
            rate = getattr(self, name)
            require(rate >= 0, f"cluster {name}={rate}: must be 0 or more GB/s")
            require(rate > 0 or not many, f"cluster {name} is missing: {self.size()} need it, in GB/s for each device")
        for name in ("host_gib", "local_disk_gib"):
            require(getattr(self, name) >= 0, f"cluster {name}={getattr(self, name)}: must be 0 (not described) or more")
        require(self.price_per_hour >= 0, f"cluster price_per_hour={self.price_per_hour}: must be 0 or more")
        priced = f"cluster currency is missing: price_per_hour={self.price_per_hour} is in which? Write currency: USD"
        require(not self.price_per_hour or bool(self.currency), priced)
        for figure in self.sources:
            require(figure in _FIGURES, f"cluster sources names {figure!r}, which is no figure; {nearest(figure, _FIGURES)}")

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    def size(self) -> str:
        devices = f"{self.devices_per_node} device" + "s" * (self.devices_per_node > 1)
        return f"{self.nodes} node{'s' * (self.nodes > 1)} of {devices}"

    def source(self, figure: str) -> str:
        return str(self.sources.get(figure, ASSUMED))

    def resized(self, nodes: int | None = None, devices_per_node: int | None = None) -> Cluster:
        """The same machines, another number of them. The processes of a CPU share it.

        Raises ConfigError for a node larger than there are.
        """
        most = self.devices_per_node
        if self.kind == "cpu" and devices_per_node and devices_per_node > most:
            return self._shared(devices_per_node).resized(nodes)
        require(
            devices_per_node is None or devices_per_node <= most,
            f"trainer.devices={devices_per_node}, but a node of cluster {self.name!r} has {most}: lower it, or describe"
            " the node in a cluster file",
        )
        return dataclasses.replace(self, nodes=nodes or self.nodes, devices_per_node=devices_per_node or most)

    def _shared(self, processes: int) -> Cluster:
        part = self.devices_per_node / processes
        rates = {name: getattr(self, name) * part for name in ("memory_gib", "peak_tflops", "memory_gbps", "price_per_hour")}
        link = self.intra_node_gbps or rates["memory_gbps"] / 2  # through memory: one writes, the other reads
        return dataclasses.replace(self, devices_per_node=processes, intra_node_gbps=link, **rates)


_FIGURES = {f.name for f in dataclasses.fields(Cluster)} - {"kind", "sources", "name", "currency"}


def built_in() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def load_cluster(name_or_file: str) -> Cluster:
    """A built-in description by name, or one of your own by its yaml file.

    Raises ConfigError for a name that does not exist, an unknown key (naming the nearest) or a value that cannot be.
    """
    path = BUILT_IN / f"{name_or_file}.yaml"
    if not path.is_file():
        path = Path(name_or_file)
        named = path.suffix in (".yaml", ".yml")
        require(named, f"cluster {name_or_file!r} does not exist; {nearest(name_or_file, built_in())} (or give a yaml file)")
    given = read_yaml(path)
    require(isinstance(given.get("sources", {}), Mapping), f"{path}: sources must be a group of figure: source")
    fields = {f.name for f in dataclasses.fields(Cluster)}
    for key in given:
        require(key in fields, f"unknown key {key!r} in {path}; {nearest(key, fields)}")
    missing = [n for n in ("kind", "memory_gib", "peak_tflops", "memory_gbps") if n not in given]
    require(not missing, f"{path} lacks {', '.join(missing)}: see {BUILT_IN / 'h100.yaml'} for how it is written")
    return from_mapping(Cluster, {"name": path.stem, **given}, where="cluster")
