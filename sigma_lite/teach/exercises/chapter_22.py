"""Serving: what a token has to read, which experts stay, what may be read ahead, and when guessing several tokens pays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.convert.stored import quantise
from sigma_lite.papers.se_moe import ring_seconds
from sigma_lite.scale.decode import distinct_experts, tokens_of_a_round
from sigma_lite.serve.expert_cache import LRU, hit_rate
from sigma_lite.teach.exercises.exercise import Exercise


def _distinct_written(E: int, K: int, tokens: float) -> float:
    missed = 1.0
    for _ in range(tokens):
        missed *= 1 - K / E
    return E - E * missed


def _no_meeting(E: int, K: int, tokens: float) -> float:
    return float(min(E, K * tokens))


def _one_at_a_time(E: int, K: int, tokens: float) -> float:
    return E - E * (1 - 1 / E) ** (K * tokens)


def weights_a_token(shared: float, expert: float, layers: int, touched: float, batch: int) -> float:
    """Weights that a step of `batch` sequences reads, for each token that it writes.

    shared: attention, routers and head, read once for all; touched: distinct experts of one layer; expert: size of one.
    """
    return (shared + layers * touched * expert) / batch


def _experts_for_each(shared: float, expert: float, layers: int, touched: float, batch: int) -> float:
    return shared / batch + layers * touched * expert


def _weights_written(shared: float, expert: float, layers: int, touched: float, batch: int) -> float:
    experts = sum(touched * expert for _ in range(layers))
    return shared / batch + experts / batch


def lru_hits(trace: list[int], slots: int) -> int:
    """How often the expert is there, for one layer whose `slots` begin empty; the least recently used leaves."""
    return round(hit_rate([[expert] for expert in trace], slots, LRU()) * len(trace))


def _fifo(trace: list[int], slots: int) -> int:
    held, hits = [], 0
    for expert in trace:
        hits += expert in held
        if expert not in held:
            held = [*held, expert][-slots:]
    return hits


def _lru_written(trace: list[int], slots: int) -> int:
    held, hits = [], 0
    for expert in trace:
        if expert in held:
            hits += 1
            held.remove(expert)
        held.append(expert)
        held = held[-slots:]
    return hits


def _last_tokens(trace: list[int], slots: int) -> int:
    return sum(expert in trace[max(0, now - slots) : now] for now, expert in enumerate(trace))


def furthest(held: list[int], future: list[int]) -> int:
    """The expert of `held` whose next use in `future` comes last; one that is never used again comes after all others."""
    return max(held, key=lambda expert: future.index(expert) if expert in future else len(future))


def _rarest(held: list[int], future: list[int]) -> int:
    return min(held, key=future.count)


def _furthest_written(held: list[int], future: list[int]) -> int:
    best, when = held[0], -1
    for expert in held:
        at = next((n for n, other in enumerate(future) if other == expert), len(future))
        if at > when:
            best, when = expert, at
    return best


def guessed_experts(x_TD: Tensor, gain_D: Tensor, w_ED: Tensor) -> Tensor:
    """What the next layer's router would choose for the stream as it is now: norm, its gain, the router's matrix, argmax."""
    return F.linear(F.rms_norm(x_TD, x_TD.shape[-1:]) * gain_D, w_ED).argmax(-1)


def _without_gain(x_TD: Tensor, gain_D: Tensor, w_ED: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x_TD, x_TD.shape[-1:]), w_ED).argmax(-1)


def _guess_written(x_TD: Tensor, gain_D: Tensor, w_ED: Tensor) -> Tensor:
    return torch.stack([(w_ED @ (x_D * gain_D)).argmax() for x_D in x_TD])  # a norm's divisor moves no argmax


def ring_time(compute: float, load: float, slots: int, layers: int) -> float:
    """Seconds until the last of `layers` equal layers is done, each needing its weights in one of `slots` slots."""
    return ring_seconds([compute] * layers, [load] * layers, slots)


def _first_load_twice(compute: float, load: float, slots: int, layers: int) -> float:
    return layers * (compute + load) if slots == 1 else load + layers * max(compute, load)


def _ring_written(compute: float, load: float, slots: int, layers: int) -> float:
    if slots == 1:
        return layers * (compute + load)
    return layers * max(compute, load) + min(compute, load)


def _always_two(compute: float, load: float, slots: int, layers: int) -> float:
    return ring_time(compute, load, 2, layers)


def int8_rows(w_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [R, C], fp32 [R]): each row's largest number becomes 127 or -127."""
    integers, scale = quantise(w_RC, 8)
    return integers, scale[:, 0]


