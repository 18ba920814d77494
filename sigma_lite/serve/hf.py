"""Export to Hugging Face's Qwen3-MoE, which computes the same: Sigma-MoE-Tiny is Qwen3-MoE with one expert per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sigma_lite.config import ModelConfig, require
from sigma_lite.data.tokenizer import END_OF_TEXT_ID
from sigma_lite.model import Transformer

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM


def to_qwen3_moe(model: Transformer, **options: object) -> Qwen3MoeForCausalLM:
    """A `transformers` model with copies of these weights; its logits equal ours.

    Args:
        options: more Qwen3MoeConfig settings, such as experts_implementation="eager" or router_aux_loss_coef.

    Raises: ConfigError for what that format cannot say: layers that differ in experts per token, sigmoid scores, a bias,
        layers without attention, parts of one's own.
    """
    from transformers import Qwen3MoeForCausalLM

    own = ", ".join(model.parts.custom)
    require(not own, f"Qwen3-MoE has no place for parts of your own, and this model has its own {own}")
    ks = set(model.k_per_layer)
    known = model.config.router_score == "softmax" and not model.bias_LE.any() and not model.config.attention_from_layer
    require(known, "Qwen3-MoE cannot say what this model has: sigmoid scores, a routing bias, or a layer without attention")
    require(len(ks) == 1, f"layers use {sorted(ks)} experts per token; Hugging Face's format needs one K: call set_k first")
    theirs = Qwen3MoeForCausalLM(qwen3_moe_config(model.config, ks.pop(), **options))
    theirs.load_state_dict(qwen3_moe_weights(model))
    return theirs.eval()


def qwen3_moe_config(config: ModelConfig, top_k: int, **options: object):
    """norm_topk_prob must be False: renormalising over a single winner makes the gate 1 and cuts the router off.

    <|endoftext|> stands between documents: generate() begins and ends with it. No token is for padding; one that is would
    get no gradient there.
    """
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        moe_intermediate_size=config.d_expert,
        num_experts=config.n_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        rms_norm_eps=config.norm_eps,
        rope_parameters=config.rope_parameters(),
        tie_word_embeddings=config.tie_embeddings,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        **{"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, **options},
    )


def qwen3_moe_weights(model: Transformer) -> dict[str, Tensor]:
    """Our parameters under their names in memory (transformers 5: experts stacked, gate rows before up rows)."""
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "lm_head.weight": model.head.weight,
        "model.norm.weight": model.norm.weight,
    }
    for layer, block in enumerate(model.blocks):
        attention, moe = block.attention, block.moe
        ours = {
            "self_attn.q_proj.weight": attention.query.weight,
            "self_attn.k_proj.weight": attention.key.weight,
            "self_attn.v_proj.weight": attention.value.weight,
            "self_attn.o_proj.weight": attention.out.weight,
            "self_attn.q_norm.weight": attention.q_norm.weight,
            "self_attn.k_norm.weight": attention.k_norm.weight,
            "input_layernorm.weight": block.attention_norm.weight,
            "post_attention_layernorm.weight": block.moe_norm.weight,
            "mlp.gate.weight": moe.router.weight,
            "mlp.experts.gate_up_proj": moe.experts.w13,
            "mlp.experts.down_proj": moe.experts.w2,
        }
        weights |= {f"model.layers.{layer}.{name}": weight for name, weight in ours.items()}
    return {name: weight.detach() for name, weight in weights.items()}
