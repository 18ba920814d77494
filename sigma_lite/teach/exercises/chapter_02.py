"""A dense decoder: attention for one query, then for all, and the other parts of a layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.kernels import grouped_swiglu
from sigma_lite.model.attention import attend, attention_mask
from sigma_lite.model.norm import RMSNorm
from sigma_lite.model.rotary import Rotation, rotate, rotation
from sigma_lite.teach.differences import Tolerance
from sigma_lite.teach.exercises.exercise import Exercise

EPS = 1e-6
FUSED = Tolerance(1e-4, 1e-5)  # torch's fused attention adds in another order


def one_query(q_C: Tensor, k_SC: Tensor, v_SC: Tensor) -> Tensor:
    all_of_them = torch.ones(1, 1, len(k_SC), dtype=torch.bool)
    return attend(q_C[None, None, None], k_SC[None, None], v_SC[None, None], all_of_them)[0, 0, 0]


def _one_query_in_words(q_C: Tensor, k_SC: Tensor, v_SC: Tensor) -> Tensor:
    score_S = k_SC @ q_C / len(q_C) ** 0.5
    weight_S = score_S.softmax(0)
    return weight_S @ v_SC


def _not_scaled(q_C: Tensor, k_SC: Tensor, v_SC: Tensor) -> Tensor:
    return (k_SC @ q_C).softmax(0) @ v_SC


def _scores_as_weights(q_C: Tensor, k_SC: Tensor, v_SC: Tensor) -> Tensor:
    return (k_SC @ q_C / len(q_C) ** 0.5) @ v_SC


def all_queries(q_SC: Tensor, k_SC: Tensor, v_SC: Tensor, visible_SS: Tensor) -> Tensor:
    return attend(q_SC[None, None], k_SC[None, None], v_SC[None, None], visible_SS[None])[0, 0]


def _all_queries_as_a_matrix(q_SC: Tensor, k_SC: Tensor, v_SC: Tensor, visible_SS: Tensor) -> Tensor:
    score_SS = q_SC @ k_SC.T / q_SC.shape[-1] ** 0.5
    weight_SS = score_SS.masked_fill(~visible_SS, -torch.inf).softmax(-1)
    return weight_SS @ v_SC


def _sees_everything(q_SC: Tensor, k_SC: Tensor, v_SC: Tensor, visible_SS: Tensor) -> Tensor:
    return _all_queries_as_a_matrix(q_SC, k_SC, v_SC, torch.ones_like(visible_SS))


def _hidden_after_the_softmax(q_SC: Tensor, k_SC: Tensor, v_SC: Tensor, visible_SS: Tensor) -> Tensor:
    return (q_SC @ k_SC.T / q_SC.shape[-1] ** 0.5).softmax(-1).masked_fill(~visible_SS, 0) @ v_SC


def _hidden_score_0(q_SC: Tensor, k_SC: Tensor, v_SC: Tensor, visible_SS: Tensor) -> Tensor:
    return (q_SC @ k_SC.T / q_SC.shape[-1] ** 0.5).masked_fill(~visible_SS, 0).softmax(-1) @ v_SC


def _softmax_of_columns(q_SC: Tensor, k_SC: Tensor, v_SC: Tensor, visible_SS: Tensor) -> Tensor:
    return (q_SC @ k_SC.T / q_SC.shape[-1] ** 0.5).masked_fill(~visible_SS, -torch.inf).softmax(0) @ v_SC


def mask(documents_BS: Tensor) -> Tensor:
    S = documents_BS.shape[1]
    return attention_mask(S, S, documents_BS, documents_BS.device)


def _mask_by_positions(documents_BS: Tensor) -> Tensor:
    place_S = torch.arange(documents_BS.shape[1])
    not_later_SS = place_S[None, :] <= place_S[:, None]
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same_BSS & not_later_SS


def _any_direction(documents_BS: Tensor) -> Tensor:
    return documents_BS[:, :, None] == documents_BS[:, None, :]


def _all_documents(documents_BS: Tensor) -> Tensor:
    B, S = documents_BS.shape
    return torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S)


def _looks_ahead(documents_BS: Tensor) -> Tensor:
    return mask(documents_BS).transpose(1, 2).contiguous()


def _not_itself(documents_BS: Tensor) -> Tensor:
    return mask(documents_BS) & ~torch.eye(documents_BS.shape[1], dtype=torch.bool)


def rms_norm(x: Tensor, weight_D: Tensor) -> Tensor:
    norm = RMSNorm(x.shape[-1], EPS)
    return torch.func.functional_call(norm, {"weight": weight_D}, x)


def _rms_norm_in_words(x: Tensor, weight_D: Tensor) -> Tensor:
    mean_square = x.square().mean(-1, keepdim=True)
    return x / (mean_square + 1e-6).sqrt() * weight_D


def _layer_norm(x: Tensor, weight_D: Tensor) -> Tensor:
    return F.layer_norm(x, weight_D.shape, weight_D, None, EPS)


def _length_1(x: Tensor, weight_D: Tensor) -> Tensor:
    return rms_norm(x, weight_D) / x.shape[-1] ** 0.5


def rope(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(x_BSHC, Rotation(cos, sin))


def _rope_in_halves(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BSHC.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _neighbours(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BSHC[..., ::2], x_BSHC[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def _backwards(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope(x_BSHC, cos, -sin)


def grouped_heads(q_HSC: Tensor, k_GSC: Tensor, v_GSC: Tensor, visible_SS: Tensor) -> Tensor:
    return attend(q_HSC[None], k_GSC[None], v_GSC[None], visible_SS[None])[0]


def _head_by_head(q_HSC: Tensor, k_GSC: Tensor, v_GSC: Tensor, visible_SS: Tensor) -> Tensor:
    H, G = len(q_HSC), len(k_GSC)
    pairs = ((h, h * G // H) for h in range(H))
    return torch.stack([all_queries(q_HSC[h], k_GSC[g], v_GSC[g], visible_SS) for h, g in pairs])


def _dealt_out(q_HSC: Tensor, k_GSC: Tensor, v_GSC: Tensor, visible_SS: Tensor) -> Tensor:
    times = len(q_HSC) // len(k_GSC)
    return grouped_heads(q_HSC, k_GSC.repeat(times, 1, 1), v_GSC.repeat(times, 1, 1), visible_SS)


def feed_forward(x_TD: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    ids_TK = torch.zeros(len(x_TD), 1, dtype=torch.int64)
    return grouped_swiglu(x_TD, ids_TK, torch.ones(len(x_TD), 1), w13[None], w2[None])


def _feed_forward_in_words(x_TD: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    gate_TF, up_TF = (x_TD @ w13.T).chunk(2, dim=-1)
    return (F.silu(gate_TF) * up_TF) @ w2.T


def _wrong_half(x_TD: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    up_TF, gate_TF = (x_TD @ w13.T).chunk(2, dim=-1)
    return (F.silu(gate_TF) * up_TF) @ w2.T


def _sigmoid(x_TD: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    gate_TF, up_TF = (x_TD @ w13.T).chunk(2, dim=-1)
    return (torch.sigmoid(gate_TF) * up_TF) @ w2.T


def next_token_loss(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV, targets_T)


def _loss_by_gather(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    log_p_TV = logits_TV.log_softmax(-1)
    return -log_p_TV[torch.arange(len(targets_T)), targets_T].mean()


def _in_bits(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return next_token_loss(logits_TV, targets_T) / math.log(2)


def _added_up(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return next_token_loss(logits_TV, targets_T) * len(targets_T)


def _log_of_the_mean(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return -logits_TV.softmax(-1)[torch.arange(len(targets_T)), targets_T].mean().log()


def _normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _queries() -> list:
    return [(_normal(C), _normal(S, C, seed=3), _normal(S, C, seed=4)) for S, C in ((5, 4), (3, 16))]


def _two_documents() -> Tensor:
    return mask(torch.tensor([[0, 0, 0, 1, 1]]))[0]


def _rows_of_queries() -> list:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    return [(*_normal(3, 4, 8), causal), (*_normal(3, 5, 16, seed=5), _two_documents())]


def _heads() -> list:
    shapes = ((4, 2), (6, 3), (4, 1))
    return [(_normal(H, 5, 8), _normal(G, 5, 8, seed=3), _normal(G, 5, 8, seed=4), _two_documents()) for H, G in shapes]


def _networks() -> list:
    shapes = ((3, 4, 8), (5, 8, 4))
    return [(_normal(T, D), _normal(2 * width, D, seed=3), _normal(D, width, seed=4)) for T, D, width in shapes]


def _predictions() -> list:
    targets_T = torch.tensor([1, 3, 0, 3, 2])
    return [(_normal(5, 4), targets_T), (3 * _normal(5, 6, seed=3), targets_T)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="attend_one",
        chapter=2,
        asks="attention for one query",
        minutes=5,
        difficulty=1,
        importance=5,
        solution=one_query,
        also=_one_query_in_words,
        source="model.attention.attend",
        hint="Three lines: a score for each position, as printed above; a softmax over the positions, which gives weights;"
        " the weighted sum of the values.",
        inputs=_queries,
        mistake=_not_scaled,
        says="the scores are not divided by the square root of C, so the weights come out too sharp",
        others=((_scores_as_weights, "these scores are no weights yet: a softmax makes them positive, with a sum of 1"),),
        axes="C",
        tolerance=FUSED,
    ),
    Exercise(
        name="attend_all",
        chapter=2,
        asks="all queries at once",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=all_queries,
        also=_all_queries_as_a_matrix,
        source="model.attention.attend",
        hint="One matrix product gives all scores, a row for each query. Set the hidden scores to minus infinity:"
        " e to that power is 0. Then take the softmax of each row, and multiply with the values.",
        inputs=_rows_of_queries,
        mistake=_sees_everything,
        says="every query sees every key: use visible_SS before the softmax",
        others=(
            (_hidden_after_the_softmax, "the weights of a row no longer sum to 1: hide the scores before the softmax"),
            (_hidden_score_0, "a score of 0 is not hidden, since e to the power 0 is 1: use minus infinity"),
            (_softmax_of_columns, "your softmax runs along dimension 0: a query is a row, so each row must sum to 1"),
        ),
        axes="SC",
        tolerance=FUSED,
    ),
    Exercise(
        name="attention_mask",
        chapter=2,
        asks="who may look at whom",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=mask,
        also=_mask_by_positions,
        source="model.attention.attention_mask",
        hint="Two conditions, joined by `&`. Compare the document numbers of rows and columns: give one of the two an extra"
        " dimension, and the comparison spreads out. A lower triangle says who stands before whom.",
        inputs=lambda: [(torch.tensor([[0, 0, 0, 1, 1], [1, 2, 2, 2, 3]]),), (torch.ones(1, 4, dtype=torch.int64),)],
        mistake=_any_direction,
        says="documents are kept apart, but a position may look at later ones, at the token that it should predict",
        others=(
            (_all_documents, "no position looks ahead, but documents are not kept apart: compare their numbers"),
            (_looks_ahead, "upside down: a query is a row, and it sees the keys, the columns, that do not stand after it"),
            (_not_itself, "almost: a position sees itself too, so the diagonal is True"),
        ),
        axes="BSS",
    ),
    Exercise(
        name="rms_norm",
        chapter=2,
        asks="RMSNorm",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=rms_norm,
        also=_rms_norm_in_words,
        source="model.norm.RMSNorm",
        hint="Square, mean over the last dimension, add 1e-6, square root. Divide by it, and multiply by the gains.",
        inputs=lambda: [(_normal(3, 8) + 1, _normal(8, seed=3)), (1e-3 * _normal(2, 3, 4), torch.ones(4))],
        mistake=_layer_norm,
        says="that is LayerNorm: it subtracts the mean first. RMSNorm leaves the mean where it is",
        others=((_length_1, "your vectors have length 1: divide by the root of the mean square, not of the sum"),),
    ),
    Exercise(
        name="rope",
        chapter=2,
        asks="turn pairs by position",
        minutes=15,
        difficulty=2,
        importance=4,
        solution=rope,
        also=_rope_in_halves,
        source="model.rotary.rotate",
        hint="Turning (a, b) by an angle gives (a cos − b sin, b cos + a sin). Here a is the first half of the coordinates,"
        " and b is the second half.",
        inputs=lambda: [
            (_normal(2, 5, 3, 8), *rotation(torch.arange(5), 8, 100.0)),
            (_normal(1, 3, 1, 4), *rotation(torch.arange(7, 10), 4, 10_000.0)),
        ],
        mistake=_neighbours,
        says="you turn neighbours (2i, 2i + 1); the package pairs coordinate i with i + C/2, as Hugging Face does."
        " Both are RoPE, but weights trained with one are noise to the other",
        others=((_backwards, "you turn the other way round: check the two signs of the sine"),),
        axes="BSHC",
    ),
    Exercise(
        name="grouped_heads",
        chapter=2,
        asks="heads that share keys",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=grouped_heads,
        also=_head_by_head,
        source="model.attention.attend",
        hint="A loop over the H query heads, each a call of step 2, stacked. The only question is which of the G keys"
        " belongs to head h: neighbours share, so the number is h * G // H.",
        inputs=_heads,
        mistake=_dealt_out,
        says="you deal the keys out in turn, head h to key h % G. Neighbouring heads share a key: h * G // H",
        axes="HSC",
        tolerance=FUSED,
    ),
    Exercise(
        name="feed_forward",
        chapter=2,
        asks="SwiGLU",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=feed_forward,
        also=_feed_forward_in_words,
        source="kernels.loop.grouped_swiglu_loop",
        hint="One product with w13 gives 2F numbers for each token. `chunk` cuts them into gate and up.",
        inputs=_networks,
        mistake=_wrong_half,
        says="the SiLU is on the wrong half: the gate's rows come first in w13",
        others=((_sigmoid, "SiLU is z times sigmoid(z): torch.nn.functional.silu"),),
        axes="TD",
        tolerance=FUSED,
    ),
    Exercise(
        name="next_token_loss",
        chapter=2,
        asks="the loss in nats",
        minutes=5,
        difficulty=1,
        importance=5,
        solution=next_token_loss,
        also=_loss_by_gather,
        source="model.transformer.Transformer.loss",
        hint="`log_softmax` gives the logarithms of all probabilities. Pick one number in each row, at the target's place.",
        inputs=_predictions,
        mistake=_in_bits,
        says="those are bits: use the natural logarithm",
        others=(
            (_added_up, "that is the sum: take the mean over tokens"),
            (_log_of_the_mean, "take the logarithm of each probability first, and the mean afterwards"),
        ),
    ),
)
