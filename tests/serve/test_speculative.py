"""A draft changes how long it takes, never what is written."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Parts, Transformer
from sigma_lite.papers.choice import ExpertChoice
from sigma_lite.scale.decode import tokens_of_a_round
from sigma_lite.serve.generate import sample
from sigma_lite.serve.speculative import speculate

NET = ModelConfig(
    vocab_size=60, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=16, d_expert=16,
    router_init_std=0.5,
)  # fmt: skip
PROMPT = torch.tensor([3, 14, 15, 9])


def made(seed: int, net: ModelConfig = NET) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(net).eval()


def nearly(model: Transformer, noise: float) -> Transformer:
    """A draft that is often right: the same weights, disturbed."""
    draft, generator = made(0), torch.Generator().manual_seed(0)
    draft.load_state_dict(model.state_dict())
    for weight in draft.parameters():
        weight.data += noise * weight.data.std().nan_to_num(0) * torch.randn(weight.shape, generator=generator)
    return draft


DRAFTS = {"none": lambda model: None, "itself": lambda model: model, "stranger": lambda _: made(1)}
DRAFTS |= {"similar": lambda model: nearly(model, 0.1)}


@pytest.mark.parametrize("drafted", [1, 3, 6])
@pytest.mark.parametrize("name", DRAFTS)
def test_the_tokens_of_the_model_alone(name, drafted):
    model = made(0)
    alone = list(sample(model, PROMPT, max_new_tokens=40, temperature=0))
    found = speculate(model, DRAFTS[name](model), PROMPT, max_new_tokens=40, drafted=drafted)
    assert found.tokens == alone
    assert found.rounds + found.accepted == 40, "each pass brings a token of its own and those accepted"
    if name == "itself":
        assert found.acceptance == 1 and found.rounds == -(-40 // (drafted + 1))
    if name == "none":
        assert found.rounds == 40 and found.drafted == 0
    if name == "similar":
        assert 0.2 < found.acceptance < 1, "a test of neither extreme"


def test_rounds_follow_the_law_of_acceptance():
    """Tokens a round against 1 + a + a^2 + a^3, at the measured chance a: 10 % off, as chances are not equal."""
    model = made(0)
    found = speculate(model, nearly(model, 0.1), PROMPT, max_new_tokens=300, drafted=3)
    assert 0.2 < found.acceptance < 0.9
    assert len(found.tokens) / found.rounds == pytest.approx(tokens_of_a_round(found.acceptance, 3), rel=0.1)


def test_experts_are_counted():
    model = made(0)
    alone = speculate(model, None, PROMPT, max_new_tokens=20)
    assert 19 * 2 < alone.experts <= (19 + 4) * 2, "one expert a layer and token, and the prompt's"
    checked = speculate(model, made(1), PROMPT, max_new_tokens=20, drafted=4)
    assert checked.experts > alone.experts, "wrong guesses touch experts for nothing"


def test_layers_without_attention_have_nothing_to_forget():
    model = made(0, dataclasses.replace(NET, attention_from_layer=1))
    found = speculate(model, made(1), PROMPT, max_new_tokens=12, drafted=3)
    assert found.tokens == list(sample(model, PROMPT, max_new_tokens=12, temperature=0))


@pytest.mark.parametrize("who", ["model", "draft"])
def test_what_cannot_write_is_refused_as_elsewhere(who):
    """A router that has to know the future, and logits that are no numbers."""
    torch.manual_seed(0)
    unfit, broken = Transformer(NET, Parts(router=ExpertChoice)).eval(), made(1)
    broken.head.weight.data.fill_(torch.nan)
    for one, why in ((unfit, "ExpertChoice decides for all tokens"), (broken, "logits are not finite")):
        given = {"model": made(0), "draft": made(0), who: one}
        with pytest.raises(ConfigError, match=why):
            speculate(**given, prompt_S=PROMPT, max_new_tokens=3)


def test_refusals():
    with pytest.raises(ConfigError, match="the draft has 50 tokens, the model 60"):
        speculate(made(0), made(0, dataclasses.replace(NET, vocab_size=50)), PROMPT, max_new_tokens=3)
    with pytest.raises(ConfigError, match="drafted=0"):
        speculate(made(0), made(0), PROMPT, max_new_tokens=3, drafted=0)
    with pytest.raises(ConfigError, match="prompt is empty"):
        speculate(made(0), None, PROMPT[:0], max_new_tokens=3)
