"""Many prompts at once: each gets what it would get alone, and what transformers' generate gives on the export."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch

from sigma_lite import cli
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.data import tokenizer
from sigma_lite.data.chat import Marks, marks
from sigma_lite.model import Parts, Transformer
from sigma_lite.model.parts import as_parts
from sigma_lite.papers.base import Assigned
from sigma_lite.papers.choice import ExpertChoice
from sigma_lite.runfile import from_mapping
from sigma_lite.serve.export import export
from sigma_lite.serve.generate import Sampling, draw_each, generate, shortlist, stream
from sigma_lite.serve.trained import Trained
from sigma_lite.storage import StorageError

NET = dataclasses.replace(from_mapping(ModelConfig, tiny.SETTINGS["model"]["net"], "net"), router_init_std=0.3, init_std=0.4)
PROMPTS = [[0, 5, 9, 200], [0], [0, 7], [0, 5, 9, 201], [3, 3], [0, 44, 45, 46]]
GREEDY = Sampling(temperature=0)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(3)
    return Transformer(NET).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Without a cache: everything is read anew for each token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# --------------------------------------------------------------------------------------------------------- the same text


def test_a_batch_writes_what_each_prompt_writes_alone_without_a_cache(model):
    found = generate(model, PROMPTS, max_new_tokens=24, sampling=GREEDY)
    assert [own.tokens for own in found] == [plain_greedy(model, prompt, 24) for prompt in PROMPTS]
    assert len({tuple(own.tokens) for own in found}) > 3, "texts that are alike would prove nothing"
    assert not any(own.stopped for own in found)


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_a_seed_gives_a_prompt_its_text_whatever_is_in_the_batch(model, at_once):
    options = {"max_new_tokens": 24, "sampling": Sampling(1.0, top_p=0.9), "stop": set(range(5, 300, 15))}
    seeds = [5, 6, 7, 8, 9, 10]
    alone = [generate(model, [prompt], seeds=[seed], **options)[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    together = generate(model, PROMPTS, seeds=seeds, at_once=at_once, **options)
    assert [own.tokens for own in together] == [own.tokens for own in alone]
    assert [own.stopped for own in together] == [own.stopped for own in alone]
    assert {own.stopped for own in alone} == {True, False}, "rows that end early leave the batch: both must occur"
    twins = generate(model, [[0], [0]], seeds=[1, 2], **options)
    assert twins[0].tokens != twins[1].tokens


def test_a_stop_token_ends_its_own_row_only(model):
    free = generate(model, PROMPTS, max_new_tokens=24, sampling=GREEDY)
    stop = free[0].tokens[5]
    for own, held in zip(free, generate(model, PROMPTS, max_new_tokens=24, sampling=GREEDY, stop={stop}), strict=True):
        cut = own.tokens.index(stop) if stop in own.tokens else 24
        assert (held.tokens, held.stopped) == (own.tokens[:cut], stop in own.tokens)


def test_transformers_writes_the_same_from_our_export(finished, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(finished)
    export("run", tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    trained = Trained("run")
    prompts = [trained.prompt_ids(text) for text in ("def rule_1", "# module", "", "x", "def rule_2")]
    ours = generate(trained.model, prompts, max_new_tokens=30, sampling=GREEDY, stop={trained.end_of_text})
    for prompt, own in zip(prompts, ours, strict=True):
        options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": trained.end_of_text}
        ids = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)[0].tolist()
        written = ids[len(prompt) :]
        assert own.tokens == (written[:-1] if written[-1] == trained.end_of_text else written)


@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 0.7, 0.0), (7, 1.0, 0.0), (7, 0.6, 0.0), (0, 1.0, 0.2), (20, 0.9, 0.1)])
def test_cuts_are_those_of_transformers(top_k, top_p, min_p):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(5, 40) * 2
    kept_BN, ids_BN = shortlist(logits, Sampling(0.7, top_k, top_p, min_p))
    ours = torch.zeros(5, 40).scatter(1, ids_BN, kept_BN)
    scores = warpers.TemperatureLogitsWarper(0.7)(None, logits)
    scores = warpers.TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = warpers.TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    scores = warpers.MinPLogitsWarper(min_p)(None, scores) if min_p else scores
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), scores.softmax(-1))
    assert (ours == 0).any()


def test_drawing_is_what_it_was_for_a_seed():
    """One prompt's text by the rule of before: torch.multinomial on the sorted nucleus."""
    logits, sampling = torch.randn(1, 300), Sampling(0.7, top_p=0.95)
    probs_V, ids_V = ((logits[0] - logits.max()) / 0.7).softmax(-1).sort(descending=True)
    kept_V = probs_V * (probs_V.cumsum(-1) - probs_V < 0.95)
    for seed in range(20):
        before = int(ids_V[torch.multinomial(kept_V, 1, generator=seeded(seed))])
        assert draw_each(logits, sampling, [seeded(seed)]).tolist() == [before]


