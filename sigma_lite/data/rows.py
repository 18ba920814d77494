"""TOKENS -> ROWS: batches whose order is a function of (seed, rows consumed). Plain torch, for notebooks too.

A run draws from one endless sequence: the rows of the corpus in a shuffled order, then again in another, and so on.
Optimizer step s takes its next rows, which micro-batches and ranks share out, so a resumed run and a run on another number
of devices see the same rows in the same steps. With `domain_run` the shuffled rows are regrouped so that neighbours share a
domain. Several sources have a sequence each, which order.py merges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sigma_lite.config import RowsConfig, require
from sigma_lite.data.copies import Copies
from sigma_lite.data.domains import Stretches, stretches_for
from sigma_lite.data.kinds import SPECIAL
from sigma_lite.data.stream import NO_DOMAIN, TokenStream

IGNORED = -100  # target of a padded position; the default ignore_index of torch's cross entropy


class Batch(NamedTuple):
    """B rows of S tokens. `targets_BS[b, s]` is the token after `ids_BS[b, s]`, and `bytes_BS` counts the target's bytes."""

    ids_BS: Tensor  # int64
    targets_BS: Tensor  # int64, the next token; IGNORED where nothing is scored
    documents_BS: Tensor  # int64, equal where two tokens of a row belong to the same document
    kinds_BS: Tensor  # uint8, kind of the target (kinds.KINDS)
    bytes_BS: Tensor  # int32, UTF-8 bytes of the target; 0 for special tokens and where nothing is scored
    domains_B: Tensor  # int64, place in Domains.names; -1 without domains, or where two meet in the row
    own_BS: Tensor | None = None  # bool, False where a row is filled up; None: nowhere

    @property
    def own_T(self) -> Tensor | None:
        return None if self.own_BS is None else self.own_BS.flatten()

    @property
    def counted(self) -> tuple[int, int]:
        """Targets that are scored, and tokens that do not fill rows up."""
        scored = int((self.targets_BS != IGNORED).sum())
        return scored, self.ids_BS.numel() if self.own_BS is None else int(self.own_BS.sum())

    @property
    def lengths(self) -> int | Tensor:
        """What a balance loss of each row asks: B, or how many tokens each row has, int64 [B]."""
        return len(self.ids_BS) if self.own_BS is None else self.own_BS.sum(1)


# ------------------------------------------------------------------------------------------------------------- order


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n_rows: int, stretches: Stretches | None = None) -> np.ndarray:
    """The permutation of 0..n_rows-1 in which one epoch visits the rows, int64. Takes 16 bytes a row.

    With `stretches` it is regrouped, and some rows sit this epoch out; see domains.py.

    Sorting random numbers gives every permutation the same chance, and NumPy keeps PCG64's numbers the same for ever,
    which it does not promise of its own `permutation`.
    """
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(n_rows), kind="stable")
    order = stretches.regroup(order) if stretches else order
    order.setflags(write=False)
    return order


def row_order(
    seed: int,
    start: int,
    count: int,
    n_rows: int,
    stretches: Stretches | None = None,
    order: Callable[..., np.ndarray] = epoch_order,
) -> np.ndarray:
    """Places start..start+count-1 of a source's endless sequence, int64 row numbers [count], across the ends of epochs."""
    parts, per_epoch = [np.empty(0, np.int64)], stretches.n_rows if stretches else n_rows
    while count > 0:
        epoch, position = divmod(start, per_epoch)
        parts.append(order(seed, epoch, n_rows, stretches)[position : position + count])
        start, count = start + len(parts[-1]), count - len(parts[-1])
    return np.concatenate(parts)


