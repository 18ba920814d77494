"""Rows of token ids in, logits and routing out. Plain torch: nothing here knows Lightning."""

from sigma_lite.model.attention import KeyValueCache
from sigma_lite.model.parts import Parts
from sigma_lite.model.router import Router, Routing
from sigma_lite.model.transformer import Output, Transformer

__all__ = ["KeyValueCache", "Output", "Parts", "Router", "Routing", "Transformer"]
