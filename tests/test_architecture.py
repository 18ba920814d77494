"""The floors of the house, and what each room may cost to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_layers_hold():
    """The contracts of pyproject.toml: a room imports only from floors below, and there is no circle."""
    lint = pytest.importorskip("importlinter.cli")
    assert lint
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


HEAVY = ("lightning", "torch", "numpy", "plotly", "torchmetrics", "tokenizers", "yaml")
ALLOWED = {
    "import sigma_lite": (),
    "import sigma_lite.config, sigma_lite.storage, sigma_lite.record, sigma_lite.balance.schedule": ("yaml",),
    "from sigma_lite import cli\ncli.main(['plan', '-c', 'scaled_configs/toy.yaml', '--json'])": ("yaml",),
    "import sigma_lite.model, sigma_lite.kernels, sigma_lite.balance.losses, sigma_lite.balance.pooled,"
    " sigma_lite.data.rows, sigma_lite.serve.generate": ("torch", "numpy", "tokenizers", "yaml"),
    "import sigma_lite.teach, sigma_lite.balance.metrics, sigma_lite.balance.balancer, sigma_lite.serve.trained": (
        *("torch", "numpy", "tokenizers", "yaml", "plotly", "torchmetrics"),
    ),
}


@pytest.mark.parametrize("code", ALLOWED)
def test_rooms_import_only_what_they_need(code):
    """Nothing but train/, data/datamodule.py and the commands that train may pay for Lightning: it costs seconds."""
    ask = f"{code}\nimport sys\nprint('\\nHEAVY', *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = set(done.stdout.splitlines()[-1].split()[1:])
    assert found <= set(ALLOWED[code])
