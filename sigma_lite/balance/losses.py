"""Losses that ask a router to spread its tokens. Shares sum to 1, so a balanced layer scores 1 whatever K is.

f_e  share of the (token, choice) slots that went to expert e; counted, hence no gradient
P_e  mean probability of expert e over the tokens; the gradient flows here
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_counts(ids_TK: Tensor, n_experts: int) -> Tensor:
    """Slots per expert, int64 [E]; the sum is T * K, less the empty slots (-1)."""
    flat_N = ids_TK.flatten()
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=flat_N.device)
    return counts_E.scatter_add_(0, flat_N.clamp(min=0), (flat_N >= 0).long())


def load_share(counts_E: Tensor) -> Tensor:
    """f: counts divided by their sum along the last axis, fp32; all zero where nothing was counted."""
    return counts_E / counts_E.sum(-1, keepdim=True).clamp(min=1)


def load_balancing_loss(probs_TE: Tensor, ids_TK: Tensor, f_E: Tensor | None = None) -> Tensor:
    """LBL = E * sum_e f_e P_e (Switch Transformer, 2101.03961; global batch: Demons in the Detail, 2501.11873).

    Args:
        probs_TE: softmax over all experts, [T, E].
        ids_TK: chosen experts, [T, K].
        f_E: load share to use instead of this micro-batch's own: pooled over ranks and accumulation it makes the loss
            the global-batch LBL, with P still local. Averaging gradients over ranks then gives the pooled gradient.

    Returns: scalar >= 0. Balanced: 1. All tokens sure of one expert: E. **Flat P: 1, whatever f is**: the blind spot.
        The gradient is E * f_e / T for each entry of column e, and nothing through f. No tokens: 0.
    """
    E = probs_TE.shape[1]
    if f_E is None:
        f_E = load_share(expert_counts(ids_TK, E))
    return E * (f_E * mean_over_tokens(probs_TE)).sum()


def sequence_load_balancing_loss(probs_TE: Tensor, ids_TK: Tensor, n_rows: int | Tensor) -> Tensor:
    """Mean over rows of each row's own LBL (DeepSeek-V3, 2412.19437, section 2.1.2, whose f carries the factor E / K).

    Args:
        probs_TE: scores over all experts, each row of the matrix summing to 1, [T, E].
        ids_TK: chosen experts, [T, K].
        n_rows: B; tokens are row-major, so each row has T / B of them. Or how many each has, int64 [B].

    Returns: scalar > 0. Every row balanced: 1. Each row sure of one expert: E, even if the rows together balance.
    Raises: ValueError when T is no multiple of B.
    """
    if isinstance(n_rows, Tensor):
        rows = zip(probs_TE.split(n_rows.tolist()), ids_TK.split(n_rows.tolist()), strict=True)
        return torch.stack([load_balancing_loss(probs, ids) for probs, ids in rows]).mean()
    T, E = probs_TE.shape
    if n_rows < 1 or T % n_rows:
        raise ValueError(f"{T} tokens do not divide into n_rows={n_rows} rows of equal length")
    ids_BN = ids_TK.reshape(n_rows, -1)
    counts_BE = torch.zeros(n_rows, E, dtype=torch.int64, device=ids_BN.device)
    counts_BE.scatter_add_(1, ids_BN.clamp(min=0), (ids_BN >= 0).long())
    P_BE = probs_TE.view(n_rows, T // n_rows, E).mean(1)
    return E * (load_share(counts_BE) * P_BE).sum(1).mean()


def top1_load_balancing_loss(logits_TE: Tensor, ids_TK: Tensor, temperature: float = 1.0) -> Tensor:
    """Top-1 LBL = E * sum_e fhat_e^2 / pbar (Sigma-MoE-Tiny, 2512.16248; released in its training code as `top1_loss`).

    fhat is the mean of softmax(logits / temperature): a load share with a gradient. pbar is the mean over tokens of the
    probability that a token gives to its chosen experts together; dividing by it closes the blind spot, because flat
    probabilities now cost E / K, not 1.

    Args:
        logits_TE: router logits, [T, E].
        ids_TK: chosen experts, [T, K].
        temperature: > 0; small values approach counting the winners.

    Returns: scalar. Balanced and sure, that is all probability on the chosen: 1, whatever K is. Flat: E / K. All tokens
        sure of one expert: E. No tokens: 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be greater than 0; the report's code suggests starting at 0.1")
    probs_TE = (logits_TE.float() / temperature).softmax(-1)
    fhat_E = mean_over_tokens(probs_TE)
    chosen_TK = probs_TE.gather(1, ids_TK.clamp(min=0)).where(ids_TK >= 0, 0.0)
    pbar = chosen_TK.sum() / max(len(ids_TK), 1)
    return logits_TE.shape[1] * fhat_E.square().sum() / pbar.clamp(min=torch.finfo(torch.float32).tiny)


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean over tokens of logsumexp(logits)^2 (ST-MoE, 2202.08906): keeps router logits small. Flat at 0: (log E)^2."""
    return logits_TE.float().logsumexp(-1).square().sum() / max(logits_TE.shape[0], 1)


def mean_over_tokens(probs_TE: Tensor) -> Tensor:
    """P: mean of each column; 0 for no tokens, where a plain mean would be NaN."""
    return probs_TE.sum(0) / max(probs_TE.shape[0], 1)
