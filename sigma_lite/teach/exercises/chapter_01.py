"""Text becomes rows: merges, rows, an order without a memory, and the unit of the loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sigma_lite.data.rows import Rows, epoch_order, row_order
from sigma_lite.teach.exercises.exercise import Exercise


def merge_pair(pieces: Sequence[str], a: str, b: str) -> list[str]:
    joined, place = [], 0
    while place < len(pieces):
        take = 2 if list(pieces[place : place + 2]) == [a, b] else 1
        joined.append("".join(pieces[place : place + take]))
        place += take
    return joined


def _merge_backwards_looking(pieces: Sequence[str], a: str, b: str) -> list[str]:
    joined, fresh = [], False  # fresh: the last one is a merge, and takes no part in another
    for piece in pieces:
        if piece == b and joined and joined[-1] == a and not fresh:
            joined[-1], fresh = a + b, True
        else:
            joined.append(piece)
            fresh = False
    return joined


def _first_only(pieces: Sequence[str], a: str, b: str) -> list[str]:
    places = [n for n in range(len(pieces) - 1) if list(pieces[n : n + 2]) == [a, b]]
    return [*pieces[: places[0]], a + b, *pieces[places[0] + 2 :]] if places else list(pieces)


def _overlapping(pieces: Sequence[str], a: str, b: str) -> list[str]:
    joined, after_a_pair = [], False
    for piece, following in zip(pieces, [*pieces[1:], ""], strict=True):
        if (piece, following) == (a, b):
            joined.append(a + b)
        elif not after_a_pair:
            joined.append(piece)
        after_a_pair = (piece, following) == (a, b)
    return joined


def best_pair(words: Sequence[Sequence[str]], age: dict[str, int]) -> tuple[str, str]:
    counts = Counter(pair for word in words for pair in zip(word[:-1], word[1:], strict=True))
    return max(counts, key=lambda pair: (counts[pair], -age[pair[0]], -age[pair[1]]))


def _best_of_the_most_frequent(words: Sequence[Sequence[str]], age: dict[str, int]) -> tuple[str, str]:
    counts = Counter()
    for word in words:
        for n in range(len(word) - 1):
            counts[word[n], word[n + 1]] += 1
    most = max(counts.values())
    tied = [pair for pair, count in counts.items() if count == most]
    return min(tied, key=lambda pair: (age[pair[0]], age[pair[1]]))


def _first_met(words: Sequence[Sequence[str]], age: dict[str, int]) -> tuple[str, str]:
    return Counter(pair for word in words for pair in zip(word[:-1], word[1:], strict=True)).most_common(1)[0][0]


def _across_words(words: Sequence[Sequence[str]], age: dict[str, int]) -> tuple[str, str]:
    return best_pair([[piece for word in words for piece in word]], age)


class _Stream:
    """A list of tokens, read as the package reads a file of them."""

    domains, end_of_text = None, 0

    def __init__(self, tokens: Sequence[int]):
        self.tokens = np.array(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[first:end], np.zeros(len(self.tokens[first:end]), np.uint8)


def cut_rows(stream: Sequence[int], S: int) -> tuple[Tensor, Tensor]:
    rows = Rows(_Stream(stream), np.ones(max(stream) + 1), length=S)
    batch = rows.__getitems__(list(range(len(rows))))
    return batch.ids_BS, batch.targets_BS


def _rows_by_shape(stream: Sequence[int], S: int) -> tuple[Tensor, Tensor]:
    B = (len(stream) - 1) // S  # one token more than the rows hold: the last target
    ids, targets = torch.tensor(stream[: B * S]), torch.tensor(stream[1 : B * S + 1])
    return ids.view(B, S), targets.view(B, S)


def _not_moved(stream: Sequence[int], S: int) -> tuple[Tensor, Tensor]:
    ids_BS, _ = cut_rows(stream, S)
    return ids_BS, ids_BS.clone()


def _moved_inside_of_rows(stream: Sequence[int], S: int) -> tuple[Tensor, Tensor]:
    ids_BS, _ = cut_rows(stream, S)
    return ids_BS, ids_BS.roll(-1, dims=1)


def _rows_of_one_more(stream: Sequence[int], S: int) -> tuple[Tensor, Tensor]:
    B = len(stream) // (S + 1)
    rows = torch.tensor(stream[: B * (S + 1)]).view(B, S + 1)
    return rows[:, :-1], rows[:, 1:]


def document_numbers(ids_BS: Tensor) -> Tensor:
    B, S = ids_BS.shape
    rows = Rows(_Stream([*ids_BS.flatten().tolist(), 0]), np.ones(int(ids_BS.max()) + 1), length=S)
    return rows.__getitems__(list(range(B))).documents_BS


def _numbers_by_cumsum(ids_BS: Tensor) -> Tensor:
    return (ids_BS == 0).cumsum(dim=1)


def _only_begins(ids_BS: Tensor) -> Tensor:
    return (ids_BS == 0).long()


def _across_rows(ids_BS: Tensor) -> Tensor:
    return (ids_BS == 0).flatten().cumsum(0).view_as(ids_BS)


def split_padding(tokens_D: np.ndarray, S: int) -> float:
    return float(1 - tokens_D.sum() / (S * np.ceil(tokens_D / S).sum()))


def _padding_document_by_document(tokens_D: np.ndarray, S: int) -> float:
    padding = sum(-int(n) % S for n in tokens_D)
    return padding / (padding + int(sum(tokens_D)))


def _mean_of_shares(tokens_D: np.ndarray, S: int) -> float:
    rows_D = np.ceil(tokens_D / S)
    return float((1 - tokens_D / (S * rows_D)).mean())


def _of_the_tokens(tokens_D: np.ndarray, S: int) -> float:
    return float(S * np.ceil(tokens_D / S).sum() / tokens_D.sum() - 1)


def _order_place_by_place(seed: int, start: int, count: int, n_rows: int) -> np.ndarray:
    places = range(start, start + count)
    return np.array([epoch_order(seed, place // n_rows, n_rows)[place % n_rows] for place in places])


def _same_order_again(seed: int, start: int, count: int, n_rows: int):
    return epoch_order(seed, 0, n_rows)[[(start + i) % n_rows for i in range(count)]]


def unigram_nats(train_T: Tensor, heldout_T: Tensor, vocab_size: int) -> Tensor:
    counts_V = torch.bincount(train_T, minlength=vocab_size) + 1
    return -(counts_V / counts_V.sum()).log()[heldout_T]


def _nats_token_by_token(train_T: Tensor, heldout_T: Tensor, vocab_size: int) -> Tensor:
    seen, N = Counter(train_T.tolist()), len(train_T)
    return torch.tensor([-math.log((seen[v] + 1) / (N + vocab_size)) for v in heldout_T.tolist()])


def _without_one(train_T: Tensor, heldout_T: Tensor, vocab_size: int) -> Tensor:
    return -(torch.bincount(train_T, minlength=vocab_size) / len(train_T)).log()[heldout_T]


def _without_v(train_T: Tensor, heldout_T: Tensor, vocab_size: int) -> Tensor:
    return -((torch.bincount(train_T, minlength=vocab_size) + 1) / len(train_T)).log()[heldout_T]


def bits_per_byte(nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> float:
    from sigma_lite.balance.bits import BitsPerByte  # here: torchmetrics takes seconds to import

    metric = BitsPerByte()
    metric.update(nats_BS, targets_BS, bytes_BS)
    return float(metric.compute()["bits_per_byte"])


def _sums_and_one_division(nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> float:
    scored_BS = targets_BS != -100
    nats, n_bytes = nats_BS[scored_BS].sum().item(), bytes_BS[scored_BS].sum().item()
    return nats / math.log(2) / n_bytes


def _mean_of_ratios(nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> float:
    scored_BS = targets_BS != -100
    return (nats_BS / bytes_BS)[scored_BS].mean().item() / math.log(2)


def _unmasked(nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> float:
    return (nats_BS.sum() / bytes_BS.sum()).item() / math.log(2)


def _in_nats(nats_BS: Tensor, targets_BS: Tensor, bytes_BS: Tensor) -> float:
    return bits_per_byte(nats_BS, targets_BS, bytes_BS) * math.log(2)


def _words() -> list:
    age = {piece: place for place, piece in enumerate("elorsw")}
    tie = [list("ow"), list("lower"), list("slo")]  # ow comes first, and lo has the older parts
    across = [list("es"), list("lo"), list("es"), list("lo"), list("es"), list("sl"), list("sl"), list("sl")]
    return [(tie, age), (across, age)]


def _streams() -> list:
    return [([0, 5, 6, 7, 0, 8, 9, 0, 3, 4, 2, 1], 4), ([0, 5, 6, 0, 7, 8, 9], 3), ([0, 2, 3, 0, 4, 0, 5, 6], 2)]


def _rows() -> list:
    return [(torch.tensor([[0, 5, 6, 0, 7], [8, 0, 9, 0, 4]]),), (torch.tensor([[3, 1, 2], [0, 4, 5]]),)]


def _tokens() -> list:
    draw = torch.Generator().manual_seed(1)
    draws = [torch.randint(high, (n,), generator=draw) for high, n in ((8, 60), (8, 9), (12, 40), (12, 7))]
    heldout = [torch.cat((draws[1], torch.tensor([9]))), draws[3]]  # 9 was never seen
    return [(draws[0], heldout[0], 10), (draws[2], heldout[1], 16)]


def _losses() -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    nats_BS = torch.rand(2, 6, generator=draw) * 5
    bytes_BS = torch.randint(1, 8, (2, 6), generator=draw)
    targets_BS = torch.randint(0, 9, (2, 6), generator=draw)
    padded_BS = targets_BS.clone()
    padded_BS[1, 3:] = -100
    return [(nats_BS, targets_BS, bytes_BS), (nats_BS, padded_BS, bytes_BS)]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="merge_pair",
        chapter=1,
        asks="merge a pair",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=merge_pair,
        also=_merge_backwards_looking,
        source="teach.exercises.chapter_01.merge_pair",
        hint="Walk from left to right with a place in the list. Where a and b stand next to each other, write one piece and"
        " go on two places; else write the piece and go on one.",
        inputs=lambda: [(list("low slow"), "l", "o"), (list("baaaba"), "a", "a"), (["lo", "w", "l", "o"], "lo", "w")],
        mistake=_first_only,
        says="you merge the first place only: merge every place where the pair stands",
        others=((_overlapping, "you use a piece twice: of three equal pieces only two become a pair"),),
    ),
    Exercise(
        name="best_pair",
        chapter=1,
        asks="the pair to merge",
        minutes=10,
        difficulty=2,
        importance=4,
        solution=best_pair,
        also=_best_of_the_most_frequent,
        source="teach.exercises.chapter_01.best_pair",
        hint="Count all pairs of all words with a Counter. `max` with a key that is a tuple compares the first entries, and"
        " looks at the next entry where these are equal. Older means a smaller number, so its sign turns around.",
        inputs=_words,
        mistake=_first_met,
        says="where several pairs are equally frequent you take the one that you met first: take the oldest parts",
        others=((_across_words, "you count pairs across the end of a word: count inside of each word"),),
    ),
    Exercise(
        name="cut_rows",
        chapter=1,
        asks="rows and targets",
        minutes=5,
        difficulty=2,
        importance=5,
        solution=cut_rows,
        also=_rows_by_shape,
        source="data.rows.Rows.__getitems__",
        hint="The targets are the stream from its second token on. So B rows need B * S + 1 tokens, which gives B."
        " Cut both and let `view` make the rows.",
        inputs=_streams,
        mistake=_not_moved,
        says="your targets are the inputs themselves: the target of a position is the token after it",
        others=(
            (_moved_inside_of_rows, "the last target of a row is the first token of the next row, not of its own"),
            (
                _rows_of_one_more,
                "you leave out a token between rows: the last target of a row is the first of the next",
            ),
        ),
    ),
    Exercise(
        name="document_numbers",
        chapter=1,
        asks="which document?",
        minutes=5,
        difficulty=1,
        importance=4,
        solution=document_numbers,
        also=_numbers_by_cumsum,
        source="data.rows.Rows.batch",
        hint="A document begins where the id is 0. How many have begun up to here? That is a running sum, row by row.",
        inputs=_rows,
        mistake=_only_begins,
        says="you mark the places where documents begin: a running sum gives all of a document's tokens one number",
        others=((_across_rows, "your numbers go on from row to row: begin again in each row, dim=1"),),
        axes="BS",
    ),
    Exercise(
        name="split_padding",
        chapter=1,
        asks="what padding costs",
        minutes=5,
        difficulty=1,
        importance=3,
        solution=split_padding,
        also=_padding_document_by_document,
        source="teach.exercises.chapter_01.split_padding",
        hint="A document of n tokens takes n / S rows, rounded up. Add up rows and tokens over all documents first.",
        inputs=lambda: [(np.array([3, 10, 8]), 4), (np.array([100, 1, 64, 65]), 64)],
        mistake=_mean_of_shares,
        says="that is the mean over documents, where a short one counts as much as a long one: add up first, divide once",
        others=((_of_the_tokens, "you divide by the tokens: divide the padding by all positions, padding included"),),
    ),
    Exercise(
        name="row_order",
        chapter=1,
        asks="an order without a memory",
        minutes=15,
        difficulty=3,
        importance=4,
        solution=row_order,
        also=_order_place_by_place,
        source="data.rows.row_order",
        hint="Place p belongs to epoch `p // n_rows`, and there it is number `p % n_rows`.",
        inputs=lambda: [(1, 0, 4, 10), (1, 7, 6, 10), (3, 25, 8, 10)],
        mistake=_same_order_again,
        says="the first epoch is right, but the second repeats its order: pass the number of the epoch on",
    ),
    Exercise(
        name="unigram_nats",
        chapter=1,
        asks="the weakest language model",
        minutes=5,
        difficulty=2,
        importance=3,
        solution=unigram_nats,
        also=_nats_token_by_token,
        source="teach.exercises.chapter_01.unigram_nats",
        hint="`torch.bincount` counts the training tokens. Add 1, divide by the sum, take minus the logarithm."
        " A tensor of ids as an index picks one number for each held-out token.",
        inputs=_tokens,
        mistake=_without_one,
        says="a token that training never saw costs infinitely many nats: add 1 to each count",
        others=((_without_v, "your probabilities sum to more than 1: with 1 added to each count, divide by N + V"),),
        axes="T",
    ),
    Exercise(
        name="bits_per_byte",
        chapter=1,
        asks="one unit for all",
        minutes=10,
        difficulty=2,
        importance=5,
        solution=bits_per_byte,
        also=_sums_and_one_division,
        source="balance.bits.BitsPerByte",
        hint="Information adds up over tokens, and so do bytes. Make the two sums, and divide once.",
        inputs=_losses,
        mistake=_mean_of_ratios,
        says="that is the mean of each token's own ratio: a short token then weighs as much as a long one."
        " Sum the nats, sum the bytes, and divide once",
        others=(
            (_unmasked, "a target of -100 is counted, too: leave its nats and its bytes out of both sums"),
            (_in_nats, "those are nats per byte: a bit is ln 2 nats, so divide by ln 2 as well"),
        ),
    ),
)
