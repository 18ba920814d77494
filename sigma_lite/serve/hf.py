"""This model as transformers' Qwen3-MoE in memory, which computes the same. On disk: see export.py and imports.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sigma_lite.data.tokenizer import END_OF_TEXT_ID
from sigma_lite.model import Transformer
from sigma_lite.serve import layout

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

NOT_IN_MEMORY = {"architectures", "model_type", "torch_dtype", "num_local_experts", "rope_theta"}  # said by other keys there


def to_qwen3_moe(model: Transformer, **options: object) -> Qwen3MoeForCausalLM:
    """A `transformers` model with copies of these weights; its logits equal ours.

    <|endoftext|> stands between documents: generate() begins and ends with it. No token is for padding; one that is would
    get no gradient there.

    Args:
        options: more Qwen3MoeConfig settings, such as experts_implementation="eager" or router_aux_loss_coef.

    Raises: ConfigError for what that format cannot say: layers that differ in experts per token, sigmoid scores, a bias,
        layers without attention, parts of one's own.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    layout.refuse_unsayable(model)
    K = model.k_per_layer[0]
    settings = layout.hf_config(model.config, 32_768, END_OF_TEXT_ID, K) | layout.sparse_settings(model.config, K)
    known = {key: value for key, value in settings.items() if key not in NOT_IN_MEMORY}
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**known | options))
    weights = layout.to_theirs(model.state_dict(), model.config, stacked=True)
    tied = {} if "lm_head.weight" in weights else {"lm_head.weight": model.head.weight.detach()}
    theirs.load_state_dict(weights | tied)
    return theirs.eval()
