"""What may stand in another's place in a model: the router, the experts, the attention, and how tokens reach the experts.

    class Second(Router):                       # each token goes to its second choice
        def choose(self, scores_TE):
            return scores_TE.topk(self.top_k + 1).indices[:, 1:]

    Transformer(config, Parts(router=Second))

`SigmaLit(parts=...)`, `model.parts: {router: {class_path: mine.Second}}` in yaml and `lab.compare` all take them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from sigma_lite.config import ModelConfig
from sigma_lite.model.attention import Attention
from sigma_lite.model.dispatch import Dispatch
from sigma_lite.model.experts import Experts
from sigma_lite.model.router import Router

Part = Callable[[ModelConfig], nn.Module]
"""A class, or a function such as a `functools.partial` of one with its settings; called once for each layer."""


@dataclass(frozen=True)
class Parts:
    """The parts of every layer; those of Sigma-MoE-Tiny unless it says otherwise.

    A module that owns parameters says in `own_weights` how they begin and whether they decay: see model/weights.py.

    Args:
        router: config -> module, [T, D] -> Routing. Most papers need a `Router` that chooses in another way.
        experts: config -> module, (x_TD, ids_TK, gates_TK) -> [T, D].
        attention: config -> module, (x_BSD, turn, mask_BSS, cache) -> [B, S, D].
        dispatch: (x_TD, routing, experts) -> [T, D]; None: `dispatch.ragged` for a router that says it may leave slots
            empty, `dispatch.local` for others.
    """

    router: Part = Router
    experts: Part = Experts
    attention: Part = Attention
    dispatch: Dispatch | None = None

    @property
    def custom(self) -> dict[str, Any]:
        """Those that are not the model's own, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not f.default}
