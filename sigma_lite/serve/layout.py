"""Names and settings of Hugging Face's Qwen3-MoE and Qwen3, in both directions. Plain torch: transformers is not needed.

Sigma-MoE-Tiny at its target sparsity *is* Qwen3-MoE with one expert per token, and a model of one expert is Qwen3. What that
format cannot say is refused by name, in both directions.

Config keys: transformers 4.x reads `num_experts` and `rope_theta`, 5.x writes `num_local_experts` and `rope_parameters`.
With the new keys alone 4.57 falls back to 128 experts and vLLM to a RoPE base of 10,000, so both are written.

Tensors on disk: `mlp.experts.3.gate_proj.weight` for every expert apart (4.x, 5.x, vLLM), which is what is written;
`mlp.experts.gate_up_proj` of all experts stacked, gate rows first (5.x in memory), is read too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sigma_lite.config import ROPE_TYPES, ModelConfig, nearest, require
from sigma_lite.model import Transformer

KINDS = ("qwen3_moe", "qwen3")
OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
INNER = {
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "moe_norm.weight": "post_attention_layernorm.weight",
}
ROUTER, BIAS = ("moe.router.weight", "mlp.gate.weight"), "moe.router.bias"
IN, OUT = "moe.experts.w13", "moe.experts.w2"

FIELDS = {
    "vocab_size": "vocab_size",
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
SPARSE = {
    "n_experts": "num_experts",
    "d_expert": "moe_intermediate_size",
    "top_k": "num_experts_per_tok",
    "renormalise": "norm_topk_prob",
}
OURS = ("router_init_std", "expert_gain")  # how training begins: kept under the key `sigma_lite`, which others do not read
ROPE = {"rope_type": "rope_type", "rope_factor": "factor", "rope_original_length": "original_max_position_embeddings"}
SAID = {*FIELDS, *SPARSE, *OURS, *ROPE, "rope_theta", "attention"}  # the last is a way to compute the same
_DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "norm_topk_prob": False}


# ---------------------------------------------------------------------------------------------------------- settings


def architecture(net: ModelConfig) -> str:
    """One of KINDS: a model of one expert is dense."""
    return KINDS[net.n_experts == 1]


def refuse_unsayable(model: Transformer) -> None:
    """ConfigError that names what neither format can say: parts of one's own, a routing bias, K by layer, other settings."""
    net, own, ks = model.config, ", ".join(model.parts.custom), list(model.k_per_layer)
    require(not own, f"Qwen3-MoE has no place for parts of your own, and this model has its own {own}")
    require(
        len(set(ks)) == 1,
        f"layers use {sorted(set(ks))} experts per token (layer by layer {ks}); Hugging Face's format needs one K: call"
        " set_k first, or export a checkpoint from sparsity.switch_step on",
    )
    biased = [layer for layer, bias_E in enumerate(model.bias_LE) if bias_E.any()]
    require(not biased, f"Qwen3-MoE cannot say the routing bias (model.balance.bias) that layers {biased} have")
    for field in dataclasses.fields(net):
        value = getattr(net, field.name)
        said = field.name in SAID or value == field.default
        require(said, f"Qwen3-MoE cannot say {field.name}={value!r}; it can only be {field.default!r} there")


