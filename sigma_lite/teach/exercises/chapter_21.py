"""After pretraining: conversations as tokens, worked steps, rows, advantages, and what a stage does to the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.data.chat import Marks
from sigma_lite.data.packed import packed
from sigma_lite.data.rows import IGNORED
from sigma_lite.data.tasks import column_steps
from sigma_lite.serve import drift
from sigma_lite.serve.marked import Routed
from sigma_lite.teach.exercises.exercise import Exercise
from sigma_lite.train import reward

BEGIN, USER, ASSISTANT, END = range(4)
FRAME = Marks(BEGIN, USER, ASSISTANT, END)

# ------------------------------------------------------------------------------------------------- a conversation


def conversation(said: list[int], answer: list[int]) -> list[int]:
    return FRAME.prompt([(said, answer)])


def conversation_plain(said: list[int], answer: list[int]) -> list[int]:
    return [0, 1] + list(said) + [2] + list(answer) + [3]


def _without_end(said: list[int], answer: list[int]) -> list[int]:
    return [0, 1, *said, 2, *answer]


def _without_begin(said: list[int], answer: list[int]) -> list[int]:
    return [1, *said, 2, *answer, 3]


def _talks() -> list:
    return [([7, 8, 9], [5]), ([4], [6, 6, 7]), ([], [9])]


# ------------------------------------------------------------------------------------------------- what is learned


def targets(ids_S: Tensor) -> Tensor:
    said_S = torch.from_numpy(FRAME.answers(ids_S[None].numpy()))[0, 1:]
    return ids_S[1:].where(said_S, IGNORED)


def targets_plain(ids_S: Tensor) -> Tensor:
    found, speaks = [], False
    for now, then in zip(ids_S.tolist(), ids_S.tolist()[1:], strict=False):
        speaks = now == 2 or (speaks and now != 3)
        found.append(then if speaks else -100)
    return torch.tensor(found)


def _late(ids_S: Tensor) -> Tensor:
    said_S = torch.from_numpy(FRAME.answers(ids_S[None].numpy()))[0, :-1]
    return ids_S[1:].where(said_S, IGNORED)


def _all_of_it(ids_S: Tensor) -> Tensor:
    return ids_S[1:]


def _itself(ids_S: Tensor) -> Tensor:
    said_S = (ids_S == ASSISTANT).cumsum(0) > (ids_S == END).cumsum(0)
    return ids_S.where(said_S, IGNORED)[:-1]


def _with_its_mark(ids_S: Tensor) -> Tensor:
    said_S = (ids_S == ASSISTANT).cumsum(0) > (ids_S == END).cumsum(0)
    return ids_S.where(said_S, IGNORED)[1:]


def _rows() -> list:
    one, other = conversation([7, 8], [5, 6]), conversation([9], [4])
    return [(torch.tensor(one),), (torch.tensor(one + other),), (torch.tensor([*other, 0, 0]),)]


# ---------------------------------------------------------------------------------------------------- worked steps


def column_steps_plain(first: str, second: str) -> str:
    carry, steps = 0, []
    for place in range(len(first) - 1, -1, -1):
        total = int(first[place]) + int(second[place]) + carry
        steps.append(first[place] + "+" + second[place] + "+" + str(carry) + "=" + str(total).zfill(2))
        carry = 1 if total > 9 else 0
    return ";".join(steps)


def _from_the_left(first: str, second: str) -> str:
    carry, steps = 0, []
    for x, y in zip(first, second, strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return ";".join(steps)


def _narrow(first: str, second: str) -> str:
    return column_steps(first, second).replace("=0", "=")


def _sums() -> list:
    return [("37", "58"), ("999", "001"), ("4", "5"), ("120", "034")]


# ------------------------------------------------------------------------------------------------------------ rows


def fill(lengths: list[int], room: int) -> list[int]:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    spans = packed(starts.numpy(), room).tolist()
    return [sum(first <= start < end for start in starts[:-1].tolist()) for first, end in spans]


def _room_not_reduced(lengths: list[int], room: int) -> list[int]:
    rows, left = [], 0
    for length in lengths:
        fits = length <= left
        rows, left = ([*rows[:-1], rows[-1] + 1], left - length) if fits else ([*rows, 1], room)
    return rows


def fill_plain(lengths: list[int], room: int) -> list[int]:
    rows, left = [], 0
    for length in lengths:
        if rows and length <= left:
            rows[-1], left = rows[-1] + 1, left - length
        else:
            rows, left = [*rows, 1], room - length
    return rows


def _leaves_a_gap(lengths: list[int], room: int) -> list[int]:
    return fill_plain(lengths, room - 1)


def _sorted_first(lengths: list[int], room: int) -> list[int]:
    return fill_plain(sorted(lengths, reverse=True), room)


def _lengths() -> list:
    return [([4, 6, 3, 7, 7], 10), ([5, 5, 5], 10), ([2, 9, 1, 8, 1, 1], 10)]


# ------------------------------------------------------------------------------------------------------ advantages


def advantages(rewards_PG: Tensor) -> Tensor:
    return reward.advantages(rewards_PG.detach(), normalise=True)[0]  # a reward has no gradient


def advantages_plain(rewards_PG: Tensor) -> Tensor:
    found = torch.zeros_like(rewards_PG)
    for group, rewards_G in enumerate(rewards_PG):
        spread = ((rewards_G - rewards_G.mean()) ** 2).mean() ** 0.5
        if spread > 0:
            found[group] = (rewards_G - rewards_G.mean()) / spread
    return found


def _of_a_sample(rewards_PG: Tensor) -> Tensor:
    spread_P1 = rewards_PG.std(1, keepdim=True)
    beyond_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return torch.where(spread_P1 > 0, beyond_PG / spread_P1, 0.0)


def _not_a_number(rewards_PG: Tensor) -> Tensor:
    return (rewards_PG - rewards_PG.mean(1, keepdim=True)) / rewards_PG.std(1, keepdim=True, correction=0)


def _over_all(rewards_PG: Tensor) -> Tensor:
    return (rewards_PG - rewards_PG.mean()) / rewards_PG.std(correction=0)


def _rewards() -> list:
    one = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    return [(one,), (torch.tensor([[0.0, 0, 0], [0, 0, 1]]),)]


# ----------------------------------------------------------------------------------------------------- policy loss


def policy(logits_NV: Tensor, tokens_N: Tensor, advantages_N: Tensor) -> Tensor:
    nats_N = torch.nn.functional.cross_entropy(logits_NV, tokens_N, reduction="none")
    return (advantages_N.detach() * nats_N).mean()


def policy_plain(logits_NV: Tensor, tokens_N: Tensor, advantages_N: Tensor) -> Tensor:
    total = torch.zeros(())
    for logits_V, token, advantage in zip(logits_NV, tokens_N, advantages_N.detach(), strict=True):
        total = total - advantage * (logits_V.softmax(0)[token]).log()
    return total / len(tokens_N)


def _uphill(logits_NV: Tensor, tokens_N: Tensor, advantages_N: Tensor) -> Tensor:
    return -policy(logits_NV, tokens_N, advantages_N)


def _of_probabilities(logits_NV: Tensor, tokens_N: Tensor, advantages_N: Tensor) -> Tensor:
    probs_N = logits_NV.softmax(-1).gather(1, tokens_N[:, None])[:, 0]
    return -(advantages_N.detach() * probs_N).mean()


def _every_with_every(logits_NV: Tensor, tokens_N: Tensor, advantages_N: Tensor) -> Tensor:
    return -(advantages_N.detach() * logits_NV.log_softmax(-1).gather(1, tokens_N[:, None])).mean()


def _draws() -> list:
    draw = torch.Generator().manual_seed(21)
    sizes = ((6, 5), (3, 9))
    return [
        (torch.randn(N, V, generator=draw), torch.randint(V, (N,), generator=draw), torch.randn(N, generator=draw).sign())
        for N, V in sizes
    ]


# --------------------------------------------------------------------------------------------------------- experts


def changed(before_TK: Tensor, now_TK: Tensor) -> float:
    one, other = (Routed(torch.zeros(len(ids)), [ids], []) for ids in (before_TK, now_TK))
    return drift.changed(one, other, torch.ones(len(before_TK), dtype=torch.bool))[0]


def changed_plain(before_TK: Tensor, now_TK: Tensor) -> float:
    pairs = zip(before_TK.tolist(), now_TK.tolist(), strict=True)
    return round(sum(set(before) != set(now) for before, now in pairs) / len(before_TK), 5)


def _in_order(before_TK: Tensor, now_TK: Tensor) -> float:
    return round((before_TK != now_TK).any(1).double().mean().item(), 5)


def _slots(before_TK: Tensor, now_TK: Tensor) -> float:
    return round((before_TK.sort(1).values != now_TK.sort(1).values).double().mean().item(), 5)


def _sets_of_tensors(before_TK: Tensor, now_TK: Tensor) -> float:
    return sum(set(before) != set(now) for before, now in zip(before_TK, now_TK, strict=True)) / len(before_TK)


def _routings() -> list:
    draw = torch.Generator().manual_seed(21)
    before = torch.tensor([[0, 1], [2, 3], [4, 5], [1, 0], [6, 2]])
    now = torch.tensor([[0, 7], [2, 3], [5, 4], [1, 9], [2, 6]])  # two changed, two only in order
    single = torch.randint(4, (10, 1), generator=draw)
    return [(before, now), (single, (single + torch.arange(10)[:, None] % 2) % 4), (before, before.flip(1))]


def unused(ids_TK: Tensor, E: int) -> int:
    return E - len(set(ids_TK.flatten().tolist()) - {-1})


def unused_plain(ids_TK: Tensor, E: int) -> int:
    return int(sum((ids_TK != expert).all() for expert in range(E)))


def _counts_the_empty(ids_TK: Tensor, E: int) -> int:
    return E - len(ids_TK.unique())


def _chosen() -> list:
    return [(torch.tensor([[0, 3], [3, -1], [5, 0]]), 8), (torch.tensor([[2, -1], [2, 1]]), 4)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="conversation",
        chapter=21,
        asks="a conversation in tokens",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=conversation,
        also=conversation_plain,
        source="data.chat.Marks.prompt",
        hint="The marks stand before the problem, between problem and answer, and behind the answer. The end of text comes"
        " first, because it ends the document before.",
        inputs=_talks,
        mistake=_without_end,
        says="the mark behind the answer is missing: a model that never saw it would not know when to stop",
        others=(
            (_without_begin, "each conversation is a document of its own: the end of text comes first"),
            (lambda said, answer: [0, 1, said, 2, answer, 3], "your list contains lists: join them with +, or write *said"),
            (lambda said, answer: [0, 1, *said, 3, 2, *answer, 3], "the mark 3 ends only what the assistant says"),
        ),
    ),
    Exercise(
        name="answer_targets",
        chapter=21,
        asks="what is learned",
        minutes=15,
        difficulty=3,
        importance=5,
        solution=targets,
        also=targets_plain,
        source="data.chat.Marks.answers",
        hint="Position s predicts token s + 1. The first answer token is predicted at the assistant's mark, and the end mark"
        " is predicted too. Count the marks that were opened and closed up to each place.",
        inputs=_rows,
        mistake=_late,
        says="that is shifted by one: at the assistant's mark the first token of the answer is to be told already",
        others=(
            (_all_of_it, "the problem would be learned too: only what the assistant says is a target"),
            (_itself, "place s holds token s itself: it must hold the next token, ids_S[s + 1]"),
            (_with_its_mark, "the mark 2 is given and the mark 3 is said: ask who speaks at s, not at s + 1"),
        ),
        axes="S",
    ),
    Exercise(
        name="column_steps",
        chapter=21,
        asks="a sum, column by column",
        minutes=8,
        difficulty=2,
        importance=3,
        solution=column_steps,
        also=column_steps_plain,
        source="data.tasks.column_steps",
        hint="Begin with the last digits. Each step writes both digits, the carry that came in, and a total of two digits;"
        " its first digit is the carry that goes out.",
        inputs=_sums,
        mistake=_from_the_left,
        says="that begins with the first digits, so that a carry moves to the wrong side: begin with the last ones",
        others=((_narrow, "a total has two digits, also below 10: then its first digit always is the carry"),),
    ),
    Exercise(
        name="pack_rows",
        chapter=21,
        asks="rows of whole conversations",
        minutes=10,
        difficulty=2,
        importance=2,
        solution=fill,
        also=fill_plain,
        source="data.packed.packed",
        hint="Keep the room that is left in the last row. A conversation that fits goes there; another one opens a row.",
        inputs=_lengths,
        mistake=_leaves_a_gap,
        says="a conversation that fills a row to its last place fits: compare with <=",
        others=(
            (_sorted_first, "conversations stay in their order: nothing is sorted here"),
            (_room_not_reduced, "the conversation that opens a row takes room too: what is left is room - length"),
        ),
    ),
    Exercise(
        name="advantages",
        chapter=21,
        asks="better than the group",
        minutes=8,
        difficulty=2,
        importance=5,
        solution=advantages,
        also=advantages_plain,
        source="train.reward.advantages",
        hint="Take each group's mean away, and divide by the group's standard deviation. Where all rewards are equal both"
        " are 0, and the advantage is 0.",
        inputs=_rewards,
        mistake=_of_a_sample,
        says="torch.std divides by G - 1, as an estimate would. These are all answers of the group: correction=0",
        others=(
            (_not_a_number, "a group of equal rewards gives 0 / 0 there: its advantages are 0"),
            (_over_all, "each group has a mean of its own: a hard problem must not look bad beside an easy one"),
        ),
        axes="PG",
    ),
    Exercise(
        name="policy_loss",
        chapter=21,
        asks="the policy's loss",
        minutes=10,
        difficulty=3,
        importance=5,
        solution=policy,
        also=policy_plain,
        source="train.reward.policy_loss",
        hint="Cross-entropy is -log p. Weigh each token's by the advantage of its answer, and take the mean.",
        inputs=_draws,
        mistake=_uphill,
        says="the sign is turned: a step downhill must make answers with a positive advantage more likely",
        others=(
            (_of_probabilities, "that is p, not log p: its slope vanishes for answers that are rare, which need it most"),
            (
                _every_with_every,
                "gather gave a column [N, 1], and a column times [N] is N x N: take [:, 0] before you multiply",
            ),
        ),
    ),
    Exercise(
        name="changed_experts",
        chapter=21,
        asks="which tokens changed expert",
        minutes=6,
        difficulty=2,
        importance=4,
        solution=changed,
        also=changed_plain,
        source="serve.drift.changed",
        hint="A token has changed if the set of its experts is another one. Sort each row first, then compare.",
        inputs=_routings,
        mistake=_in_order,
        says="the order of a token's experts does not matter: compare sets",
        others=(
            (_slots, "count tokens, not slots: a token of which one expert changed has changed"),
            (_sets_of_tensors, "two tensors with the same number differ in a set: make whole numbers of them with tolist()"),
        ),
    ),
    Exercise(
        name="unused_experts",
        chapter=21,
        asks="experts without a token",
        minutes=4,
        difficulty=1,
        importance=3,
        solution=unused,
        also=unused_plain,
        source="serve.drift._between",
        hint="Count the different experts that occur. -1 is an empty slot, no expert.",
        inputs=_chosen,
        mistake=_counts_the_empty,
        says="-1 marks an empty slot, and counts as no expert",
    ),
)
