"""An eighth of the full config's depth and width, all its 96 experts and its schedule, trains alike on every mesh.

At full width it is 2.65 B parameters: benchmarks/plan_eighth.py does that.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from launch import curve, done, fit

from sigma_lite.runfile import load_run

CONFIGS = Path(__file__).parents[2] / "scaled_configs"
MESHES = [(4, 4), (4, 2), (4, 1)]  # ranks, of them along the expert axis: EP 4, EP 2 x FSDP 2, FSDP 4


@pytest.fixture(scope="module")
def run():
    return load_run([CONFIGS / name for name in ("sigma_moe_tiny.yaml", "overlays/eighth.yaml", "overlays/narrow.yaml")])


def test_it_is_the_full_config_but_shorter_and_narrower(run):
    full = load_run([CONFIGS / "sigma_moe_tiny.yaml"])
    changed = {name for name, value in dataclasses.asdict(full.net).items() if getattr(run.net, name) != value}
    assert changed == {"n_layers", "d_model", "d_expert", "n_heads", "n_kv_heads"}
    assert (8 * run.net.n_layers, 8 * run.net.d_model, 8 * run.net.d_expert) == (56, 1536, 768)
    assert run.sparsity.head == full.sparsity.head[:7] and run.balance == full.balance and run.optim == full.optim


@pytest.mark.slow
def test_it_takes_the_same_steps_on_every_mesh(run, place):
    """Two steps of AdamW on the tiny corpus, whose vocabulary is the only thing that is changed."""
    settings = {
        "model__net": dataclasses.asdict(run.net) | {"vocab_size": 300},
        "model__sparsity": {"head": list(run.sparsity.head), "switch_step": run.sparsity.switch_step},
        "model__balance": dataclasses.asdict(run.balance),
        "model__optim": {"lr": run.optim.lr, "warmup_steps": 2},
        "trainer__max_steps": 2,
        "trainer__val_check_interval": 2,
    }
    curves = {}
    for ranks, expert_ranks in [(1, 1), *MESHES]:
        done(fit(ranks, expert_ranks, **settings))
        curves[ranks, expert_ranks] = curve(Path("run"))
        shutil.rmtree("run")  # half a gigabyte
    assert len(curves[1, 1]) == 2 and curves[1, 1][1][0] < curves[1, 1][0][0], "the loss falls"
    for mesh in MESHES:
        for step, (a, b) in enumerate(zip(curves[mesh], curves[1, 1], strict=True)):
            assert a == pytest.approx(b, rel=1e-5), (mesh, step)
