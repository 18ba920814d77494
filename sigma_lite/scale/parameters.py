"""Parameters of a model with parts of its own, counted: on the model, or on torch's meta device, where none takes memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sigma_lite.config import ConfigError, Ledger, ModelConfig
from sigma_lite.model import Parts, Transformer
from sigma_lite.model.norm import RMSNorm
from sigma_lite.model.parts import as_parts


class Counted(ModelConfig):
    """A shape whose ledger is counted on the model that it describes, not computed from the shape."""

    model: Transformer

    def ledger(self, k_per_layer: Sequence[int] | None = None) -> Ledger:
        """As ModelConfig's. `active_experts` is what the experts say, or else K of E slices and all that has no slices."""
        k_per_layer = self.check_k(k_per_layer if k_per_layer is not None else (self.top_k,) * self.n_layers)
        found: Counter[str] = Counter()
        for name, weight in self.model.named_parameters():
            found[_kind(name, self.model.get_submodule(name.rpartition(".")[0]))] += weight.numel()
        active = [
            _active(block.moe.experts, k, self.n_experts) for block, k in zip(self.model.blocks, k_per_layer, strict=True)
        ]
        kinds = ("embedding", "attention", "router", "norms", "experts")
        return Ledger(**{kind: found[kind] for kind in kinds}, active_experts=sum(active))


def counted(net: ModelConfig, parts: Parts | Mapping[str, Any]) -> Counted:
    """`net` with the ledger of a model of these parts. Raises ConfigError, by name, where that cannot be built unseen."""
    try:
        with torch.device("meta"):
            model = Transformer(net, as_parts(parts))
    except ConfigError:
        raise
    except Exception as error:  # whatever a reader's class says
        names = ", ".join(f"model.parts.{name}" for name in as_parts(parts).custom)
        raise ConfigError(
            f"{names}: the parameters cannot be counted, because the model cannot be built on torch's meta device:"
            f" {type(error).__name__}: {error}"
        ) from error
    return _counted_on(model)


def shape_of(model: Transformer) -> ModelConfig:
    """Its config; where it has parts of its own, with a ledger that is counted on it. Ask this for what a model has."""
    return _counted_on(model) if model.parts.custom else model.config


def _counted_on(model: Transformer) -> Counted:
    shape = Counted(**{f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)})
    object.__setattr__(shape, "model", model)  # no field: it is no setting
    return shape


def _kind(name: str, owner: nn.Module) -> str:
    """The ledger's word for a parameter; what routes between blocks or scales a router is of the routers."""
    if name.startswith(("embedding.", "head.")):
        return "embedding"
    if ".moe.experts." in name:
        return "experts"
    if isinstance(owner, RMSNorm):
        return "norms"
    return "attention" if ".attention." in name else "router"


def _active(experts: nn.Module, k: int, E: int) -> int:
    """Parameters of a layer's experts that one token uses.

    An expert is a slice of each [n, M, N] parameter with n > 1, and a token uses K of E: on average, where sizes differ.
    """
    if hasattr(experts, "active_parameters"):
        return experts.active_parameters(k)
    sliced = sum(w.numel() for w in experts.parameters() if w.dim() == 3 and len(w) > 1)
    return sum(w.numel() for w in experts.parameters()) - sliced + sliced * k // E