# ------------------------------------------------------------------------------------------------ routers and attention


def test_chosen_experts_are_those_of_one_long_reading(model):
    model.set_k((2, 1))
    (own,) = generate(model, [PROMPTS[0]], max_new_tokens=9, sampling=GREEDY, experts=True)
    ids = torch.tensor([[*PROMPTS[0], *own.tokens[:-1]]])
    with torch.no_grad():
        routings = model(ids).routings
    assert [layer.shape for layer in own.experts] == [(12, 2), (12, 1)]
    assert all(torch.equal(chosen, routing.ids) for chosen, routing in zip(own.experts, routings, strict=True))


ROUTERS = ("base.Assigned", "threshold.Above", "remoe.ReLURouter", "rounding.Rounded", "hash.Hashed", "adamoe.NullRouter")


@pytest.mark.parametrize("parts", [*({"router": name} for name in ROUTERS), {"attention": "moduleformer.StickBreaking"}])
def test_other_parts_write_with_a_cache_as_without(parts):
    """Also those that choose from the whole batch in training, and those that leave slots empty."""
    torch.manual_seed(1)
    found = as_parts({part: f"sigma_lite.papers.{name}" for part, name in parts.items()})
    other = Transformer(dataclasses.replace(NET, top_k=2), found).eval()
    texts = generate(other, PROMPTS, max_new_tokens=12, sampling=GREEDY, experts=True)
    assert [own.tokens for own in texts] == [plain_greedy(other, prompt, 12) for prompt in PROMPTS]
    assert [len(own.experts[0]) for own in texts] == [len(prompt) + 11 for prompt in PROMPTS]


def test_a_router_that_needs_the_future_is_refused_by_name():
    other = Transformer(NET, Parts(router=ExpertChoice)).eval()
    with pytest.raises(ConfigError, match=r"papers\.choice\.ExpertChoice decides for all tokens of a batch together"):
        generate(other, [[0]], max_new_tokens=1)
    with pytest.raises(ConfigError, match="ExpertChoice"):
        stream(other, torch.tensor([[0]]), max_new_tokens=1)


def with_router(place: Path, path: str, **settings: object) -> None:
    router = {"class_path": path, "init_args": settings} if settings else path
    quick = {"trainer__max_steps": 2, "model__sparsity": None, "trainer__val_check_interval": 2}
    tiny.write_config(place, "own.yaml", model__parts={"router": router}, **quick)
    cli.main(["fit", "-c", "own.yaml", "--model.optim.warmup_steps=1"])


def test_a_run_whose_router_needs_the_future_trains_and_writes_nothing(place, capsys):
    with_router(place, "sigma_lite.papers.choice.ExpertChoice")
    assert "no sample: sigma_lite.papers.choice.ExpertChoice decides" in capsys.readouterr().err
    assert tiny.refused(cli.main, "generate", "run") == 2
    assert "ExpertChoice decides for all tokens" in capsys.readouterr().err


def test_a_run_with_a_router_of_the_package_is_opened_by_its_name(place, capsys, monkeypatch):
    with_router(place, "sigma_lite.papers.base.Assigned", rounds=3)
    trained = Trained("run")
    assert isinstance(trained.model.blocks[0].moe.router, Assigned) and trained.model.blocks[0].moe.router.rounds == 3
    cli.main(["generate", "run", "--max-new-tokens", "3"])
    monkeypatch.setattr(Assigned, "choose", lambda self, scores_TE: scores_TE.topk(1).indices)
    with pytest.raises(ConfigError, match="trained with other code: .*whose code has changed since"):
        Trained("run")


def test_code_of_others_runs_only_when_asked(place, capsys, monkeypatch):
    Path("my_parts.py").write_text("from sigma_lite.model import Router\n\nclass Mine(Router):\n    pass\n")
    monkeypatch.syspath_prepend(str(place))
    with_router(place, "my_parts.Mine")
    assert tiny.refused(cli.main, "generate", "run") == 2
    assert "run has parts.router=my_parts.Mine: give it" in capsys.readouterr().err
    cli.main(["generate", "run", "--own-parts", "--max-new-tokens", "3"])
    assert as_parts({"router": "my_parts.Mine"}).custom.keys() == {"router"}


# ----------------------------------------------------------------------------------------------------- the commands


