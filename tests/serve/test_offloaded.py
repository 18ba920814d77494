"""Experts that are read when they are needed: the same numbers, a twelfth of the bytes, and every byte counted."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from sigma_lite import cli
from sigma_lite.checkpoint import REST, Sharded, newest_checkpoint, write_checkpoint
from sigma_lite.config import ConfigError, ModelConfig
from sigma_lite.model import KeyValueCache, Parts, Transformer
from sigma_lite.papers.adamoe import NullRouter
from sigma_lite.papers.hash import Hashed
from sigma_lite.papers.latency import Mixed, ShiftExperts
from sigma_lite.papers.latent import Latent
from sigma_lite.papers.se_moe import ring_seconds
from sigma_lite.papers.shared import WithShared
from sigma_lite.serve.expert_cache import LFU, LRU, Clairvoyant, hit_rate
from sigma_lite.serve.generate import sample
from sigma_lite.serve.mapped import Mapped
from sigma_lite.serve.offloaded import Offloaded
from sigma_lite.serve.trained import Trained
from sigma_lite.serve.weights import offload
from sigma_lite.storage import StorageError

NET = ModelConfig(
    vocab_size=300, n_layers=3, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=96, d_expert=16,
    router_init_std=0.5,
)  # fmt: skip
PROMPT = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1))


def made(net: ModelConfig = NET, parts: Parts = Parts()) -> Transformer:  # noqa: B008
    torch.manual_seed(0)
    return Transformer(net, parts).eval()


def keep(model: Transformer, place: Path) -> Path:
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    write_checkpoint(place, {"state_dict": state, "global_step": 0})
    return place


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return keep(made(), tmp_path_factory.mktemp("kept") / "step=000000.safetensors")


@torch.inference_mode()
def greedy(model: Transformer, count: int = 25) -> tuple[list[int], Tensor]:
    """Tokens, and the logits of all calls."""
    cache, ids, tokens, logits = [KeyValueCache() for _ in model.blocks], PROMPT[None], [], []
    for _ in range(count):
        logits.append(model(ids, cache=cache).logits[0])
        tokens.append(int(logits[-1][-1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.cat(logits)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("resident", [1, 8, 95])
def test_the_same_tokens_and_the_same_logits(file, resident, policy, prefetch):
    """Bitwise, also where a prompt of 40 tokens asks for more experts than there are slots."""
    expected, found = made(), made()
    source = offload(found, file, resident=resident, policy=policy, prefetch=prefetch)
    source.forget()
    tokens, logits = greedy(found)
    assert tokens == greedy(expected)[0] and torch.equal(logits, greedy(expected)[1])
    assert max(len(call) for layer in source.layers for call in layer.trace) > 8
    source.close()


def test_made_where_nothing_is_recorded(file):
    with torch.inference_mode():
        found = made()
        offload(found, file)
    assert torch.equal(greedy(found)[1], greedy(made())[1])


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_every_backend(file, monkeypatch, backend):
    monkeypatch.setenv("SIGMA_LITE_BACKEND", backend)
    found = made()
    offload(found, file)
    torch.testing.assert_close(greedy(found)[1], greedy(made())[1], atol=1e-6, rtol=1e-5)
    assert greedy(found)[0] == greedy(made())[0]


def test_several_experts_a_token(file):
    """K of 4, 2 and 1 with three slots: fewer than a token needs."""
    expected, found = made(), made()
    offload(found, file, resident=3)
    for model in (expected, found):
        model.set_k((4, 2, 1))
    torch.testing.assert_close(greedy(found)[1], greedy(expected)[1], atol=1e-6, rtol=1e-5)
    assert greedy(found)[0] == greedy(expected)[0]


PARTS = {
    "shift": Parts(experts=ShiftExperts),
    "two kinds": Parts(experts=functools.partial(Mixed, full=40, shift_width=8)),
    "shared": Parts(experts=WithShared),
    "latent": Parts(experts=functools.partial(Latent, keep_scale=True)),
    "empty slots": Parts(router=functools.partial(NullRouter, nulls=96)),
    "by token": Parts(router=Hashed),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_built_on_experts(tmp_path, name):
    net = dataclasses.replace(NET, top_k=2)
    expected, found = made(net, PARTS[name]), made(net, PARTS[name])
    source = offload(found, keep(expected, tmp_path / "kept.safetensors"))
    torch.testing.assert_close(greedy(found)[1], greedy(expected)[1], atol=1e-6, rtol=1e-5)
    assert source.held_bytes < source.expert_bytes / 4


def test_a_twelfth_of_the_experts_bytes(file):
    """Made without storage, the model gets its other weights from the file, and all it holds of experts are 8 of 96."""
    with torch.device("meta"):
        found = Transformer(NET).eval()
    source = offload(found, file, resident=8)
    assert torch.equal(greedy(found)[1], greedy(made())[1])
    assert source.expert_bytes == NET.ledger().experts * 4 and source.held_bytes * 12 == source.expert_bytes
    held = sum(p.numel() for layer in source.layers for p in layer.parameters())
    assert held * 4 == source.held_bytes
    whole, rest = sum(p.numel() for p in made().parameters()), sum(p.numel() for p in found.parameters())
    assert whole - rest == NET.ledger().experts * 11 // 12
    assert found.head.weight is found.embedding.weight


def test_every_byte_is_counted(file):
    """Without guesses: an expert's bytes for each that was not there; with guesses: for each that was read."""
    one = 3 * NET.d_model * NET.d_expert * 4
    for prefetch in (False, True):
        model = made()
        source = offload(model, file, prefetch=prefetch)
        source.forget()
        greedy(model)
        source.close()
        c = source.counts
        assert c.asked == sum(len(call) for layer in source.layers for call in layer.trace) > 0
        read = c.moved_bytes // one
        assert c.moved_bytes % one == 0
        if not prefetch:
            assert read == c.asked - c.hits and c.guesses == c.guessed == 0
        else:
            assert (
                c.guesses >= c.guessed > 0
                and c.asked - c.hits - c.guessed <= read <= c.asked - c.hits - c.guessed + c.guesses
            )
        assert f"{c.asked:,} experts" in source.in_words() and "8.3%" in source.in_words()


