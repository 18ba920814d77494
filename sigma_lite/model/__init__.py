"""Rows of token ids in, logits and routing out. Plain torch: nothing here knows Lightning."""

from sigma_lite.model.attention import KeyValueCache
from sigma_lite.model.router import Routing
from sigma_lite.model.transformer import Output, Transformer

__all__ = ["KeyValueCache", "Output", "Routing", "Transformer"]