class TrainSampler(Sampler[list[int]]):
    """Row numbers of each micro-batch of one rank, from step `first_step()` on.

    Micro-batch m of rank r takes rows [(m * world + r) * per_micro, + per_micro) of its step: the pooled rows of a step
    are the same for any world size. The length counts from step 0, as Lightning does when it resumes, and as if every step
    had the micro-batches of the last; data/datamodule.py sees to it that Lightning counts a ramp so too.

    Args:
        rows_of: the rows of a step; default: the next ones of one source.
    """

    def __init__(
        self,
        n_rows: int,
        rows: RowsConfig,
        rank: int = 0,
        world: int = 1,
        steps: int | None = None,
        first_step: Callable[[], int] = lambda: 0,
        stretches: Stretches | None = None,
        rows_of: Callable[[int], np.ndarray] | None = None,
    ):
        self.n_rows, self.rows, self.rank, self.world = n_rows, rows, rank, world
        self.steps, self.first_step, self.stretches = steps, first_step, stretches
        self.rows_of = rows_of or self._next
        self.micros = rows.accumulation(world)

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("an endless sampler has no length; give it steps")
        return self.steps * self.micros

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step()
        while self.steps is None or step < self.steps:
            yield from self.of_step(step)
            step += 1

    def of_step(self, step: int) -> list[list[int]]:
        """Row numbers of each micro-batch of this rank."""
        return self.rows_of(step).reshape(-1, self.world, self.rows.per_micro)[:, self.rank].tolist()

    def _next(self, step: int) -> np.ndarray:
        """The rows of a step, of one source without an `Order`."""
        return row_order(self.rows.seed, self.rows.before(step), self.rows.at(step), self.n_rows, self.stretches)