def test_hits_are_those_of_the_policy_on_the_trace(file):
    """What a model has measured is what its trace says: one token at a time, LRU and LFU."""
    for name, kind in (("lru", LRU), ("lfu", LFU)):
        model = made()
        source = offload(model, file, policy=name, prefetch=False)
        source.forget()
        with torch.inference_mode():
            for token in PROMPT[:30]:
                model(token.view(1, 1))
        for layer in source.layers:
            assert layer.counts.hits / layer.counts.asked == pytest.approx(hit_rate(layer.trace, 8, kind()))


def test_policies_by_hand():
    trace = [[0], [1], [0], [2], [0], [1]]
    assert hit_rate(trace, 2, LRU()) == 2 / 6  # 2 pushes 1 out, 1 comes back too late
    assert hit_rate(trace, 2, Clairvoyant(trace)) == 2 / 6 and hit_rate(trace, 3, LRU()) == 3 / 6
    busy = [[0]] * 5 + [[1], [2], [3]] * 2 + [[0]]
    assert hit_rate(busy, 2, LFU(half_life=0)) == 5 / 12  # 0 has five hits, and stays
    assert hit_rate(busy, 2, LRU()) == 4 / 12
    gone = [[0]] * 8 + [[1], [2]] * 8
    assert hit_rate(gone, 2, LFU(half_life=0)) < hit_rate(gone, 2, LFU(half_life=4)), "old hits fade"


def test_nobody_beats_who_knows_the_future():
    generator = torch.Generator().manual_seed(0)
    weights = torch.arange(1.0, 25).reciprocal()
    trace = [[int(e)] for e in torch.multinomial(weights, 400, True, generator=generator)]
    for slots in (2, 6, 12):
        best = hit_rate(trace, slots, Clairvoyant(trace))
        assert all(hit_rate(trace, slots, policy) <= best for policy in (LRU(), LFU()))
    assert hit_rate(trace, 24, LRU()) == 1 - len({e for (e,) in trace}) / 400


def test_a_right_guess_is_read_before_it_is_asked_for(tmp_path):
    """Routers that ignore the stream guess right each time, and then nobody waits for a slow disk but at the first layer."""
    model = made()
    for block in model.blocks:
        block.moe.router.weight.data.zero_()
        block.moe.router.bias[5] = 1
    source = offload(model, keep(model, tmp_path / "kept.safetensors"), resident=2)
    source.forget()
    with torch.inference_mode():
        model(PROMPT[:1, None])
    first, *others = (layer.counts for layer in source.layers)
    assert (first.guessed, first.guesses) == (0, 0)
    assert all((c.asked, c.guessed, c.guesses) == (1, 1, 1) for c in others)


