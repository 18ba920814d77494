"""Sampling with a key/value cache: each position is read once, prompts of one length together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_lite.config import require
from sigma_lite.model import KeyValueCache, Routing, Transformer, of_experts
from sigma_lite.model.assumes import assumed


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The cuts follow each other in this order, each on what the one before left.

    Raises: ConfigError for a value out of range.
    """

    temperature: float = 0.8  # 0 takes the most probable token; 1 samples the model's own distribution
    top_k: int = 0  # sample among the k most probable tokens; 0: among all
    top_p: float = 0.95  # among the most probable ones whose probabilities just reach this sum (nucleus, 1904.09751)
    min_p: float = 0.0  # among those with at least this share of the largest probability (2407.01082)

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature={self.temperature}: must be 0 (greedy) or more")
        require(self.top_k >= 0, f"top_k={self.top_k}: must be 1 or more, or 0 for all tokens")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: must lie in (0, 1]")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p}: must lie in 0..1")


class Written(NamedTuple):
    """One step of a batch of N prompts that still go on."""

    rows: list[int]  # which prompts of the batch
    tokens: list[int]  # what comes next in each; a stop token is here, and ends its row
    routings: list[Routing]  # one a layer, of the positions read for it: N * S tokens, S = 1 but for the prompt
    logits_NV: Tensor  # fp32, of the model itself: before temperature and cuts


class Continuation(NamedTuple):
    tokens: list[int]  # without the stop token
    stopped: bool  # False: cut at max_new_tokens
    experts: list[Tensor]  # of each layer, int64 [positions read, K], if asked for; -1: an empty slot
    logps: list[float]  # log p of each token and of the stop token, by the model itself, if asked for


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    at_once: int = 64,
    experts: bool = False,
    logps: bool = False,
) -> list[Continuation]:
    """Continue many prompts, in their order. Each gets the tokens that it would get alone with its seed.

    A cache has no room for padding, so prompts of the same length are read together.

    Args:
        prompts: token ids, each at least one.
        stop: ids that end a text.
        seeds: one for each prompt; default: 0, 1, 2, ...
        at_once: most prompts in a batch; memory grows with it.
        experts: also return which experts each position chose.
        logps: also return how probable each token was, whatever the temperature.

    Raises: ConfigError as `stream`.
    """
    _require_prompts(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in (range(len(prompts)) if seeds is None else seeds)]
    require(len(generators) == len(prompts), f"{len(generators)} seeds for {len(prompts)} prompts: give one for each")
    groups: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[len(prompt)].append(place)
    found: dict[int, Continuation] = {}
    for group in groups.values():
        for first in range(0, len(group), at_once):
            places = group[first : first + at_once]
            ids_BS, own = torch.tensor([list(prompts[p]) for p in places]), [generators[p] for p in places]
            steps = stream(model, ids_BS, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, generators=own)
            found |= zip(places, _collected(steps, len(places), stop, experts, logps), strict=True)
    return [found[place] for place in range(len(prompts))]


def stream(
    model: Transformer,
    prompts_BS: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    generators: Sequence[torch.Generator | None] | None = None,
) -> Iterator[Written]:
    """The same for prompts of one length [B, S], token by token. What is given is checked at once, not at the first token.

    Args:
        generators: one for each prompt, on the CPU; default: torch's own.

    Raises: ConfigError for an empty prompt, a value out of range, and a router that has to know the future; later for
        logits that are not finite.
    """
    require(prompts_BS.numel() > 0, "the prompt is empty: give at least one token to continue")
    require(max_new_tokens >= 0, f"max_new_tokens={max_new_tokens}: must be 0 or more")
    why = why_it_cannot_write(model)
    require(not why, why)
    generators = [None] * len(prompts_BS) if generators is None else list(generators)
    return _steps(model, prompts_BS, max_new_tokens, sampling, torch.tensor(sorted(stop), dtype=torch.int64), generators)


@torch.inference_mode()
def _steps(
    model: Transformer,
    ids_BS: Tensor,
    count: int,
    sampling: Sampling,
    stop: Tensor,
    generators: list[torch.Generator | None],
) -> Iterator[Written]:
    device = model.embedding.weight.device
    cache = [KeyValueCache() for _ in model.blocks]
    rows = list(range(len(ids_BS)))
    for _ in range(count):
        x_BSD, routings = model.backbone(ids_BS.to(device), cache=cache)
        logits_BV = model.head(x_BSD[:, -1]).float().cpu()
        tokens_B = draw_each(logits_BV, sampling, generators)
        yield Written(rows, tokens_B.tolist(), of_experts(routings), logits_BV)
        left = (~torch.isin(tokens_B, stop)).nonzero()[:, 0]
        if not len(left):
            return
        if len(left) < len(rows):
            rows, generators = ([given[i] for i in left.tolist()] for given in (rows, generators))
            for layer in cache:  # one without attention has none
                if layer.keys is not None and layer.values is not None:
                    layer.keys, layer.values = layer.keys[left.to(device)], layer.values[left.to(device)]
        ids_BS = tokens_B[left, None]


