"""What may stand in another's place in a model: the router, the experts, the attention, how tokens reach the experts, and
how the stream goes through the blocks.

    class Second(Router):                       # each token goes to its second choice
        def choose(self, scores_TE):
            return scores_TE.topk(self.top_k + 1).indices[:, 1:]

    Transformer(config, Parts(router=Second))

`SigmaLit(parts=...)`, `model.parts: {router: {class_path: mine.Second}}` in yaml and `lab.compare` all take them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from sigma_lite.config import ModelConfig, nearest, require
from sigma_lite.model.attention import Attention
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts
from sigma_lite.model.router import Router
from sigma_lite.reading import imported

Part = Callable[[ModelConfig], nn.Module]
"""A class, or a function such as a `functools.partial` of one with its settings; called once for each layer.

One that takes `layer` is told the layer's number, from 0: so layers may have parts of different sizes.
"""


@dataclass(frozen=True)
class Parts:
    """The parts of every layer; those of Sigma-MoE-Tiny unless it says otherwise.

    A module that owns parameters says in `own_weights` how they begin and whether they decay: see model/weights.py.

    Args:
        router: config -> module, [T, D] -> Routing. Most papers need a `Router` that chooses in another way.
        experts: config -> module, (x_TD, ids_TK, gates_TK) -> [T, D]. What works once per token, such as a shared expert,
            stands in `around(x_TD, routing, dispatch) -> [T, D]`, which calls dispatch with the experts inside.
            `active_parameters(k) -> int`, if they have it, tells the planner how many parameters one token uses;
            `set_k(k)` raises ConfigError where they cannot work with k experts per token.
        attention: config -> module, (x_BSD, rotation, mask_BSS, cache) -> [B, S, D]; or that and a NamedRouting
            where it chooses too, such as among its heads: balance losses then see that choice as well.
        stack: config -> module, (blocks, x_BSD, rotation, mask, caches, ids_BS) -> ([B, S, D], routings): how the stream
            goes through the blocks; None: through one after another. Unlike the others, one for the whole model.
        dispatch: (x_TD, routing, experts) -> [T, D]; None: `dispatch.ragged` for a router that says it may leave slots
            empty, `dispatch.local` for others.
    """

    router: Part = Router
    experts: Part = Experts
    attention: Part = Attention
    dispatch: Dispatch | None = None
    stack: Part | None = None

    @property
    def custom(self) -> dict[str, Any]:
        """Those that are not the model's own, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not f.default}

    def of_layer(self, layer: int) -> Parts:
        """These, with the number of the layer given to those that take it."""
        modules = {name: part for name, part in self.custom.items() if name not in ("dispatch", "stack")}
        told = {name: functools.partial(part, layer=layer) for name, part in modules.items() if _takes_layer(part)}
        return dataclasses.replace(self, **told) if told else self


NAMES = tuple(f.name for f in fields(Parts))


def as_parts(given: Parts | Mapping[str, Any] | None) -> Parts:
    """Parts from what a yaml or a reader gives: {"router": a class, a path, or {"class_path": ..., "init_args": {...}}}.

    Raises: ConfigError for a part that does not exist, and for what cannot be called or imported.
    """
    if isinstance(given, Parts):
        return given
    given = _as_plain(given)
    for name in given or {}:
        require(name in NAMES, f"unknown part {name!r}; {nearest(name, NAMES)}")
    return Parts(**{name: _part(name, value) for name, value in (given or {}).items() if value is not None})


def _takes_layer(part: Part) -> bool:
    try:
        return "layer" in inspect.signature(part).parameters
    except (TypeError, ValueError):  # of what is not written in Python
        return False


def _part(name: str, given: Any) -> Any:
    where = f"model.parts.{name}"
    settings: Mapping[str, Any] = {}
    given = _as_plain(given)
    if isinstance(given, Mapping):
        require(
            isinstance(given.get("class_path"), str), f"{where}={given!r}: give class_path, and init_args if it takes any"
        )
        given, settings = given["class_path"], _as_plain(given.get("init_args")) or {}
        settings = {key: value for key, value in settings.items() if key != "config"}  # which the model gives
    if isinstance(given, str):
        given = imported(given, where)
    require(callable(given), f"{where}={given!r}: give a class, or a function of the ModelConfig")
    return functools.partial(given, **settings) if settings else given


def _as_plain(given: Any) -> Any:
    """Lightning's parser makes namespaces of plain groups."""
    return given.as_dict() if hasattr(given, "as_dict") else given
