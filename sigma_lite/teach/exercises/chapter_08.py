"""Top-1 LBL: what is pooled before it is divided, and the gradient that reaches the router."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import top1_load_balancing_loss
from sigma_lite.teach.exercises.exercise import Exercise


def certainty(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Mean over tokens of the probability that a token gives to its K experts together."""
    return probs_TE.gather(1, ids_TK).sum(1).mean()


def _certainty_in_a_loop(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    total = torch.zeros(())
    for probs_E, ids_K in zip(probs_TE, ids_TK, strict=True):
        total = total + probs_E[ids_K].sum()
    return total / len(probs_TE)


def _mean_over_slots(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    return certainty(probs_TE, ids_TK) / ids_TK.shape[1]


def top1(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return top1_load_balancing_loss(logits_TE, ids_TK, temperature)


def _top1_plainly(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    probs_TE = (logits_TE / temperature).softmax(dim=1)
    fhat_E = probs_TE.mean(dim=0)
    pbar = probs_TE.gather(1, ids_TK).sum(dim=1).mean()
    return probs_TE.shape[1] * (fhat_E**2).sum() / pbar


def _at_temperature_1(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return top1(logits_TE, ids_TK, 1.0)


def _times_temperature(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return top1(logits_TE, ids_TK, 1 / temperature)


def _by_slots(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return ids_TK.shape[1] * top1(logits_TE, ids_TK, temperature)


def _counted(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    probs_TE = (logits_TE / temperature).softmax(-1)
    f_E = torch.bincount(ids_TK.flatten(), minlength=probs_TE.shape[1]) / ids_TK.numel()
    return len(f_E) * (f_E * probs_TE.mean(0)).sum() / certainty(probs_TE, ids_TK)


def _of_the_winner(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return top1(logits_TE, logits_TE.topk(1).indices, temperature)


def slope(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """T times dL / dp: (2 E fhat_e - L where e is chosen) / pbar, [T, E]."""
    p_TE = probs_TE.detach()
    E, fhat_E, pbar = p_TE.shape[1], p_TE.mean(0), certainty(p_TE, ids_TK)
    loss = E * fhat_E.square().sum() / pbar
    chosen_TE = torch.zeros_like(p_TE).scatter(1, ids_TK, 1.0)
    return (2 * E * fhat_E - loss * chosen_TE) / pbar


def _slope_by_autograd(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    p_TE = probs_TE.detach().requires_grad_()
    pbar = p_TE.gather(1, ids_TK).sum(1).mean()
    loss = p_TE.shape[1] * p_TE.mean(0).square().sum() / pbar
    return len(p_TE) * torch.autograd.grad(loss, p_TE)[0]


def _push_only(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    p_TE = probs_TE.detach()
    return (2 * p_TE.shape[1] * p_TE.mean(0) / certainty(p_TE, ids_TK)).expand_as(p_TE).clone()


def _bracket_only(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    return slope(probs_TE, ids_TK) * certainty(probs_TE.detach(), ids_TK)


def asked(fhat_E: Tensor, loss: float) -> Tensor:
    """[E, E] bool: does a token of expert w (row) gain by giving probability to e (column)?"""
    E = len(fhat_E)
    return E * fhat_E.detach()[:, None] - E * fhat_E.detach() > loss / 2


def _asked_in_a_loop(fhat_E: Tensor, loss: float) -> Tensor:
    E = len(fhat_E)
    answer_EE = torch.zeros(E, E, dtype=torch.bool)
    for w in range(E):
        for e in range(E):
            answer_EE[w, e] = bool(2 * E * fhat_E[w] - loss > 2 * E * fhat_E[e])
    return answer_EE


def _columns_first(fhat_E: Tensor, loss: float) -> Tensor:
    return asked(fhat_E, loss).T.contiguous()


def _any_difference(fhat_E: Tensor, loss: float) -> Tensor:
    return asked(fhat_E, 0.0)


def _not_in_shares(fhat_E: Tensor, loss: float) -> Tensor:
    return fhat_E.detach()[:, None] - fhat_E.detach() > loss / 2


def invisible(logits_TE: Tensor, temperature: float, level: float) -> int:
    """How many experts have a mean probability below `level` fair shares."""
    fhat_E = (logits_TE / temperature).softmax(-1).mean(0)
    return int((len(fhat_E) * fhat_E < level).sum())


def _invisible_in_a_loop(logits_TE: Tensor, temperature: float, level: float) -> int:
    probs_TE, count = (logits_TE / temperature).softmax(dim=1), 0
    for e in range(probs_TE.shape[1]):
        count += bool(probs_TE[:, e].mean() < level / probs_TE.shape[1])
    return count


def _invisible_by_winners(logits_TE: Tensor, temperature: float, level: float) -> int:
    f_E = torch.bincount(logits_TE.argmax(-1), minlength=logits_TE.shape[1]) / len(logits_TE)
    return int((len(f_E) * f_E < level).sum())


def _invisible_without_shares(logits_TE: Tensor, temperature: float, level: float) -> int:
    return int(((logits_TE / temperature).softmax(-1).mean(0) < level).sum())


def pooled(logits_MTE: Tensor, k: int) -> Tensor:
    logits_TE = logits_MTE.flatten(0, 1)
    return top1_load_balancing_loss(logits_TE, logits_TE.topk(k).indices)


def _pooled_plainly(logits_MTE: Tensor, k: int) -> Tensor:
    probs_NE = logits_MTE.reshape(-1, logits_MTE.shape[-1]).softmax(dim=1)
    fhat_E, pbar = probs_NE.mean(dim=0), probs_NE.topk(k).values.sum(dim=1).mean()
    return len(fhat_E) * (fhat_E**2).sum() / pbar


def _mean_of_losses(logits_MTE: Tensor, k: int) -> Tensor:
    return torch.stack([pooled(logits_TE[None], k) for logits_TE in logits_MTE]).mean()


def _mean_of_chosen(logits_MTE: Tensor, k: int) -> Tensor:
    return k * pooled(logits_MTE, k)


def gradient(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return torch.func.grad(top1_load_balancing_loss)(logits_TE.detach(), ids_TK, temperature)


def _gradient_through_the_softmax(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    p_TE = (logits_TE.detach() / temperature).softmax(-1)
    a_TE = slope(p_TE, ids_TK)
    return p_TE * (a_TE - (p_TE * a_TE).sum(1, keepdim=True)) / (len(p_TE) * temperature)


def _without_temperature(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return temperature * gradient(logits_TE, ids_TK, temperature)


def _gradient_of_mean(logits_TE: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return ids_TK.shape[1] * gradient(logits_TE, ids_TK, temperature)


def _batches() -> list:
    generator = torch.Generator().manual_seed(8)
    shapes = ((3, 10, 5, 1), (1, 6, 4, 1), (2, 8, 6, 3))
    return [(torch.randn(*shape, generator=generator), k) for *shape, k in shapes]


def _logits() -> list:
    generator = torch.Generator().manual_seed(8)
    cases = [(torch.randn(7, 5, generator=generator), k, temperature) for k, temperature in ((1, 1.0), (1, 0.5), (2, 0.5))]
    return [(logits_TE, logits_TE.topk(k).indices, temperature) for logits_TE, k, temperature in cases]


def _chosen() -> list:
    generator = torch.Generator().manual_seed(8)
    made = [(torch.randn(T, E, generator=generator).softmax(-1), k) for T, E, k in ((7, 5, 2), (6, 4, 1), (5, 8, 3))]
    return [(probs_TE, probs_TE.topk(k).indices) for probs_TE, k in made]


def _crowds() -> list:
    return [(torch.tensor([0.5, 0.3, 0.15, 0.05]), 1.4), (torch.tensor([0.4, 0.4, 0.1, 0.06, 0.04]), 3.0)]


def _skewed() -> list:
    generator = torch.Generator().manual_seed(8)
    lean_E = torch.linspace(-2, 2, 12)
    return [
        (torch.randn(60, 12, generator=generator) + lean_E, t, level) for t, level in ((1.0, 0.3), (0.3, 0.5), (2.0, 0.7))
    ]


PER_TOKEN = "right for K = 1; with more, add up the K chosen probabilities of a token before you take the mean over tokens"


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="certainty",
        chapter=8,
        asks="the certainty",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=certainty,
        also=_certainty_in_a_loop,
        source="balance.losses.top1_load_balancing_loss",
        hint="For each token, look up the probabilities of its K experts and add them up. Then take the mean over tokens.",
        inputs=_chosen,
        mistake=_mean_over_slots,
        says=PER_TOKEN,
    ),
    Exercise(
        name="top1_loss",
        chapter=8,
        asks="the Top-1 loss",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=top1,
        also=_top1_plainly,
        source="balance.losses.top1_load_balancing_loss",
        hint="Divide the logits by the temperature and take the softmax. All the rest is computed from these probabilities.",
        inputs=_logits,
        mistake=_at_temperature_1,
        says="right at temperature 1: the softmax must see logits / temperature",
        others=(
            (_times_temperature, "you multiplied by the temperature: a low temperature makes a router look more certain"),
            (_by_slots, PER_TOKEN),
            (_of_the_winner, PER_TOKEN),
            (_counted, "you counted choices: here the share is the mean probability, and it is squared"),
        ),
    ),
    Exercise(
        name="probability_slope",
        chapter=8,
        asks="push and pull",
        minutes=10,
        difficulty=3,
        importance=4,
        solution=slope,
        also=_slope_by_autograd,
        source="teach.exercises.chapter_08.slope",
        hint="The push is one number for each expert. The pull is L where an expert is chosen by the token and 0 elsewhere."
        " scatter(1, ids_TK, 1.0) into zeros marks the chosen.",
        inputs=_chosen,
        mistake=_push_only,
        says="that is the push alone: subtract L where the expert is one that the token has chosen",
        others=((_bracket_only, "that is the bracket: divide it by the certainty, the 1 / pbar in front of it"),),
        axes="TE",
    ),
    Exercise(
        name="asked_to_leave",
        chapter=8,
        asks="who is asked to leave?",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=asked,
        also=_asked_in_a_loop,
        source="teach.exercises.chapter_08.asked",
        hint="Compare all pairs of experts in fair shares, that is E times the mean probability. A column minus a row makes"
        " all differences at once.",
        inputs=_crowds,
        mistake=_columns_first,
        says="mirrored: the row is the expert that the token has, the column the one that it might go to",
        others=(
            (_any_difference, "you ask for any difference: the loss tolerates L / 2 fair shares"),
            (_not_in_shares, "in the inequality stands E times the mean probability, on both sides"),
        ),
    ),
    Exercise(
        name="top1_gradient",
        chapter=8,
        asks="the gradient that reaches the router",
        minutes=20,
        difficulty=4,
        importance=3,
        solution=gradient,
        also=_gradient_through_the_softmax,
        source="balance.losses.top1_load_balancing_loss",
        hint="Take the slope of step 3, with the temperature inside of p, and go through the softmax as in chapter 6:"
        " p times (slope minus the mean of the slope under p), divided by T and by the temperature.",
        inputs=_logits,
        mistake=_without_temperature,
        says="right up to the factor 1 / temperature: the softmax sees logits / temperature, so the chain rule divides",
        others=((_gradient_of_mean, PER_TOKEN),),
        axes="TE",
    ),
    Exercise(
        name="top1_pooled",
        chapter=8,
        asks="pooled over micro-batches",
        minutes=10,
        difficulty=2,
        importance=3,
        solution=pooled,
        also=_pooled_plainly,
        source="balance.losses.top1_load_balancing_loss",
        hint="Pool the two means over all tokens of the step, and only then square and divide. The mean of the M losses is"
        " something else.",
        inputs=_batches,
        mistake=_mean_of_losses,
        says="this is the mean of the micro-batches' losses: pool fhat and pbar first, then square and divide",
        others=((_mean_of_chosen, PER_TOKEN),),
    ),
    Exercise(
        name="invisible_experts",
        chapter=8,
        asks="experts that nobody is close to",
        minutes=5,
        difficulty=2,
        importance=3,
        solution=invisible,
        also=_invisible_in_a_loop,
        source="teach.exercises.chapter_08.invisible",
        hint="The mean probability of a fair expert is 1/E. So compare E times the mean probability with the level.",
        inputs=_skewed,
        mistake=_invisible_by_winners,
        says="you counted winners: here the mean probability at this temperature decides, because the gradient has its size",
        others=((_invisible_without_shares, "the level is in fair shares: multiply the mean probability by E"),),
    ),
)
