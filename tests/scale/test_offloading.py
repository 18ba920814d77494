"""SE-MoE's storage bounds: by hand, for Sigma-MoE-Tiny, and in the plan that people read."""

from __future__ import annotations

from pathlib import Path

import pytest

from sigma_lite.config import ConfigError
from sigma_lite.runfile import load_run
from sigma_lite.scale.cluster import Cluster
from sigma_lite.scale.forecast import forecast
from sigma_lite.scale.offloading import bounds
from sigma_lite.scale.table import as_table

CONFIGS = Path(__file__).parents[2] / "scaled_configs"


def test_bounds_by_hand():
    """16 D + 4 a S / L, 16 a S, 12 S."""
    assert bounds(dense=10, sparse=1000, layers=5, active=0.5) == (160 + 400, 8000, 12000)
    assert bounds(10, 0, 5) == (160, 0, 0)


def test_the_plan_of_sigma_says_it():
    run = load_run([CONFIGS / "sigma_moe_tiny.yaml"])
    found, counts = forecast(run, "h100-node", nodes=1), run.net.ledger()
    own = found["experts_elsewhere"]
    assert own["active_share"] == pytest.approx(1, abs=1e-6), "a micro-batch of thousands of tokens touches every expert"
    assert own["devices_bytes"] == pytest.approx(16 * (counts.total - counts.experts) + 4 * counts.experts / 56, rel=1e-6)
    assert own["disks_bytes"] == 12 * counts.experts and own["fits"] == {"devices": True, "hosts": True, "disks": True}
    assert own["devices_bytes"] < found["initial"]["memory"]["weights"] * 8, "weights alone, at 4 bytes, are more"
    assert "if experts were kept elsewhere" in as_table(found)
    small = forecast(load_run([CONFIGS / "toy.yaml"]), "cpu-core")["experts_elsewhere"]
    assert small["fits"] == {"devices": True, "hosts": None, "disks": None}


def test_a_size_that_cannot_be():
    with pytest.raises(ConfigError, match="cluster host_gib=-1"):
        Cluster("gpu", 80, 1, 1, host_gib=-1)
