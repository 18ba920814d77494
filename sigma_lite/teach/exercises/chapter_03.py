"""Many experts: group the slots, count the parameters."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.config import ModelConfig
from sigma_lite.kernels.loop import grouped_swiglu_loop
from sigma_lite.kernels.plan import routing_plan
from sigma_lite.teach.exercises.exercise import Exercise

NET = ModelConfig()


def swiglu(x_TD: Tensor, w13_e: Tensor, w2_e: Tensor) -> Tensor:
    ids_TK, gates_TK = torch.zeros(len(x_TD), 1, dtype=torch.int64), torch.ones(len(x_TD), 1)
    return grouped_swiglu_loop(x_TD, ids_TK, gates_TK, w13_e[None], w2_e[None])


def _swiglu_plainly(x_TD: Tensor, w13_e: Tensor, w2_e: Tensor) -> Tensor:
    width = len(w13_e) // 2
    valve_TF, up_TF = x_TD @ w13_e[:width].T, x_TD @ w13_e[width:].T
    return (valve_TF * torch.sigmoid(valve_TF) * up_TF) @ w2_e.T


def _halves_swapped(x_TD: Tensor, w13_e: Tensor, w2_e: Tensor) -> Tensor:
    return swiglu(x_TD, torch.cat(w13_e.chunk(2)[::-1]), w2_e)


def _without_silu(x_TD: Tensor, w13_e: Tensor, w2_e: Tensor) -> Tensor:
    valve_TF, up_TF = (x_TD @ w13_e.T).chunk(2, dim=-1)
    return (valve_TF * up_TF) @ w2_e.T


def moe(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return grouped_swiglu_loop(x_TD, ids_TK, gates_TK, w13, w2)


def _moe_token_by_token(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    rows = []
    for x_D, ids_K, gates_K in zip(x_TD, ids_TK, gates_TK, strict=True):
        parts = []
        for e, gate in zip(ids_K, gates_K, strict=True):
            valve_F, up_F = (w13[e] @ x_D).chunk(2)
            parts.append(gate * (w2[e] @ (F.silu(valve_F) * up_F)))
        rows.append(sum(parts))
    return torch.stack(rows)


def _without_gates(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return moe(x_TD, ids_TK, torch.ones_like(gates_TK), w13, w2)


def _last_choice_wins(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`y[token] = rows` in the order of experts: a token keeps the result of its last expert only."""
    last_T1 = ids_TK.argmax(1, keepdim=True)
    return moe(x_TD, ids_TK.gather(1, last_T1), gates_TK.gather(1, last_T1), w13, w2)


def plan(ids_TK: Tensor, n_experts: int) -> tuple:
    found = routing_plan(ids_TK, n_experts)
    return found.slot_N, found.token_N, found.ends_E


def _plan_by_sorting(ids_TK: Tensor, n_experts: int) -> tuple:
    expert_N = ids_TK.flatten()
    slot_N = torch.argsort(expert_N, stable=True)
    ends_E = torch.bincount(expert_N, minlength=n_experts).cumsum(0).int()
    return slot_N, slot_N // ids_TK.shape[1], ends_E


def _rows_are_tokens(ids_TK: Tensor, n_experts: int) -> tuple:
    slot_N, _, ends_E = routing_plan(ids_TK, n_experts)
    return slot_N, slot_N, ends_E


def _choices() -> list:
    generator = torch.Generator().manual_seed(3)
    return [(torch.rand(tokens, E, generator=generator).topk(k).indices, E) for tokens, E, k in ((7, 4, 2), (6, 8, 1))]


