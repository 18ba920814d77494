"""Where training could keep what it does not use at the moment: the storage bounds of SE-MoE (2205.10034, section 2).

Dense parameters stay on the devices with all that Adam needs, 16 bytes each. Of S expert parameters only the weights of the
layer at work are on a device; hosts hold weights, gradients and moments of those that a step touches, and disks hold the
weights and both moments of all:

    devices  16 D + 4 a S / L      hosts  16 a S      disks  12 S

with a the share of experts that a step touches. For an ultra-sparse model nearly all parameters are experts', so devices
need hundreds of times less; but a training step of many tokens touches every expert, so hosts get no smaller with K.

This package does not train that way: the numbers say what it would be worth. It serves that way (serve/weights.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sigma_lite.runfile import RunConfig
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.decode import distinct_experts
from sigma_lite.scale.layout import Layout
from sigma_lite.scale.memory import GIB, usable


class Bounds(NamedTuple):
    """Bytes that all machines together need."""

    devices: float
    hosts: float
    disks: float


def bounds(dense: int, sparse: int, layers: int, active: float = 1.0) -> Bounds:
    """Of D dense and S sparse parameters in L layers, of whose experts a step touches the share `active`."""
    return Bounds(16 * dense + 4 * active * sparse / layers, 16 * active * sparse, 12 * sparse)


def elsewhere(run: RunConfig, layout: Layout, cluster: Cluster) -> dict[str, Any]:
    """The bounds of a config on a cluster, and whether they hold; None of a store whose size nobody has described."""
    net, counts = run.net, run.net.ledger()
    active = distinct_experts(net.n_experts, net.top_k, layout.per_micro * run.rows.length) / net.n_experts
    found = bounds(counts.total - counts.experts, counts.experts, net.n_layers, active)
    room = Bounds(
        usable(cluster) * cluster.devices,
        cluster.host_gib * cluster.nodes * GIB,
        cluster.local_disk_gib * cluster.nodes * GIB,
    )
    return {
        "active_share": active,
        **{f"{name}_bytes": need for name, need in found._asdict().items()},
        "fits": {
            name: need <= has if has else None for (name, need), has in zip(found._asdict().items(), room, strict=True)
        },
    }
