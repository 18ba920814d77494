"""Global-batch balance: counts are added, losses are not averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import load_balancing_loss, load_share
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.teach import plots_domains
from sigma_lite.teach.exercises.exercise import Exercise


def micro_lbl(probs_MTE: Tensor) -> Tensor:
    return torch.stack([load_balancing_loss(probs_TE, probs_TE.topk(1).indices) for probs_TE in probs_MTE]).mean()


def _micro_in_a_loop(probs_MTE: Tensor) -> Tensor:
    M, T, E = probs_MTE.shape
    total = torch.zeros(())
    for probs_TE in probs_MTE:
        f_E = torch.bincount(probs_TE.argmax(dim=1), minlength=E) / T
        total = total + E * (f_E * probs_TE.mean(dim=0)).sum()
    return total / M


def global_lbl(probs_MTE: Tensor) -> Tensor:
    probs_TE = probs_MTE.flatten(0, 1)
    return load_balancing_loss(probs_TE, probs_TE.topk(1).indices)


def _global_term_by_term(probs_MTE: Tensor) -> Tensor:
    M, T, E = probs_MTE.shape
    f_E = torch.bincount(probs_MTE.argmax(dim=2).flatten(), minlength=E) / (M * T)
    return torch.stack([E * (f_E * probs_TE.mean(dim=0)).sum() for probs_TE in probs_MTE]).mean()


def pooled_shares(counts_ME: Tensor) -> Tensor:
    pooled = PooledCounts()
    return torch.stack([pooled.add(counts_E) for counts_E in counts_ME])


def _shares_by_running_sum(counts_ME: Tensor) -> Tensor:
    so_far_ME = counts_ME.cumsum(dim=0)
    return so_far_ME / so_far_ME.sum(dim=1, keepdim=True)


def _mean_of_shares(counts_ME: Tensor) -> Tensor:
    so_far_M = torch.arange(1, len(counts_ME) + 1)[:, None]
    return load_share(counts_ME).cumsum(0) / so_far_M


def _over_its_own(counts_ME: Tensor) -> Tensor:
    return counts_ME.cumsum(0) / counts_ME.sum(1, keepdim=True)


def buffer_losses(probs_MTE: Tensor) -> Tensor:
    """[M]: the loss that each micro-batch takes its gradient from."""
    counts_ME = torch.stack([torch.bincount(ids_T, minlength=probs_MTE.shape[2]) for ids_T in probs_MTE.argmax(-1)])
    pairs = zip(probs_MTE, pooled_shares(counts_ME), strict=True)
    return torch.stack([load_balancing_loss(probs_TE, probs_TE.topk(1).indices, f_E) for probs_TE, f_E in pairs])


def _buffer_in_a_loop(probs_MTE: Tensor) -> Tensor:
    E, losses = probs_MTE.shape[2], []
    counts_E = torch.zeros(E)
    for probs_TE in probs_MTE:
        for probs_E in probs_TE:
            counts_E[probs_E.argmax()] += 1
        f_E = counts_E / counts_E.sum()
        losses.append(E * (f_E * probs_TE.mean(dim=0)).sum())
    return torch.stack(losses)


def _each_its_own(probs_MTE: Tensor) -> Tensor:
    return torch.stack([load_balancing_loss(probs_TE, probs_TE.topk(1).indices) for probs_TE in probs_MTE])


def _all_at_the_end(probs_MTE: Tensor) -> Tensor:
    E = probs_MTE.shape[2]
    f_E = torch.bincount(probs_MTE.argmax(2).flatten(), minlength=E) / probs_MTE[..., 0].numel()
    return torch.stack([E * (f_E * probs_TE.mean(0)).sum() for probs_TE in probs_MTE])


def _count_comes_late(probs_MTE: Tensor) -> Tensor:
    E, losses, counts_E = probs_MTE.shape[2], [], torch.zeros(probs_MTE.shape[2])
    for probs_TE in probs_MTE:
        losses.append(E * (counts_E / counts_E.sum() * probs_TE.mean(0)).sum())
        counts_E = counts_E + torch.bincount(probs_TE.argmax(1), minlength=E)
    return torch.stack(losses)


def noise_floor(n_experts: int, tokens: int) -> float:
    """The micro loss to expect of a perfect and certain router that draws experts at random."""
    return 1 + (n_experts - 1) / tokens


def _noise_from_the_variance(n_experts: int, tokens: int) -> float:
    mean = 1 / n_experts
    variance = mean * (1 - mean) / tokens  # of the share that one expert gets
    return n_experts * n_experts * (variance + mean**2)


def _without_the_one(n_experts: int, tokens: int) -> float:
    return (n_experts - 1) / tokens


def _e_over_t(n_experts: int, tokens: int) -> float:
    return 1 + n_experts / tokens


def specialisation(f_DE: Tensor) -> float:
    return plots_domains.specialisation(f_DE.detach())


def _moved_tokens(f_DE: Tensor) -> float:
    average_E, moved = f_DE.mean(dim=0), 0.0
    for f_E in f_DE:
        moved += sum(max(0.0, (own - fair).item()) for own, fair in zip(f_E, average_E, strict=True))
    return moved / len(f_DE)


def _counted_twice(f_DE: Tensor) -> float:
    return 2 * specialisation(f_DE)


def _from_uniform(f_DE: Tensor) -> float:
    return 0.5 * (f_DE - 1 / f_DE.shape[1]).abs().sum(1).mean().item()


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _counts() -> list:
    counts_ME = torch.randint(0, 9, (4, 6), generator=_draw()) * torch.tensor([[1], [5], [2], [1]])
    return [(counts_ME,), (torch.tensor([[2, 0, 0], [1, 4, 5]]),)]


def _probs() -> list:
    draw = _draw()
    return [(torch.randn(3, 20, 6, generator=draw).softmax(-1),), (torch.randn(2, 5, 8, generator=draw).softmax(-1),)]


def _domains() -> list:
    draw = _draw()
    return [(torch.randn(D, E, generator=draw).softmax(-1),) for D, E in ((4, 8), (2, 5))]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="micro_lbl",
        chapter=7,
        asks="the micro-batch loss",
        minutes=5,
        difficulty=2,
        importance=4,
        solution=micro_lbl,
        also=_micro_in_a_loop,
        source="balance.losses.load_balancing_loss",
        hint="Take the loss of chapter 6 for each micro-batch by itself, with its own counts. Then average the M losses.",
        inputs=_probs,
        mistake=global_lbl,
        says="that is the global loss: here each micro-batch counts its own f",
    ),
    Exercise(
        name="global_lbl",
        chapter=7,
        asks="the global loss",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=global_lbl,
        also=_global_term_by_term,
        source="balance.losses.load_balancing_loss",
        hint="Count f over all micro-batches together. P may be averaged in any order, because the mean of means of equal"
        " size is the mean of all.",
        inputs=_probs,
        mistake=micro_lbl,
        says="that is the mean of the micro losses: each of them counted its own f. Count over the whole step first",
    ),
    Exercise(
        name="noise_floor",
        chapter=7,
        asks="the noise of few tokens",
        minutes=3,
        difficulty=2,
        importance=3,
        solution=noise_floor,
        also=_noise_from_the_variance,
        source="teach.exercises.chapter_07.noise_floor",
        hint="The loss is E times a sum of E squares, all with the same mean: a share's variance plus its mean squared."
        " That gives 1, what balance costs, and a part that falls with the tokens.",
        inputs=lambda: [(96, 128), (8, 512), (4, 10)],
        mistake=_without_the_one,
        says="that is the excess alone: a balanced layer costs 1 even without noise",
        others=((_e_over_t, "almost: one share is fixed by the others, so it is E - 1"),),
    ),
    Exercise(
        name="pooled_shares",
        chapter=7,
        asks="the buffer",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=pooled_shares,
        also=_shares_by_running_sum,
        source="balance.pooled.PooledCounts",
        hint="Keep a running sum of the counts. The share of each moment is this sum divided by its own total.",
        inputs=_counts,
        mistake=_mean_of_shares,
        says="that is a mean of shares: a small micro-batch weighs as much as a large one. Add counts, then divide",
        others=((_over_its_own, "you divide the running sum by the micro-batch's own total: divide it by the sum's total"),),
        axes="ME",
    ),
    Exercise(
        name="buffer_losses",
        chapter=7,
        asks="one loss for each micro-batch",
        minutes=10,
        difficulty=3,
        importance=4,
        solution=buffer_losses,
        also=_buffer_in_a_loop,
        source="balance.pooled.PooledCounts",
        hint="Go through the micro-batches in order. Add the counts of this one first, then make f from all counts so far.",
        inputs=_probs,
        mistake=_each_its_own,
        says="each of your losses uses its own counts only: keep the counts of the micro-batches before",
        others=(
            (_all_at_the_end, "you used the counts of the whole step, which the first micro-batch cannot know yet"),
            (
                _count_comes_late,
                "count a micro-batch before you take its loss: the first one has no other counts",
            ),
        ),
        axes="M",
    ),
    Exercise(
        name="specialisation",
        chapter=7,
        asks="how specialised?",
        minutes=10,
        difficulty=2,
        importance=3,
        solution=specialisation,
        also=_moved_tokens,
        source="teach.plots_domains.specialisation",
        hint="Compare each domain's shares with the mean over the domains. What one expert has too much, another lacks,"
        " so the sum of all differences counts each moved token twice.",
        inputs=_domains,
        mistake=_counted_twice,
        says="twice too large: a token that moves is missing at one expert and new at another, and is counted at both",
        others=((_from_uniform, "compare with the mean over the domains, not with an even load"),),
    ),
)
