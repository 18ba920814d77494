"""Experts on several machines: who sends what to whom, for whom everybody waits, and where experts should compute."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sigma_lite.papers import eplb
from sigma_lite.teach.exercises.exercise import Exercise
from sigma_lite.teach.plots_scale import makespan, send_matrix


def _receivers_first(ids_TK: Tensor, ranks: int, n_experts: int) -> Tensor:
    return send_matrix(ids_TK, ranks, n_experts).T.contiguous()


def _matrix_written(ids_TK: Tensor, ranks: int, n_experts: int) -> Tensor:
    sends_RR = torch.zeros(ranks, ranks, dtype=torch.long)
    for t, experts in enumerate(ids_TK.tolist()):
        for expert in experts:
            sends_RR[t * ranks // len(ids_TK), expert * ranks // n_experts] += 1
    return sends_RR


def wire_bytes(d_model: int, k: int, ranks: int, size: int) -> float:
    """Bytes that a token sends in one layer of a step: out and back, forward and backward, less what is at home."""
    return 4 * k * d_model * size * (ranks - 1) / ranks


def _home_too(d_model: int, k: int, ranks: int, size: int) -> float:
    return float(4 * k * d_model * size)


def _bytes_written(d_model: int, k: int, ranks: int, size: int) -> float:
    away = 1 - 1 / ranks
    return sum(away * d_model * size for _ in range(4 * k))


def _busiest_expert(f_E: Tensor, ranks: int) -> float:
    return (len(f_E) * f_E.max() / f_E.sum()).item()


def _span_written(f_E: Tensor, ranks: int) -> float:
    sums = [part.sum().item() for part in f_E.chunk(ranks)]
    return max(sums) * ranks / sum(sums)


def replicate(loads: list[float], spots: int) -> list[int]:
    """The expert of each spot: each once, then copies where copies are busiest."""
    return eplb.replicate(np.array(loads), spots).tolist()


def _all_to_the_busiest(loads: list[float], spots: int) -> list[int]:
    return [*range(len(loads)), *[int(np.argmax(loads))] * (spots - len(loads))]


def _replicate_written(loads: list[float], spots: int) -> list[int]:
    own = list(range(len(loads)))
    while len(own) < spots:
        each = [load / own.count(expert) for expert, load in enumerate(loads)]
        own.append(each.index(max(each)))
    return own


def packed(loads: list[float], ranks: int) -> list[int]:
    """The rank of each spot: heaviest first, into the lightest rank that has room."""
    return eplb.pack(np.array(loads), ranks)[0].tolist()


def _in_order(loads: list[float], ranks: int) -> list[int]:
    return [spot * ranks // len(loads) for spot in range(len(loads))]


def _without_room(loads: list[float], ranks: int) -> list[int]:
    found, sums = [0] * len(loads), [0.0] * ranks
    for spot in sorted(range(len(loads)), key=lambda spot: -loads[spot]):
        found[spot] = sums.index(min(sums))
        sums[found[spot]] += loads[spot]
    return found


def _packed_written(loads: list[float], ranks: int) -> list[int]:
    found, sums, room = [0] * len(loads), [0.0] * ranks, [len(loads) // ranks] * ranks
    for spot in sorted(range(len(loads)), key=lambda spot: -loads[spot]):
        rank = min((r for r in range(ranks) if room[r]), key=lambda r: sums[r])
        found[spot], room[rank] = rank, room[rank] - 1
        sums[rank] += loads[spot]
    return found


def snaked(loads: list[float], ranks: int) -> list[int]:
    """The rank of each spot: dealt forth and back, heaviest first."""
    spots = len(loads)
    dealt_P = eplb.deal(np.arange(spots)[None], np.array(loads)[None], ranks)[0]  # spots, rank by rank
    found = np.empty(spots, dtype=int)
    found[dealt_P] = np.arange(spots) * ranks // spots
    return found.tolist()


def _always_forth(loads: list[float], ranks: int) -> list[int]:
    found = [0] * len(loads)
    for place, spot in enumerate(sorted(range(len(loads)), key=lambda spot: -loads[spot])):
        found[spot] = place % ranks
    return found


def _snaked_written(loads: list[float], ranks: int) -> list[int]:
    found, there_and_back = [0] * len(loads), [*range(ranks), *reversed(range(ranks))]
    for place, spot in enumerate(sorted(range(len(loads)), key=lambda spot: -loads[spot])):
        found[spot] = there_and_back[place % (2 * ranks)]
    return found


def _routings() -> list:
    generator = torch.Generator().manual_seed(14)
    shapes = ((8, 4, 8, 1), (12, 3, 6, 2), (6, 2, 4, 1))
    return [(torch.rand(T, E, generator=generator).topk(k).indices, R, E) for T, R, E, k in shapes]


def _shares() -> list:
    f_E = torch.tensor([5.0, 1, 2, 2, 0, 3, 1, 2]) / 16
    return [(f_E, 4), (f_E, 2), (f_E, 1), (torch.ones(6) / 6, 3)]


README = [90.0, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]  # EPLB's own example, and its second layer
SECOND = [20.0, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]

EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="send_matrix",
        chapter=19,
        asks="Who sends what",
        solution=send_matrix,
        inputs=_routings,
        mistake=_receivers_first,
        says="right numbers, mirrored: row r is what rank r sends, column r what it gets",
        minutes=10,
        difficulty=2,
        importance=4,
        hint="The rank of a token and the rank of an expert are both a whole-number division. Count pairs of ranks.",
        also=_matrix_written,
        source="teach.plots_scale.send_matrix",
    ),
    Exercise(
        name="wire_bytes",
        chapter=19,
        asks="Bytes on the wire",
        solution=wire_bytes,
        inputs=lambda: [(1536, 1, 8, 2), (64, 8, 4, 4), (32, 2, 1, 2)],
        mistake=_home_too,
        says="some experts are at home: of so many ranks one needs no wire",
        minutes=6,
        difficulty=2,
        importance=3,
        hint="Out and back, forward and backward: four times k rows. Only the share (ranks - 1) / ranks of them travels.",
        also=_bytes_written,
        source="scale.traffic.exchanged",
    ),
    Exercise(
        name="makespan",
        chapter=19,
        asks="Makespan",
        solution=makespan,
        inputs=_shares,
        mistake=_busiest_expert,
        says="that is the busiest expert; a rank's work is the sum over the experts that live on it",
        minutes=5,
        difficulty=1,
        importance=5,
        hint="Cut the experts into as many equal parts as there are ranks, sum each, and compare the largest with the mean.",
        also=_span_written,
        source="teach.plots_scale.makespan",
    ),
    Exercise(
        name="replicate",
        chapter=19,
        asks="Copies for the busy",
        solution=replicate,
        inputs=lambda: [(README, 16), (SECOND, 16), ([8.0, 1, 1], 6), ([1.0, 2], 2)],
        mistake=_all_to_the_busiest,
        says="after a copy the expert's load is shared by both: compare load / copies before each new copy",
        minutes=10,
        difficulty=2,
        importance=4,
        hint="Keep the number of copies of each expert. The next copy goes where load / copies is largest.",
        also=_replicate_written,
        source="papers.eplb.replicate",
    ),
    Exercise(
        name="packed",
        chapter=19,
        asks="Pack",
        solution=packed,
        inputs=lambda: [(README, 4), (SECOND, 6), ([9.0, 1, 1, 1], 2)],
        mistake=_in_order,
        says="that leaves the spots in order; begin with the heaviest, wherever it stands",
        others=((_without_room, "one rank gets more spots than its share: leave out the ranks that are full"),),
        minutes=12,
        difficulty=3,
        importance=4,
        hint="Sort the spots by load. For each, look at the ranks that still have room, and take that with the least sum.",
        also=_packed_written,
        source="papers.eplb.pack",
    ),
    Exercise(
        name="snaked",
        chapter=19,
        asks="The snake",
        solution=snaked,
        inputs=lambda: [(README, 4), (SECOND, 3), ([5.0, 4, 3, 2], 2)],
        mistake=_always_forth,
        says="every round begins at rank 0, so rank 0 always gets its heaviest: turn every second round around",
        minutes=8,
        difficulty=2,
        importance=3,
        hint="Sorted by load, the places 0 to 2R - 1 go to the ranks 0 .. R - 1, R - 1 .. 0; then the same again.",
        also=_snaked_written,
        source="papers.eplb.deal",
    ),
)
