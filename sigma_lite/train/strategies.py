"""Which of Lightning's strategies train as this package means it, and where SLURM's variables mean nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
    XLAStrategy,
)

from sigma_lite.config import require
from sigma_lite.scale.layout import strategy_config
from sigma_lite.scale.strategy import ExpertParallel

CHOOSE = f"choose auto, ddp or {ExpertParallel.__module__}.{ExpertParallel.__name__}"
REFUSED = {  # beginnings of names -> why
    "fsdp": "it cuts gradients over the ranks, and each would clip by the norm of its own piece",
    "deepspeed": "it clips and steps by itself, past the total norm that is recorded and guarded here",
    "modelparallel": "it leaves it to the model to be laid out, and this model would be trained on each rank for itself",
    "xla": "no TPU was ever tried",
    "single_xla": "no TPU was ever tried",
    "ddp_spawn": "its ranks are children that no signal reaches, so they could not save before they end",
    "ddp_fork": "its ranks are children that no signal reaches, so they could not save before they end",
    "ddp_notebook": "its ranks are children that no signal reaches, so they could not save before they end",
}


def check_named(strategy: object) -> None:
    """ConfigError for a `trainer.strategy` of yaml that would train something else, wherever it is asked for."""
    strategy_config(strategy)
    given = strategy.get("class_path") if isinstance(strategy, Mapping) else strategy
    args = (strategy.get("init_args") or {}) if isinstance(strategy, Mapping) else {}
    name = str(given).rpartition(".")[2].lower()
    for start, why in REFUSED.items():
        require(not name.startswith(start), f"trainer.strategy={given}: {why}; {CHOOSE}")
    if isinstance(args, Mapping):
        start = args.get("start_method", "popen")
        require(start == "popen", f"trainer.strategy with start_method={start}: {REFUSED['ddp_spawn']}; leave it out")
        period = args.get("model_averaging_period")
        require(period is None, f"trainer.strategy with model_averaging_period={period}: {AVERAGING}; leave it out")


AVERAGING = "between averages the ranks hold different weights, and a checkpoint would hold one rank's"


def check_made(strategy: Strategy) -> None:
    """ConfigError for a strategy that trains something else: also one that Lightning has chosen, or a class of yours."""
    name = type(strategy).__name__
    ours = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ExpertParallel))
    theirs = isinstance(strategy, (DeepSpeedStrategy, XLAStrategy))
    why = next((why for start, why in REFUSED.items() if name.lower().startswith(start)), "its gradients were never checked")
    require(ours and not theirs, f"trainer.strategy is a {name}: {why}; {CHOOSE}")
    start = getattr(strategy, "_start_method", None) or "popen"
    require(start == "popen", f"trainer.strategy starts ranks by {start}: {REFUSED['ddp_spawn']}; set trainer.strategy=ddp")
    period = getattr(strategy, "_model_averaging_period", None)
    require(period is None, f"trainer.strategy with model_averaging_period={period}: {AVERAGING}; leave it out")


def outside_srun(plugins: Any) -> Any:
    """Lightning's `plugins`, and the plain environment where SLURM's variables are set but srun did not start this process.

    In the shell of an allocation, in a batch script or in a notebook server Lightning would take this one process for
    all of SLURM's tasks: it stops with a traceback, or waits for the others for ever.
    """
    slurm = "SLURM_NTASKS" in os.environ and SLURMEnvironment.job_name() not in ("bash", "interactive")
    if not slurm or "SLURM_STEP_ID" in os.environ or TorchElasticEnvironment.detect():
        return plugins
    given = [] if plugins is None else list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    if any(hasattr(plugin, "creates_processes_externally") for plugin in given):
        return plugins
    if os.environ["SLURM_NTASKS"] != "1":
        print(
            f"sigma-lite: SLURM_NTASKS={os.environ['SLURM_NTASKS']}, but srun did not start this process: it goes on"
            " without SLURM, as trainer.devices says; in a job, write srun before the command",
            file=sys.stderr,
        )
    return [*given, LightningEnvironment()]
