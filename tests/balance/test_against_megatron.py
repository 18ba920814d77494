"""The same losses, router and bias step by another hand: Megatron-core, where it is installed.

Its switch loss takes summed probabilities and counts: E * sum_e (sum_t p_te) count_e / (K T T). With f = count / (K T) and
P = sum_t p / T that is E * sum f P, so nothing needs converting: both are 1 at balance, for every K.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from test_against_others import EACH_K, E, T, inputs, same
from torch import Tensor

from sigma_lite.balance.bias import bias_step
from sigma_lite.balance.losses import expert_counts, load_balancing_loss, sequence_load_balancing_loss, z_loss
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ModelConfig
from sigma_lite.model.router import Router

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of everything that is not a GPU
    megatron = pytest.importorskip("megatron.core.transformer.moe.moe_utils")


def switch(probs: Tensor, counts: Tensor, K: int, tokens: int) -> Tensor:
    return megatron.switch_load_balancing_loss_func(probs, counts, tokens, K, E, moe_aux_loss_coeff=1.0)


@EACH_K
@pytest.mark.parametrize("seed", range(5))
def test_megatron_micro_batch_loss(K, seed):
    logits, probs, ids = inputs(K, seed)
    same(load_balancing_loss(probs, ids), switch(probs, expert_counts(ids, E), K, T), logits)


@EACH_K
def test_megatron_sequence_loss(K):
    """Megatron lays rows beside each other as if they were more experts, and divides the sum by their number."""
    logits, probs, ids = inputs(K)
    B, S = 4, T // 4
    counts_BE = torch.stack([expert_counts(row, E) for row in ids.split(S)])
    side_by_side = probs.view(B, S, E).transpose(0, 1).reshape(S, B * E)
    theirs = switch(side_by_side, counts_BE.flatten(), K, S) / B
    same(sequence_load_balancing_loss(probs, ids, B), theirs, logits)


@EACH_K
def test_megatron_accumulation_buffer(K):
    """Its running mean of counts over micro-batches gives the share that our pooled counts give."""
    pooled, total = PooledCounts(), torch.zeros(1, E)
    for n, seed in enumerate(range(3), start=1):
        logits, probs, ids = inputs(K, seed)
        f_LE, total = pooled.add(expert_counts(ids, E)[None]), total + expert_counts(ids, E)
        same(load_balancing_loss(probs, ids, f_LE[0]), switch(probs, total[0] / n, K, T), logits)


@pytest.mark.parametrize("scale", [0.1, 1, 30])
def test_megatron_z_loss(scale):
    logits = (scale * inputs(1)[0].detach()).requires_grad_()
    same(z_loss(logits), megatron.z_loss_func(logits, 1.0), logits)


@EACH_K
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_megatron_choice_gate_and_scores(K, score):
    """Its softmax ignores the bias, so we compare without one; its sigmoid gates of K > 1 are renormalised, ours not."""
    made = Router(ModelConfig(d_model=32, n_experts=E, top_k=K, router_score=score))
    torch.manual_seed(0)
    torch.nn.init.normal_(made.weight)
    bias = torch.linspace(-0.5, 0.5, E) if score == "sigmoid" else None
    if bias is not None:
        made.bias.copy_(bias)
    ours = made(torch.randn(T, 32))
    gates, chosen = megatron.topk_routing_with_score_function(
        ours.logits, K, use_pre_softmax=True, score_function=score, expert_bias=bias
    )
    mine = torch.zeros(T, E).scatter_(1, ours.ids, ours.gates)
    assert torch.equal(chosen, mine > 0)
    renormalised = score == "sigmoid" and K > 1
    torch.testing.assert_close(gates, mine / mine.sum(1, keepdim=True) if renormalised else mine)
    _, probs = megatron.compute_routing_scores_for_aux_loss(ours.logits, K, score)
    torch.testing.assert_close(ours.probs, probs)


def test_megatron_bias_update(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(megatron.parallel_state, "get_tensor_and_data_parallel_group", lambda **_: None)
    counts, bias = torch.randint(0, 9, (5, E), generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, E)
    counts[0] = 4
    theirs = megatron.get_updated_expert_bias(counts.float(), bias, 1e-3)
    torch.testing.assert_close(bias + bias_step(counts, "sign", 1e-3), theirs, rtol=0, atol=1e-7)
