"""What a yaml describes, before anything runs: parameters in all, per token, before and after the switch of sparsity."""

from __future__ import annotations

from typing import Any

from sigma_lite.balance.schedule import k_per_layer
from sigma_lite.runfile import RunConfig


def plan(run: RunConfig) -> dict[str, Any]:
    """Counts of parameters, and FLOPs per token of one forward pass (2 per active matrix parameter, attention excluded).

    `active_*` leave embeddings out, as the report's "0.5B activated" does; `initial` is before the switch.
    """
    net, sparsity = run.net, run.sparsity
    k_initial = k_per_layer(
        0, switch_step=max(sparsity.switch_step, 1), n_layers=net.n_layers, head=sparsity.head, target=net.top_k
    )
    first, last = net.ledger(k_initial), net.ledger()
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
        "k_target": [net.top_k] * net.n_layers,
        "sparsity": last.non_embedding / last.active,
        "forward_flops_per_token_initial": 2 * (first.active - first.norms + net.vocab_size * net.d_model),
        "forward_flops_per_token_target": 2 * (last.active - last.norms + net.vocab_size * net.d_model),
    }


def as_table(facts: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, list):
            text = " ".join(map(str, value[:12])) + (f" ... ({len(value)} layers)" if len(value) > 12 else "")
        else:
            text = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
        lines.append(f"{name.replace('_', ' '):32s} {text}")
    return "\n".join(lines)
