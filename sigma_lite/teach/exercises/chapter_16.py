"""The grouped matmul: what a layer reads and multiplies, slots sorted by expert and back, and what a tile wastes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.kernels.loop import grouped_swiglu_loop
from sigma_lite.kernels.plan import routing_plan
from sigma_lite.teach.differences import Tolerance
from sigma_lite.teach.exercises.exercise import Exercise
from sigma_lite.teach.plots_kernels import useful_rows as useful_rows_of


def intensity(tokens: int, n_experts: int, D: int, width: int) -> float:
    """FLOP per byte of weights of a layer with one expert per token: bf16 weights, each read once."""
    flops = 2 * 3 * D * width * tokens
    return flops / (2 * 3 * D * width * n_experts)


def _intensity_in_short(tokens: int, n_experts: int, D: int, width: int) -> float:
    # a weight of two bytes is multiplied and added once for each token of its expert
    return tokens / n_experts


def _fp32(tokens: int, n_experts: int, D: int, width: int) -> float:
    return intensity(tokens, n_experts, D, width) / 2


def _one_expert(tokens: int, n_experts: int, D: int, width: int) -> float:
    return float(tokens)


def _one_byte(tokens: int, n_experts: int, D: int, width: int) -> float:
    return 2 * intensity(tokens, n_experts, D, width)


def layer(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return grouped_swiglu_loop(x_TD, ids_TK, gates_TK, w13, w2)


def _layer_with_slices(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for e in range(len(w13)):
        token, slot = (ids_TK == e).nonzero(as_tuple=True)
        valve, up = (x_TD[token] @ w13[e].T).chunk(2, dim=-1)
        y = (F.silu(valve) * up) @ w2[e].T
        y_TD = y_TD.index_add(0, token, y * gates_TK[token, slot, None])
    return y_TD


def _without_gates(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return grouped_swiglu_loop(x_TD, ids_TK, 0 * gates_TK + 1, w13, w2)


def _silu_on_the_other(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return grouped_swiglu_loop(x_TD, ids_TK, gates_TK, torch.cat(w13.chunk(2, dim=1)[::-1], dim=1), w2)


def _overwritten(x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    last = ids_TK == ids_TK.max(1, keepdim=True).values  # the expert with the highest number writes last
    return grouped_swiglu_loop(x_TD, ids_TK, gates_TK * last, w13, w2)


def slice_bytes(n_experts: int, page_bytes: int) -> int:
    """Bytes of all gradients that w[e] makes in a loop over all experts: E stacks of E pages."""
    return n_experts * n_experts * page_bytes


def _slice_bytes_added_up(n_experts: int, page_bytes: int) -> int:
    total = 0
    for _expert in range(n_experts):
        shape_of_the_gradient = n_experts  # as many pages as w has, all but one of them zero
        total += shape_of_the_gradient * page_bytes
    return total


def _of_unbind(n_experts: int, page_bytes: int) -> int:
    return n_experts * page_bytes


def sorted_slots(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """(slot_N, ends_E), both int64: the slots in the order of their experts, and the row behind each expert's last."""
    plan = routing_plan(ids_TK, n_experts)
    return plan.slot_N, plan.ends_E.long()