def test_a_slow_disk_is_as_slow_as_it_says(file):
    files, into = Mapped(file, bytes_per_second=2e5), torch.empty(2 * NET.d_expert, NET.d_model)
    begun = time.perf_counter()
    for expert in range(10):  # all that were ever read: a read makes up for what the one before has overslept
        files.copy("blocks.1.moe.experts.w13", expert, into)
    took = time.perf_counter() - begun
    assert 0.9 < took / (10 * into.numel() * 4 / 2e5) < 1.3


@pytest.mark.parametrize(("compute", "load", "prefetch"), [(0.02, 0.05, True), (0.05, 0.02, True), (0.02, 0.03, False)])
def test_time_of_a_token_is_the_larger_of_computing_and_reading(tmp_path, compute, load, prefetch):
    """Within 15 %, where routers guess right: the ring's law with two slots, N max(c, l) + min(c, l); without guesses the
    sum, N (c + l). An expert that is there takes no reading. The best of five tokens each.

    Routers ignore the stream and want another expert for each token, or in every second layer always the same. Computing is
    slept, so c is what the same model takes with all experts in memory; the file is read at a rate.
    """
    N, seconds = 4, {"all read": [], "half read": []}
    models = [made(dataclasses.replace(NET, n_layers=N)) for _ in range(2)]
    for block in (*models[0].blocks, *models[1].blocks):
        block.moe.router.weight.data.zero_()
    one, file = 3 * NET.d_model * NET.d_expert * 4, keep(models[0], tmp_path / "kept.safetensors")
    source = offload(models[0], file, resident=8, prefetch=prefetch, bytes_per_second=one / load)
    for experts in (*(layer.slots for layer in source.layers), *(block.moe.experts for block in models[1].blocks)):
        experts.register_forward_hook(lambda *_: time.sleep(compute))
    writers = [sample(model, PROMPT[:1], max_new_tokens=10, temperature=0) for model in models]
    for token, case in enumerate(["all read"] * 5 + ["half read"] * 5):
        reads = [case == "all read" or layer % 2 == 1 for layer in range(N)]
        for model in models:
            for layer, block in enumerate(model.blocks):
                block.moe.router.bias.zero_()
                block.moe.router.bias[10 * layer + (token if reads[layer] else 4)] = 1
        before, took = source.counts.moved_bytes, []
        for writer in writers:
            begun = time.perf_counter()
            next(writer)
            took.append(time.perf_counter() - begun)
        assert source.counts.moved_bytes - before == one * sum(reads)
        seconds[case].append((*took, [load * there for there in reads]))
    for case, tokens in seconds.items():
        measured, c, loads = min(t[0] for t in tokens), min(t[1] for t in tokens) / N, tokens[0][2]
        law = ring_seconds([c] * N, loads, 2) if prefetch else N * c + sum(loads)
        assert measured == pytest.approx(law, rel=0.15), case
    source.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"resident": 0}, r"resident=0: must lie in 1\.\.95"),
        ({"resident": 96}, "all 96 are there without it"),
        ({"policy": "lur"}, "did you mean 'lru'"),
        ({"bytes_per_second": 0}, "bytes_per_second=0"),
    ],
)
def test_what_cannot_be(file, given, words):
    with pytest.raises(ConfigError, match=words):
        offload(made(), file, **given)


def test_the_checkpoint_of_another_model(file, tmp_path):
    with pytest.raises(ConfigError, match=r"w13 \[96, 32, 32\], this model's is \[96, 16, 32\]"):
        offload(made(dataclasses.replace(NET, d_expert=8)), file)
    with pytest.raises(ConfigError, match="has no blocks.3.moe.experts.w13"):
        offload(made(dataclasses.replace(NET, n_layers=4)), file)
    with pytest.raises(StorageError, match="does not exist"):
        offload(made(), tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StorageError, match="cut or altered"):
        offload(made(), cut)


