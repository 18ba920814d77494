"""The same losses, router and bias step by another hand: Megatron-core, where it is installed.

Its switch loss takes summed probabilities and counts: E * sum_e (sum_t p_te) count_e / (K T T). With f = count / (K T) and
P = sum_t p / T that is E * sum f P, so nothing needs converting: both are 1 at balance, for every K.

One difference is left out: beside a bias, its losses count the choice that the scores alone would make, and ours the tokens
really sent.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from test_against_others import EACH_K, E, T, inputs, same
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, WithBias
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


# ---------------------------------------------------------------------------------------------------- its whole router


@pytest.fixture
def alone(monkeypatch):
    """Megatron's groups for one rank, and a CPU where it asks for the GPU's number to make its buffers."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    yield SimpleNamespace(**dict.fromkeys(("tp", "cp", "tp_cp", "tp_dp_cp"), torch.distributed.group.WORLD))
    torch.distributed.destroy_process_group()


def their_router(groups, K: int, score: str, **settings):
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 1, "num_moe_experts": E, "moe_router_topk": K}
    choice = {"moe_router_pre_softmax": True, "moe_router_score_function": score}
    return TopKRouter(TransformerConfig(**shape, **choice, **settings), groups)


@EACH_K
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_megatron_router_with_all_its_losses(K, score, alone):
    """Micro-batch, sequence, accumulated global and z-loss at once, as its training attaches them to what the router
    returns, over a step of three micro-batches: the same gradient at the logits."""
    weights = {"aux_loss": 0.1, "seq_aux_loss": 0.2, "global_aux_loss": 0.3}
    losses = {"moe_router_load_balancing_type": list(weights), "moe_aux_loss_coeff": list(weights.values())}
    theirs, B, pooled = their_router(alone, K, score, **losses, moe_z_loss_coeff=0.4), 4, PooledCounts()
    for seed in range(3):
        logits = inputs(K, seed)[0]
        returned, _ = theirs.routing(logits.view(B, T // B, E).transpose(0, 1).contiguous())
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        probs, ids = scores / scores.sum(-1, keepdim=True), scores.topk(K).indices
        f_LE = pooled.add(expert_counts(ids, E)[None])
        ours = 0.1 * load_balancing_loss(probs, ids) + 0.2 * sequence_load_balancing_loss(probs, ids, B)
        ours = ours + 0.3 * load_balancing_loss(probs, ids, f_LE[0]) + 0.4 * z_loss(logits)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, 0 * returned.sum())]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
        assert gradients[0].abs().max() > 1e-4


@EACH_K
def test_megatron_bias_over_a_step(K, alone, monkeypatch):
    """Choice by a bias, counts over micro-batches, one sign step at the end, three times over: the same bias."""
    monkeypatch.setattr(megatron.parallel_state, "get_tensor_and_data_parallel_group", lambda **_: alone.tp)
    theirs = their_router(alone, K, "sigmoid", moe_router_enable_expert_bias=True, moe_router_load_balancing_type="none")
    ours = WithBias(Balancer(), "sign", rate=0.05)
    bias_LE, pooled = torch.zeros(1, E), PooledCounts()
    for step in range(3):
        for seed in range(2):
            logits = inputs(K, 2 * step + seed)[0]
            theirs.routing(logits[:, None])
            ids = (logits.detach().sigmoid() + bias_LE[0]).topk(K).indices
            pooled.add(expert_counts(ids, E)[None])
        assert torch.equal(theirs.local_tokens_per_expert, pooled.counts_LE[0].float())
        bias_LE = ours.next_bias(bias_LE, pooled.counts_LE, step)
        theirs.expert_bias.copy_(megatron.get_updated_expert_bias(theirs.local_tokens_per_expert, theirs.expert_bias, 0.05))
        torch.testing.assert_close(bias_LE[0], theirs.expert_bias, rtol=0, atol=1e-6)
        theirs.local_tokens_per_expert.zero_()
        pooled.reset()
    assert not torch.equal(ids, logits.topk(K).indices), "the bias decides nothing here, so the test would show nothing"
