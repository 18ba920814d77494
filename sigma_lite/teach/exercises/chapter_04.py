"""The router: the order of softmax and top-k, the slope of a gate, and what counts as a share."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.teach.exercises.exercise import Exercise


def gates(logits_TE: Tensor, k: int) -> Tensor:
    return logits_TE.softmax(-1).topk(k, dim=-1).values


def _gates_by_hand(logits_TE: Tensor, k: int) -> Tensor:
    exps_TE = torch.exp(logits_TE)
    probs_TE = exps_TE / exps_TE.sum(dim=1, keepdim=True)
    return probs_TE.sort(dim=1, descending=True).values[:, :k]


def _gates_over_tokens(logits_TE: Tensor, k: int) -> Tensor:
    return logits_TE.softmax(0).topk(k, dim=-1).values


def gates_last(logits_TE: Tensor, k: int) -> Tensor:
    return logits_TE.topk(k, dim=-1).values.softmax(-1)


def _gates_divided(logits_TE: Tensor, k: int) -> Tensor:
    gates_TK = gates(logits_TE, k)
    return gates_TK / gates_TK.sum(dim=1, keepdim=True)


def router(x_TD: Tensor, weight_ED: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(gates, ids), both [T, K], best first."""
    gates_TK, ids_TK = (x_TD @ weight_ED.T).softmax(-1).topk(k, dim=-1)
    return gates_TK, ids_TK


def _router_token_by_token(x_TD: Tensor, weight_ED: Tensor, k: int) -> tuple[Tensor, Tensor]:
    gates, ids = [], []
    for x_D in x_TD:
        probs_E = torch.stack([x_D @ row_D for row_D in weight_ED]).softmax(dim=0)
        order_E = probs_E.argsort(descending=True)
        ids.append(order_E[:k])
        gates.append(probs_E[order_E[:k]])
    return torch.stack(gates), torch.stack(ids)


def _over_tokens(x_TD: Tensor, weight_ED: Tensor, k: int) -> tuple[Tensor, Tensor]:
    gates_TK, ids_TK = (x_TD @ weight_ED.T).softmax(0).topk(k, dim=-1)
    return gates_TK, ids_TK


def _logits_as_gates(x_TD: Tensor, weight_ED: Tensor, k: int) -> tuple[Tensor, Tensor]:
    gates_TK, ids_TK = (x_TD @ weight_ED.T).topk(k, dim=-1)
    return gates_TK, ids_TK


def _router_with_softmax_last(x_TD: Tensor, weight_ED: Tensor, k: int) -> tuple[Tensor, Tensor]:
    logits_TK, ids_TK = _logits_as_gates(x_TD, weight_ED, k)
    return logits_TK.softmax(-1), ids_TK


def _router_that_learns_nothing(x_TD: Tensor, weight_ED: Tensor, k: int) -> tuple[Tensor, Tensor]:
    gates_TK, ids_TK = router(x_TD, weight_ED, k)
    return gates_TK.detach(), ids_TK


def share(ids_TK: Tensor, n_experts: int) -> Tensor:
    return load_share(expert_counts(ids_TK, n_experts))


def _share_counted(ids_TK: Tensor, n_experts: int) -> Tensor:
    counts = [0] * n_experts
    for e in ids_TK.flatten().tolist():
        counts[e] += 1
    return torch.tensor(counts) / ids_TK.numel()


def _per_token(ids_TK: Tensor, n_experts: int) -> Tensor:
    return expert_counts(ids_TK, n_experts) / ids_TK.shape[0]


def slope(logits_E: Tensor) -> Tensor:
    """d (largest probability) / d logits."""
    p_E = logits_E.detach().softmax(-1)
    winner_E = torch.zeros_like(p_E).scatter(0, p_E.argmax(-1, keepdim=True), 1.0)
    return p_E.max() * (winner_E - p_E)


def _slope_by_autograd(logits_E: Tensor) -> Tensor:
    z_E = logits_E.detach().requires_grad_()
    z_E.softmax(0).max().backward()
    return z_E.grad


def _own_slopes(logits_E: Tensor) -> Tensor:
    p_E = logits_E.detach().softmax(-1)
    return p_E * (1 - p_E)


def _without_winner(logits_E: Tensor) -> Tensor:
    p_E = logits_E.detach().softmax(-1)
    return -p_E.max() * p_E


def _winner_only(logits_E: Tensor) -> Tensor:
    p_E = logits_E.detach().softmax(-1)
    return torch.where(p_E == p_E.max(), p_E * (1 - p_E), 0.0)


def remaining(gates_TK: Tensor) -> Tensor:
    """Share of each token's gates that stays when only its best expert does."""
    return (gates_TK[:, 0] / gates_TK.sum(1)).detach()


def _remaining_in_a_loop(gates_TK: Tensor) -> Tensor:
    return torch.tensor([max(gates_K) / sum(gates_K) for gates_K in gates_TK.tolist()])


def _of_all_tokens(gates_TK: Tensor) -> Tensor:
    return (gates_TK[:, 0] / gates_TK.sum()).detach()


def tied(logits_TE: Tensor) -> float:
    """Share of the tokens whose two largest logits are equal."""
    first_T, second_T = logits_TE.topk(2, dim=-1).values.T
    return (first_T == second_T).float().mean().item()


def _tied_by_counting(logits_TE: Tensor) -> float:
    at_the_top_T = (logits_TE == logits_TE.max(dim=1, keepdim=True).values).sum(dim=1)
    return float((at_the_top_T > 1).sum()) / len(logits_TE)


