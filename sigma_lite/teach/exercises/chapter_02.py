"""Chapter 2: the parts of a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor

from sigma_lite.model.attention import attention_mask
from sigma_lite.model.norm import RMSNorm
from sigma_lite.model.rotary import Rotation, rotate, rotation
from sigma_lite.teach.exercises.exercise import Exercise

EPS = 1e-6


def rms_norm(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    norm = RMSNorm(x_TD.shape[-1], EPS)
    return torch.func.functional_call(norm, {"weight": weight_D}, x_TD)


def _layer_norm(x_TD: Tensor, weight_D: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x_TD, weight_D.shape, weight_D, None, EPS)


def rope(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(x_BSHC, Rotation(cos, sin))


def _neighbours(x_BSHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BSHC[..., ::2], x_BSHC[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def mask(documents_BS: Tensor) -> Tensor:
    S = documents_BS.shape[1]
    return attention_mask(S, S, documents_BS, documents_BS.device)


def _any_direction(documents_BS: Tensor) -> Tensor:
    return documents_BS[:, :, None] == documents_BS[:, None, :]


def _all_documents(documents_BS: Tensor) -> Tensor:
    B, S = documents_BS.shape
    return torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S)


def _normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EXERCISES = (
    Exercise(
        name="rms_norm",
        chapter=2,
        solution=rms_norm,
        inputs=lambda: [(_normal(3, 8) + 1, _normal(8, seed=3)), (1e-3 * _normal(2, 4), torch.ones(4))],
        mistake=_layer_norm,
        says="that is LayerNorm: it subtracts the mean first. RMSNorm leaves the mean where it is",
        axes="TD",
    ),
    Exercise(
        name="rope",
        chapter=2,
        solution=rope,
        inputs=lambda: [
            (_normal(2, 5, 3, 8), *rotation(torch.arange(5), 8, 100.0)),
            (_normal(1, 3, 1, 4), *rotation(torch.arange(7, 10), 4, 10_000.0)),
        ],
        mistake=_neighbours,
        says="you turn neighbours (2i, 2i + 1); the package pairs coordinate i with i + C/2, as Hugging Face does."
        " Both are RoPE, but weights trained with one are noise to the other",
        axes="BSHC",
    ),
    Exercise(
        name="attention_mask",
        chapter=2,
        solution=mask,
        inputs=lambda: [(torch.tensor([[0, 0, 0, 1, 1], [1, 2, 2, 2, 3]]),), (torch.ones(1, 4, dtype=torch.int64),)],
        mistake=_any_direction,
        says="documents are kept apart, but a position may look at later ones, at the token that it should predict",
        others=((_all_documents, "no position looks ahead, but documents are not kept apart: compare their numbers"),),
        axes="BSS",
    ),
)
