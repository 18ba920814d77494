"""Rows of token ids in, logits and routing out. Plain torch: nothing here knows Lightning."""

from sigma_lite.model.attention import KeyValueCache
from sigma_lite.model.parts import Parts
from sigma_lite.model.router import NamedRouting, Router, Routing, of_experts, of_others, of_tokens
from sigma_lite.model.transformer import Output, Transformer

__all__ = [
    "KeyValueCache",
    "NamedRouting",
    "Output",
    "Parts",
    "Router",
    "Routing",
    "Transformer",
    "of_experts",
    "of_others",
    "of_tokens",
]
