"""Ranks with unequal numbers of tokens: rewards keep live answers only, conversations score answers only."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from ranks import on_ranks

from sigma_lite.model import Routing
from sigma_lite.train.callbacks.diary import Diary
from sigma_lite.train.callbacks.load_recorder import LoadRecorder


class Told(Diary):
    """Keeps what is written."""

    def __init__(self):
        super().__init__()
        self.record, self.entries = True, []

    def write(self, trainer, kind, **facts):
        self.entries.append((trainer.global_step, facts["tokens"], facts["f"]))


def routing(T: int, expert: int) -> Routing:
    ids = torch.full((T, 1), expert)
    return Routing(torch.full((T, 4), 0.25), ids, torch.full((T, 1), 0.25), torch.zeros(T, 4))


def windows(batches: list[list[Routing]], world: int, first: bool = True) -> list[tuple]:
    """(step, tokens, f) of each window of 100 tokens; half of the steps, then a checkpoint, then the others."""
    diary = Told()
    module = SimpleNamespace(
        net=SimpleNamespace(n_layers=1, n_experts=4),
        device=torch.device("cpu"),
        balance=SimpleNamespace(window_tokens=100),
        model=SimpleNamespace(bias_LE=torch.zeros(1, 4)),
        told_by_lightning=None,
        k_at=lambda step: (1,),
        log=lambda *_, **__: None,
    )
    trainer = SimpleNamespace(world_size=world, accumulate_grad_batches=1, is_global_zero=first, callbacks=[diary])
    recorder = LoadRecorder()
    for step, routings in enumerate(batches, start=1):
        if step in (1, 8):
            kept = recorder.state_dict()
            recorder = LoadRecorder()
            if kept:
                recorder.load_state_dict(kept)
            recorder.on_fit_start(trainer, module)
        trainer.global_step = step
        recorder.on_train_batch_end(trainer, module, {"routings": routings}, None, step - 1)
    return diary.entries


def test_ranks_with_unequal_numbers_of_tokens_close_their_windows_in_the_same_step(tmp_path):
    """11 and 9 tokens a step, then none on one of them: 100 of both are reached where one process reaches them."""
    sizes = [(11, 9)] * 6 + [(0, 20)] * 6
    ours = lambda rank: [[routing(both[rank], rank)] for both in sizes]  # noqa: E731
    two = on_ranks(2, lambda rank: windows(ours(rank), 2, first=rank == 0), tmp_path)
    both = [[Routing(*map(torch.cat, zip(a[0], b[0], strict=True)))] for a, b in zip(ours(0), ours(1), strict=True)]
    assert two[0] == two[1] == windows(both, 1)
    assert [(step, tokens) for step, tokens, _ in two[0]] == [(5, 100), (10, 100)]
