"""What surgeries share: a model of another shape or of other parts, which keeps the weights that fit; hidden units."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sigma_lite.config import ModelConfig, require
from sigma_lite.model import Parts, Transformer


def rebuilt(model: Transformer, config: ModelConfig | None = None, parts: Parts | None = None) -> Transformer:
    """Weights and buffers of the same name and shape are copied; the rest begins as in training, for a surgery to fill."""
    other = Transformer(config or model.config, model.parts if parts is None else parts)
    state, own = model.state_dict(), other.state_dict()
    other.load_state_dict({n: t for n, t in state.items() if n in own and own[n].shape == t.shape}, strict=False)
    return other.eval()


def units(w13_XD: Tensor, w2_DF: Tensor) -> Tensor:
    """The weights of each hidden unit, [F, 3 D]: gate row, up row, down column. Any order of units is the same network."""
    return torch.cat([*w13_XD.chunk(2), w2_DF.T], 1)


def named_parts(parts: Parts) -> dict[str, Any]:
    """Parts as a yaml names them. Raises ConfigError for one that cannot be named, such as a lambda."""
    named = {}
    for name, part in parts.custom.items():
        partial = isinstance(part, functools.partial)
        inner, arguments = (part.func, dict(part.keywords)) if partial else (part, {})
        path = f"{inner.__module__}.{getattr(inner, '__qualname__', '<no name>')}"
        plain = "<" not in path and not (partial and part.args)
        require(plain, f"the new model's {name} is {path}, which no yaml can name: give a class and keyword settings")
        named[name] = {"class_path": path, **({"init_args": arguments} if arguments else {})}
    return named
