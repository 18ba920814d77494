"""An independent implementation with our weights: transformers' Qwen3-MoE must give our logits."""

import dataclasses

import pytest
import torch

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.serve.hf import to_qwen3_moe

SMALL = ModelConfig(
    vocab_size=96,
    n_layers=3,
    d_model=64,
    n_heads=4,
    n_kv_heads=2,
    head_dim=24,
    n_experts=12,
    d_expert=32,
    router_init_std=0.3,
)


@pytest.mark.parametrize("top_k", [1, 8])
@pytest.mark.parametrize("tie", [True, False])
def test_logits_equal_qwen3_moe(top_k, tie):
    config = dataclasses.replace(SMALL, top_k=top_k, tie_embeddings=tie)
    torch.manual_seed(top_k)
    ours = Transformer(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 1:  # norm gains of exactly 1 would hide a gain in the wrong place
                parameter.normal_(1, 0.2)
    theirs = to_qwen3_moe(ours)
    ids = torch.randint(0, config.vocab_size, (2, 33))
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    assert (a - b).norm() / b.norm() <= 1e-5
    assert b.std() > 0.01, "logits that hardly differ would prove nothing"


def test_a_model_in_the_middle_of_its_schedule_is_not_exported():
    ours = Transformer(SMALL)
    ours.set_k((4, 2, 1))
    with pytest.raises(ConfigError, match=r"layers use \[1, 2, 4\] experts per token"):
        to_qwen3_moe(ours)


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_export_is_the_same_model_and_ends_with_the_document(tie, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ours = Transformer(dataclasses.replace(SMALL, tie_embeddings=tie)).eval()
    with torch.no_grad():
        ours.norm.weight.fill_(0)  # all logits are equal: the first, <|endoftext|>, is the most probable
    to_qwen3_moe(ours).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (theirs.config.eos_token_id, theirs.generation_config.eos_token_id, theirs.config.bos_token_id) == (0, 0, 0)
    assert theirs.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False).tolist() == [[5, 6, 0]]
    assert theirs.config.pad_token_id is None  # the embedding of a padding token gets no gradient
