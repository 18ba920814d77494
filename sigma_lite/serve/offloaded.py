"""The experts of one layer in a few slots: who is there, who is on the way, who leaves. See serve/weights.py."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sigma_lite.model.experts import Experts
from sigma_lite.serve.expert_cache import Policy
from sigma_lite.serve.mapped import Mapped


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
        self.w13 = torch.empty(files.shape(f"{name}.w13"), device="meta")  # for who asks how many experts there are
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
