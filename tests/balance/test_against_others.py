"""The same losses by other hands: Megatron-core, transformers, finite differences, gradients derived on paper.

Megatron's switch loss takes summed probabilities and counts: E * sum_e (sum_t p_te) (count_e) / (K T T). With
f = count / (K T) and P = sum_t p / T that is E * sum f P, so nothing needs converting: both are 1 at balance for every K.
transformers divides counts by T, not by K T: its loss is K times ours.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from sigma_lite.balance.bias import bias_step
from sigma_lite.balance.losses import (
    expert_counts,
    load_balancing_loss,
    load_share,
    sequence_load_balancing_loss,
    top1_load_balancing_loss,
    z_loss,
)
from sigma_lite.balance.pooled import PooledCounts
from sigma_lite.config import ModelConfig
from sigma_lite.model.router import Router

EACH_K = pytest.mark.parametrize("K", [1, 2, 8])
T, E = 96, 16


@pytest.fixture(scope="module")
def megatron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("megatron.core.transformer.moe.moe_utils")


def inputs(K: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a gradient, their softmax, and the chosen experts; the columns are not equally liked."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(T, E, generator=generator) + torch.linspace(0, 2, E)).requires_grad_()
    probs = logits.softmax(-1)
    return logits, probs, probs.topk(K).indices


def same(ours: Tensor, theirs: Tensor, source: Tensor) -> None:
    """Value and gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(loss, source, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
    assert gradients[0].abs().max() > 1e-6, "a gradient of 0 would agree with anything"


# ---------------------------------------------------------------------------------------------------------- Megatron


def switch(megatron, probs: Tensor, counts: Tensor, K: int, tokens: int) -> Tensor:
    return megatron.switch_load_balancing_loss_func(probs, counts, tokens, K, E, moe_aux_loss_coeff=1.0)


@EACH_K
@pytest.mark.parametrize("seed", range(5))
def test_megatron_micro_batch_loss(megatron, K, seed):
    logits, probs, ids = inputs(K, seed)
    same(load_balancing_loss(probs, ids), switch(megatron, probs, expert_counts(ids, E), K, T), logits)


@EACH_K
def test_megatron_sequence_loss(megatron, K):
    """Megatron lays rows beside each other as if they were more experts, and divides the sum by their number."""
    logits, probs, ids = inputs(K)
    B, S = 4, T // 4
    counts_BE = torch.stack([expert_counts(row, E) for row in ids.split(S)])
    side_by_side = probs.view(B, S, E).transpose(0, 1).reshape(S, B * E)
    theirs = switch(megatron, side_by_side, counts_BE.flatten(), K, S) / B
    same(sequence_load_balancing_loss(probs, ids, B), theirs, logits)


@EACH_K
def test_megatron_accumulation_buffer(megatron, K):
    """Its running mean of counts over micro-batches gives the share that our pooled counts give."""
    pooled, total = PooledCounts(), torch.zeros(1, E)
    for n, seed in enumerate(range(3), start=1):
        logits, probs, ids = inputs(K, seed)
        f_LE, total = pooled.add(expert_counts(ids, E)[None]), total + expert_counts(ids, E)
        same(load_balancing_loss(probs, ids, f_LE[0]), switch(megatron, probs, total[0] / n, K, T), logits)


@pytest.mark.parametrize("scale", [0.1, 1, 30])
def test_megatron_z_loss(megatron, scale):
    logits = (scale * inputs(1)[0].detach()).requires_grad_()
    same(z_loss(logits), megatron.z_loss_func(logits, 1.0), logits)


@EACH_K
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_megatron_choice_gate_and_scores(megatron, K, score):
    """Its softmax ignores the bias, so there we compare without one; its sigmoid gates of K > 1 are renormalised, ours not."""
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


def test_megatron_bias_update(megatron, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(megatron.parallel_state, "get_tensor_and_data_parallel_group", lambda **_: None)
    counts, bias = torch.randint(0, 9, (5, E), generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, E)
    counts[0] = 4
    theirs = megatron.get_updated_expert_bias(counts.float(), bias, 1e-3)
    torch.testing.assert_close(bias + bias_step(counts, "sign", 1e-3), theirs, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------------ transformers


@EACH_K
@pytest.mark.parametrize("seed", range(5))
def test_transformers_loss_is_K_times_ours(K, seed):
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    logits, probs, ids = inputs(K, seed)
    same(K * load_balancing_loss(probs, ids), qwen.load_balancing_loss_func((logits,), E, K), logits)


# ----------------------------------------------------------------------------------------------- derived, and measured


def through_softmax(to_probs: Tensor, probs: Tensor) -> Tensor:
    """dL/dz from dL/dp: p_e (g_e - sum p g)."""
    return probs * (to_probs - (probs * to_probs).sum(1, keepdim=True))


@EACH_K
def test_gradients_derived_on_paper(K):
    logits, probs, ids = inputs(K)
    f = load_share(expert_counts(ids, E))
    lse, p = logits.logsumexp(1, keepdim=True), probs.detach()
    fhat, pbar = p.mean(0), p.gather(1, ids).mean()
    chosen = torch.zeros(T, E).scatter_(1, ids, 1.0)
    to_top1 = 2 * E * fhat / (T * pbar) - E * fhat.square().sum() / pbar**2 * chosen / (K * T)
    derived = {
        "lbl": (load_balancing_loss(probs, ids), through_softmax((E * f / T).expand(T, E), p)),
        "top1": (top1_load_balancing_loss(logits, ids), through_softmax(to_top1, p)),
        "z": (z_loss(logits), (2 * lse * p / T).detach()),
    }
    for name, (loss, expected) in derived.items():
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@EACH_K
def test_gradients_measured_by_finite_differences(K):
    """The choice is held fixed, as it is in the loss: moving one logit a little moves f by nothing."""
    logits, _, ids = inputs(K)
    losses = {
        "lbl": lambda z: load_balancing_loss(z.softmax(-1), ids),
        "sequence": lambda z: sequence_load_balancing_loss(z.softmax(-1), ids, 4),
        "top1": lambda z: top1_load_balancing_loss(z, ids, 0.5),
        "z": z_loss,
    }
    direction = torch.randn(T, E, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slopes = {
            name: (loss(logits + 1e-2 * direction) - loss(logits - 1e-2 * direction)) / 2e-2 for name, loss in losses.items()
        }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss(logits), logits)
        assert (gradient * direction).sum().item() == pytest.approx(slopes[name].item(), rel=2e-3, abs=2e-5), name
