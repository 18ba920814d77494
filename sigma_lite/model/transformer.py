"""The language model: embedding, L blocks, norm, head. Returns logits and what every router decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sigma_lite.config import ModelConfig
from sigma_lite.model.attention import Allowed, Attention, KeyValueCache, attention_mask
from sigma_lite.model.block import Block
from sigma_lite.model.documents import attention_way, pieces, varlen
from sigma_lite.model.norm import RMSNorm
from sigma_lite.model.parts import Parts
from sigma_lite.model.rotary import Rotation, rotation
from sigma_lite.model.router import Routing, of_experts, of_others
from sigma_lite.model.weights import Weight, fill, passing, weight_of


class Output(NamedTuple):
    logits: Tensor  # [B, S, V]
    routings: list[Routing]  # of each layer's experts; then NamedRoutings of what else chooses; T = B * S tokens, row-major


class Transformer(nn.Module):
    """A decoder whose every feed-forward layer is a mixture of experts (Sigma-MoE-Tiny, 2512.16248, section 2).

    Weights depend only on torch's seed and each parameter's name: not on the order of construction, nor on how a
    parameter is later sharded.
    """

    def __init__(self, config: ModelConfig, parts: Parts = Parts()):  # noqa: B008  frozen: safe to share
        super().__init__()
        self.config, self.parts = config, parts
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config, layer >= config.attention_from_layer, parts.of_layer(layer)) for layer in range(config.n_layers)
        )
        for layer, block in enumerate(self.blocks):
            block.layer = block.moe.router.layer = layer
        self.stack = parts.stack(config) if parts.stack else None
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.own_weights = {
            "embedding.weight": Weight(config.init_std),
            "head.weight": passing(config.d_model, decays=False),  # unless it is the embedding's
        }
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def forward(
        self, ids_BS: Tensor, *, documents_BS: Tensor | None = None, cache: Sequence[KeyValueCache] | None = None
    ) -> Output:
        """Logits of the next token at every position.

        Args:
            ids_BS: token ids, [B, S], 0..V-1.
            documents_BS: equal numbers mark positions of one document, and do not fall within a row; attention stays inside.
                None: one document a row.
            cache: one KeyValueCache a layer; `ids_BS` then continues what the cache has seen, and is added to it.

        Raises: ValueError for ids that are not [B, S] integers, and for a cache of another number of layers.
        """
        x_BSD, routings = self.backbone(ids_BS, documents_BS=documents_BS, cache=cache)
        return Output(self.head(x_BSD), routings)

    def loss(
        self, ids_BS: Tensor, targets_BS: Tensor, *, documents_BS: Tensor | None = None, count: float | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Mean next-token loss in nats over targets other than -100, and the routings.

        Equals cross_entropy of `forward`'s logits, without ever holding all [T, V] of them.

        Args:
            count: divide the sum by this, not by the number of these targets: see balance/pooled.py.
        """
        x_BSD, routings = self.backbone(ids_BS, documents_BS=documents_BS)
        return cross_entropy(x_BSD.flatten(0, 1), self.head.weight, targets_BS.flatten(), count=count), routings

    def nats(
        self, ids_BS: Tensor, targets_BS: Tensor, *, documents_BS: Tensor | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """-log p of every target, [B, S], 0 where the target is -100; and the routings."""
        x_BSD, routings = self.backbone(ids_BS, documents_BS=documents_BS)
        nats_T = cross_entropy(x_BSD.flatten(0, 1), self.head.weight, targets_BS.flatten(), "none")
        return nats_T.view_as(ids_BS), routings

    def backbone(
        self, ids_BS: Tensor, *, documents_BS: Tensor | None = None, cache: Sequence[KeyValueCache] | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """The normalised stream [B, S, D] before the head, and the routings."""
        if ids_BS.dim() != 2 or ids_BS.is_floating_point():
            raise ValueError(f"ids must be integers [B, S], got {ids_BS.dtype} {list(ids_BS.shape)}")
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(f"cache has {len(cache)} entries for {len(self.blocks)} layers: give one KeyValueCache a layer")
        seen, S = (cache[-1].length if cache is not None else 0), ids_BS.shape[1]
        positions_S = torch.arange(seen, seen + S, device=ids_BS.device)
        angles = rotation(positions_S, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        mask_BSS = self.who_may_look(seen, S, documents_BS, ids_BS.device)
        through = self.stack or one_after_another
        x_BSD, routings = through(self.blocks, self.embedding(ids_BS), angles, mask_BSS, cache, ids_BS)
        return self.norm(x_BSD), [*of_experts(routings), *of_others(routings)]

    def who_may_look(self, seen: int, S: int, documents_BS: Tensor | None, device: torch.device) -> Allowed:
        """What attention is told of documents: see model/documents.py. An attention of one's own is given the mask."""
        if documents_BS is None or seen or self.parts.attention is not Attention:
            return attention_mask(S, seen + S, documents_BS, device)
        mixed, weights = torch.is_autocast_enabled(device.type), self.embedding.weight.dtype
        dtype = torch.get_autocast_dtype(device.type) if mixed else weights
        way, _ = attention_way(self.config, S, device, dtype)
        if way == "masked":
            return attention_mask(S, S, documents_BS, device)
        if documents_BS.shape[1] != S:
            raise ValueError(f"documents of {documents_BS.shape[1]} positions for {S} ids: give each its document")
        return pieces(documents_BS) if way == "blocks" else varlen(documents_BS)

    @property
    def k_per_layer(self) -> tuple[int, ...]:
        """Experts per token in each layer, now."""
        return tuple(block.moe.router.top_k for block in self.blocks)

    def set_k(self, k_per_layer: Sequence[int]) -> None:
        """Change the experts per token, layer by layer. No weight, optimizer state or gate scale changes."""
        for block, k in zip(self.blocks, self.config.check_k(k_per_layer), strict=True):
            change = getattr(block.moe.router, "set_k", None)  # a router of a chapter's reader may be any module
            change(k) if change else setattr(block.moe.router, "top_k", k)
            if told := getattr(block.moe.experts, "set_k", None):  # those that cannot work with so many say so
                told(k)

    @property
    def bias_LE(self) -> Tensor:
        """What is added to every router's scores before the choice, fp32 [L, E]; a copy."""
        return torch.stack([block.moe.router.bias for block in self.blocks])

    def set_bias(self, bias_LE: Tensor) -> None:
        """Raises ValueError for another shape: [L, 1] or [L] would be spread over all experts, and change no choice."""
        if bias_LE.shape != self.bias_LE.shape:
            raise ValueError(f"bias is {list(bias_LE.shape)}, expected [L, E] = {list(self.bias_LE.shape)}")
        for block, bias_E in zip(self.blocks, bias_LE, strict=True):
            block.moe.router.bias.copy_(bias_E)

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                self.initialise(name, parameter)

    def initialise(self, name: str, weight: Tensor) -> None:
        """Fill a tensor of parameter `name`'s full shape with what it begins as, which its module says."""
        fill(weight, weight_of(self, name), name)


def one_after_another(
    blocks: Sequence[Block],
    x_BSD: Tensor,
    angles: Rotation,
    mask_BSS: Allowed,
    caches: Sequence[KeyValueCache] | None,
    ids_BS: Tensor,
) -> tuple[Tensor, list[Routing]]:
    """The stream through all blocks, and what each one's routers decided."""
    routings: list[Routing] = []
    for block, cache in zip(blocks, caches or [None] * len(blocks), strict=True):
        x_BSD, found = block(x_BSD, angles, mask_BSS, cache, ids_BS)
        routings += found
    return x_BSD, routings


CHUNK = 512  # tokens whose logits exist at one time; on a CPU this beats torch's own choice by a fifth


def cross_entropy(
    x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, reduction: str = "mean", count: float | None = None
) -> Tensor:
    """-log softmax(head x)[target], in nats; chunked over tokens where torch can (2.13 on), so memory is O(chunk * V).

    Under autocast the products are of its 16 bits; softmax, loss and the sum of the head's gradient are in fp32.

    Args:
        count: what a mean divides by; None: the number of targets other than -100.
    """
    device = x_TD.device.type
    if reduction == "mean" and torch.is_grad_enabled():
        if torch.is_autocast_enabled(device):
            return _MixedCrossEntropy.apply(x_TD, head_VD, targets_T, torch.get_autocast_dtype(device), count)
        if hasattr(F, "linear_cross_entropy"):
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
            if count is None:
                return F.linear_cross_entropy(x_TD, head_VD, targets_T, options=options)
            return F.linear_cross_entropy(x_TD, head_VD, targets_T, reduction="sum", options=options) / count
    chunks = zip(x_TD.split(CHUNK), targets_T.split(CHUNK), strict=True)
    losses = [F.cross_entropy(F.linear(x, head_VD).float(), t, reduction="none") for x, t in chunks]
    losses_T = torch.cat(losses) if losses else x_TD.new_zeros(0)
    return losses_T if reduction == "none" else losses_T.sum() / ((targets_T != -100).sum() if count is None else count)


class _MixedCrossEntropy(torch.autograd.Function):
    """Mean loss whose gradients are made chunk by chunk in the forward pass, while the logits are there.

    torch's chunked loss does not follow autocast, and given 16-bit numbers it rounds the loss to 16 bits too.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, dtype: torch.dtype, count: float | None) -> Tensor:
        x_TD, head_VD = x_TD.to(dtype), head_VD.to(dtype)
        scored_T = targets_T != -100
        dx_TD, dhead_VD = torch.empty_like(x_TD), torch.zeros_like(head_VD, dtype=torch.float32)
        nats = dhead_VD.new_zeros(())
        chunks = (tensor.split(CHUNK) for tensor in (x_TD, targets_T.where(scored_T, 0), scored_T, dx_TD))
        for x_CD, targets_C, scored_C, dx_CD in zip(*chunks, strict=True):
            logp_CV = torch.mm(x_CD, head_VD.T).float().log_softmax(-1)
            nats -= (logp_CV.gather(1, targets_C[:, None])[:, 0] * scored_C).sum()
            dlogits_CV = logp_CV.exp_()
            dlogits_CV[torch.arange(len(targets_C), device=x_CD.device), targets_C] -= 1
            dlogits_CV = dlogits_CV.mul_(scored_C[:, None]).to(dtype)  # not yet divided by the count: fp16 would lose it
            torch.mm(dlogits_CV, head_VD, out=dx_CD)
            dhead_VD += torch.mm(dlogits_CV.T, x_CD)
        ctx.count = scored_T.sum() if count is None else count
        ctx.save_for_backward(dx_TD, dhead_VD)
        return nats / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx_TD, dhead_VD = ctx.saved_tensors
        return dx_TD * (dloss / ctx.count), dhead_VD.mul_(dloss / ctx.count), None, None, None
