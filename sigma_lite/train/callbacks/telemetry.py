"""Looks that cost something, so they come now and then: each expert's gradient, each rank's rows, the peak of memory."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from sigma_lite.balance.metrics import rounded
from sigma_lite.config import require
from sigma_lite.model import Transformer
from sigma_lite.scale.cluster import load_cluster
from sigma_lite.scale.placement import identity, rank_loads, waiting
from sigma_lite.train.callbacks.diary import Diary, completes_step
from sigma_lite.train.callbacks.replan import Replan
from sigma_lite.train.callbacks.throughput import Throughput
from sigma_lite.train.memory import Peak


class Telemetry(pl.Callback):
    """Watch a run; loggers are named by trainer.logger, as in `--trainer.logger=WandbLogger --trainer.logger.project=mine`.

    In one line of yaml: `trainer: {logger: {class_path: WandbLogger, init_args: {project: mine}}}`. TensorBoardLogger and
    CSVLogger write into the run's folder unless they are given a save_dir; any class on top of Lightning's Logger does by
    its path. Names of metrics stand in train/callbacks/names.py; trainer.log_every_n_steps says how often.

    Args:
        every: optimizer steps between two looks at the gradient of each expert, and at the rows of each rank of expert
            parallelism. Each is an `experts` entry of the diary, and its summary goes to loggers. 0: never.
        cluster: the machine that this run's plan is made for, as `sigma-lite plan --cluster` takes it: the report compares
            the run with this plan, and MFU is a share of this machine's peak. null: for the plan a laptop or H100, by
            trainer.accelerator; for MFU what Lightning knows of the GPU at hand.
    """

    def __init__(self, every: int = 100, cluster: str | None = None):
        require(every >= 0, f"telemetry.every={every}: must be 0 (never) or more optimizer steps")
        self.every, self.cluster = every, cluster
        if cluster is not None:
            load_cluster(cluster)  # better a word now than when everything is ready
        self.peak = Peak()
        self._placed: np.ndarray | None = None  # the expert of each spot in this step, where that is not its home
        self._found: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Before there is a model."""
        if stage == "fit":
            self.peak.begin(trainer.strategy.root_device)

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, Throughput):
                callback.peak_flops = self._peak_flops(trainer)
            if isinstance(callback, Diary):
                callback.peak = self.peak

    def _peak_flops(self, trainer: pl.Trainer) -> float | None:
        device, mixed = trainer.strategy.root_device, str(trainer.precision).startswith("bf16")
        if self.cluster is not None:
            return load_cluster(self.cluster).peak_tflops * 1e12
        dtype = torch.bfloat16 if mixed else torch.float32
        return get_available_flops(device, dtype) if device.type == "cuda" else None

    def _looks(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._placed = next((c.experts_LP for c in trainer.callbacks if isinstance(c, Replan)), None)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        if not self._looks(trainer.global_step + 1):
            return
        norms_LE, ranks = expert_gradient_norms(module.model), getattr(trainer.strategy, "expert_parallel", 1)
        self._found = {} if norms_LE is None else {"grad_norm": rounded(norms_LE, 4)}
        if ranks > 1 and module.pooled.counts_LE is not None:
            self._found |= rows_of_ranks(module.pooled.counts_LE, ranks, self._placed)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if completes_step(trainer, batch_idx) and self._found:
            for callback in trainer.callbacks:
                if isinstance(callback, Diary):
                    callback.write(trainer, "experts", **self._found)
            self._found = {}


@torch.no_grad()
def expert_gradient_norms(model: Transformer) -> Tensor | None:
    """L2 norm of each expert's gradient, fp32 [L, E] on the CPU; None where there is none, as in a step that was refused.

    An expert is a slice [e] of every [E, M, N] parameter of its layer; what else a layer's experts share is left out. Of
    sharded gradients each rank holds a part: all ranks must call it.
    """
    rows = []
    for block in model.blocks:
        E = model.config.n_experts
        matrices = [p.grad for p in block.moe.experts.parameters() if p.grad is not None and p.dim() == 3 and len(p) == E]
        if not matrices:
            return None
        rows.append(sum(map(_squares, matrices)).sqrt())
    return torch.stack(rows).float().cpu()


def _squares(grad_EMN: Tensor) -> Tensor:
    """Sum of squares of each slice, [E]."""
    local = grad_EMN.to_local() if isinstance(grad_EMN, DTensor) else grad_EMN
    squares_E = torch.linalg.vector_norm(local, dim=(1, 2)).square()
    if local is grad_EMN:
        return squares_E
    whole = [p if p.is_shard(0) or isinstance(p, Replicate) else Partial() for p in grad_EMN.placements]
    return DTensor.from_local(squares_E, grad_EMN.device_mesh, whole).full_tensor()


def rows_of_ranks(counts_LE: Tensor, ranks: int, placed_LP: np.ndarray | None) -> dict[str, Any]:
    """Rows that each expert-parallel rank's experts got, over all layers, and what the fullest had of an even share."""
    loads_LE = counts_LE.double().cpu().numpy()
    placed_LP = identity(loads_LE, ranks, loads_LE.shape[1]) if placed_LP is None else placed_LP
    rows_R = rank_loads(placed_LP, loads_LE, ranks).sum(0)
    return {"rows": [round(float(rows)) for rows in rows_R], "fullest_rank": round(waiting(placed_LP, loads_LE, ranks), 4)}
