"""Progressive sparsification: a schedule with several stages, and what a schedule costs on average."""

from __future__ import annotations

from collections.abc import Sequence

from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.config import ModelConfig
from sigma_lite.teach.exercises.exercise import Exercise

Stages = Sequence[tuple[int, Sequence[int]]]


def stages(step: int, stages: Stages, n_layers: int) -> tuple[int, ...]:
    reached = [head for first, head in stages if first <= step]
    return k_per_layer(0, switch_step=1, n_layers=n_layers, head=reached[-1])


def _one_step_late(step: int, stages: Stages, n_layers: int) -> tuple[int, ...]:
    reached = [head for first, head in stages if first < step] or [stages[0][1]]
    return k_per_layer(0, switch_step=1, n_layers=n_layers, head=reached[-1])


def mean_active(net: ModelConfig, head: Sequence[int], switch_step: int, steps: int) -> float:
    lists = (k_per_layer(step, switch_step=switch_step, n_layers=net.n_layers, head=head) for step in range(steps))
    return sum(net.ledger(k).active for k in lists) / steps


def _unweighted(net: ModelConfig, head: Sequence[int], switch_step: int, steps: int) -> float:
    return (mean_active(net, head, 1, 1) + mean_active(net, head, 0, 1)) / 2


def _stages() -> list:
    plan = [(0, (8, 8, 4)), (10, (4, 2)), (30, ())]
    return [(step, plan, 5) for step in (0, 9, 10, 29, 30, 31)] + [(3, [(0, (2, 2, 2))], 2)]


def _runs() -> list:
    net = ModelConfig(n_layers=4)
    return [(net, (8, 4), 7, 10), (net, (), 5, 10), (net, (2,), 20, 10)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="k_stages",
        chapter=11,
        solution=stages,
        inputs=_stages,
        mistake=_one_step_late,
        says="your stages begin one step late: a stage holds from its first step on",
    ),
    Exercise(
        name="mean_active",
        chapter=11,
        solution=mean_active,
        inputs=_runs,
        mistake=_unweighted,
        says="this is the mean of the two lists: weigh each with the steps for which it holds",
    ),
)
