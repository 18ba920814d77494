"""Sampling with a key/value cache: each position is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sigma_lite.config import require
from sigma_lite.model import KeyValueCache, Transformer


def sample(
    model: Transformer,
    prompt_S: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """New token ids, one by one. What is given is checked at once, not at the first token.

    Args:
        prompt_S: token ids, [S], S >= 1.
        temperature: 0 takes the most probable token; 1 samples the model's own distribution.
        top_p: sample among the most probable tokens whose probabilities just reach this sum (nucleus, 1904.09751), 0..1.
        stop_id: end, without yielding it, when this token is drawn.

    Raises: ConfigError for an empty prompt or a value out of range.
    """
    require(prompt_S.dim() == 1 and len(prompt_S) > 0, "the prompt is empty: give at least one token to continue")
    require(temperature >= 0, f"temperature={temperature}: must be 0 (greedy) or more")
    require(0 < top_p <= 1, f"top_p={top_p}: must lie in (0, 1]")
    require(max_new_tokens >= 0, f"max_new_tokens={max_new_tokens}: must be 0 or more")
    return _tokens(
        model, prompt_S[None], max_new_tokens, stop_id, lambda logits_V: draw(logits_V, temperature, top_p, generator)
    )


@torch.inference_mode()
def _tokens(
    model: Transformer, ids_BS: Tensor, count: int, stop_id: int | None, choose: Callable[[Tensor], int]
) -> Iterator[int]:
    cache = [KeyValueCache() for _ in model.blocks]
    for _ in range(count):
        token = choose(model(ids_BS, cache=cache).logits[0, -1].float())
        if token == stop_id:
            return
        yield token
        ids_BS = ids_BS.new_tensor([[token]])


def draw(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> int:
    """One token from logits [V]; one of -inf is ruled out.

    Raises ConfigError for NaN, or where the largest is infinite: argmax would name a token all the same.
    """
    finite = bool(torch.isfinite(logits_V.max()))  # NaN where any is
    require(finite, "the model's logits are not finite: its training diverged; use an earlier checkpoint, or train it anew")
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V, ids_V = ((logits_V - logits_V.max()) / temperature).softmax(-1).sort(descending=True)
    kept_V = probs_V * (probs_V.cumsum(-1) - probs_V < top_p)  # the token that crosses top_p still counts
    return int(ids_V[torch.multinomial(kept_V, 1, generator=generator)])
