"""What a yaml describes, before anything runs: parameters in all, per token, before and after the switch of sparsity."""

from __future__ import annotations

from typing import Any

from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.runfile import RunConfig
from sigma_lite.scale.traffic import flops_per_token


def plan(run: RunConfig) -> dict[str, Any]:
    """Counts of parameters, and FLOPs per token of one forward pass (2 per active matrix parameter, attention excluded).

    `active_*` leave embeddings out, as the report's "0.5B activated" does; `initial` is before the switch. `attention` FLOPs
    are scores and sums over the positions seen so far, `training` FLOPs everything, forward and backward.
    """
    net, length = run.net, run.rows.length
    k_initial, k_target = k_before_and_after(run)
    first, last = net.ledger(k_initial), net.ledger(k_target)
    flops_first, flops_last = (flops_per_token(net, k, length) for k in (k_initial, k_target))
    return {
        "total_params": last.total,
        "non_embedding_params": last.non_embedding,
        "embedding_params": last.embedding,
        "attention_params": last.attention,
        "router_params": last.router,
        "norm_params": last.norms,
        "expert_params": last.experts,
        "active_params_initial": first.active,
        "active_params_target": last.active,
        "k_initial": list(k_initial),
        "k_target": list(k_target),
        "sparsity": last.non_embedding / last.active,
        "forward_flops_per_token_initial": flops_first.matrices + flops_first.head,
        "forward_flops_per_token_target": flops_last.matrices + flops_last.head,
        "head_flops_per_token": flops_last.head,
        "attention_flops_per_token": flops_last.attention,
        "training_flops_per_token_initial": flops_first.training,
        "training_flops_per_token_target": flops_last.training,
    }


def k_before_and_after(run: RunConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Experts per token in each layer before the switch of sparsity, and after it."""
    net, sparsity = run.net, run.sparsity
    first = k_per_layer(
        0, switch_step=max(sparsity.switch_step, 1), n_layers=net.n_layers, head=sparsity.head, target=net.top_k
    )
    return first, (net.top_k,) * net.n_layers
