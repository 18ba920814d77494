"""The load-balancing loss: what it is made of, where its gradient goes, and what it measures."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import expert_counts, load_balancing_loss, load_share, mean_over_tokens
from sigma_lite.teach.differences import Tolerance
from sigma_lite.teach.exercises.exercise import Exercise


def _mean_in_a_loop(probs_TE: Tensor) -> Tensor:
    total_E = torch.zeros(probs_TE.shape[1])
    for probs_E in probs_TE:
        total_E = total_E + probs_E
    return total_E / len(probs_TE)


def loss(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    return load_balancing_loss(probs_TE, ids_TK)


def _loss_in_a_loop(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    E, slots = probs_TE.shape[1], ids_TK.numel()
    total = torch.zeros(())
    for e in range(E):
        f_e = (ids_TK == e).sum() / slots
        total = total + f_e * probs_TE[:, e].mean()
    return E * total


def _without_e(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    return loss(probs_TE, ids_TK) / probs_TE.shape[1]


def _per_token(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    return loss(probs_TE, ids_TK) * ids_TK.shape[1]


def _not_divided(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    return loss(probs_TE, ids_TK) * ids_TK.numel()


def our_weight(theirs: float, k: int, n_layers: int) -> float:
    """Their term: theirs * mean over layers of K * LBL. Ours: weight * sum over layers of LBL."""
    return theirs * k / n_layers


def _term_by_term(theirs: float, k: int, n_layers: int) -> float:
    lbl = 1.25  # any value of the loss, the same in all layers
    their_term = theirs * sum([k * lbl] * n_layers) / n_layers
    our_term_for_weight_1 = sum([lbl] * n_layers)
    return their_term / our_term_for_weight_1


def _the_other_way(theirs: float, k: int, n_layers: int) -> float:
    return theirs * n_layers / k


def _layers_forgotten(theirs: float, k: int, n_layers: int) -> float:
    return theirs * k


def gradient(logits_TE: Tensor) -> Tensor:
    z_TE = logits_TE.detach().requires_grad_()
    probs_TE = z_TE.softmax(-1)
    return torch.autograd.grad(load_balancing_loss(probs_TE, z_TE.topk(1).indices), z_TE)[0]


def _gradient_by_hand(logits_TE: Tensor) -> Tensor:
    T, E = logits_TE.shape
    p_TE = logits_TE.detach().softmax(-1)
    f_E = torch.bincount(p_TE.argmax(-1), minlength=E) / T
    return E / T * p_TE * (f_E - (p_TE * f_E).sum(-1, keepdim=True))


def _one_sum_for_all(logits_TE: Tensor) -> Tensor:
    T, E = logits_TE.shape
    p_TE = logits_TE.detach().softmax(-1)
    f_E = torch.bincount(p_TE.argmax(-1), minlength=E) / T
    return E / T * p_TE * (f_E - (p_TE * f_E).sum())


def _on_the_probabilities(logits_TE: Tensor) -> Tensor:
    T, E = logits_TE.shape
    return (E / T * load_share(expert_counts(logits_TE.detach().topk(1).indices, E))).expand(T, E)


def lbl(f_E: Tensor, P_E: Tensor) -> Tensor:
    # detached: a covariance does not notice a constant, so its gradient differs from the product's by one, rightly
    return load_balancing_loss(P_E[None], torch.zeros(1, 1, dtype=torch.int64), f_E).detach()


def _covariance(f_E: Tensor, P_E: Tensor) -> Tensor:
    covariance = ((f_E - f_E.mean()) * (P_E - P_E.mean())).mean()
    return 1 + len(f_E) ** 2 * covariance


def _unbiased(f_E: Tensor, P_E: Tensor) -> Tensor:
    return 1 + len(f_E) ** 2 * torch.cov(torch.stack((f_E, P_E)))[0, 1]


def _sum_of_products(f_E: Tensor, P_E: Tensor) -> Tensor:
    return 1 + len(f_E) ** 2 * ((f_E - f_E.mean()) * (P_E - P_E.mean())).sum()


def shrunk(logits_TE: Tensor, g: float) -> tuple[float, float]:
    """(LBL, load of the busiest expert in fair shares) of a router whose logits are multiplied by g; K = 1."""
    z_TE = g * logits_TE.detach()
    ids_TK = z_TE.topk(1).indices
    f_E = load_share(expert_counts(ids_TK, z_TE.shape[1]))
    return load_balancing_loss(z_TE.softmax(-1), ids_TK).item(), (len(f_E) * f_E.max()).item()


def _shrunk_plainly(logits_TE: Tensor, g: float) -> tuple[float, float]:
    T, E = logits_TE.shape
    probs_TE = torch.softmax(g * logits_TE, dim=1)
    f_E = torch.bincount(probs_TE.argmax(dim=1), minlength=E) / T
    P_E = probs_TE.mean(dim=0)
    return (E * (f_E * P_E).sum()).item(), (E * f_E.max()).item()


def _scaled_probabilities(logits_TE: Tensor, g: float) -> tuple[float, float]:
    value, busiest = shrunk(logits_TE, 1.0)
    return g * value, busiest


def _in_shares(logits_TE: Tensor, g: float) -> tuple[float, float]:
    value, busiest = shrunk(logits_TE, g)
    return value, busiest / logits_TE.shape[1]


def moved(before_TE: Tensor, after_TE: Tensor) -> float:
    """Share of the tokens whose expert is another one; K = 1."""
    return (before_TE.argmax(-1) != after_TE.argmax(-1)).float().mean().item()


def _moved_in_a_loop(before_TE: Tensor, after_TE: Tensor) -> float:
    count = 0
    for before_E, after_E in zip(before_TE, after_TE, strict=True):
        count += int(before_E.argmax() != after_E.argmax())
    return count / len(before_TE)


def _any_logit(before_TE: Tensor, after_TE: Tensor) -> float:
    return (before_TE != after_TE).any(-1).float().mean().item()


def _draw(seed: int = 6) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _probabilities() -> list:
    draw = _draw()
    return [(torch.randn(6, 4, generator=draw).softmax(-1),), (torch.randn(9, 5, generator=draw).softmax(-1),)]


def _routed() -> list:
    draw, cases = _draw(), []
    for T, E, k in ((6, 4, 1), (9, 8, 3), (5, 12, 2)):
        probs_TE = torch.randn(T, E, generator=draw).softmax(-1)
        cases.append((probs_TE, probs_TE.topk(k).indices))
    return cases


def _logits() -> list:
    draw = _draw()
    return [(torch.randn(7, 5, generator=draw),), (3 * torch.randn(4, 8, generator=draw),)]


def _shares() -> list:
    draw = _draw()
    return [tuple(torch.rand(2, E, generator=draw).softmax(-1)) for E in (4, 12)]


def _scaled() -> list:
    draw = _draw()
    return [(torch.randn(40, 6, generator=draw), 0.5), (2 * torch.randn(30, 8, generator=draw), 0.1)]


def _pairs() -> list:
    draw = _draw()
    before_TE = torch.randn(40, 6, generator=draw)
    return [(before_TE, before_TE + 0.5 * torch.randn(40, 6, generator=draw)), (before_TE, 0.25 * before_TE)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="mean_probability",
        chapter=6,
        asks="the mean probability",
        minutes=3,
        difficulty=1,
        importance=4,
        solution=mean_over_tokens,
        also=_mean_in_a_loop,
        source="balance.losses.mean_over_tokens",
        hint="Each row belongs to a token and sums to 1. You want one number for each expert, so average down the columns.",
        inputs=_probabilities,
        mistake=lambda probs_TE: probs_TE.mean(1),
        says="that is one number for each token, always 1/E: average over the tokens, which is dimension 0",
        others=((lambda probs_TE: probs_TE.sum(0), "your numbers sum to T: divide by the number of tokens"),),
        axes="E",
    ),
    Exercise(
        name="load_balancing_loss",
        chapter=6,
        asks="the balance loss",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=loss,
        also=_loss_in_a_loop,
        source="balance.losses.load_balancing_loss",
        hint="Count how many slots each expert has, and divide by the number of all slots: that is f. Take P from step 1."
        " Multiply the two expert by expert, add up, and multiply by the number of experts. f is a count: no gradient.",
        inputs=_routed,
        mistake=_without_e,
        says="right up to a factor: multiply by the number of experts, so that a balanced layer scores 1",
        others=(
            (_per_token, "right for K = 1. With more, your f sums to K: divide by the number of slots, not of tokens"),
            (_not_divided, "your f holds counts: divide them by the number of all slots, since f must sum to 1"),
        ),
    ),
    Exercise(
        name="our_weight",
        chapter=6,
        asks="a weight from another code",
        minutes=5,
        difficulty=2,
        importance=2,
        solution=our_weight,
        also=_term_by_term,
        source="teach.exercises.chapter_06.our_weight",
        hint="Write down both terms of the training loss for a layer whose LBL is 1. The two terms must be equal.",
        inputs=lambda: [(0.01, 2, 1), (0.02, 8, 24), (0.001, 1, 6)],
        mistake=_the_other_way,
        says="upside down: their loss is K times as large, so our weight must be larger to give the same term;"
        " and we add the layers up where they average",
        others=((_layers_forgotten, "right for one layer. They average over layers and we add them up"),),
    ),
    Exercise(
        name="lbl_covariance",
        chapter=6,
        asks="one plus a covariance",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=lbl,
        also=_covariance,
        source="balance.losses.load_balancing_loss",
        hint="A covariance is the mean, over experts, of (f minus its mean) times (P minus its mean).",
        inputs=_shares,
        mistake=_unbiased,
        says="torch.cov divides by E - 1, as an estimate from a sample would. These are all experts: divide by E",
        others=((_sum_of_products, "you add the products up: a covariance is a mean, so divide by E"),),
    ),
    Exercise(
        name="lbl_gradient",
        chapter=6,
        asks="the gradient on the logits",
        minutes=15,
        difficulty=3,
        importance=4,
        solution=gradient,
        also=_gradient_by_hand,
        source="balance.losses.load_balancing_loss",
        hint="The formula above is the answer. Compute f from the largest logit of each token, p by a softmax,"
        " and the inner sum once for each token.",
        inputs=_logits,
        mistake=_on_the_probabilities,
        says="that is the gradient on the probabilities, which depend on all logits: go on through the softmax",
        others=((_one_sum_for_all, "the inner sum runs over experts: one number for each token, sum(-1, keepdim=True)"),),
        axes="TE",
    ),
    Exercise(
        name="shrunk_logits",
        chapter=6,
        asks="the cheap way out",
        minutes=8,
        difficulty=2,
        importance=5,
        solution=shrunk,
        also=_shrunk_plainly,
        source="teach.exercises.chapter_06.shrunk",
        hint="Multiply the logits by g first. Then take the softmax and the largest logit as always; K = 1.",
        inputs=_scaled,
        mistake=_scaled_probabilities,
        says="you multiplied the probabilities by g, so they no longer sum to 1: multiply the logits, then take the softmax",
        others=((_in_shares, "your second number is a share of the tokens: multiply by E, so that it is in fair shares"),),
        tolerance=Tolerance(1e-4, 1e-5),
    ),
    Exercise(
        name="moved_tokens",
        chapter=6,
        asks="who moved?",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=moved,
        also=_moved_in_a_loop,
        source="teach.exercises.chapter_06.moved",
        hint="The expert of a token is the place of its largest logit. Compare the two places, token by token.",
        inputs=_pairs,
        mistake=_any_logit,
        says="you asked whether any logit changed: ask whether the largest logit is in another place",
    ),
)