def _one_scale(w_RC: Tensor) -> tuple[Tensor, Tensor]:
    scale = w_RC.abs().max() / 127
    return (w_RC / scale).round().to(torch.int8), scale.expand(len(w_RC)).clone()


def _int8_written(w_RC: Tensor) -> tuple[Tensor, Tensor]:
    scale_R = w_RC.abs().max(dim=1).values / 127
    return torch.round(w_RC / scale_R[:, None]).to(torch.int8), scale_R


def _cut_off(w_RC: Tensor) -> tuple[Tensor, Tensor]:
    scale_R = w_RC.abs().amax(1) / 127
    return (w_RC / scale_R[:, None]).to(torch.int8), scale_R


def _as_if_all_were_judged(acceptance: float, drafted: int) -> float:
    return 1 + acceptance * drafted


def _round_written(acceptance: float, drafted: int) -> float:
    tokens, chance = 1.0, 1.0
    for _ in range(drafted):
        chance *= acceptance
        tokens += chance
    return tokens


def _traces() -> list:
    generator = torch.Generator().manual_seed(22)
    skewed = torch.multinomial(1 / torch.arange(1.0, 13), 60, replacement=True, generator=generator).tolist()
    return [([0, 1, 0, 2, 0, 1], 2), ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], 3), (skewed, 4), ([7, 7, 7], 1)]


def _futures() -> list:
    return [([0, 1, 2], [2, 0, 0, 1]), ([4, 6], [6, 6, 6, 4, 6]), ([3, 5, 8], [5, 3, 5]), ([2, 9], [9, 9, 2, 2, 2])]


def _streams() -> list:
    generator = torch.Generator().manual_seed(22)
    made = []
    for T, D, E in ((6, 8, 5), (9, 4, 12)):
        gain_D = torch.rand(D, generator=generator) * 3
        made.append((torch.randn(T, D, generator=generator), gain_D, torch.randn(E, D, generator=generator)))
    return made