def _sorted_in_a_loop(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    slots, ends = [], []
    for expert in range(n_experts):
        slots += [slot for slot, chosen in enumerate(ids_TK.flatten().tolist()) if chosen == expert]
        ends.append(len(slots))
    return torch.tensor(slots), torch.tensor(ends)


def _starts(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    slot_N, ends_E = sorted_slots(ids_TK, n_experts)
    return slot_N, ends_E.roll(1).index_fill(0, torch.tensor([0]), 0)


def _counts(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    slot_N, ends_E = sorted_slots(ids_TK, n_experts)
    return slot_N, ends_E.diff(prepend=torch.tensor([0]))


def multiply_groups(x_ND: Tensor, ends_E: Tensor, w_EFD: Tensor) -> Tensor:
    """[N, F]: each group of sorted rows times its own expert's matrix."""
    return F.grouped_mm(x_ND.detach(), w_EFD.detach().transpose(1, 2), offs=ends_E.int())


def _group_by_group(x_ND: Tensor, ends_E: Tensor, w_EFD: Tensor) -> Tensor:
    groups, first = [], 0
    for end, w_FD in zip(ends_E.tolist(), w_EFD.unbind(0), strict=True):
        groups.append(x_ND[first:end] @ w_FD.T)
        first = end
    return torch.cat(groups)


def _all_from_row_0(x_ND: Tensor, ends_E: Tensor, w_EFD: Tensor) -> Tensor:
    return x_ND @ w_EFD[-1].T


def way_back(slot_N: Tensor) -> Tensor:
    """[N] int64: the sorted row of each slot, the inverse of slot_N."""
    return torch.empty_like(slot_N).scatter_(0, slot_N, torch.arange(len(slot_N)))


def _way_back_in_a_loop(slot_N: Tensor) -> Tensor:
    row_N = torch.zeros_like(slot_N)
    for row, slot in enumerate(slot_N.tolist()):
        row_N[slot] = row
    return row_N


def _the_same_way(slot_N: Tensor) -> Tensor:
    return slot_N


def useful_rows(counts_E: Tensor, rows: int) -> float:
    """Share of the rows of all tiles that hold a token, when no tile serves two experts."""
    return useful_rows_of(counts_E.numpy(), rows)


def _tiles_counted(counts_E: Tensor, rows: int) -> float:
    tiles = 0
    for count in counts_E.tolist():
        tiles += -(-count // rows)  # rounded up
    return int(counts_E.sum()) / (tiles * rows)


def _across_experts(counts_E: Tensor, rows: int) -> float:
    total = int(counts_E.sum())
    return total / (math.ceil(total / rows) * rows)


def _mean_of_shares(counts_E: Tensor, rows: int) -> float:
    shares = [count / (math.ceil(count / rows) * rows) for count in counts_E.tolist() if count]
    return sum(shares) / len(shares)


def _layers() -> list:
    draw, cases = torch.Generator().manual_seed(12), []
    for T, E, K in ((6, 4, 2), (9, 5, 3)):
        x_TD, w13, w2 = (torch.randn(shape, generator=draw) for shape in ((T, 8), (E, 8, 8), (E, 8, 4)))
        ids_TK = torch.rand(T, E - 1, generator=draw).topk(K).indices  # nobody asks for the last expert
        cases.append((x_TD, ids_TK, torch.rand(T, K, generator=draw), w13, w2))
    return cases


def _routings() -> list:
    generator = torch.Generator().manual_seed(12)
    some = [torch.rand(T, E, generator=generator).topk(K).indices for T, K, E in ((6, 1, 4), (5, 2, 3))]
    many_TK = torch.rand(40, 3, generator=generator).topk(2).indices  # so many that a sort which is not stable shows
    return [(some[0], 4), (some[1], 3), (torch.tensor([[2], [0], [2]]), 4), (many_TK, 3)]  # in one, nobody asks for 1 and 3


def _groups() -> list:
    draw, cases = torch.Generator().manual_seed(12), []
    for ends, width in (([2, 2, 7], 4), ([1, 4, 4, 6], 8)):
        x_ND, w_EFD = torch.randn(ends[-1], 8, generator=draw), torch.randn(len(ends), width, 8, generator=draw)
        cases.append((x_ND, torch.tensor(ends), w_EFD))
    return cases


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="arithmetic_intensity",
        chapter=16,
        asks="FLOP for each byte",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=intensity,
        also=_intensity_in_short,
        source="teach.exercises.chapter_16.intensity",
        hint="Write down the FLOPs with the formula above (K = 1). Write down the bytes: three matrices for each expert, two"
        " bytes a weight. Then divide, and see what cancels.",
        inputs=lambda: [(8192, 96, 1536, 768), (1000, 8, 64, 48)],
        mistake=_fp32,
        says="half of it: a weight in bf16 has two bytes, and each weight is multiplied and added, which is two FLOPs",
        others=(
            (_one_expert, "you read the weights of one expert: the layer reads those of all experts"),
            (_one_byte, "twice too much: a weight in bf16 has two bytes, and you counted one"),
        ),
    ),
    Exercise(
        name="expert_layer",
        chapter=16,
        asks="the loop that everybody writes first",
        minutes=15,
        difficulty=3,
        importance=5,
        solution=layer,
        also=_layer_with_slices,
        source="kernels.loop.grouped_swiglu_loop",
        hint="For each expert find its slots with (ids_TK == e).nonzero(as_tuple=True): you get the tokens and the places."
        " Take the rows of these tokens, apply the expert, multiply by their gates, and add the result with index_add.",
        inputs=_layers,
        mistake=_without_gates,
        says="right without the gates: multiply each expert's output by gates_TK[token, slot]",
        others=(
            (_silu_on_the_other, "silu belongs to the first half of what w13 gives, the valve; the second half is up"),
            (_overwritten, "a token with several experts keeps only the last one's output: add with index_add"),
        ),
        axes="TD",
        tolerance=Tolerance(1e-3, 1e-4),
    ),
    Exercise(
        name="slice_bytes",
        chapter=16,
        asks="what a slice costs",
        minutes=3,
        difficulty=1,
        importance=4,
        solution=slice_bytes,
        also=_slice_bytes_added_up,
        source="kernels.loop.grouped_swiglu_loop",
        hint="The gradient of one slice has the shape of the whole stack. The loop takes one slice for each expert.",
        inputs=lambda: [(192, 65536), (8, 100)],
        mistake=_of_unbind,
        says="that is one stack, as unbind makes it. A loop over w[e] makes a whole stack for each expert",
    ),
    Exercise(
        name="sorted_slots",
        chapter=16,
        asks="sort the slots",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=sorted_slots,
        also=_sorted_in_a_loop,
        source="kernels.plan.routing_plan",
        hint="A stable argsort keeps equal experts in their order. The ends are the running sum of the counts, and bincount"
        " needs minlength, so that experts without a slot are counted too.",
        inputs=_routings,
        mistake=_starts,
        says="those are the rows at which experts begin; an end is the row behind the last one, and the last end is T K",
        others=((_counts, "those are the counts: an end is the sum of all counts up to and with this expert, cumsum"),),
        axes="N",
    ),
    Exercise(
        name="multiply_groups",
        chapter=16,
        asks="multiply the groups",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=multiply_groups,
        also=_group_by_group,
        source="kernels.torch_grouped._forward",
        hint="A group begins where the group before it ends, and the first one at row 0. Multiply its rows by the transposed"
        " matrix of its expert. Put the results one below the other.",
        inputs=_groups,
        mistake=_all_from_row_0,
        says="all rows have met the last expert: a group does not begin at row 0, but at the end of the group before it",
        axes="NF",
        tolerance=Tolerance(1e-3, 1e-4),
    ),
    Exercise(
        name="way_back",
        chapter=16,
        asks="the way back",
        minutes=5,
        difficulty=2,
        importance=4,
        solution=way_back,
        also=_way_back_in_a_loop,
        source="kernels.plan.routing_plan",
        hint="slot_N[row] says which slot lies in a row. You want the opposite: at place slot_N[row] write row.",
        inputs=lambda: [(torch.tensor([2, 0, 3, 1]),), (torch.tensor([1, 4, 0, 2, 3]),)],
        mistake=_the_same_way,
        says="slot_N leads from a row to its slot; you want the way from a slot to its row, which is another order",
        axes="N",
    ),
    Exercise(
        name="useful_rows",
        chapter=16,
        asks="useful rows",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=useful_rows,
        also=_tiles_counted,
        source="teach.plots_kernels.useful_rows",
        hint="An expert with n tokens has n / rows tiles, rounded up: -(-n // rows). Divide all tokens by all rows.",
        inputs=lambda: [(torch.tensor([5, 3, 1]), 4), (torch.tensor([16, 0, 17]), 16)],
        mistake=_across_experts,
        says="so it would be if a tile could serve two experts; each expert fills up its own last tile",
        others=((_mean_of_shares, "that is the mean of the experts' shares: add all tokens, add all rows, then divide"),),
    ),
)
