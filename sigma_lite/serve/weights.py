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

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sigma_lite.config import nearest, require
from sigma_lite.model import Transformer
from sigma_lite.model.experts import Experts
from sigma_lite.serve.expert_cache import POLICIES, Policy, policy_named
from sigma_lite.serve.mapped import Mapped, is_meta


@dataclass
class Counts:
    """What happened to the experts that one layer, or all of them, were asked for."""

    asked: int = 0  # distinct experts, call by call
    hits: int = 0  # of them, that stayed from an earlier call
    guessed: int = 0  # of them, that were read because the router before had guessed them
    guesses: int = 0  # experts that were guessed and not there, so that reading began
    moved_bytes: int = 0
    waited_s: float = 0.0  # for reading, while nothing was computed

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(one + more for one, more in pairs))

    @property
    def hit_rate(self) -> float:
        """Share that was there, or on its way, when it was asked for."""
        return (self.hits + self.guessed) / max(self.asked, 1)


class Offloaded(nn.Module):
    """The experts of one layer, of which some are in memory. Called like the `Experts` whose place it takes.

    Args:
        slots: the same experts, whose stacked weights now have room for `resident` of them.
        weights: names of those weights.
        name: of the experts in the model, and so in the files.
    """

    def __init__(
        self,
        slots: Experts,
        resident: int,
        policy: Policy,
        loader: ThreadPoolExecutor,
        weights: list[str],
        name: str,
        files: Mapped,
    ):
        super().__init__()
        self.slots, self.policy, self.loader = slots, policy, loader
        self.weights, self.name, self.files = weights, name, files
        self.free = list(range(resident))
        self.slot_of: dict[int, int] = {}
        self.coming: dict[int, Future] = {}  # of those in slot_of, whose reading has not been waited for
        self.guessed: set[int] = set()  # of those in slot_of, that nobody has asked for yet
        self.counts, self.trace = Counts(), None
        self.guess_next: Callable[[], None] | None = None  # set before each call where a layer follows

    def forward(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        (T, K), ids_N, gates_N1 = ids_TK.shape, ids_TK.flatten(), gates_TK.reshape(-1, 1)
        rows_of = _by_expert(ids_N)
        rows, parts = [], []
        for expert, slot in self._visit(list(rows_of)):
            row_M = rows_of[expert]
            rows.append(row_M)
            parts.append(self.slots(x_TD[row_M // K], ids_N.new_full((len(row_M), 1), slot), gates_N1[row_M]))
        if not parts:
            return torch.zeros_like(x_TD)
        y_ND = (
            parts[0] if T * K == 1 else torch.empty_like(torch.cat(parts)).index_copy_(0, torch.cat(rows), torch.cat(parts))
        )
        return y_ND if K == 1 else y_ND.view(T, K, -1).sum(1)

    def _visit(self, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(expert, its slot): those that are there first, so that the others are read meanwhile."""
        if self.trace is not None:
            self.trace.append(list(experts))
        self._forget_guesses(set(experts))
        self._count(experts)
        order, asked = sorted(experts, key=lambda expert: expert not in self.slot_of), 0
        for n, expert in enumerate(order):
            while asked < len(order) and self._begin(order[asked], set(order[n:asked])):
                self.policy.used(order[asked])
                asked += 1
            if self.guess_next:
                guess, self.guess_next = self.guess_next, None
                guess()  # after what this layer needs: one thread reads in the order of asking
            self._wait(expert)
            yield expert, self.slot_of[expert]

    def guess(self, experts: Sequence[int]) -> None:
        """Begin to read what will probably be asked for, as many as there are slots."""
        experts = list(experts)[: len(self.free) + len(self.slot_of)]
        for expert in experts:
            if expert not in self.slot_of and self._begin(expert, set(experts)):
                self.guessed.add(expert)
                self.counts.guesses += 1

    def _begin(self, expert: int, stay: set[int]) -> bool:
        """Whether the expert is there or on its way, now. False where all slots hold what must `stay`."""
        if expert in self.slot_of:
            return True
        if not self.free:
            candidates = self.slot_of.keys() - stay
            if not candidates:
                return False
            self._evict(self.policy.victim(candidates))
        slot = self.slot_of[expert] = self.free.pop()
        self.coming[expert] = self.loader.submit(self._read, expert, slot)
        return True

    def _read(self, expert: int, slot: int) -> None:
        """In the loader's thread."""
        for weight in self.weights:
            into = getattr(self.slots, weight)[slot]
            self.counts.moved_bytes += self.files.copy(f"{self.name}.{weight}", expert, into)

    def _evict(self, expert: int) -> None:
        """What may still be read into its slot is overwritten by the next, because the loader works in turn."""
        if expert in self.coming:
            self.coming.pop(expert).cancel()
        self.guessed.discard(expert)
        self.free.append(self.slot_of.pop(expert))

    def _forget_guesses(self, needed: set[int]) -> None:
        """Wrong guesses whose reading has not begun are not read."""
        for expert in self.guessed - needed:
            if self.coming[expert].cancel():
                self._evict(expert)
            elif self.coming[expert].done():
                self.guessed.discard(expert)  # read for nothing, or for later

    def _count(self, experts: Sequence[int]) -> None:
        there = [expert for expert in experts if expert in self.slot_of]
        early = [expert for expert in there if expert in self.guessed]
        self.counts.asked += len(experts)
        self.counts.guessed += len(early)
        self.counts.hits += len(there) - len(early)
        self.guessed -= set(early)

    def _wait(self, expert: int) -> None:
        if expert not in self.coming:
            return
        begun = time.perf_counter()
        self.coming.pop(expert).result()
        self.counts.waited_s += time.perf_counter() - begun


def _by_expert(ids_N: Tensor) -> dict[int, Tensor]:
    """The rows of each distinct expert."""
    if len(ids_N) == 1:
        return {int(ids_N): torch.zeros_like(ids_N)}
    order_N = ids_N.argsort(stable=True)
    found, counts = ids_N[order_N].unique_consecutive(return_counts=True)
    return dict(zip(found.tolist(), order_N.split(counts.tolist()), strict=True))


# ------------------------------------------------------------------------------------------------------- whole model


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
    if is_meta(model):
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
