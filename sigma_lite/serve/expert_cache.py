"""Which experts stay in a few slots: LRU, LFU with decay, and what the best possible choice would have reached.

A *trace* is what one layer was asked for, call after call: a list of lists of distinct experts. One token at one expert per
token makes lists of one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Protocol

from sigma_lite.config import nearest, require

Trace = Sequence[Collection[int]]


class Policy(Protocol):
    """Told of every expert that was needed; asked who has to leave."""

    def used(self, expert: int) -> None: ...

    def victim(self, candidates: Collection[int]) -> int: ...


class LRU:
    """The least recently used leaves."""

    def __init__(self) -> None:
        self.clock, self.last = 0, defaultdict(int)

    def used(self, expert: int) -> None:
        self.clock += 1
        self.last[expert] = self.clock

    def victim(self, candidates: Collection[int]) -> int:
        return min(candidates, key=lambda expert: (self.last[expert], expert))


class LFU(LRU):
    """The one with the fewest hits leaves, the least recently used of several. Hits halve now and then.

    Args:
        half_life: uses of the layer after which all hits are halved, so that what was busy long ago may leave; the decay of
            SE-MoE's CPU cache (2205.10034). 0: never.
    """

    def __init__(self, half_life: int = 256):
        super().__init__()
        require(half_life >= 0, f"half_life={half_life}: must be 0 (never) or more")
        self.half_life, self.hits = half_life, defaultdict(float)

    def used(self, expert: int) -> None:
        super().used(expert)
        self.hits[expert] += 1
        if self.half_life and self.clock % self.half_life == 0:
            for known in self.hits:
                self.hits[known] /= 2

    def victim(self, candidates: Collection[int]) -> int:
        return min(candidates, key=lambda expert: (self.hits[expert], self.last[expert], expert))


class Clairvoyant:
    """Who is needed furthest in the future leaves (Belady, 1966). No policy has more hits, and none can know this."""

    def __init__(self, trace: Trace):
        self.clock, self.uses = 0, defaultdict(list)
        for now, expert in enumerate(expert for asked in trace for expert in asked):
            self.uses[expert].append(now)
        for times in self.uses.values():
            times.reverse()

    def used(self, expert: int) -> None:
        self.uses[expert].pop()

    def victim(self, candidates: Collection[int]) -> int:
        never = float("inf")
        return max(candidates, key=lambda expert: self.uses[expert][-1] if self.uses[expert] else never)


POLICIES = {"lru": LRU, "lfu": LFU}


def policy_named(name: str) -> Policy:
    """Raises ConfigError that names the nearest one."""
    require(name in POLICIES, f"policy {name!r} does not exist; {nearest(name, POLICIES)}")
    return POLICIES[name]()


def hit_rate(trace: Trace, slots: int, policy: Policy) -> float:
    """Share of asked experts that were there, for one layer with `slots` slots that begins empty."""
    require(slots >= 1, f"slots={slots}: must be at least 1")
    held, hits, asked = set(), 0, 0
    for experts in trace:
        for expert in experts:
            asked += 1
            hits += expert in held
            if expert not in held and len(held) == slots:
                held.remove(policy.victim(held))
            held.add(expert)
            policy.used(expert)
    return hits / max(asked, 1)
