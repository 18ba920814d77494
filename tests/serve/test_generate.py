"""Sampling: the cache changes nothing, a seed fixes everything, and the sampled share follows the model."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from sigma_lite import cli
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import Transformer
from sigma_lite.runfile import from_mapping
from sigma_lite.serve.generate import draw, sample
from sigma_lite.serve.trained import Trained

NET = from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net")


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Transformer(NET).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_is_argmax_without_a_cache(model):
    prompt = torch.tensor([0, 5, 9, 200])
    found = list(sample(model, prompt, max_new_tokens=20, temperature=0))
    ids = prompt
    for token in found:
        with torch.no_grad():
            assert token == int(model(ids[None]).logits[0, -1].argmax())
        ids = torch.cat([ids, torch.tensor([token])])
    assert len(found) == 20


def test_a_seed_fixes_the_text(model):
    def text(seed):
        return list(sample(model, torch.tensor([0]), max_new_tokens=30, temperature=1.0, generator=seeded(seed)))

    assert text(1) == text(1) != text(2)


def test_stops_without_the_stop_token(model):
    free = list(sample(model, torch.tensor([0]), max_new_tokens=30, temperature=1.0, generator=seeded(1)))
    stop = free[10]
    held = list(sample(model, torch.tensor([0]), max_new_tokens=30, temperature=1.0, stop_id=stop, generator=seeded(1)))
    assert held == list(itertools.takewhile(lambda t: t != stop, free))


def test_draw_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = seeded(0)

    def shares(**options):
        drawn = torch.tensor([draw(logits, generator=generator, **options) for _ in range(2000)])
        return torch.bincount(drawn, minlength=4) / 2000

    torch.testing.assert_close(shares(temperature=1.0, top_p=1.0), logits.exp(), atol=0.05, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5, top_p=1.0), (2 * logits).softmax(0), atol=0.05, rtol=0)
    # 0.5 + 0.3 just reaches 0.7: the token that crosses still counts
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.05, rtol=0)
    assert shares(temperature=1.0, top_p=0.5)[0] == 1
    assert shares(temperature=1e-40, top_p=1.0)[0] == 1  # towards greedy, without overflow


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": -1}])
def test_wrong_settings_are_refused_at_once(model, wrong):
    with pytest.raises(ConfigError):
        sample(model, torch.tensor([0]), **{"max_new_tokens": 3, **wrong})


def test_an_empty_prompt_of_tokens(model):
    with pytest.raises(ConfigError, match="prompt is empty"):
        sample(model, torch.tensor([], dtype=torch.int64), max_new_tokens=3)


def test_the_command_is_deterministic(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)

    def text(*options):
        cli.main(["generate", "run", "--max-new-tokens", "30", *options])
        return capsys.readouterr().out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--temperature", "0", "--seed", "1") == text("--temperature", "0", "--seed", "2")
    assert text("--prompt", "").strip("\n") != ""  # an empty prompt is the start of a document


def test_a_run_is_loaded_with_the_experts_of_its_step(finished, monkeypatch):
    monkeypatch.chdir(finished)
    trained = Trained("run")
    assert trained.step == 12 and trained.model.k_per_layer == (1, 1)
    pieces = list(trained.continue_text("def ", 20, seed=1))
    assert "".join(pieces).encode()  # whole characters only
