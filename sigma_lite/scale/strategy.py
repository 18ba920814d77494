"""A Lightning strategy for data and expert parallelism. In yaml:

    trainer:
      accelerator: gpu
      devices: 8
      strategy:
        class_path: sigma_lite.scale.strategy.ExpertParallel
        init_args: {expert_parallel: 8}

It lives here, below train/, because it knows models and checkpoints but neither losses nor steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor

from sigma_lite.checkpoint import remove
from sigma_lite.config import ConfigError, require
from sigma_lite.model import Transformer
from sigma_lite.scale.layout import StrategyConfig, precision_named
from sigma_lite.scale.shard import Mesh, is_sharded, make_mesh, place, shard
from sigma_lite.scale.sharded_checkpoint import load_sharded, save_sharded, whole_for_all


class ExpertParallel(ModelParallelStrategy):
    """Every `Transformer` of a LightningModule laid out over all ranks, built piece by piece in `configure_model`.

    Checkpoints are folders of shards, which continue on any number of ranks; gloo serves CPUs and NCCL GPUs.

    Args:
        expert_parallel: ranks that share out the experts of a layer; divides the number of ranks and of experts. 1: every
            rank runs all experts, gathered layer by layer. The other ranks' factor is data parallelism.
        recompute: activation checkpointing: keep only each block's input, compute the block twice.
        compile_attention: run attention through torch.compile. Experts are one kernel already, and their sizes change.
        timeout_s: seconds to wait for the other ranks, at the start and in each exchange.
        process_group_backend: gloo or nccl; None: what suits the device.
        exchange_parts: cut each layer's tokens into so many parts, and let experts compute one while others travel. The
            gradients are the same but for the last bits; there are so many times as many messages. 1: as a whole.
        capacity: give every message this many times an even share of rows, so that no host waits for sizes. Bytes and
            experts' work grow by this factor. A step in which rows do not fit is skipped, as one with a NaN gradient is;
            capacity = expert_parallel always fits. None: messages of the size that is needed, one wait a layer.
        replan_every: after so many steps let each expert compute where the planner puts it, by the loads of these steps;
            and once more behind the first step after a switch of sparsity, when the loads are others. Weights, gradients
            and checkpoints stay where they are: what is computed elsewhere travels. 0: never.
        copies: so many more experts than it stores are computed on each rank: copies of busy ones, by the planner.
        planner: function (loads_LE, ranks, spots) -> experts of the spots; see scale/placement.py and papers/eplb.py.
    """

    def __init__(
        self,
        expert_parallel: int = 1,
        recompute: bool = False,
        compile_attention: bool = False,
        timeout_s: float = 1800.0,
        process_group_backend: str | None = None,
        exchange_parts: int = 1,
        capacity: float | None = None,
        replan_every: int = 0,
        copies: int = 0,
        planner: str = "sigma_lite.papers.eplb.plan",
    ):
        given = expert_parallel, recompute, compile_attention, timeout_s, process_group_backend, exchange_parts, capacity
        StrategyConfig(*given, replan_every, copies, planner)  # checks them
        self.replan_every, self.copies, self.planner = replan_every, copies, planner
        self.travel = {"exchange_parts": exchange_parts, "capacity": capacity}
        super().__init__(process_group_backend=process_group_backend, timeout=timedelta(seconds=timeout_s))
        self.expert_parallel, self.recompute, self.compile_attention = expert_parallel, recompute, compile_attention
        self.mesh: Mesh | None = None
        self._loading: Path | None = None

    # -------------------------------------------------------------------------------------------------------- start

    def setup_environment(self) -> None:
        try:
            self._setup_distributed()
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            place = f"{self.cluster_environment.main_address}:{self.cluster_environment.main_port}"
            raise ConfigError(
                f"rank {self.global_rank} of {self.world_size} did not meet the others at {place} within"
                f" {self._timeout.total_seconds():.0f} s: start as many processes as trainer.devices x trainer.num_nodes"
                " says, with the same MASTER_ADDR and MASTER_PORT"
            ) from error
        self.mesh = make_mesh(self.root_device.type, self.world_size, self.expert_parallel)
        self._writers = dist.new_group(backend="gloo", timeout=self._timeout)  # theirs alone: they may work beside a step

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}  # every rank reads rows of its own

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Lightning builds the model inside: without storage, which it gets on leaving, each rank its pieces."""
        with torch.device("meta"):
            yield
        precision = self.precision_plugin.precision
        precision_named(precision)
        dtype = torch.bfloat16 if precision == "bf16-mixed" else None
        for model in self.lightning_module.modules():
            if isinstance(model, Transformer) and not is_sharded(model):
                if self.compile_attention:
                    _compile_attention(model)
                shard(model, self.mesh, recompute=self.recompute, compute_dtype=dtype, **self.travel)

    def place(self, experts_LP: np.ndarray | None) -> None:
        """Where experts compute from now on; all ranks call this with the same placement. See scale/shard.py's `place`."""
        for model in self.lightning_module.modules():
            if isinstance(model, Transformer):
                place(model, self.mesh, experts_LP, **self.travel)

    # -------------------------------------------------------------------------------------------------- checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # the model has its storage, and callbacks expect their state before on_fit_start

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Numbered as on one device: parameters come in the same order in every layout.

        Raises: ConfigError for an optimizer whose state is not laid out as its parameters are: pieces would be lost.
        """
        for parameter, entries in optimizer.state.items():
            for name, value in entries.items():
                shared = isinstance(value, DTensor) and value.shape == parameter.shape
                alike = not isinstance(value, Tensor) or value.numel() == 1 or shared == isinstance(parameter, DTensor)
                what = f"the state {name!r} of {type(optimizer).__name__}, {list(getattr(value, 'shape', ()))}"
                laid_out = f"is not laid out as its parameter is, {list(parameter.shape)}, so a checkpoint would lose pieces"
                require(alike, f"{what}, {laid_out}: leave trainer.strategy out, or train with adamw or muon")
        return optimizer.state_dict()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = load_sharded(self._loading, self._moments(checkpoint["optimizer_states"]))["optimizer_states"]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def _moments(self, states: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Which parameter each tensor of the optimizers' state is laid out like, by its path in the checkpoint."""
        like = {}
        for n, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, entries in state["state"].items():
                like |= {f"/optimizer_states/{n}/state/{i}/{name}": parameters[i] for name in entries if name != "step"}
        return like

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """`storage_options` is what calls the writing, such as a `Background`; None: it is done on return."""
        save_sharded(filepath, checkpoint, storage_options, self._writers)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights in their layout; the optimizer's state follows when there is an optimizer.

        A fit that finds a damaged folder goes on from the one before, and says so.
        """
        path = Path(checkpoint_path)
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        self._loading = path = whole_for_all(path, self._writers) if fitting and path.is_dir() else path
        like = {f"/state_dict/{name}": value for name, value in self.lightning_module.state_dict().items()}
        return load_sharded(self._loading, like)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            remove(Path(filepath))


def _compile_attention(model: Transformer) -> None:
    for block in model.blocks:
        if block.attention is not None:
            block.attention.compile()