def test_speed_and_the_trained_length_are_said_beside_the_text(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    cli.main(["generate", "run", "--max-new-tokens", "40", "--temperature", "0"])
    seen = capsys.readouterr()
    assert "tokens/s" in seen.err and "trained on rows of 32" in seen.err and "tokens/s" not in seen.out
    cli.main(["generate", "run", "--max-new-tokens", "4", "--prompt", "a"])
    assert "trained on rows" not in capsys.readouterr().err


def test_few_experts_in_memory_write_the_same_and_say_so(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    texts = []
    for resident in ([], ["--resident", "2"]):
        cli.main(["generate", "run", "--prompt", "def", "--max-new-tokens", "12", "--temperature", "0", *resident])
        texts.append(capsys.readouterr())
    assert texts[0].out == texts[1].out
    assert "of experts held (25.0%)" in texts[1].err and "of experts held" not in texts[0].err
    assert tiny.refused(cli.main, "generate", "run", "--resident", "8") == 2
    assert "resident=8: must lie in 1..7" in capsys.readouterr().err


def test_several_prompts_and_samples(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    options = ["--max-new-tokens", "12", "--temperature", "1"]
    cli.main(["generate", "run", "--prompt", "def", "--prompt", "# module 1", "--samples", "2", *options])
    out = capsys.readouterr().out
    assert out.count("---") == 4 and "--- 3 of 4, seed 2\n# module 1" in out
    cli.main(["generate", "run", "--prompt", "# module 1", "--seed", "2", *options])
    assert capsys.readouterr().out.strip() in out


def test_experts_are_listed_token_by_token(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    cli.main(["generate", "run", "--prompt", "def", "--max-new-tokens", "3", "--experts"])
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("token "))
    assert lines[head].split()[1:] == ["layer", "0", "layer", "1"] and "<|endoftext|>" in lines[head + 1]
    assert len(lines) - head - 1 >= 4 and all(line.split()[-1].isdigit() for line in lines[head + 1 :])


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--top-k", "-1"], "top_k=-1: must be 1 or more"),
        (["--min-p", "2"], "min_p=2.0: must lie in 0..1"),
        (["--samples", "0"], "samples=0"),
        (["--stop", "def rule"], "tokens of this tokenizer"),
    ],
)
def test_wrong_options_are_refused(finished, monkeypatch, capsys, wrong, words):
    monkeypatch.chdir(finished)
    assert tiny.refused(cli.main, "generate", "run", *wrong) == 2
    assert words in capsys.readouterr().err


def test_an_exported_folder_writes_as_its_run(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(finished)
    export("run", tmp_path / "hf")
    texts = []
    for folder in ("run", str(tmp_path / "hf")):
        cli.main(["generate", folder, "--max-new-tokens", "20", "--seed", "4"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="holds no checkpoint"):
        Trained(tmp_path / "empty")


def test_chat_frames_what_is_said(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    trained = Trained("run")
    frame = marks(trained.tokenizer, trained.end_of_text)
    assert frame == Marks(0, 1, 2, 3)
    assert frame.prompt([([7, 8], [9]), ([6], None)]) == [0, 1, 7, 8, 2, 9, 3, 1, 6, 2]
    assert 1 not in trained.ids("<|user|>"), "what a person types is text"
    monkeypatch.setattr(sys, "stdin", io.StringIO("def\nclass\n\nnever read\n"))
    cli.main(["chat", "run", "--temperature", "0", "--max-new-tokens", "5"])
    first = generate(trained.model, [[0, 1, *trained.ids("def"), 2]], max_new_tokens=5, sampling=GREEDY, stop={0, 1, 3})[
        0
    ].tokens
    second = frame.prompt([(trained.ids("def"), first), (trained.ids("class"), None)])
    second = generate(trained.model, [second], max_new_tokens=5, sampling=GREEDY, stop={0, 1, 3})[0].tokens
    assert capsys.readouterr().out == "".join("".join(trained.texts(own)) + "\n" for own in (first, second))


def test_chat_without_the_marks_says_what_is_lacking(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(finished)
    export("run", tmp_path / "hf")
    path = tmp_path / "hf/tokenizer.json"
    path.write_text(path.read_text().replace("<|assistant|>", "<|helper|>"))
    assert tiny.refused(cli.main, "chat", str(tmp_path / "hf")) == 2
    assert "tokenizer lacks <|assistant|>, which frame a conversation" in capsys.readouterr().err
    shutil.copy(finished / "run/tokenizer.json", path)
    assert tokenizer.load(path).token_to_id("<|assistant|>") == 2