def _matrices() -> list:
    generator = torch.Generator().manual_seed(22)
    rows_R = torch.tensor([1.0, 0.1, 10.0, 0.01])[:, None]
    return [(torch.randn(4, 6, generator=generator) * rows_R,), (torch.randn(2, 3, generator=generator),)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="distinct_experts",
        chapter=22,
        asks="How many experts do so many tokens touch?",
        solution=distinct_experts,
        inputs=lambda: [(96, 1, 1), (96, 1, 32), (96, 8, 32), (8, 8, 3), (4, 1, 0)],
        mistake=_no_meeting,
        says="that is as if two tokens never chose the same expert; take the chance that an expert is missed by all of them",
        others=((_one_at_a_time, "right for K = 1: the K experts of a token differ, so it misses one with chance 1 - K/E"),),
        minutes=8,
        difficulty=2,
        importance=5,
        hint="One token misses an expert with chance 1 - K/E. How probable is it that all of them miss it?",
        also=_distinct_written,
        source="scale.decode.distinct_experts",
    ),
    Exercise(
        name="weights_a_token",
        chapter=22,
        asks="Weights read for each token",
        solution=weights_a_token,
        inputs=lambda: [(10.0, 2.0, 3, 1.0, 1), (10.0, 2.0, 3, 4.0, 8), (5.0, 1.0, 1, 96.0, 1000)],
        mistake=_experts_for_each,
        says="the touched experts are read once for the whole batch as well: divide them by the batch too",
        minutes=5,
        difficulty=1,
        importance=4,
        hint="One step reads the shared weights, and each layer's touched experts. It writes a token for each sequence.",
        also=_weights_written,
        source="scale.decode.reads",
    ),
    Exercise(
        name="lru_hits",
        chapter=22,
        asks="A cache that forgets the least recently used",
        solution=lru_hits,
        inputs=_traces,
        mistake=_fifo,
        says="that throws out who came first; an expert that was just used again must move to the back of the queue",
        others=(
            (
                _last_tokens,
                "you look at the last tokens: the slots hold the last different experts, and repeats need no slot",
            ),
        ),
        minutes=10,
        difficulty=2,
        importance=5,
        hint="Keep a list in order of use. A hit moves its expert to the end, a miss appends one and may push out the first"
        " of the list.",
        also=_lru_written,
        source="serve.expert_cache.hit_rate",
    ),
    Exercise(
        name="furthest",
        chapter=22,
        asks="Who leaves, if you know the future?",
        solution=furthest,
        inputs=_futures,
        mistake=_rarest,
        says="not the one with the fewest uses to come: the one whose next use is furthest away, however many follow it",
        minutes=8,
        difficulty=2,
        importance=3,
        hint="For each expert that is held: where in the list of future tokens does it come first? Nowhere is the end.",
        also=_furthest_written,
        source="serve.expert_cache.Clairvoyant",
    ),
    Exercise(
        name="guessed_experts",
        chapter=22,
        asks="Guess with the next layer's router",
        solution=guessed_experts,
        inputs=_streams,
        mistake=_without_gain,
        says="the next layer's norm has a gain for each dimension: multiply by it before the router's matrix",
        axes="T",
        minutes=8,
        difficulty=2,
        importance=4,
        hint="Do what the next block does before its experts: normalise, multiply by the gain, score, take the best.",
        also=_guess_written,
        source="serve.weights._chosen",
    ),
    Exercise(
        name="ring_time",
        chapter=22,
        asks="A ring of slots",
        solution=ring_time,
        inputs=lambda: [(1.0, 2.0, 1, 4), (1.0, 2.0, 2, 4), (3.0, 1.0, 2, 10), (2.0, 2.0, 3, 5), (1.0, 5.0, 4, 8)],
        mistake=_first_load_twice,
        says="where loading is the slower, this counts the first load twice: N loads follow one another, then one layer"
        " computes",
        others=((_always_two, "right for two slots or more: with one slot a layer cannot load while another computes"),),
        minutes=10,
        difficulty=3,
        importance=3,
        hint="With two slots or more the slower of both works without a pause, and the other is seen once: at the beginning"
        " (the first load) or at the end (the last layer). With one slot nothing overlaps.",
        also=_ring_written,
        source="papers.se_moe.ring_seconds",
    ),
    Exercise(
        name="int8_rows",
        chapter=22,
        asks="Weights in one byte",
        solution=int8_rows,
        inputs=_matrices,
        mistake=_one_scale,
        says="one scale for the whole matrix: rows of small numbers then lose their digits. Give each row its own scale",
        others=((_cut_off, "to(torch.int8) cuts the digits off, and 3.9 becomes 3: round first"),),
        minutes=8,
        difficulty=2,
        importance=4,
        hint="The largest absolute number of a row, divided by 127, is its scale. Divide by it, round, and store as int8.",
        also=_int8_written,
        source="convert.stored.quantise",
    ),
    Exercise(
        name="tokens_of_a_round",
        chapter=22,
        asks="Tokens that one check brings",
        solution=tokens_of_a_round,
        inputs=lambda: [(0.5, 1), (0.5, 4), (0.8, 4), (1.0, 3), (0.0, 5)],
        mistake=_as_if_all_were_judged,
        says="a guess behind a wrong one is worth nothing: guess n counts only if all n are right, with chance a to the n",
        minutes=6,
        difficulty=2,
        importance=4,
        hint="One token comes from the model itself, always. Guess 1 counts with chance a, guess 2 with chance a times a.",
        also=_round_written,
        source="scale.decode.tokens_of_a_round",
    ),
)
