"""Which experts read a text: the facts of the routing explorer, as plain values that a page and a widget draw."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sigma_lite.config import require
from sigma_lite.data.kinds import KINDS, SPECIAL
from sigma_lite.data.tokenizer import token_bytes
from sigma_lite.model import of_experts
from sigma_lite.serve.generate import joined
from sigma_lite.serve.marked import Marked, Text, at_hand, kinds_of, route
from sigma_lite.serve.specialise import favourites, specialisation
from sigma_lite.serve.trained import Trained, plain_prompt
from sigma_lite.storage import StorageError

FAVOURITES = 10  # tokens of an expert that are shown
MOST = 4000  # tokens of a text: a page holds each in every layer


def explored(
    trained: Trained, text: str, data: str | Path | None = None, tokens: int = 30_000, name: str | None = None
) -> dict[str, Any]:
    """`facts` of a text, with experts known by about `tokens` tokens: held-out ones, in `data` or where the run had them, or
    this Python's library."""
    marked = at_hand(trained, data if data and (Path(data) / "manifest.json").is_file() else None, tokens)
    return facts(trained, text, experts(trained, marked), marked.source, name)


def text_to_read(trained: Trained, text: str | None, file: str | Path | None, prompt: str) -> str:
    """What a person gave, or the prompt and 100 tokens that the model writes behind it. Raises StorageError, ConfigError."""
    if text is not None:
        return plain_prompt(text)
    if file is None:
        return prompt + "".join(trained.continue_text(prompt, 100))
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read {file} as UTF-8 text: {error}") from error


def facts(trained: Trained, text: str, known: list[list[dict]], source: str, name: str | None = None) -> dict[str, Any]:
    """A text as its tokens, with the experts of each in every layer.

    Args:
        known: what `experts` returned for the same model, and `source` the text from which.
        name: of the document, by whose ending Python is known; default: it is Python if Python can parse it.

    Returns: JSON values; tokens: [text, kind, nats] each, nats None for the first; experts [L][T][K] and gates [L][T][K]; -1
        is an empty slot.
    Raises: ConfigError for a text that is too long.
    """
    ids = trained.prompt_ids(text)
    require(len(ids) <= MOST, f"the text has {len(ids)} tokens, and {MOST} can be shown: give a piece of it")
    nats, chosen, gates = _read(trained, ids)
    sizes = token_bytes(trained.tokenizer, trained.model.config.vocab_size)
    kinds = [SPECIAL, *kinds_of(Text(text, name or _guess(text)), np.array(ids[1:], np.int64), sizes).tolist()]
    words = [shown(trained, token) for token in ids]
    return {
        "step": trained.step,
        "n_experts": max(trained.model.config.n_experts, *(len(of_layer) for of_layer in known)),
        "length": trained.length,
        "kinds": list(KINDS),
        "tokens": [list(token) for token in zip(words, kinds, [None, *nats], strict=True)],
        "experts": [layer.tolist() for layer in chosen],
        "gates": [[[round(gate, 3) for gate in own] for own in layer.tolist()] for layer in gates],
        "known": known,
        "source": source,
    }


def experts(trained: Trained, marked: Marked) -> list[list[dict]]:
    """What each expert of each layer serves in a text: [L][E] of {slots, tokens, kinds}.

    tokens: [text, slots, share of this token's slots that come here]; kinds: [name, share of the expert's slots, share of
    all slots, whether it is more than chance].
    """
    routed = route(trained, marked)
    tokens_T, found, own_T1 = marked.ids_BS.flatten(), [], marked.kinds_BS.flatten()[:, None] >= 0
    for of_layer_TK in routed.experts:
        ids_TK = of_layer_TK.where(own_T1, -1)
        E = max(trained.model.config.n_experts, int(ids_TK.max()) + 1)
        own = specialisation(ids_TK, marked.kinds_BS, E, len(KINDS), deals=100)
        sure, all_G = set(own.pairs()), own.counts_EG.sum(0) / max(own.counts_EG.sum(), 1)
        of_layer = []
        for expert, best in enumerate(favourites(ids_TK, tokens_T, E, FAVOURITES)):
            slots = int(own.counts_EG[expert].sum())
            kinds = [
                [KINDS[kind], round(n / slots, 4), round(float(all_G[kind]), 4), (expert, kind) in sure]
                for kind, n in sorted(enumerate(own.counts_EG[expert].tolist()), key=lambda pair: -pair[1])
                if n
            ]
            tokens = [[shown(trained, one.token), one.count, round(one.of_token, 3)] for one in best]
            of_layer.append({"slots": slots, "tokens": tokens, "kinds": kinds})
        found.append(of_layer)
    return found


@torch.inference_mode()
def _read(trained: Trained, ids: list[int]) -> tuple[list[float], list[torch.Tensor], list[torch.Tensor]]:
    """Cost of each token but the first, experts and gates [T, K] of each layer. Longer texts are read in rows."""
    costs, chosen, gates = [], [], []
    for first in range(0, len(ids), trained.length):
        row = torch.tensor([ids[first : first + trained.length]])
        logits_BSV, routings = trained.model(row)
        following = ids[first + 1 : first + trained.length + 1]
        logp_SV = logits_BSV[0, : len(following)].float().log_softmax(-1)
        costs += (-logp_SV.gather(1, torch.tensor(following, dtype=torch.int64)[:, None])[:, 0]).tolist()
        chosen.append([routing.ids for routing in of_experts(routings)])
        gates.append([routing.gates for routing in of_experts(routings)])
    return (
        [round(cost, 3) for cost in costs],
        [joined(layer) for layer in zip(*chosen, strict=True)],
        [joined(layer) for layer in zip(*gates, strict=True)],
    )


def shown(trained: Trained, token: int) -> str:
    """A token's text; a special token's name; bytes that are no character alone as \\xe2."""
    text = "".join(trained.texts([token]))
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "".join(f"\\x{byte:02x}" for byte in trained.bytes_of[token])
    return text or trained.tokenizer.id_to_token(token) or f"<{token}>"


def _guess(text: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "text"
    return "text.py"