def test_the_folder_of_several_ranks(tmp_path):
    """As two ranks write it: halves of the experts, and of an embedding, in files of their own."""
    model, folder = made(), tmp_path / "step=000000.safetensors"
    tree, files = {}, {f"rank-000{rank}-0000.safetensors": ({}, {}) for rank in (0, 1)}
    for name, weight in model.state_dict().items():
        place = f"/state_dict/model.{name}"
        tree[f"model.{name}"] = weight
        if ".experts." in name or name == "embedding.weight":
            tree[f"model.{name}"] = Sharded(place, tuple(weight.shape), "float32")
            for half, first, (tensors, boxes) in zip(weight.chunk(2), (0, len(weight) // 2), files.values(), strict=True):
                tensors[place], boxes[place] = half, ((first, *[0] * (weight.dim() - 1)), tuple(half.shape))
    for file, (tensors, _) in files.items():
        write_checkpoint(folder / file, tensors)
    write_checkpoint(folder / REST, {"tree": {"state_dict": tree}, "files": {f: boxes for f, (_, boxes) in files.items()}})
    with torch.device("meta"):
        found = Transformer(NET).eval()
    offload(found, folder)
    assert torch.equal(greedy(found)[1], greedy(model)[1])


def test_an_error_of_the_loader_is_raised(file):
    model = made()
    source = offload(model, file, prefetch=False)
    source.files.pieces.clear()
    with pytest.raises(KeyError), torch.inference_mode():
        model(PROMPT[None])


# ------------------------------------------------------------------------------------------------------------- a run


def test_a_run_with_few_experts_in_memory(finished, monkeypatch):
    """`Trained(run, resident=2)` writes what `Trained(run)` writes."""
    monkeypatch.chdir(finished)
    whole, few = Trained("run"), Trained("run", resident=2)
    assert whole.offloaded is None and few.offloaded.held_bytes * 4 == few.offloaded.expert_bytes
    assert few.model.k_per_layer == whole.model.k_per_layer
    for options in ({"temperature": 0}, {"seed": 3}):
        texts = ["".join(trained.continue_text("def rule", 40, **options)) for trained in (whole, few)]
        assert texts[0] == texts[1]
    assert all(isinstance(block.moe.experts, Offloaded) for block in few.model.blocks)


def test_generate_with_a_twelfth_of_96_experts(place, capsys):
    """`sigma-lite generate --resident 8`: the same text, and what was held, hit, read and waited for is said."""
    tiny.write_config(place, model__net__n_experts=96, trainer__max_steps=2, trainer__val_check_interval=2)
    cli.main(["fit", "-c", "tiny.yaml"])
    capsys.readouterr()
    for resident in ([], ["--resident", "8"]):
        cli.main(["generate", "run", "--prompt", "def rule", "--max-new-tokens", "40", "--temperature", "0", *resident])
    written, said = capsys.readouterr()
    whole, few = written[: len(written) // 2], written[len(written) // 2 :]
    assert whole == few and len(whole) > 20
    found = re.search(
        r"0\.1 of (\S+) MB of experts held \(8\.3%\), (\d+)% of (\d+) experts there .* (\S+) MB read, \S+ s waited", said
    )
    assert found and float(found[1]) == pytest.approx(2 * 96 * 3 * 32 * 16 * 4 / 1e6, abs=0.05)
    assert 0 < int(found[2]) < 100 and int(found[3]) >= 80 and float(found[4]) > 0


def test_a_damaged_run_is_passed_over_as_ever(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    newest = newest_checkpoint("run")
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    assert Trained("run", resident=2).step < int(newest.stem[5:])
    assert "cut or altered, so" in capsys.readouterr().err


def test_a_name_that_cannot_be_mapped(file, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    shutil.copy(file, odd)
    with pytest.raises(StorageError, match="not UTF-8"):
        offload(made(), odd)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_the_process(tmp_path):
    """What the system counts as this process's own grows by far less than the experts have: 8 of 96 of 113 MB."""
    code = f"""
import sys, torch
from sigma_lite.model import Transformer
from sigma_lite.serve.generate import sample
from sigma_lite.serve.weights import offload
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
from test_offloaded import NET, keep
import dataclasses
net = dataclasses.replace(NET, d_model=256, d_expert=128)
def own(): return next(int(l.split()[1]) / 1e3 for l in open("/proc/self/status") if l.startswith("RssAnon"))
if sys.argv[1] == "write":
    keep(Transformer(net), {str(tmp_path / "kept.safetensors")!r})
else:
    with torch.device("meta"):
        model = Transformer(net).eval()
    before = own()
    source = offload(model, {str(tmp_path / "kept.safetensors")!r})
    tokens = list(sample(model, torch.arange(40), max_new_tokens=20, temperature=0))
    print(own() - before, source.expert_bytes / 1e6)
"""
    for word in ("write", "read"):
        done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    grown, whole = map(float, done.stdout.split())
    print(grown, whole)
    assert whole > 110 and grown < whole / 3
