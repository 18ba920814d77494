"""Grouped-query attention (GQA, 2305.13245) with QK-norm (2010.04245) and RoPE, on torch's fused attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_lite.config import ModelConfig
from sigma_lite.model import documents
from sigma_lite.model.assumes import Assumes
from sigma_lite.model.documents import Pieces, Varlen
from sigma_lite.model.norm import RMSNorm
from sigma_lite.model.rotary import Rotation, rotate
from sigma_lite.model.weights import into_stream, passing

Allowed = Tensor | Pieces | Varlen | None
"""Who may look at whom: bool [B or 1, S, S], the same said shorter, or None for plain causal attention."""


class Attention(nn.Module):
    """H query heads share G key/value heads. Queries and keys are normalised per head, so logits cannot blow up."""

    assumes = Assumes()

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.d_model, config.n_heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=False)
        inner, outer = passing(config.d_model), passing(self.out.in_features, into_stream(config.n_layers))
        self.own_weights = {f"{name}.weight": inner for name in ("query", "key", "value")} | {"out.weight": outer}
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation, mask_BSS: Allowed = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]. `mask_BSS` is True where a query may look, or says it shorter; None: plain causal."""
        q_BSHC, k_BSGC, v_BSGC = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        q_BSHC, k_BSGC = rotate(self.q_norm(q_BSHC), rotation), rotate(self.k_norm(k_BSGC), rotation)
        q, k, v = (t.transpose(1, 2) for t in (q_BSHC, k_BSGC, v_BSGC))
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(attend(q, k, v, mask_BSS).transpose(1, 2).flatten(2))


def attend(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask_BSS: Allowed) -> Tensor:
    """torch's attention on the kernel that keeps no [S, S] scores: [B, H, S, C], H a multiple of G."""
    if isinstance(mask_BSS, (Pieces, Varlen)):
        end_to_end = _attend_pieces if isinstance(mask_BSS, Pieces) else _attend_varlen
        q_THC, k_TGC, v_TGC = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHSC, k_BGSC, v_BGSC))
        return end_to_end(q_THC, k_TGC, v_TGC, mask_BSS).view_as(q_BHSC.transpose(1, 2)).transpose(1, 2)
    groups = q_BHSC.shape[1] // k_BGSC.shape[1]
    if mask_BSS is None:
        return F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, is_causal=True, enable_gqa=groups > 1)
    if q_BHSC.is_cuda and groups > 1:  # flash attention takes no mask, the memory-efficient kernel no groups: repeat heads
        k_BGSC, v_BGSC = (t.repeat_interleave(groups, dim=1) for t in (k_BGSC, v_BGSC))
        groups = 1
    return F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, attn_mask=mask_BSS[:, None], enable_gqa=groups > 1)


@torch.compiler.disable  # each batch is cut elsewhere: there would be as many compiled versions
def _attend_pieces(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, cut: Pieces) -> Tensor:
    """`split` and not slices: the gradient of each slice would be a tensor of all T positions."""
    parts = (t.split(cut.sizes) for t in (q_THC, k_TGC, v_TGC))
    done = [
        attend(*(t.transpose(0, 1)[None] for t in (q, k, v)), mask)[0].transpose(0, 1)
        for q, k, v, mask in zip(*parts, cut.masks, strict=True)
    ]
    return torch.cat(done)


def _attend_varlen(q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, packed: Varlen) -> Tensor:
    """Not run on a GPU by us. Autocast does not know this function, and norms give fp32: cast here."""
    device, groups = q_THC.device.type, q_THC.shape[1] // k_TGC.shape[1]
    if torch.is_autocast_enabled(device):
        q_THC, k_TGC, v_TGC = (t.to(torch.get_autocast_dtype(device)) for t in (q_THC, k_TGC, v_TGC))
    ends = packed.starts_N, packed.starts_N, packed.longest, packed.longest
    causal = -1, 0  # how far to look back (all) and ahead
    return documents.varlen_attn(q_THC, k_TGC, v_TGC, *ends, window_size=causal, enable_gqa=groups > 1)


class KeyValueCache:
    """Keys and values of the positions already seen by one layer, so that sampling reads each position once.

    Memory: 2 * B * G * C * positions elements; GQA with 4 of 16 heads needs a quarter of full attention.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys_BGSC: Tensor, values_BGSC: Tensor) -> tuple[Tensor, Tensor]:
        """Add S positions and return all of them."""
        if self.keys is not None:
            keys_BGSC = torch.cat((self.keys, keys_BGSC), dim=2)
            values_BGSC = torch.cat((self.values, values_BGSC), dim=2)
        self.keys, self.values = keys_BGSC, values_BGSC
        return keys_BGSC, values_BGSC


def attention_mask(queries: int, keys: int, documents_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """Who may look at whom, [B or 1, queries, keys]; None where plain causal attention says it all.

    The queries are the last `queries` of `keys` positions. With `documents_BS`, a position sees only its own document.
    Raises ValueError where that is not of all the keys: a cache does not remember its documents.
    """
    if documents_BS is None and (queries == keys or queries == 1):
        return None if queries == keys else torch.ones(1, 1, keys, dtype=torch.bool, device=device)
    causal_SS = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if documents_BS is None:
        return causal_SS[None]
    if documents_BS.shape[1] != keys or queries != keys:
        raise ValueError(f"documents of {documents_BS.shape[1]} positions for {keys} keys: with a cache leave documents out")
    return causal_SS & (documents_BS[:, :, None] == documents_BS[:, None, :])
