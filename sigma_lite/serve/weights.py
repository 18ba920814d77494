"""Where an expert's weights are when they are needed: in one of a few slots, or still on disk.

    offload(model, checkpoint, resident=8)       # generate as before; 8 of 96 experts of each layer are in memory

An ultra-sparse model touches one expert of a layer for each token, so most of its weights lie idle most of the time. Here
each layer has `resident` slots. An expert that is asked for and not there is copied from the mapped checkpoint by a loader
thread, which meanwhile also begins with what the next layer will probably ask for: the next layer's own router, applied to
the stream as it is before this layer's experts have added to it (Eliseev and Mazur, 2312.17238, guess with the next gate
as well). What is computed is the same as with all experts in memory.

Only for inference: weights change under a backward pass.
"""

from __future__ import annotations

import functools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sigma_lite.config import nearest, require
from sigma_lite.model import Transformer
from sigma_lite.model.experts import Experts
from sigma_lite.serve.expert_cache import POLICIES, policy_named
from sigma_lite.serve.mapped import Mapped
from sigma_lite.serve.offloaded import Counts, Offloaded


@dataclass
class Offload:
    """A model whose experts are read when they are needed: what it holds, and what has happened so far."""

    layers: list[Offloaded]
    files: Mapped
    loader: ThreadPoolExecutor
    held_bytes: int  # of all slots
    expert_bytes: int  # of all experts, on disk

    @property
    def counts(self) -> Counts:
        """Over all layers."""
        return functools.reduce(Counts.__add__, (layer.counts for layer in self.layers))

    def forget(self) -> None:
        """Count from 0 again, and record which experts each layer is asked for from now on."""
        for layer in self.layers:
            layer.counts, layer.trace = Counts(), []

    def in_words(self) -> str:
        c, held, whole = self.counts, self.held_bytes / 1e6, self.expert_bytes / 1e6
        words = (
            f"{held:.1f} of {whole:.1f} MB of experts held ({held / whole:.1%})",
            f"{c.hit_rate:.0%} of {c.asked:,} experts there when asked for ({c.guessed:,} by a right guess)",
            f"{c.moved_bytes / 1e6:,.1f} MB read",
            f"{c.waited_s:.2f} s waited",
        )
        return ", ".join(words)

    def close(self) -> None:
        """End the thread that reads. The model cannot be used any more."""
        self.loader.shutdown(cancel_futures=True)


def offload(
    model: Transformer,
    checkpoint: str | Path,
    *,
    resident: int = 8,
    policy: str = "lru",
    prefetch: bool = True,
    bytes_per_second: float | None = None,
) -> Offload:
    """Leave experts on disk but for `resident` of each layer. The model computes what it did before, in less memory.

    A model that was made under `torch.device("meta")` gets its other weights from the checkpoint too, so its experts never
    are in memory together. Any part built on `Experts` is served; one with no more than `resident` experts stays whole.

    Args:
        checkpoint: with the weights of this very model, from RUN/checkpoints.
        resident: experts of each layer that are in memory; 1 is enough, whatever the model's experts per token.
        policy: who leaves: lru | lfu.
        prefetch: let each layer's router guess before its turn, and read what it names.
        bytes_per_second: as of a slower disk; None: as fast as it goes.

    Raises: ConfigError for numbers that cannot be, an unknown policy, and a checkpoint of another model; StorageError for
        one that is missing or damaged.
    """
    require(policy in POLICIES, f"policy {policy!r} does not exist; {nearest(policy, POLICIES)}")
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    most = max((len(module.w13) for module in experts.values()), default=0)
    require(most > 0, "this model has no experts that could be left on disk: every part is of a kind of its own")
    require(1 <= resident < most, f"resident={resident}: must lie in 1..{most - 1}; all {most} are there without it")
    files, loader = Mapped(checkpoint, bytes_per_second), ThreadPoolExecutor(1, "experts")
    layers, left_out, held, whole = {}, set(), 0, 0
    for name, module in experts.items():
        if len(module.w13) <= resident:
            continue
        stacked = _stacked(module, name, files)
        whole += sum(tensor.numel() * tensor.element_size() for tensor in stacked.values())
        held += sum(_shrink(module, own, tensor, resident) for own, tensor in stacked.items())
        left_out |= {f"{name}.{own}" for own in stacked}
        layers[name] = Offloaded(module, resident, policy_named(policy), loader, list(stacked), name, files)
        model.set_submodule(name, layers[name])
    if any(weight.is_meta for weight in model.parameters()):
        _fill_the_rest(model, files.others(left_out))
    if prefetch:
        _let_routers_guess(model, layers)
    return Offload(list(layers.values()), files, loader, held, whole)


def _stacked(module: Experts, name: str, files: Mapped) -> dict[str, Tensor]:
    """The weights of a module that hold one entry for each expert. Raises ConfigError where the file has others."""
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    E = len(module.w13)
    stacked = {n: tensor for n, tensor in own.items() if tensor.dim() and len(tensor) == E}
    for n, tensor in stacked.items():
        shape, there = list(tensor.shape), files.shape(f"{name}.{n}")
        found = f"{files.path} has {'no ' if there is None else ''}{name}.{n}{'' if there is None else f' {list(there)}'}"
        require(there == tuple(shape), f"{found}, this model's is {shape}: give a checkpoint of this very model")
        require(not hasattr(tensor, "to_local"), "experts that are shared out over ranks are not offloaded: use one device")
    return stacked


def _shrink(module: Experts, name: str, tensor: Tensor, resident: int) -> int:
    """Give a stacked weight room for `resident` experts only; its bytes."""
    slots = tensor.new_empty((resident, *tensor.shape[1:]))
    setattr(module, name, nn.Parameter(slots, requires_grad=False) if isinstance(tensor, nn.Parameter) else slots)
    return slots.numel() * slots.element_size()


def _fill_the_rest(model: Transformer, state: dict[str, Tensor]) -> None:
    """Storage for a model without any, and all weights but the experts'."""
    model.to_empty(device="cpu")
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight
    missing = [name for name in model.load_state_dict(state, strict=False).missing_keys if ".slots." not in name]
    require(not missing, f"the checkpoint has no {', '.join(missing)}: give one of this very model")


def _let_routers_guess(model: Transformer, layers: dict[str, Offloaded]) -> None:
    """Before the experts of each layer work, its stream goes through the router of the next."""
    of_block = {}
    for number in range(len(model.blocks)):
        own = [layer for name, layer in layers.items() if name.startswith(f"blocks.{number}.")]
        if len(own) == 1:  # experts of two kinds have numbers of their own
            of_block[number] = own[0]
    for number, layer in of_block.items():
        following = of_block.get(number + 1)
        block = model.blocks[number + 1] if following else None
        if block is None or getattr(block.moe.router, "reads_tokens", False):
            continue

        def before(_, args, layer=layer, following=following, block=block):
            (stream_BSD,) = args
            layer.guess_next = lambda: following.guess(_chosen(block, stream_BSD))

        model.blocks[number].moe_norm.register_forward_pre_hook(before)


@torch.no_grad()
def _chosen(block: nn.Module, stream_BSD: Tensor) -> list[int]:
    """Experts that a block would choose for a stream, the most wanted first."""
    ids = block.moe.router(block.moe_norm.forward(stream_BSD).flatten(0, 1)).ids  # forward: no hooks, nobody else guesses
    return [expert for expert, _ in Counter(ids.flatten().tolist()).most_common() if expert >= 0]
