"""Progressive sparsification: schedules, what they cost, and what a switch changes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.config import ModelConfig
from sigma_lite.teach.exercises.exercise import Exercise

Stages = Sequence[tuple[int, Sequence[int]]]


def shares_of_a_token(share: float, n_experts: int, k: int) -> float:
    fair = k / n_experts  # of all tokens that an expert serves, since each token is served k times
    return share / fair


def _by_counting(share: float, n_experts: int, k: int) -> float:
    tokens = 1_000_000
    its_copies, slots = share * tokens, k * tokens
    return its_copies / (slots / n_experts)


def _without_k(share: float, n_experts: int, k: int) -> float:
    return share * n_experts


def _times_k(share: float, n_experts: int, k: int) -> float:
    return share * n_experts * k


def schedule(step: int, switch_step: int, n_layers: int, head: Sequence[int]) -> tuple[int, ...]:
    return k_per_layer(step, switch_step=switch_step, n_layers=n_layers, head=head)


def _layer_by_layer(step: int, switch_step: int, n_layers: int, head: Sequence[int]) -> tuple[int, ...]:
    experts = []
    for layer in range(n_layers):
        early = head[layer] if layer < len(head) else 1
        experts.append(early if step < switch_step else 1)
    return tuple(experts)


def _switch_too_late(step: int, switch_step: int, n_layers: int, head: Sequence[int]) -> tuple[int, ...]:
    return schedule(step, switch_step + 1, n_layers, head)


def _head_too_long(step: int, switch_step: int, n_layers: int, head: Sequence[int]) -> tuple[int, ...]:
    return (1,) * n_layers if step >= switch_step else (*head, *(1,) * (n_layers - len(head)))


def _head_last(step: int, switch_step: int, n_layers: int, head: Sequence[int]) -> tuple[int, ...]:
    return schedule(step, switch_step, n_layers, head)[::-1]


def stages(step: int, stages: Stages, n_layers: int) -> tuple[int, ...]:
    reached = [head for first, head in stages if first <= step]
    return k_per_layer(0, switch_step=1, n_layers=n_layers, head=reached[-1])


def _last_stage_reached(step: int, stages: Stages, n_layers: int) -> tuple[int, ...]:
    for first, stage in stages:
        if first <= step:
            head = stage
    return tuple([*head, *[1] * n_layers][:n_layers])


def _one_step_late(step: int, stages: Stages, n_layers: int) -> tuple[int, ...]:
    reached = [head for first, head in stages if first < step] or [stages[0][1]]
    return k_per_layer(0, switch_step=1, n_layers=n_layers, head=reached[-1])


def mean_active(net: ModelConfig, head: Sequence[int], switch_step: int, steps: int) -> float:
    lists = (k_per_layer(step, switch_step=switch_step, n_layers=net.n_layers, head=head) for step in range(steps))
    return sum(net.ledger(k).active for k in lists) / steps


def _two_lists_weighed(net: ModelConfig, head: Sequence[int], switch_step: int, steps: int) -> float:
    early, late = (net.ledger(schedule(step, 1, net.n_layers, head)).active for step in (0, 1))
    before = min(switch_step, steps) / steps
    return before * early + (1 - before) * late


def _unweighted(net: ModelConfig, head: Sequence[int], switch_step: int, steps: int) -> float:
    return (mean_active(net, head, 1, 1) + mean_active(net, head, 0, 1)) / 2


def _past_the_end(net: ModelConfig, head: Sequence[int], switch_step: int, steps: int) -> float:
    early, late = mean_active(net, head, 1, 1), mean_active(net, head, 0, 1)
    return (switch_step * early + (steps - switch_step) * late) / steps


def work(net: ModelConfig, lists: Sequence[Sequence[int]], tokens: int) -> list[int]:
    return list(accumulate(net.ledger(k).active * tokens for k in lists))


def _work_in_a_loop(net: ModelConfig, lists: Sequence[Sequence[int]], tokens: int) -> list[int]:
    done, so_far = [], 0
    for k in lists:
        so_far += net.ledger(k).active * tokens
        done.append(so_far)
    return done


def _of_each_step(net: ModelConfig, lists: Sequence[Sequence[int]], tokens: int) -> list[int]:
    return [net.ledger(k).active * tokens for k in lists]


def _all_parameters(net: ModelConfig, lists: Sequence[Sequence[int]], tokens: int) -> list[int]:
    return [(n + 1) * net.ledger().non_embedding * tokens for n in range(len(lists))]


def winners_part(gates_TK: Tensor) -> float:
    return (gates_TK.amax(1) / gates_TK.sum(1)).mean().item()


def _part_token_by_token(gates_TK: Tensor) -> float:
    parts = [max(gates_K) / sum(gates_K) for gates_K in gates_TK.tolist()]
    return sum(parts) / len(parts)


def _ratio_of_sums(gates_TK: Tensor) -> float:
    return (gates_TK.amax(1).sum() / gates_TK.sum()).item()


def _first_gate(gates_TK: Tensor) -> float:
    return (gates_TK[:, 0] / gates_TK.sum(1)).mean().item()


def switch_gap(
    steps: Sequence[int], losses: Sequence[float], kept: Sequence[float], switch_step: int
) -> tuple[float, float]:
    gaps = [mine - theirs for mine, theirs in zip(losses, kept, strict=True)]
    first = next(place for place, step in enumerate(steps) if step > switch_step)
    return max(gaps[first : first + 2]), sum(gaps[-5:]) / 5


def _gap_with_tensors(
    steps: Sequence[int], losses: Sequence[float], kept: Sequence[float], switch_step: int
) -> tuple[float, float]:
    gap_N = torch.tensor(losses, dtype=torch.float64) - torch.tensor(kept, dtype=torch.float64)
    after_N = gap_N[torch.tensor(steps) > switch_step]
    return after_N[:2].max().item(), gap_N[-5:].mean().item()


def _other_sign(
    steps: Sequence[int], losses: Sequence[float], kept: Sequence[float], switch_step: int
) -> tuple[float, float]:
    at_switch, at_end = switch_gap(steps, losses, kept, switch_step)
    return -at_switch, -at_end


def _switch_itself(
    steps: Sequence[int], losses: Sequence[float], kept: Sequence[float], switch_step: int
) -> tuple[float, float]:
    gaps = [mine - theirs for mine, theirs in zip(losses, kept, strict=True)]
    first = next(place for place, step in enumerate(steps) if step >= switch_step)
    return gaps[first], sum(gaps[-5:]) / 5


def _largest_of_all(
    steps: Sequence[int], losses: Sequence[float], kept: Sequence[float], switch_step: int
) -> tuple[float, float]:
    gaps = [mine - theirs for mine, theirs in zip(losses, kept, strict=True)]
    return max(gaps), sum(gaps[-5:]) / 5


def _schedules() -> list:
    return [(step, 10, 5, (8, 4, 2)) for step in (0, 9, 10, 11)] + [(3, 7, 2, (8, 6, 4)), (3, 7, 3, ())]


def _stages() -> list:
    plan = [(0, (8, 8, 4)), (10, (4, 2)), (30, ())]
    return [(step, plan, 5) for step in (0, 9, 10, 29, 30, 31)] + [(3, [(0, (2, 2, 2))], 2)]


def _runs() -> list:
    net = ModelConfig(n_layers=4)
    return [(net, (8, 4), 7, 10), (net, (), 5, 10), (net, (2,), 20, 10)]


def _lists() -> list:
    net = ModelConfig(n_layers=2)
    return [(net, [(8, 4), (8, 4), (1, 1)], 100), (net, [(2, 1), (1, 1)], 2048)]


def _gates() -> list:
    draw = torch.Generator().manual_seed(10)
    gates_TK = torch.rand(6, 4, generator=draw)
    return [(gates_TK,), (torch.tensor([[0.1, 0.3], [0.9, 0.1], [0.2, 0.2]]),)]


def _curves() -> list:
    steps = [8, 16, 24, 32, 40, 48, 56, 64]
    kept = [6.0, 5.0, 4.5, 4.2, 4.0, 3.9, 3.8, 3.7]
    converted = [6.0, 5.0, 4.5, 4.5, 4.4, 4.05, 3.9, 3.75]
    slower = [6.0, 5.0, 4.5, 4.2, 4.1, 4.3, 4.0, 3.8]
    rising = [6.0, 5.0, 4.6, 4.3, 4.2, 4.2, 4.2, 4.2]
    return [(steps, converted, kept, 24), (steps, slower, kept, 33), (steps, rising, kept, 16)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="shares_of_a_token",
        chapter=11,
        asks="does the token fit?",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=shares_of_a_token,
        also=_by_counting,
        source="teach.exercises.chapter_11.shares_of_a_token",
        hint="With k experts per token there are k times as many slots as tokens. A fair share is all slots divided by E.",
        inputs=lambda: [(0.03, 96, 1), (0.03, 96, 8), (0.5, 4, 2)],
        mistake=_without_k,
        says="right for k = 1. With more experts per token a fair share is larger: k / E of all tokens",
        others=((_times_k, "upside down in k: more experts per token make a fair share larger, and the token fits better"),),
    ),
    Exercise(
        name="k_schedule",
        chapter=11,
        asks="the schedule",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=schedule,
        also=_layer_by_layer,
        source="balance.schedule.k_per_layer",
        hint="From the switch on, every layer has 1. Before it, the first layers have the head and the others have 1.",
        inputs=_schedules,
        mistake=_switch_too_late,
        says="the switch comes one step late: at step `switch_step` all layers already use 1",
        others=(
            (_head_too_long, "a head may be longer than the model: cut it to n_layers"),
            (_head_last, "the list begins with layer 0, the lowest: the head comes first"),
        ),
    ),
    Exercise(
        name="k_stages",
        chapter=11,
        asks="several stages",
        minutes=10,
        difficulty=2,
        importance=3,
        solution=stages,
        also=_last_stage_reached,
        source="balance.schedule.k_per_layer",
        hint="The last stage whose first step has been reached. Then it is a head and a tail of ones.",
        inputs=_stages,
        mistake=_one_step_late,
        says="your stages begin one step late: a stage holds from its first step on",
    ),
    Exercise(
        name="mean_active",
        chapter=11,
        asks="the mean bill",
        minutes=10,
        difficulty=2,
        importance=3,
        solution=mean_active,
        also=_two_lists_weighed,
        source="config.ModelConfig.ledger",
        hint="There are only two lists. Weigh the active parameters of each with the steps for which it holds. A switch"
        " after the last step never comes.",
        inputs=_runs,
        mistake=_unweighted,
        says="this is the mean of the two lists: weigh each with the steps for which it holds",
        others=((_past_the_end, "right if the run reaches the switch: the first list holds for at most `steps` steps"),),
    ),
    Exercise(
        name="work_done",
        chapter=11,
        asks="work instead of steps",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=work,
        also=_work_in_a_loop,
        source="teach.exercises.chapter_11.work",
        hint="One step costs its active parameters times its tokens. Keep a running sum.",
        inputs=_lists,
        mistake=_of_each_step,
        says="that is the work of each step: after a step, count all steps up to it",
        others=((_all_parameters, "you count all experts: a token multiplies with the active parameters only"),),
    ),
    Exercise(
        name="winners_part",
        chapter=11,
        asks="what the winner keeps",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=winners_part,
        also=_part_token_by_token,
        source="teach.exercises.chapter_11.winners_part",
        hint="For each token, its largest gate divided by the sum of its gates. Then the mean over tokens.",
        inputs=_gates,
        mistake=_ratio_of_sums,
        says="you add up first and divide once, so tokens with large gates weigh more: divide token by token",
        others=((_first_gate, "you take the first gate: take the largest of each token"),),
    ),
    Exercise(
        name="switch_gap",
        chapter=11,
        asks="a jump, and what is left of it",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=switch_gap,
        also=_gap_with_tensors,
        source="teach.exercises.chapter_11.switch_gap",
        hint="Subtract the curves point by point. Find the first point after the switch.",
        inputs=_curves,
        mistake=_other_sign,
        says="the sign is turned around: a converted run that is worse has a positive gap",
        others=(
            (_switch_itself, "begin after the switch: a point at the switch or before it has not felt it"),
            (_largest_of_all, "that is the largest gap of the whole run: only the first two points after the switch count"),
        ),
    ),
)