class HeldoutSampler(Sampler[list[int]]):
    """Every held-out row once, in order, shared out over ranks.

    All ranks get the same number of batches, or one would wait for ever in a collective; a rank that runs out gets
    padding rows, in which nothing is scored.
    """

    def __init__(self, n_rows: int, per_micro: int, rank: int = 0, world: int = 1):
        self.n_rows, self.per_micro, self.rank, self.world = n_rows, per_micro, rank, world

    def __len__(self) -> int:
        return -(-self.n_rows // (self.per_micro * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = (batch * self.world + self.rank) * self.per_micro
            yield list(range(first, min(first + self.per_micro, self.n_rows))) or [self.n_rows]


# -------------------------------------------------------------------------------------------------------------- rows


class Rows(Dataset):
    """Row k of a token stream: inputs are tokens [k*S, k*S + S), targets the same window moved on by one.

    `padded=False` (training) leaves out the last tokens, fewer than a row. `padded=True` (validation) has a last row
    that is filled up, so that each token but the first of the stream is a target exactly once. With `copies`, frequent
    tokens are rewritten in the inputs; see copies.py.
    """

    def __init__(
        self,
        stream: TokenStream,
        token_bytes_V: np.ndarray,
        length: int,
        padded: bool = False,
        copies: Copies | None = None,
    ):
        self.stream, self.token_bytes_V, self.length, self.padded = stream, token_bytes_V, length, padded
        self.copies = copies
        targets = max(len(stream) - 1, 0)
        self.n_rows = -(-targets // length) if padded else targets // length

    def __len__(self) -> int:
        return self.n_rows

    def span(self, row: int) -> tuple[int, int]:
        """The first of a row's tokens in the stream, and the one behind its last input."""
        return row * self.length, (row + 1) * self.length

    def window(self, row: int) -> tuple[int, int]:
        """The same with its last target: what is read of the stream, which may end before."""
        return row * self.length, (row + 1) * self.length + 1

    def __getitem__(self, row: int) -> Batch:
        """One row, as a batch of one."""
        return self.__getitems__([row])

    def __getitems__(self, rows: list[int]) -> Batch:
        S = self.length
        ids, kinds = self.tokens([self.window(row) for row in rows])
        sizes_B = np.clip(len(self.stream) - np.array(rows, np.int64) * S, 0, S + 1)
        return self.batch(ids, kinds, np.arange(1, S + 1) < sizes_B[:, None], rows)

    def tokens(self, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64, kinds uint8) of stretches of at most S + 1 tokens, [B, S + 1]; what is missing is end of text."""
        ids = np.full((len(spans), self.length + 1), self.stream.end_of_text, np.int64)
        kinds = np.full(ids.shape, SPECIAL, np.uint8)
        for place, (first, end) in enumerate(spans):
            row_ids, row_kinds = self.stream.read(first, end)
            ids[place, : len(row_ids)], kinds[place, : len(row_kinds)] = row_ids, row_kinds
        return ids, kinds

    def batch(self, ids: np.ndarray, kinds: np.ndarray, scored: np.ndarray, rows: list[int]) -> Batch:
        """Rows from their tokens [B, S + 1]. Args: scored, which targets count, bool [B, S]; rows, their numbers."""
        targets, inputs = ids[:, 1:], ids[:, :-1].copy()
        if self.copies:
            inputs = self.copies.rewritten(inputs, np.array(rows)[:, None] * self.length + np.arange(self.length))
        return Batch(
            ids_BS=torch.from_numpy(inputs),
            targets_BS=torch.from_numpy(np.where(scored, targets, IGNORED)),
            documents_BS=torch.from_numpy(np.cumsum(ids[:, :-1] == self.stream.end_of_text, axis=1)),
            kinds_BS=torch.from_numpy(kinds[:, 1:].copy()),
            bytes_BS=torch.from_numpy(np.where(scored, self.token_bytes_V[targets], 0).astype(np.int32)),
            domains_B=torch.from_numpy(self.domains(np.array(rows, np.int64))),
        )

    def domains(self, rows_N: np.ndarray) -> np.ndarray:
        """The domain that owns every input token of a row, int64 [N] of places in Domains.names, or -1."""
        if self.stream.domains is None:
            return np.full(len(rows_N), NO_DOMAIN, np.int64)
        first_N = rows_N * self.length
        return self.stream.domains.of(first_N, np.minimum(first_N + self.length, len(self.stream)) - 1)


def train_loader(
    rows: Rows,
    config: RowsConfig,
    rank: int = 0,
    world: int = 1,
    steps: int | None = None,
    first_step: Callable[[], int] = lambda: 0,
    rows_of: Callable[[int], np.ndarray] | None = None,
    cls: type[DataLoader] = DataLoader,
    **options,
) -> DataLoader:
    """Micro-batches of a run of `steps` optimizer steps (None: without end); `options` go to the DataLoader (`cls`).

    Args:
        rows_of: the rows of a step, such as `Order.rows`; default: the next ones of one source.

    Raises ConfigError when the training text is shorter than one row, or has not the domains that `domain_run` needs.
    """
    stretches = None
    if rows_of is None:
        require_a_row(rows, config.length)
        stretches = stretches_of(rows, config)
    sampler = TrainSampler(len(rows), config, rank, world, steps, first_step, stretches, rows_of)
    return cls(rows, batch_sampler=sampler, collate_fn=identity, **options)


def require_a_row(rows: Rows, length: int, whose: str = "") -> None:
    """ConfigError where the training text is shorter than a row; `whose`: of which source, if there are several."""
    require(
        len(rows) > 0,
        f"rows.length={length} is longer than the training text{whose and f' of {whose}'} ({len(rows.stream)} tokens):"
        f" set it to {max(len(rows.stream) - 1, 1)} or less, or add text",
    )


def stretches_of(rows: Rows, config: RowsConfig) -> Stretches | None:
    """How `domain_run` regroups the rows of one corpus; 1 asks for nothing."""
    if config.domain_run == 1:
        return None
    return stretches_for(rows.stream.domains, rows.domains, len(rows), config.domain_run)


def heldout_loader(rows: Rows, config: RowsConfig, rank: int = 0, world: int = 1, **options) -> DataLoader:
    """Every held-out row once over all ranks; sum losses and bytes, then divide: the last batches are smaller."""
    sampler = HeldoutSampler(len(rows), config.per_micro, rank, world)
    return DataLoader(rows, batch_sampler=sampler, collate_fn=identity, **options)


def identity(batch: Batch) -> Batch:
    return batch


def together(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches as one."""
    *columns, owns = zip(*batches, strict=True)
    filled = any(own is not None for own in owns)
    own = [torch.ones_like(b.ids_BS, dtype=torch.bool) if b.own_BS is None else b.own_BS for b in batches if filled]
    return Batch(*map(torch.cat, columns), torch.cat(own) if filled else None)
