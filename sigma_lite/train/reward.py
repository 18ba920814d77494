"""Reinforcement from rewards that a rule gives: the model answers, and answers better than their group become likelier.

GRPO (2402.03300), on policy. A micro-batch holds problems, one a row. The model draws `answers` answers to each at
temperature 1. An answer earns 1 if it ended and its result is right, else 0. Its advantage is what it earned beyond the mean
of its group, divided by the group's standard deviation with `normalise`:

    loss = mean over all tokens of a step's answers of -advantage * log p(token)

So all answers of a step are written before the first of its micro-batches is learned from. The mean over tokens is DAPO's
(2503.14476); without `normalise` the advantage is Dr. GRPO's (2503.20783), which does not favour problems that are almost
always or almost never solved. A group in which all earned the same has no advantage: it is dead, and is left out before the
forward pass, so neither the loss nor a router's load counts it. Each drawing is used for one step; then the ratio of new and
old probability is 1, and there is nothing to clip. No reference model holds the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sigma_lite.balance.pooled import Counted
from sigma_lite.config import RewardConfig, require
from sigma_lite.data.chat import Marks
from sigma_lite.data.rows import IGNORED, Batch
from sigma_lite.data.tasks import result
from sigma_lite.model import Routing, Transformer, of_experts, of_tokens
from sigma_lite.model.transformer import cross_entropy
from sigma_lite.serve.generate import Continuation, Sampling, generate, joined, those_causal, why_it_cannot_write

AT_ONCE = 256  # answers that are written together
OWN = Sampling(temperature=1.0, top_p=1.0)  # the model's own distribution, from which on-policy answers must come


class Outcome(NamedTuple):
    """Of one micro-batch. The tokens of a routing are those of the live answers, T in all; none where no group is live."""

    loss: Tensor
    routings: list[Routing]
    lengths: Tensor | int  # how these tokens divide into rows: see Batch.lengths
    live: bool  # False: every group was dead, and nothing is to be learned
    told: dict[str, Tensor]  # scalars for the diary


class Answered(NamedTuple):
    """B prompts and their answers as rows for a forward pass; what is left of a row is filled up."""

    ids_BS: Tensor
    targets_BS: Tensor  # tokens of answers, the end mark too; IGNORED elsewhere
    own_BS: Tensor  # bool: not filled up


class Lesson(NamedTuple):
    """Answers of one micro-batch's live groups; those of the first where none is live: the model has to read something."""

    rows: Answered
    advantages_B: Tensor
    written: list[Continuation]
    live: bool
    told: dict[str, Tensor]

    @property
    def counted(self) -> tuple[int, int]:
        """Tokens of live answers, and those with their problems."""
        return (int((self.rows.targets_BS != IGNORED).sum()), int(self.rows.own_BS.sum())) if self.live else (0, 0)


class Reinforcement:
    """What a step of rewards does with the problems of a micro-batch.

    Args:
        frame: ids of the marks around a problem.
        text: ids -> their text, by which results are compared.

    Raises: ConfigError for a model that cannot write, or that would not learn as it writes.
    """

    def __init__(self, config: RewardConfig, model: Transformer, frame: Marks, text: Callable[[list[int]], str]):
        why = why_it_cannot_write(model) or why_it_learns_otherwise(model)
        require(not why, why)
        self.config, self.model, self.frame, self.text = config, model, frame, text

    def __call__(self, batch: Batch, step: int, first: int) -> Outcome:
        """Of a step that is one micro-batch; see `ask`."""
        return self.learn(self.ask(batch, step, first))

    def ask(self, batch: Batch, step: int, first: int) -> Lesson:
        """Answer, as any finished model does (in evaluation mode), and judge.

        Args:
            batch: one problem a row.
            step: optimizer steps finished.
            first: place of the batch's first row among the rows of this step: answers do not depend on how it is cut.
        """
        asked, G = problems_of(batch, self.frame.assistant, self.frame.end), self.config.answers
        seeds = drawn_seeds(self.config.seed, step, first * G, len(asked) * G)
        prompts = [prompt for prompt, _ in asked for _ in range(G)]
        options = {"sampling": OWN, "stop": {self.frame.end}, "at_once": AT_ONCE, "experts": True, "logps": True}
        was = self.model.training
        self.model.eval()  # a router may look at the whole batch in training, or move by what it reads
        try:
            written = generate(self.model, prompts, max_new_tokens=self.config.max_new_tokens, seeds=seeds, **options)
        finally:
            self.model.train(was)
        torch.clear_autocast_cache()  # weights that were cast while nothing could have a gradient
        rewards_PG = torch.tensor([float(r) for r in self.rewards(asked, written)]).view(-1, G)
        shown_PG = shuffled(rewards_PG, seeds[::G]) if self.config.null else rewards_PG
        advantages_PG, live_P = advantages(shown_PG, self.config.normalise)
        live = bool(live_P.any())
        learned_P = live_P if live else torch.arange(len(live_P)) == 0
        kept = learned_P.repeat_interleave(G).nonzero()[:, 0].tolist()
        rows = answered([prompts[i] for i in kept], [written[i] for i in kept], self.frame.begin, self.frame.end)
        told = {
            "reward": rewards_PG.mean(),
            "length": torch.tensor([float(len(own.logps)) for own in written]).mean(),  # tokens, the end mark too
            "ended": torch.tensor([float(own.stopped) for own in written]).mean(),
            "dead": (~live_P).float().mean(),
            "entropy": -torch.tensor([logp for own in written for logp in own.logps]).mean(),  # nats a token, estimated
        }
        return Lesson(rows, advantages_PG.flatten()[kept], [written[i] for i in kept], live, told)

    def learn(self, lesson: Lesson, each: Counted | None = None) -> Outcome:
        """Compute the loss. Args: each: the mean over the step's micro-batches, where they differ."""
        scored = None if each is None else each.scored
        loss, nats_N, routings = policy_loss(self.model, lesson.rows, lesson.advantages_B, scored)
        told = lesson.told | mismatch(lesson.written, nats_N, routings)
        routings = routings if lesson.live else [r.each(lambda t: t[:0]) for r in routings]
        device = self.model.embedding.weight.device
        lengths_B = lesson.rows.own_BS.sum(1) * lesson.live
        return Outcome(loss, routings, lengths_B, lesson.live, {name: value.to(device) for name, value in told.items()})

    def rewards(self, asked: Sequence[tuple], written: Sequence[Continuation]) -> list[bool]:
        """Whether each answer ended and has the right result, to the digit."""
        right = [result(self.text(answer)) for _, answer in asked for _ in range(self.config.answers)]
        return [own.stopped and result(self.text(own.tokens)) == answer for own, answer in zip(written, right, strict=True)]


