"""The sizes at which experiments run. What differs between arms is elsewhere; what they share is here.

The model is the report's shape made small: every layer a mixture of 96 experts, one active. Rows are short, because
balance is about tokens, not about long context.
"""

from __future__ import annotations

from sigma_lite.config import nearest, require
from sigma_lite.lab.experiment import Scale
from sigma_lite.runfile import overlay

SMALL = {
    "vocab_size": 2048,
    "n_layers": 6,
    "d_model": 64,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 32,
    "n_experts": 96,
    "d_expert": 48,
    "top_k": 1,
}
CORPUS = {"source": "stdlib", "dir": "data/lab-2048"}
PACKAGES = (  # of those that this project installs, the ones with most Python
    "torch sympy transformers pandas numpy sqlalchemy lightning sphinx networkx plotly jedi babel nbconvert jupyter-server "
    "prompt-toolkit pytest mpmath ipython datasets huggingface-hub"
)


def _cpu(steps: int, window_tokens: int) -> dict:
    return {
        "seed_everything": 0,
        "model": {
            "net": SMALL,
            "balance": {"loss": "global", "weight": 0.02, "z_weight": 1e-4, "window_tokens": window_tokens},
            "optim": {"lr": 3e-3, "warmup_steps": 50, "decay_fraction": 0.2},
        },
        "data": {"corpus": CORPUS, "rows": {"length": 128, "per_step": 32, "per_micro": 32}},
        "save": {"every": steps // 4},
        "trainer": {"max_steps": steps, "accelerator": "cpu", "devices": 1},
    }


LONG = overlay(  # the cpu scale's model, more than nine times as long and on more text
    _cpu(steps=7500, window_tokens=200_000),
    {
        "model": {"sparsity": {"head": [8, 8, 4, 2], "switch_step": 5250}, "optim": {"warmup_steps": 200}},
        "data": {
            "corpus": {
                "source": "packages",
                "packages": PACKAGES.split(),
                "package_bytes": 4_000_000,
                "dir": "data/lab-packages",
            }
        },
        "save": {"every": 750, "milestones": [5250]},
        "trainer": {"val_check_interval": 2500},  # held-out text is long: reading it takes as long as 500 steps
    },
)

TOY = {  # scaled_configs/toy.yaml; a test holds them together
    "seed_everything": 0,
    "model": {
        "net": {
            "vocab_size": 4096,
            "n_layers": 4,
            "d_model": 128,
            "n_heads": 2,
            "n_kv_heads": 1,
            "head_dim": 64,
            "n_experts": 96,
            "d_expert": 64,
            "top_k": 1,
        },
        "sparsity": {"head": [8, 6, 4, 2], "switch_step": 720},
        "balance": {"loss": "global", "weight": 0.0025, "z_weight": 0.00025, "window_tokens": 100_000},
        "optim": {"lr": 0.004, "warmup_steps": 50, "decay_fraction": 0.4},
    },
    "data": {
        "corpus": {"source": "programs", "dir": "data/programs"},
        "rows": {"length": 256, "per_step": 8, "per_micro": 8},
    },
    "save": {"every": 100},
    "trainer": {"max_steps": 1200, "val_check_interval": 240, "accelerator": "cpu", "devices": 1},
}

GPU = {
    "seed_everything": 0,
    "model": {
        "net": {
            "vocab_size": 16_384,
            "n_layers": 16,
            "d_model": 512,
            "n_heads": 8,
            "n_kv_heads": 2,
            "head_dim": 64,
            "n_experts": 96,
            "d_expert": 256,
            "top_k": 1,
        },
        "balance": {"loss": "global", "weight": 0.01, "z_weight": 1e-4, "window_tokens": 2_000_000},
        "optim": {"lr": 1e-3, "warmup_steps": 500, "decay_fraction": 0.3},
    },
    "data": {
        "corpus": {
            "source": "hf",
            "dataset": "HuggingFaceFW/fineweb-edu",
            "subset": "sample-10BT",
            "dir": "data/lab-fineweb",
            "max_documents": 1_000_000,
        },
        "rows": {"length": 1024, "per_step": 128, "per_micro": 32},
    },
    "save": {"every": 1000},
    "trainer": {"max_steps": 8000, "accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"},
}

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "quick",
            "a first look on any laptop: fig2 took 3 to 4 minutes on two cores, text preparation included",
            _cpu(steps=240, window_tokens=100_000),
        ),
        Scale(
            "cpu",
            "the recorded runs: 3 to 45 minutes an arm, the longest beside other work",
            _cpu(steps=800, window_tokens=200_000),
            seeds=(0, 1, 2),
            recorded=True,
        ),
        Scale("toy", "the model of `make toy`: 5 to 11 minutes an arm on one core", TOY, seeds=(0, 1, 2), recorded=True),
        Scale(
            "long",
            "30 million tokens for `length`: an arm took 43 to 65 minutes of steps and 12 to 24 of held-out text, one core",
            LONG,
            seeds=(0, 1),
            recorded=True,
        ),
        Scale("gpu", "one GPU; never run, so nobody knows how long it takes", GPU, seeds=(0, 1, 2), recorded=True),
    )
}


def scale(name: str) -> Scale:
    """A scale by name. Raises ConfigError naming the nearest."""
    require(name in SCALES, f"scale {name!r} does not exist; {nearest(name, SCALES)}")
    return SCALES[name]
