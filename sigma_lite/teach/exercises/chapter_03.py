"""Many experts, few active: group the slots, compute the layer, count what it costs, and see what it buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.config import ModelConfig
from sigma_lite.kernels import grouped_swiglu
from sigma_lite.kernels.plan import routing_plan
from sigma_lite.lab.seeds import paired
from sigma_lite.teach.differences import Tolerance
from sigma_lite.teach.exercises.exercise import Exercise

NET = ModelConfig()
SMALL = replace(NET, n_layers=2, d_expert=32)
BYTES = 16  # of a parameter in training: weight, gradient and two moments in fp32


def plan(ids_TK: Tensor, n_experts: int) -> tuple:
    found = routing_plan(ids_TK, n_experts)
    return found.slot_N, found.token_N, found.ends_E


def _plan_in_words(ids_TK: Tensor, n_experts: int) -> tuple:
    K, expert_N = ids_TK.shape[1], ids_TK.flatten()
    slot_N = torch.cat([(expert_N == e).nonzero().flatten() for e in range(n_experts)])
    ends_E = torch.bincount(expert_N, minlength=n_experts).cumsum(0).int()
    return slot_N, slot_N // K, ends_E


def _rows_are_tokens(ids_TK: Tensor, n_experts: int) -> tuple:
    slot_N, _, ends_E = plan(ids_TK, n_experts)
    return slot_N, slot_N, ends_E


def _begins(ids_TK: Tensor, n_experts: int) -> tuple:
    slot_N, token_N, ends_E = plan(ids_TK, n_experts)
    return slot_N, token_N, torch.cat((torch.zeros(1, dtype=torch.int32), ends_E[:-1]))


def _counts(ids_TK: Tensor, n_experts: int) -> tuple:
    slot_N, token_N, ends_E = plan(ids_TK, n_experts)
    return slot_N, token_N, ends_E.diff(prepend=ends_E.new_zeros(1))


def moe(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return grouped_swiglu(x_TD, ids_TK, gates_TK, w13, w2)


def _expert(x: Tensor, w13_e: Tensor, w2_e: Tensor) -> Tensor:
    valve, up = (x @ w13_e.T).chunk(2, dim=-1)
    return (F.silu(valve) * up) @ w2_e.T


def _expert_by_expert(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for e in range(len(w13)):
        token, choice = (ids_TK == e).nonzero(as_tuple=True)
        valve, up = (x_TD[token] @ w13[e].T).chunk(2, dim=-1)
        rows = (F.silu(valve) * up) @ w2[e].T * gates_TK[token, choice, None]
        y_TD = y_TD.index_add(0, token, rows)
    return y_TD


def _no_gate(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return moe(x_TD, ids_TK, torch.ones_like(gates_TK), w13, w2)


def _last_one_wins(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for e in range(len(w13)):
        token, choice = (ids_TK == e).nonzero(as_tuple=True)
        y_TD = y_TD.index_copy(0, token, _expert(x_TD[token], w13[e], w2[e]) * gates_TK[token, choice, None])
    return y_TD


def _gate_inside(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    rows = ((gates_TK[t, k] * x_D, e) for t, x_D in enumerate(x_TD) for k, e in enumerate(ids_TK[t]))
    y_NTD = torch.stack([_expert(x_D, w13[e], w2[e]) for x_D, e in rows])
    return y_NTD.view(*ids_TK.shape, -1).sum(1)


def shared(net: ModelConfig) -> int:
    ledger = net.ledger()
    return ledger.attention + ledger.router + ledger.norms


def _shared_by_hand(net: ModelConfig) -> int:
    D, query, key = net.d_model, net.n_heads * net.head_dim, net.n_kv_heads * net.head_dim
    attention = 2 * D * query + 2 * D * key
    router, norms = D * net.n_experts, 2 * D + 2 * net.head_dim
    return net.n_layers * (attention + router + norms) + D


def _keys_for_all_heads(net: ModelConfig) -> int:
    return shared(replace(net, n_kv_heads=net.n_heads))


def _no_router(net: ModelConfig) -> int:
    return shared(net) - net.ledger().router


def _no_final_norm(net: ModelConfig) -> int:
    return shared(net) - net.d_model


def active(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return net.ledger(k_per_layer).active


def _active_by_hand(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    expert = 3 * net.d_model * net.d_expert
    return shared(net) + sum(k_per_layer) * expert


def _same_k_in_all_layers(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return net.ledger((k_per_layer[-1],) * net.n_layers).active


def _two_matrices(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return shared(net) + sum(k_per_layer) * 2 * net.d_model * net.d_expert


def training_bytes(net: ModelConfig) -> int:
    return BYTES * net.ledger().non_embedding


def _four_numbers_each(net: ModelConfig) -> int:
    experts = net.n_layers * net.n_experts * 3 * net.d_model * net.d_expert
    return (shared(net) + experts) * (4 + 4 + 4 + 4)


def _of_the_active(net: ModelConfig) -> int:
    return BYTES * net.ledger().active


def _one_moment(net: ModelConfig) -> int:
    return 12 * net.ledger().non_embedding


def training_flops(net: ModelConfig, k_per_layer: Sequence[int], tokens: int) -> int:
    return 6 * net.ledger(k_per_layer).active * tokens


def _forward_and_twice_backward(net: ModelConfig, k_per_layer: Sequence[int], tokens: int) -> int:
    forward = 2 * _active_by_hand(net, tuple(k_per_layer))
    backward = 2 * forward
    return (forward + backward) * tokens


def _forward_only(net: ModelConfig, k_per_layer: Sequence[int], tokens: int) -> int:
    return 2 * net.ledger(k_per_layer).active * tokens


def _all_experts(net: ModelConfig, k_per_layer: Sequence[int], tokens: int) -> int:
    return 6 * net.ledger().non_embedding * tokens


def elements_written(n_experts: int, size: int) -> int:
    stack = n_experts * size  # what the gradient of one expert's weights becomes
    return n_experts * stack


def _written_in_a_loop(n_experts: int, size: int) -> int:
    written = 0
    for _ in range(n_experts):
        gradient = torch.zeros(n_experts, size)
        written += gradient.numel()
    return written


def _one_stack(n_experts: int, size: int) -> int:
    return n_experts * size


def mean_gain(ours: Sequence[float], theirs: Sequence[float]) -> float:
    arms = {"ours": ours, "theirs": theirs}
    runs = [{"arm": arm, "seed": n, "score": x} for arm, scores in arms.items() for n, x in enumerate(scores)]
    return paired({"experiment": "", "arms": arms, "runs": runs}, "ours", "theirs", lambda run: run["score"]).mean


def _pair_by_pair(ours: Sequence[float], theirs: Sequence[float]) -> float:
    gains = [a / b - 1 for a, b in zip(ours, theirs, strict=True)]
    return sum(gains) / len(gains)


def _ratio_of_means(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return sum(ours) / sum(theirs) - 1


def _against_ours(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return mean_gain(theirs, ours)


def _choices() -> list:
    generator = torch.Generator().manual_seed(3)
    shapes = ((7, 4, 2), (6, 8, 1), (40, 3, 2))  # in the last one a sort that is not stable shows
    return [(torch.rand(tokens, E, generator=generator).topk(k).indices, E) for tokens, E, k in shapes]


def _layers() -> list:
    draw, cases = torch.Generator().manual_seed(3), []
    for T, E, K in ((5, 6, 1), (6, 4, 2)):
        x_TD, w13, w2 = (torch.randn(shape, generator=draw) for shape in ((T, 4), (E, 16, 4), (E, 4, 8)))
        ids_TK = torch.rand(T, E, generator=draw).topk(K).indices
        cases.append((x_TD, ids_TK, torch.rand(T, K, generator=draw), w13, w2))
    return cases


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="routing_plan",
        chapter=3,
        asks="sort by expert",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=plan,
        also=_plan_in_words,
        source="kernels.plan.routing_plan",
        hint="Flatten the ids: slot n then belongs to token n // K. A stable argsort keeps ties in order."
        " A running sum of the counts says where each expert's rows end.",
        inputs=_choices,
        mistake=_rows_are_tokens,
        says="your rows name slots where tokens are wanted: with K choices a token, slot n belongs to another number",
        others=(
            (_begins, "those are the places where experts begin: ends_E says where they end"),
            (_counts, "those are the counts: an expert's end is the sum of all counts up to and with its own, cumsum"),
        ),
    ),
    Exercise(
        name="moe_layer",
        chapter=3,
        asks="a layer of experts",
        minutes=15,
        difficulty=3,
        importance=5,
        solution=moe,
        also=_expert_by_expert,
        source="kernels.loop.grouped_swiglu_loop",
        hint="A loop over experts. `(ids_TK == e).nonzero(as_tuple=True)` gives the tokens of e, and which choice it was."
        " Compute their rows, multiply with their gates, and add them to the result at their tokens with index_add.",
        inputs=_layers,
        mistake=_no_gate,
        says="the gates are missing: multiply each expert's output with the gate of that choice",
        others=(
            (_last_one_wins, "right for K = 1. With more, a token's experts must be added: yours keeps the last"),
            (_gate_inside, "the gate multiplies what the expert gives, not what it gets: SiLU makes that a difference"),
        ),
        axes="TD",
        tolerance=Tolerance(1e-4, 1e-5),
    ),
    Exercise(
        name="shared_parameters",
        chapter=3,
        asks="what every token uses",
        minutes=10,
        difficulty=2,
        importance=3,
        solution=shared,
        also=_shared_by_hand,
        source="config.ModelConfig.ledger",
        hint="Count one layer: four projections of attention, one row of width D for each expert, four norms."
        " Multiply by the layers, and add the final norm.",
        inputs=lambda: [(NET,), (SMALL,), (replace(NET, n_heads=8, head_dim=16, n_experts=8),)],
        mistake=_keys_for_all_heads,
        says="keys and values have n_kv_heads heads, and not n_heads",
        others=(
            (_no_router, "the router is missing: a row of width d_model for each expert, in each layer"),
            (_no_final_norm, "almost: after the last layer stands one more norm of width d_model"),
        ),
    ),
    Exercise(
        name="active_parameters",
        chapter=3,
        asks="what one token uses",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=active,
        also=_active_by_hand,
        source="config.ModelConfig.ledger",
        hint="What every token uses, and sum(k_per_layer) experts of three matrices each.",
        inputs=lambda: [(NET, (8, 6, 4, 2)), (NET, (1, 1, 1, 1)), (SMALL, (3, 1))],
        mistake=_same_k_in_all_layers,
        says="every layer seems to use the last layer's K: the list may hold a different number for each",
        others=((_two_matrices, "a SwiGLU expert has three matrices: valve, up and down"),),
    ),
    Exercise(
        name="training_bytes",
        chapter=3,
        asks="what must be kept",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=training_bytes,
        also=_four_numbers_each,
        source="teach.exercises.chapter_03.training_bytes",
        hint="Four numbers of 4 bytes for each parameter, of all experts, whether a token uses them or not.",
        inputs=lambda: [(NET,), (SMALL,)],
        mistake=_of_the_active,
        says="you count the active parameters: an expert without tokens has a weight, a gradient and moments, too",
        others=((_one_moment, "Adam keeps two moments for each weight"),),
    ),
    Exercise(
        name="training_flops",
        chapter=3,
        asks="the work of training",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=training_flops,
        also=_forward_and_twice_backward,
        source="teach.exercises.chapter_03.training_flops",
        hint="Forward: a multiplication and an addition for each active parameter. Backward: twice as much.",
        inputs=lambda: [(NET, (1, 1, 1, 1), 100), (SMALL, (4, 2), 7)],
        mistake=_forward_only,
        says="that is the forward pass: the backward pass costs twice as much again",
        others=((_all_experts, "a token multiplies with the active parameters only, not with all experts"),),
    ),
    Exercise(
        name="elements_written",
        chapter=3,
        asks="why it is slow",
        minutes=5,
        difficulty=2,
        importance=3,
        solution=elements_written,
        also=_written_in_a_loop,
        source="teach.exercises.chapter_03.elements_written",
        hint="Each turn of the loop writes a gradient as large as the whole stack. How many turns are there?",
        inputs=lambda: [(4, 10), (96, 128 * 64)],
        mistake=_one_stack,
        says="that is one stack, which is what `unbind` writes. Indexing writes a stack for each expert",
    ),
    Exercise(
        name="mean_gain",
        chapter=3,
        asks="better, over seeds",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=mean_gain,
        also=_pair_by_pair,
        source="lab.seeds.paired",
        hint="Runs of one seed belong together. Take the relative difference of each pair, and then the mean.",
        inputs=lambda: [([1.6, 1.5, 1.7], [1.7, 1.6, 1.9]), ([2.0, 1.0], [1.0, 2.0])],
        mistake=_ratio_of_means,
        says="that is the ratio of the means: divide pair by pair first, so that what a seed does to both cancels",
        others=((_against_ours, "upside down: the result says by how much ours differ from theirs"),),
    ),
)
