"""One layer: attention, then a mixture of experts, each on a normalised copy of the stream and added back to it."""

from __future__ import annotations

from torch import Tensor, nn

from sigma_lite.config import ModelConfig, require
from sigma_lite.model.attention import Allowed, KeyValueCache
from sigma_lite.model.dispatch import for_router
from sigma_lite.model.norm import RMSNorm
from sigma_lite.model.parts import Parts
from sigma_lite.model.rotary import Rotation
from sigma_lite.model.router import NamedRouting, Routing

_PLAIN = "a plain Routing, which is one of experts: give a subclass of NamedRouting, that says `of` what"


class MoE(nn.Module):
    """Route each token, send it to its experts, bring the weighted sum back."""

    def __init__(self, config: ModelConfig, parts: Parts = Parts()):  # noqa: B008  frozen: safe to share
        super().__init__()
        self.router = parts.router(config)
        self.experts = parts.experts(config)
        self.dispatch = parts.dispatch or for_router(self.router)

    def forward(self, x_BSD: Tensor, ids_BS: Tensor | None = None) -> tuple[Tensor, Routing]:
        """[B, S, D] -> [B, S, D]. `ids_BS` are the tokens' ids, for a router that reads them."""
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD, ids_BS.flatten()) if getattr(self.router, "reads_tokens", False) else self.router(x_TD)
        around = getattr(self.experts, "around", None)  # experts that also do something once per token
        y_TD = around(x_TD, routing, self.dispatch) if around else self.dispatch(x_TD, routing, self.experts)
        return y_TD.view_as(x_BSD), routing


class Block(nn.Module):
    """Pre-norm residual layer; without `attends` it is the mixture of experts alone."""

    layer = 0  # which one it is; the model says it

    def __init__(self, config: ModelConfig, attends: bool = True, parts: Parts = Parts()):  # noqa: B008
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps) if attends else None
        self.attention = parts.attention(config) if attends else None
        self.moe_norm = RMSNorm(config.d_model, config.norm_eps)
        self.moe = MoE(config, parts)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        mask_BSS: Allowed = None,
        cache: KeyValueCache | None = None,
        ids_BS: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        routings = []
        if self.attention:
            y = self.attention(self.attention_norm(x_BSD), rotation, mask_BSS, cache)
            y_BSD, *routings = y if isinstance(y, tuple) else (y,)  # with routings where attention chooses too
            x_BSD = x_BSD + y_BSD
        y_BSD, routing = self.moe(self.moe_norm(x_BSD), ids_BS)
        return x_BSD + y_BSD, [routing, *map(self.named, routings)]

    def named(self, routing: NamedRouting) -> NamedRouting:
        """Attention's choice, of this layer. Raises ConfigError for one that does not say what was chosen."""
        require(isinstance(routing, NamedRouting), f"{type(self.attention).__name__} returned {_PLAIN}")
        routing.layer = self.layer
        return routing