def _tied_anywhere(logits_TE: Tensor) -> float:
    ordered_TE = logits_TE.sort(-1).values
    return (ordered_TE[:, 1:] == ordered_TE[:, :-1]).any(-1).float().mean().item()


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def _logits() -> list:
    logits_TE = torch.randn(6, 8, generator=_draw())
    return [(logits_TE, 1), (logits_TE, 3)]


def _more_than_one() -> list:
    logits_TE = torch.randn(6, 8, generator=_draw())
    return [(logits_TE, 2), (logits_TE, 3)]


def _inputs() -> list:
    draw = _draw()
    sizes = ((5, 8, 6, 2), (7, 3, 4, 1))
    return [(torch.randn(T, D, generator=draw), torch.randn(E, D, generator=draw), k) for T, D, E, k in sizes]


def _choices() -> list:
    return [(torch.rand(9, 12, generator=_draw()).topk(2).indices, 12), (torch.tensor([[0], [0], [3]]), 5)]


def _one_token() -> list:
    draw = _draw()
    return [(torch.randn(5, generator=draw),), (2 * torch.randn(8, generator=draw),)]


def _some_gates() -> list:
    draw = _draw()
    return [(gates(torch.randn(T, 8, generator=draw), k),) for T, k in ((5, 4), (3, 8))]


def _with_ties() -> list:
    draw = _draw()
    return [(torch.randint(0, high, (T, 6), generator=draw).float(),) for high, T in ((12, 20), (8, 30))]


OVER_TOKENS = "your softmax runs over the tokens: for each token the probabilities of all experts must sum to 1"


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="gates",
        chapter=4,
        asks="softmax, then top-k",
        minutes=5,
        difficulty=1,
        importance=5,
        solution=gates,
        also=_gates_by_hand,
        source="model.router.Router.routing",
        hint="Make the probabilities of all experts first. Then keep the K largest of each row, largest first.",
        inputs=_logits,
        mistake=gates_last,
        says="these gates sum to 1 over the chosen: a softmax over the winners only, whose gradient at K = 1 is zero",
        others=((_gates_over_tokens, OVER_TOKENS),),
        axes="TK",
    ),
    Exercise(
        name="gates_last",
        chapter=4,
        asks="top-k, then softmax",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=gates_last,
        also=_gates_divided,
        source="teach.exercises.chapter_04.gates_last",
        hint="Keep the K largest logits of each row. The softmax then runs over these K numbers only.",
        inputs=_more_than_one,
        mistake=gates,
        says="that is the order of step 1: here the softmax must not see the experts that were not chosen",
        axes="TK",
    ),
    Exercise(
        name="load_share",
        chapter=4,
        asks="the share of an expert",
        minutes=5,
        difficulty=2,
        importance=5,
        solution=share,
        also=_share_counted,
        source="balance.losses.expert_counts",
        hint="Count how often each expert occurs in ids_TK. There are T · K slots, not T.",
        inputs=_choices,
        mistake=_per_token,
        says="your shares sum to K: divide by the number of slots, not of tokens",
        others=((expert_counts, "those are the counts: divide by the number of slots"),),
        axes="E",
    ),
    Exercise(
        name="router",
        chapter=4,
        asks="the whole router",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=router,
        also=_router_token_by_token,
        source="model.router.Router.forward",
        hint="A logit is the inner product of a token and an expert's row of the weight. All of them together are one matrix"
        " product. Then do what you did in step 1, and keep the places as well as the values.",
        inputs=_inputs,
        mistake=_over_tokens,
        says=OVER_TOKENS,
        others=(
            (_logits_as_gates, "your gates are logits: take the softmax over all experts first"),
            (_router_with_softmax_last, "that is softmax last: here the softmax sees all experts, and top-k comes after it"),
            (_router_that_learns_nothing, "no gradient leaves your gates: the router would never learn"),
        ),
    ),
    Exercise(
        name="winner_slope",
        chapter=4,
        asks="the slope of a gate",
        minutes=10,
        difficulty=3,
        importance=4,
        solution=slope,
        also=_slope_by_autograd,
        source="teach.exercises.chapter_04.slope",
        hint="In the formula, i is the winner and j runs over all experts. So you need one row of it: g times (1 at the"
        " winner, 0 elsewhere, minus the probability of j).",
        inputs=_one_token,
        mistake=_own_slopes,
        says="that is each probability's slope on its own logit. Here it is always the winner's probability, on every logit",
        others=(
            (_without_winner, "right for the others; at the winner itself the δ of the formula is 1"),
            (_winner_only, "right at the winner. If another logit rises, the winner's gate falls: that slope is not zero"),
        ),
        axes="E",
    ),
    Exercise(
        name="remaining_gates",
        chapter=4,
        asks="what stays at the switch",
        minutes=5,
        difficulty=1,
        importance=2,
        solution=remaining,
        also=_remaining_in_a_loop,
        source="teach.exercises.chapter_04.remaining",
        hint="The first column holds each token's largest gate. Compare it with the sum of that token's row.",
        inputs=_some_gates,
        mistake=_of_all_tokens,
        says="you divided by the gates of all tokens together: each token keeps a share of its own row",
        axes="T",
    ),
    Exercise(
        name="tied_tokens",
        chapter=4,
        asks="ties for the first place",
        minutes=5,
        difficulty=2,
        importance=2,
        solution=tied,
        also=_tied_by_counting,
        source="teach.exercises.chapter_04.tied",
        hint="Take the two largest logits of each token and ask whether they are equal.",
        inputs=_with_ties,
        mistake=_tied_anywhere,
        says="you also counted ties further down: only a tie for the first place can change the winner",
    ),
)