def why_it_learns_otherwise(model: Transformer) -> str:
    """Which part routes the answers that are learned otherwise than it wrote them, as a sentence; "" where none does."""
    part = next(those_causal(model, "in evaluation only"), None)
    if part is None:
        return ""
    return (
        f"{part} decides token by token when it writes, and for all tokens of a batch together in training: rewards"
        " would teach another policy than the one that wrote; choose a router that is causal in training too"
    )


def problems_of(batch: Batch, assistant: int, end: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each row: ids up to where the assistant begins, and from there to the end of the answer."""
    ids_BS = torch.cat([batch.ids_BS, batch.targets_BS[:, -1:]], 1).tolist()
    begun = [ids.index(assistant) + 1 for ids in ids_BS]
    return [(ids[:at], ids[at : ids.index(end, at)]) for ids, at in zip(ids_BS, begun, strict=True)]


def drawn_seeds(seed: int, step: int, first: int, count: int) -> list[int]:
    """One for each answer, of seed, step and the answer's place in the step alone: a run that goes on draws the same."""
    return np.random.SeedSequence([seed, step]).generate_state(first + count)[first:].tolist()


def shuffled(rewards_PG: Tensor, seeds: Sequence[int]) -> Tensor:
    """Rewards dealt anew inside each group: every answer gets one of its group's, whatever it said."""
    orders = [torch.randperm(rewards_PG.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return rewards_PG.gather(1, torch.stack(orders))


def advantages(rewards_PG: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    """What each answer earned beyond its group, fp32 [P, G], and which groups live, bool [P].

    Args:
        normalise: divide by the group's standard deviation, which is that of its G answers, not an estimate of more.
    """
    beyond_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    live_P = (rewards_PG != rewards_PG[:, :1]).any(1)
    if normalise:
        beyond_PG = beyond_PG / rewards_PG.std(1, keepdim=True, correction=0).where(live_P[:, None], 1.0)
    return beyond_PG.where(live_P[:, None], 0.0), live_P


def answered(prompts: Sequence[Sequence[int]], written: Sequence[Continuation], fill: int, end: int) -> Answered:
    whole = [[*prompt, *own.tokens, *[end] * own.stopped] for prompt, own in zip(prompts, written, strict=True)]
    S = max(map(len, whole)) - 1
    ids_BS, targets_BS = torch.full((len(whole), S), fill), torch.full((len(whole), S), IGNORED)
    for row, (prompt, ids) in enumerate(zip(prompts, whole, strict=True)):
        ids_BS[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets_BS[row, len(prompt) - 1 : len(ids) - 1] = torch.tensor(ids[len(prompt) :])
    own_BS = torch.arange(S) < torch.tensor([len(ids) - 1 for ids in whole])[:, None]
    return Answered(ids_BS, targets_BS, own_BS)


def policy_loss(
    model: Transformer, rows: Answered, advantages_B: Tensor, count: float | None = None
) -> tuple[Tensor, Tensor, list[Routing]]:
    """Mean over the answers' tokens of -advantage * log p; or their sum divided by `count`, as balance/pooled.py says.

    Returns: the loss; -log p of these tokens, [N], row by row; the routings of all tokens that are not filled up.
    """
    device = model.embedding.weight.device
    ids_BS, targets_BS, own_BS = (part.to(device) for part in rows)
    x_BSD, routings = model.backbone(ids_BS)  # attention looks back only, so what fills a row up changes nothing before it
    scored_BS = targets_BS != IGNORED
    nats_N = cross_entropy(x_BSD[scored_BS], model.head.weight, targets_BS[scored_BS], "none")
    advantages_N = advantages_B.to(device)[:, None].expand_as(ids_BS)[scored_BS]
    losses_N = advantages_N * nats_N
    loss = losses_N.mean() if count is None else losses_N.sum() / count
    return loss, nats_N, of_tokens(routings, own_BS.flatten())


@torch.no_grad()
def mismatch(written: Sequence[Continuation], nats_N: Tensor, routings: Sequence[Routing]) -> dict[str, Tensor]:
    """How far reading token by token with a cache is from the forward pass that is trained, on the same answers.

    Returns: experts_differ, the share of (token, layer) whose experts are others; logp_differ, the mean distance of log p.
    """
    differ = []
    for layer, routing in enumerate(of_experts(routings)):
        there_TK, here_TK = torch.cat([own.experts[layer] for own in written]), routing.ids.cpu()
        both = joined([there_TK, here_TK]).sort(1).values
        differ.append((both[: len(there_TK)] != both[len(there_TK) :]).any(1).float().mean())
    logp_N = torch.tensor([logp for own in written for logp in own.logps])
    return {"experts_differ": torch.stack(differ).mean(), "logp_differ": (logp_N + nats_N.cpu().float()).abs().mean()}