def sample(
    model: Transformer,
    prompt_S: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int = 0,
    min_p: float = 0.0,
    stop_id: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """New token ids of one prompt [S], one by one, up to a stop token and without it. See `Sampling` and `stream`."""
    require(prompt_S.dim() == 1, f"one prompt is [S], not {list(prompt_S.shape)}: `generate` takes several")
    stop = {stop_id} if isinstance(stop_id, int) else set(stop_id or ())
    sampling = Sampling(temperature, top_k, top_p, min_p)
    steps = stream(
        model, prompt_S[None], max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, generators=[generator]
    )
    return (step.tokens[0] for step in steps if step.tokens[0] not in stop)


# ------------------------------------------------------------------------------------------------------------ drawing


def draw(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> int:
    """One token from logits [V]; see `draw_each`."""
    return int(draw_each(logits_V[None], Sampling(temperature, top_p=top_p), [generator])[0])


def draw_each(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator | None]) -> Tensor:
    """A token for each row of logits, int64 [B]; one of -inf is ruled out. Each row draws from its own generator.

    Raises ConfigError for NaN, or where the largest is infinite: argmax would name a token all the same.
    """
    finite = bool(torch.isfinite(logits_BV.amax(-1)).all())  # NaN where any is
    require(finite, "the model's logits are not finite: its training diverged; use an earlier checkpoint, or train it anew")
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    kept_BN, ids_BN = shortlist(logits_BV, sampling)
    drawn = [torch.multinomial(kept_N, 1, generator=own) for kept_N, own in zip(kept_BN, generators, strict=True)]
    return ids_BN.gather(-1, torch.stack(drawn))[:, 0]


def shortlist(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What may be drawn: weights [B, N], 0 for what is cut off, and whose they are, int64 [B, N]. Top-p sorts."""
    probs_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_k:
        probs_BN, ids_BN = probs_BV.topk(min(sampling.top_k, probs_BV.shape[-1]))
        probs_BN = probs_BN / probs_BN.sum(-1, keepdim=True)
    elif sampling.top_p < 1:
        probs_BN, ids_BN = probs_BV.sort(descending=True)
    else:
        probs_BN, ids_BN = probs_BV, torch.arange(probs_BV.shape[-1]).expand_as(probs_BV)
    if sampling.top_p < 1:
        probs_BN = probs_BN * (probs_BN.cumsum(-1) - probs_BN < sampling.top_p)  # the token that crosses top_p still counts
    if sampling.min_p:
        probs_BN = probs_BN * (probs_BN >= sampling.min_p * probs_BN.amax(-1, keepdim=True))
    return probs_BN, ids_BN


# ------------------------------------------------------------------------------------------------------------- around


def why_it_cannot_write(model: Transformer) -> str:
    """Which part has to know the future, as a sentence; "" where none does. A part that says nothing is trusted."""
    part = next(those_causal(model, "no"), None)
    if part is None:
        return ""
    return (
        f"{part} decides for all tokens of a batch together, later ones too: a text that is"
        " written token by token has no later ones, so it would be routed as the model never was in training"
    )


def those_causal(model: Transformer, said: str) -> Iterator[str]:
    """Names of the model's parts whose `assumes.causal` says this: yes, no, or in evaluation only."""
    parts = (part for block in model.blocks for part in (block.moe.router, block.moe.experts, block.attention))
    kinds = (type(part) for part in parts)
    return (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if assumed(kind).causal == said)


def _require_prompts(prompts: Sequence[Sequence[int]]) -> None:
    for place, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompt {place} is empty: give at least one token to continue")


def _collected(steps: Iterator[Written], B: int, stop: Collection[int], experts: bool, logps: bool) -> list[Continuation]:
    tokens: list[list[int]] = [[] for _ in range(B)]
    likely: list[list[float]] = [[] for _ in range(B)]
    chosen: list[list[list[Tensor]]] = [[] for _ in range(B)]  # of each row, step by step, layer by layer: [S, K]
    for step in steps:
        if logps:
            nats_N = F.cross_entropy(step.logits_NV, torch.tensor(step.tokens), reduction="none")
            for row, nats in zip(step.rows, nats_N.tolist(), strict=True):
                likely[row].append(-nats)
        for place, (row, token) in enumerate(zip(step.rows, step.tokens, strict=True)):
            tokens[row].append(token)
            if experts:
                chosen[row].append([r.ids.cpu().unflatten(0, (len(step.rows), -1))[place] for r in step.routings])
    ended = [bool(own) and own[-1] in set(stop) for own in tokens]
    return [
        Continuation(own[: len(own) - end], end, [joined(layer) for layer in zip(*reads, strict=True)], logp)
        for own, end, reads, logp in zip(tokens, ended, chosen, likely, strict=True)
    ]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """[T, K] one after the other; K may differ where slots may be empty, and is filled up with -1."""
    K = max(ids_TK.shape[1] for ids_TK in parts)
    return torch.cat([F.pad(ids_TK, (0, K - ids_TK.shape[1]), value=-1) for ids_TK in parts])
