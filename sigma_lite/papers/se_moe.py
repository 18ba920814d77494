"""SE-MoE: weights that arrive just before they are needed (2205.10034; as MoESys in a journal).

The paper's: all layers' experts lie in the host's memory, and the device has K slots, each as large as the experts of one
layer. When layer i is done its slot is filled with layer K + i, while the layers between compute. With c seconds of
computing and l of loading a layer, and K >= 2, N layers take

    N max(c, l) + min(c, l)                  and with K = 1, where nothing overlaps, N (c + l)

in K / N of the memory. *2D prefetch*: dense parameters come from other devices over their links while expert parameters
come from the disk through the host's memory; a layer then waits for the slowest of these ways, not for their sum. The
host's cache counts hits, which decay, and gives up what has few: serve/expert_cache.py's LFU. *Elastic placement*: in
training on several tasks at once, light tasks share a node and heavy ones get several.

Elsewhere: the exchange of tokens in two steps (scale/two_level.py), an embedding cut along the hidden size
(scale/split_embedding.py), storage bounds (scale/offloading.py).

Theirs: CUDA streams, NVLink and NVMe. Ours: threads and mapped files on one machine, rates made visible by throttling; the
placement is simulated. Confidence: the ring and its analysis read; of the decay and the tasks only the idea. Their 18.2 %
(four tasks), 33 % (training) and 13 % (inference) are of their machines.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor, nn

from sigma_lite.config import require
from sigma_lite.model import Transformer
from sigma_lite.model.experts import Experts
from sigma_lite.papers.eplb import replicate
from sigma_lite.serve.mapped import Mapped

Lane = Callable[[int, int], object]
"""(turn, slot): load what that turn needs, or a part of it, into that slot."""


class Ring:
    """K slots that are filled in turn, ahead of those who use them.

    Args:
        lanes: each has a thread of its own, so that parts of a turn are loaded at one time.
        slots: K. 1: a slot is filled only when nobody uses it, so nothing overlaps.
        turns: how many there will be; None: no end.
    """

    def __init__(self, lanes: Sequence[Lane], slots: int, turns: int | None = None):
        require(slots >= 1, f"slots={slots}: must be at least 1")
        self.free = [SimpleQueue() for _ in lanes]
        self.ready = [SimpleQueue() for _ in lanes]
        self._ended = False
        for free, slot in itertools.product(self.free, range(slots)):
            free.put(slot)
        numbers = [range(turns) if turns is not None else itertools.count() for _ in lanes]
        self.threads = [
            threading.Thread(target=self._fill, args=each, name="ring", daemon=True)
            for each in zip(lanes, self.free, self.ready, numbers, strict=True)
        ]
        for thread in self.threads:
            thread.start()

    def _fill(self, lane: Lane, free: SimpleQueue, ready: SimpleQueue, turns: Iterator[int]) -> None:
        for turn in turns:
            slot = free.get()
            if self._ended:
                return
            try:
                lane(turn, slot)
            except BaseException as error:  # raised where the slot is waited for
                ready.put(error)
                return
            ready.put(slot)

    @contextlib.contextmanager
    def turn(self) -> Iterator[int]:
        """The next turn's slot, once all of it is there; filled anew when the block has ended. Raises a lane's error."""
        found = []
        for ready in self.ready:
            found.append(ready.get())
            if isinstance(found[-1], BaseException):
                ready.put(found[-1])  # for whoever asks again
                raise found[-1]
        try:
            yield found[0]
        finally:
            for free in self.free:
                free.put(found[0])

    def close(self) -> None:
        """End the threads; a slot that is being filled is finished first. Of two rings the staging one is closed first."""
        self._ended = True
        for free in self.free:
            free.put(0)
        for thread, ready in zip(self.threads, self.ready, strict=True):
            thread.join()
            ready.put(RuntimeError("the ring is closed"))


def through(staging: Ring, load: Lane) -> Lane:
    """A lane that takes from another ring: disk to host memory there, host memory to device here.

    Args:
        load: (slot of the staging ring, slot to fill).
    """

    def lane(_: int, slot: int) -> None:
        with staging.turn() as staged:
            load(staged, slot)

    return lane


def ring_seconds(
    compute_N: Sequence[float], load_N: Sequence[float], slots: int, before_N: Sequence[float] | None = None
) -> float:
    """When the last of N layers is done. A load waits for the load before it and for its slot, a layer for its load.

    N equal layers: N max(c, l) + min(c, l) for K >= 2, and N (c + l) for K = 1. What is sometimes written, l + N max(c, l),
    counts the first load twice where loading is the slower.

    Args:
        compute_N: seconds in which each layer uses its slot.
        before_N: seconds of each layer before it needs its slot, such as attention's before experts. They overlap with the
            load even where K = 1.
    """
    loaded, done = [], []
    for n, (compute, load) in enumerate(zip(compute_N, load_N, strict=True)):
        slot_free = done[n - slots] if n >= slots else 0.0
        loaded.append(max(loaded[-1] if loaded else 0.0, slot_free) + load)
        here = (done[-1] if done else 0.0) + (before_N[n] if before_N is not None else 0.0)
        done.append(max(here, loaded[-1]) + compute)
    return done[-1] if done else 0.0


# ------------------------------------------------------------------------------------------------------ a whole model


class FromRing(nn.Module):
    """The experts of one layer, in whichever slot of a ring the layer's turn comes."""

    def __init__(self, experts: Experts, ring: RingOfLayers, layer: int):
        super().__init__()
        self.inner, self.ring, self.layer = experts, ring, layer

    def forward(self, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        with self.ring.of(self.layer) as weights:
            for name, weight in weights.items():
                setattr(self.inner, name, weight)
            return self.inner(x_TD, ids_TK, gates_TK)


class RingOfLayers:
    """A model whose experts are in memory layer by layer: after the last layer comes the first of the next pass.

    Fit for passes that touch most experts, such as long prompts and batches; one token touches one expert of a layer, for
    which serve/weights.py reads no more than that.

    Args:
        model: a Transformer with `Experts`; it is changed, and from now on must run whole passes, one after another.
        checkpoint: with its weights.
        slots: layers whose experts are in memory, 1 .. number of layers.
        bytes_per_second: as of a slower disk.

    Raises: ConfigError for a number of slots that cannot be, or experts of another kind.
    """

    def __init__(self, model: Transformer, checkpoint: str | Path, slots: int = 2, bytes_per_second: float | None = None):
        N, kinds = len(model.blocks), [type(block.moe.experts) for block in model.blocks]
        require(1 <= slots <= N, f"slots={slots}: must lie in 1..{N}, the number of layers")
        require(set(kinds) == {Experts}, f"a ring takes the model's own Experts, not {kinds[0].__name__}")
        self.files, self.layers, self.turns = Mapped(checkpoint, bytes_per_second), N, 0
        first = model.blocks[0].moe.experts
        shapes = {name: weight for name, weight in first.named_parameters()}
        self.expert_bytes = N * sum(weight.numel() * weight.element_size() for weight in shapes.values())
        self.held_bytes = self.expert_bytes // N * slots
        self.slots = [
            {name: nn.Parameter(torch.empty_like(weight), requires_grad=False) for name, weight in shapes.items()}
            for _ in range(slots)
        ]
        for layer, block in enumerate(model.blocks):
            block.moe.experts = FromRing(block.moe.experts, self, layer)
            for name in shapes:
                setattr(block.moe.experts.inner, name, self.slots[0][name])
        self.ring = Ring([self._load], slots)

    def _load(self, turn: int, slot: int) -> None:
        for name, weight in self.slots[slot].items():
            self.files.copy_all(f"blocks.{turn % self.layers}.moe.experts.{name}", weight)

    @contextlib.contextmanager
    def of(self, layer: int) -> Iterator[dict[str, nn.Parameter]]:
        """The weights of a layer whose turn it is. RuntimeError where it is another's: its weights would be taken."""
        if layer != self.turns % self.layers:
            raise RuntimeError(f"layer {layer} came at the turn of layer {self.turns % self.layers}: run whole passes only")
        with self.ring.turn() as slot:
            self.turns += 1
            yield self.slots[slot]


# --------------------------------------------------------------------------------------------------------- many tasks


def one_node_each(loads_T: Sequence[float], nodes: int) -> list[list[tuple[int, float]]]:
    """Whole tasks, dealt in turn: what a fixed placement does. Of each node, (task, work)."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(nodes)]
    for task, load in enumerate(loads_T):
        found[task % nodes].append((task, load))
    return found


def elastic(loads_T: Sequence[float], nodes: int) -> list[list[tuple[int, float]]]:
    """Heavy tasks cut into equal parts, parts put heaviest first onto the lightest node; as few cuts as the best needs.

    Parts of one task are data parallel and have to sum its gradients, so a cut is not free.
    """
    loads, best = np.asarray(loads_T, dtype=float), None
    require(nodes >= 1 and len(loads) > 0, f"{len(loads)} tasks on {nodes} nodes: give at least one of each")
    for spots in range(len(loads), len(loads) + 2 * nodes):
        task_P = replicate(loads, spots)
        part_P = loads[task_P] / np.bincount(task_P)[task_P]
        placed: list[list[tuple[int, float]]] = [[] for _ in range(nodes)]
        for part in np.argsort(-part_P, kind="stable"):
            lightest = min(placed, key=lambda node: sum(work for _, work in node))
            lightest.append((int(task_P[part]), float(part_P[part])))
        if best is None or slowest(placed) < slowest(best) * (1 - 1e-9):
            best = placed
    return best


def slowest(placed: Sequence[Sequence[tuple[int, float]]]) -> float:
    """Work of the fullest node: a step lasts as long."""
    return max(sum(work for _, work in node) for node in placed)
