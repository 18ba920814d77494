"""Longer rows than those trained on: RoPE's angles slowed down, as transformers does it, and what may be asked for."""

from __future__ import annotations

import math

import pytest
import torch

from sigma_lite.config import ConfigError, ModelConfig, RopeScaling
from sigma_lite.model import Transformer
from sigma_lite.model.rotary import rotate, rotation, slowed, temperature

LINEAR = {"rope_type": "linear", "rope_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_factor": 8.0, "rope_original_length": 64}
NET = {"vocab_size": 300, "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "n_experts": 4}


def test_linear_angles_are_those_of_positions_between():
    """Law: position 4 p of a row four times as long has the angle that position p had."""
    plain, longer = (
        rotation(torch.arange(50), 32, 10_000.0),
        rotation(torch.arange(200), 32, 10_000.0, RopeScaling("linear", 4, 0)),
    )
    torch.testing.assert_close(longer.cos[::4], plain.cos, rtol=0, atol=1e-5)
    torch.testing.assert_close(longer.sin[::4], plain.sin, rtol=0, atol=1e-5)


def test_yarn_leaves_fast_pairs_and_slows_slow_ones():
    """Law: more than 32 turns in an original row: untouched; less than one: slowed by the factor; between, neither is
    exceeded, and a slower pair is slowed at least as much.
    """
    speed_P = 10_000.0 ** -(torch.arange(0, 128, 2) / 128)
    turns_P = 4096 * speed_P / (2 * math.pi)
    ratio_P = speed_P / slowed(speed_P, 10_000.0, RopeScaling("yarn", 8.0, 4096))
    assert ratio_P[turns_P > 34].allclose(torch.tensor(1.0)) and ratio_P[turns_P < 0.85].allclose(torch.tensor(8.0))
    assert (ratio_P.diff() >= -1e-5).all() and 1 < ratio_P.median() < 8
    assert temperature(RopeScaling("yarn", 8.0, 4096)) == pytest.approx(1 + 0.1 * math.log(8))


@pytest.mark.parametrize("kind", [("linear", 3.0, 0), ("yarn", 8.0, 64)])
def test_products_still_see_only_distance(kind):
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, 2, 32), torch.randn(1, 6, 2, 32)
    products = []
    for start in (0, 500):
        turn = rotation(torch.arange(start, start + 6), 32, 10_000.0, RopeScaling(*kind))
        products.append(torch.einsum("bqhc,bkhc->bhqk", rotate(q, turn), rotate(k, turn)))
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scaled", [LINEAR, YARN])
def test_frequencies_and_logits_are_transformers(scaled):
    """`rope_parameters` is what transformers reads: its Qwen3-MoE with our weights gives our logits, in a long row."""
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from sigma_lite.serve.hf import to_qwen3_moe

    torch.manual_seed(0)
    ours = Transformer(ModelConfig(**NET, **scaled)).eval()
    theirs = to_qwen3_moe(ours, experts_implementation="eager")
    speed_P, attention = ROPE_INIT_FUNCTIONS[scaled["rope_type"]](theirs.config, device="cpu")
    plain_P = 10_000.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(slowed(plain_P, 10_000.0, ours.config.rope_scaling), speed_P)
    assert temperature(ours.config.rope_scaling) == pytest.approx(attention)
    ids = torch.randint(300, (1, 400))
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
        unscaled = Transformer(ModelConfig(**NET)).eval()
        unscaled.load_state_dict(ours.state_dict())
        other = unscaled(ids).logits
    assert (a - b).norm() <= 1e-5 * b.norm()
    assert (other - b).norm() > 1e-3 * b.norm(), "else this row would not tell them apart"


@pytest.mark.parametrize(
    "given, said",
    [
        ({"rope_type": "yarm"}, "did you mean 'yarn'"),
        ({"rope_factor": 4.0}, "no effect on rope_type=default"),
        ({"rope_type": "linear", "rope_factor": 0.5}, "at least 1"),
        ({"rope_type": "yarn", "rope_factor": 4.0}, "yarn needs the tokens of a row before"),
        ({**LINEAR, "rope_original_length": 64}, "the other types 0"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        ModelConfig(**given)


def test_rope_is_part_of_a_checkpoint_and_its_absence_means_what_it_meant():
    """A checkpoint of before has no such keys: its settings are completed with today's defaults."""
    from sigma_lite.train.settings import completed

    old = {"net": {"d_model": 64, "rope_theta": 10_000.0}}
    assert completed(old)["net"]["rope_type"] == "default" and completed(old)["net"]["attention"] == "auto"
    assert ModelConfig(**completed(old)["net"]).rope_scaling is None