def active(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return net.ledger(k_per_layer).active


def _active_by_hand(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    D, heads, kv = net.d_model, net.n_heads * net.head_dim, net.n_kv_heads * net.head_dim
    expert = 3 * D * net.d_expert
    attention = 2 * D * heads + 2 * D * kv
    shared = attention + D * net.n_experts + 2 * (D + net.head_dim)  # router; two norms of the stream, and QK-norm
    return net.n_layers * shared + D + sum(k_per_layer) * expert


def _same_k_in_all_layers(net: ModelConfig, k_per_layer: tuple[int, ...]) -> int:
    return net.ledger((k_per_layer[-1],) * net.n_layers).active


def removed(head: tuple[int, ...], n_layers: int, d_model: int, d_expert: int) -> int:
    """Active parameters that go when layers with K = head, and 1 above, all switch to K = 1."""
    net = replace(ModelConfig(), n_layers=n_layers, d_model=d_model, d_expert=d_expert)
    early = (*head, *[1] * (n_layers - len(head)))
    return net.ledger(early).active - net.ledger((1,) * n_layers).active


def _removed_by_hand(head: tuple[int, ...], n_layers: int, d_model: int, d_expert: int) -> int:
    return sum(k - 1 for k in head) * 3 * d_model * d_expert


def _all_of_them(head: tuple[int, ...], n_layers: int, d_model: int, d_expert: int) -> int:
    return sum(head) * 3 * d_model * d_expert


def _two_matrices(head: tuple[int, ...], n_layers: int, d_model: int, d_expert: int) -> int:
    return sum(k - 1 for k in head) * 2 * d_model * d_expert


def training_bytes(parameters: int) -> int:
    """Weight, gradient and Adam's two moments, in float32."""
    return 16 * parameters


def _four_numbers(parameters: int) -> int:
    return sum(4 * parameters for _ in ("weight", "gradient", "first moment", "second moment"))


def _without_moments(parameters: int) -> int:
    return 8 * parameters


def _one_expert() -> list:
    draw = torch.Generator().manual_seed(3)
    shapes = ((5, 4, 4), (3, 6, 2))
    return [tuple(torch.randn(s, generator=draw) for s in ((T, D), (2 * f, D), (D, f))) for T, D, f in shapes]


def _layers() -> list:
    draw, made = torch.Generator().manual_seed(3), []
    for T, D, E, f, k in ((6, 4, 4, 4, 2), (5, 4, 5, 4, 1)):
        gates_TK, ids_TK = torch.randn(T, E, generator=draw).softmax(-1).topk(k)
        ids_TK = ids_TK.where(ids_TK != 1, 0) if k == 1 else ids_TK  # nobody wants expert 1
        weights = [torch.randn(s, generator=draw) / 2 for s in ((E, 2 * f, D), (E, D, f))]
        made.append((torch.randn(T, D, generator=draw), ids_TK, gates_TK, *weights))
    return made


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="swiglu",
        chapter=3,
        asks="one expert",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=swiglu,
        also=_swiglu_plainly,
        source="kernels.loop.grouped_swiglu_loop",
        hint="Multiply by both up projections at once and cut the result in two. SiLU opens or closes the valve half; the"
        " product of both halves is projected down.",
        inputs=_one_expert,
        mistake=_halves_swapped,
        says="your halves are swapped: the first half of w13 is the valve, which passes through SiLU",
        others=((_without_silu, "the valve must pass through torch.nn.functional.silu before it multiplies"),),
        axes="TD",
    ),
    Exercise(
        name="moe_layer",
        chapter=3,
        asks="the layer, as a loop over experts",
        minutes=15,
        difficulty=3,
        importance=5,
        solution=moe,
        also=_moe_token_by_token,
        source="kernels.loop.grouped_swiglu_loop",
        hint="For each expert find the slots that chose it: (ids_TK == e).nonzero(as_tuple=True) gives token and choice."
        " Compute these rows, multiply by their gates, and add them to the rows of the result with index_add.",
        inputs=_layers,
        mistake=_without_gates,
        says="each expert's row must be multiplied by the gate of its slot",
        others=((_last_choice_wins, "with K = 2 one of a token's two rows is lost: add with index_add, do not assign"),),
        axes="TD",
    ),
    Exercise(
        name="routing_plan",
        chapter=3,
        asks="the plan",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=plan,
        also=_plan_by_sorting,
        source="kernels.plan.routing_plan",
        hint="Flatten the choices: slot n belongs to token n // K. A stable sort by expert keeps the order of tokens.",
        inputs=_choices,
        mistake=_rows_are_tokens,
        says="your rows name slots where tokens are wanted: with K choices a token, slot n belongs to another number",
    ),
    Exercise(
        name="active_parameters",
        chapter=3,
        asks="the ledger",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=active,
        also=_active_by_hand,
        source="config.ModelConfig.ledger",
        hint="Query and output projections are d_model by n_heads * head_dim; key and value have n_kv_heads instead. Only"
        " the experts depend on K, and their number is the sum of the list.",
        inputs=lambda: [(NET, (8, 6, 4, 2)), (NET, (1, 1, 1, 1)), (replace(NET, n_layers=2, d_expert=32), (3, 1))],
        mistake=_same_k_in_all_layers,
        says="every layer seems to use the last layer's K: the list may hold a different number for each",
    ),
    Exercise(
        name="removed_by_the_switch",
        chapter=3,
        asks="what the switch removes",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=removed,
        also=_removed_by_hand,
        source="config.ModelConfig.ledger",
        hint="A layer that goes from K to 1 loses K - 1 experts. An expert has three matrices of d_model by d_expert.",
        inputs=lambda: [((8, 6, 4, 2), 6, 64, 32), ((4,), 3, 96, 48)],
        mistake=_all_of_them,
        says="one expert of each layer stays: a layer loses K - 1 of them",
        others=((_two_matrices, "an expert has three matrices: valve, up and down"),),
    ),
    Exercise(
        name="training_bytes",
        chapter=3,
        asks="what training keeps",
        minutes=3,
        difficulty=1,
        importance=3,
        solution=training_bytes,
        also=_four_numbers,
        source="teach.exercises.chapter_03.training_bytes",
        hint="A number in float32 takes 4 bytes. How many numbers does each parameter need?",
        inputs=lambda: [(1_000_000,), (19_360_000_000,)],
        mistake=_without_moments,
        says="that is weight and gradient: Adam keeps two more numbers for each parameter",
    ),
)