def hf_config(net: ModelConfig, length: int, end_of_text: int, top_k: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of an export.

    Args:
        length: positions that the model was trained on.
        end_of_text: id of the token between documents, with which generation begins and ends.
        top_k: experts per token now, which a schedule may still hold above `net.top_k`.
    """
    kind = architecture(net)
    return {
        "architectures": ["Qwen3ForCausalLM" if kind == "qwen3" else "Qwen3MoeForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(net, ours) for ours, theirs in FIELDS.items()},
        **(sparse_settings(net, top_k) if kind == "qwen3_moe" else {}),
        "intermediate_size": net.d_expert,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_position_embeddings": length,
        "rope_theta": net.rope_theta,
        "rope_parameters": net.rope_parameters(),
        **({"rope_scaling": net.rope_parameters()} if net.rope_type != "default" else {}),  # 4.57 reads no other
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        "sigma_lite": {name: getattr(net, name) for name in OURS},
    }


def sparse_settings(net: ModelConfig, top_k: int) -> dict[str, Any]:
    """`norm_topk_prob` is False unless the model renormalises: divided by itself the one gate of top-1 would be 1."""
    sparse = {theirs: getattr(net, ours) for ours, theirs in SPARSE.items()}
    other = {
        "num_experts_per_tok": top_k,
        "num_local_experts": net.n_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return sparse | other


def net_of(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json of Qwen3-MoE or Qwen3 describes; keys of transformers 4.x or 5.x.

    Raises: ConfigError that names the key, for what this model does not compute.
    """
    kind = config.get("model_type")
    require(
        kind in KINDS, f"model_type {kind!r}: only Qwen3-MoE and Qwen3 compute what this model does; {nearest(kind, KINDS)}"
    )
    if "num_experts" not in config and "num_local_experts" in config:
        config = {**config, "num_experts": config["num_local_experts"]}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    only = {
        "attention_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "quantization_config": None,
    }
    for key, value in only.items():
        found = config.get(key, value)
        require(found == value or not (found or value), f"{key}={found!r}: this model can only be {value!r} there")
    names = FIELDS | (SPARSE if kind == "qwen3_moe" else {"d_expert": "intermediate_size"})
    values = {ours: _value(config, theirs) for ours, theirs in names.items()}
    if kind == "qwen3":
        values |= {"n_experts": 1, "top_k": 1}
    theta = config.get("rope_theta", rope.get("rope_theta", 10_000.0))
    extra = {name: value for name, value in (config.get("sigma_lite") or {}).items() if name in OURS}
    return ModelConfig(**values, rope_theta=float(theta), **_scaling(config, rope), **extra)


def _scaling(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """How RoPE is slowed down, in our settings. ConfigError for a type or a setting of one that is not computed here."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ROPE_TYPES, f"rope_type={kind!r}: this model can only have {', '.join(ROPE_TYPES)} there")
    known = {*ROPE.values(), "type", "rope_theta"}
    more = {key: value for key, value in rope.items() if key not in known and value is not None}
    require(not more, f"rope_parameters {more}: this model has only YaRN's usual values there")
    if kind == "default":
        return {}
    original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    return {"rope_type": kind, "rope_factor": rope.get("factor"), "rope_original_length": original if kind == "yarn" else 0}


def _value(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key, _DEFAULTS.get(key))
    if value is None and key == "head_dim":
        value = _value(config, "hidden_size") // _value(config, "num_attention_heads")
    if value is None and key == "num_key_value_heads":
        value = _value(config, "num_attention_heads")
    require(value is not None, f"config.json lacks {key}; {nearest(key, config)}")
    return value


# ----------------------------------------------------------------------------------------------------------- tensors


def to_theirs(state: Mapping[str, Tensor], net: ModelConfig, stacked: bool = False) -> dict[str, Tensor]:
    """Our `state_dict` under their names: views, no copies. Of tied weights only the embedding; of one expert no router.

    Args:
        stacked: all experts of a layer in one tensor, as in the memory of transformers 5, and any number of them.
    """
    head = [] if net.tie_embeddings else ["head.weight"]
    found = {OUTER[name]: state[name] for name in ("embedding.weight", "norm.weight", *head)}
    dense = architecture(net) == "qwen3" and not stacked
    for layer in range(net.n_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        found |= {theirs + name: state[ours + mine] for mine, name in INNER.items()}
        found |= {} if dense else {theirs + ROUTER[1]: state[ours + ROUTER[0]]}
        w13_EXD, w2_EDF = state[ours + IN], state[ours + OUT]
        if stacked:
            found |= {f"{theirs}mlp.experts.gate_up_proj": w13_EXD, f"{theirs}mlp.experts.down_proj": w2_EDF}
            continue
        for expert, (w13_XD, w2_DF) in enumerate(zip(w13_EXD, w2_EDF, strict=True)):
            place = f"{theirs}mlp." + ("" if dense else f"experts.{expert}.")
            gate_FD, up_FD = w13_XD.chunk(2)
            found |= {f"{place}{name}_proj.weight": w for name, w in (("gate", gate_FD), ("up", up_FD), ("down", w2_DF))}
    return found


def to_ours(names: set[str], read: Callable[[str], Tensor], net: ModelConfig) -> dict[str, Tensor]:
    """Their tensors as our `state_dict`, in either layout; routers of a dense model and all biases are 0.

    Args:
        names: of all tensors that there are.
        read: one of them by name.

    Raises: ConfigError naming tensors that are missing, of another shape, or not part of such a model.
    """
    left = set(names)

    def take(name: str, *shape: int) -> Tensor:
        require(name in left, f"tensor {name} is missing")
        left.discard(name)
        tensor = read(name)
        require(tuple(tensor.shape) == shape, f"tensor {name} is {list(tensor.shape)}, config.json says {list(shape)}")
        return tensor

    V, D, E, F = net.vocab_size, net.d_model, net.n_experts, net.d_expert
    state = {"embedding.weight": take(OUTER["embedding.weight"], V, D), "norm.weight": take(OUTER["norm.weight"], D)}
    if net.tie_embeddings:
        left.discard(OUTER["head.weight"])  # some write it all the same
        state["head.weight"] = state["embedding.weight"]
    else:
        state["head.weight"] = take(OUTER["head.weight"], V, D)
    query, key = net.n_heads * net.head_dim, net.n_kv_heads * net.head_dim
    shapes = dict(zip(INNER, ((query, D), (key, D), (key, D), (D, query), *((net.head_dim,),) * 2, (D,), (D,)), strict=True))
    for layer in range(net.n_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        state |= {ours + mine: take(theirs + name, *shapes[mine]) for mine, name in INNER.items()}
        state[ours + BIAS] = torch.zeros(E)
        dense = f"{theirs}mlp.gate_proj.weight" in left and E == 1
        state[ours + ROUTER[0]] = torch.zeros(E, D) if dense else take(theirs + ROUTER[1], E, D)
        if f"{theirs}mlp.experts.gate_up_proj" in left:
            state[ours + IN] = take(f"{theirs}mlp.experts.gate_up_proj", E, 2 * F, D)
            state[ours + OUT] = take(f"{theirs}mlp.experts.down_proj", E, D, F)
            continue
        places = [f"{theirs}mlp." + ("" if dense else f"experts.{expert}.") for expert in range(E)]
        halves = ([take(f"{place}{name}_proj.weight", F, D) for name in ("gate", "up")] for place in places)
        state[ours + IN] = torch.stack([torch.cat(both) for both in halves])
        state[ours + OUT] = torch.stack([take(f"{place}down_proj.weight", D, F) for place in places])
    require(not left, f"{len(left)} tensors are not part of such a model, the first is {min(left, default='')}")
    return state
