"""A trained model whose experts are elsewhere: hit rates of its traces, time and bytes with 8 of 96 resident, the ring's
law, and what a draft brings. Texts are this package's own sources, on which no run was trained.

    python benchmarks/offload.py --model NAME_OR_RUN --draft NAME_OR_RUN [--out FILE]

Some 4 core-minutes for the toy, by the recorded times of its parts; times are worth something only on a machine without
other work. Recorded with scaled_configs/toy.yaml at 500 steps and switch_step 300, and as a draft the same with one layer of
one expert: d_model 64, d_expert 128, one head, sparsity.head [].
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from chosen import add_model, folder_of, said, with_checkpoint

from sigma_lite.checkpoint import newest_checkpoint
from sigma_lite.model import KeyValueCache
from sigma_lite.papers.se_moe import RingOfLayers, ring_seconds
from sigma_lite.runfile import load_run
from sigma_lite.scale.decode import distinct_experts, reads, share_to_accept, speculative_gain
from sigma_lite.serve.expert_cache import LFU, LRU, Clairvoyant, hit_rate
from sigma_lite.serve.speculative import speculate
from sigma_lite.serve.trained import Trained
from sigma_lite.serve.weights import offload
from sigma_lite.storage import write_json
from sigma_lite.train.provenance import device_name, git_commit

ROOT = Path(__file__).parents[1]
LENGTH, ROWS, WRITTEN = 256, 16, 120
SLOTS, WINDOWS, DRAFTED = (1, 4, 8, 16, 32, 48), (2, 4, 8, 16, 32, 64, 96, 256), (1, 2, 4, 8)
SLOW = 20e6  # bytes per second: an expert of the toy then takes 5 ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model(parser, text=False)
    parser.add_argument("--draft", type=folder_of, required=True, metavar="NAME_OR_RUN", help="a small model, same tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = with_checkpoint(options.model)
    trained, draft = Trained(run), Trained(options.draft)
    text = "\n\n".join(path.read_text("utf-8") for path in sorted((ROOT / "sigma_lite/model").glob("*.py")))
    ids = torch.tensor(trained.tokenizer.encode(text).ids[: ROWS * LENGTH]).view(ROWS, LENGTH)
    traces, chosen = routed(trained, ids)
    facts: dict[str, Any] = {
        "what": " ".join(__doc__.split("\n\n")[0].split()),
        "command": f"python benchmarks/offload.py --model {said(options.model)} --draft {said(options.draft)}",
        "device": device_name(torch.device("cpu")),
        "commit": git_commit(),
        "model": f"{trained.model.config.n_layers} layers of {trained.model.config.n_experts} experts, step {trained.step},"
        f" {ids.numel()} tokens of text",
        "distinct_experts": {t: distinct(chosen, t, trained.model.config.n_experts) for t in WINDOWS},
        "hit_rate": {slots: rates(traces, slots) for slots in SLOTS},
        "generation": generation(run, ids),
        "ring": ring(run, ids),
        "reads": weights_read(),
        "speculation": speculation(trained, draft, ids),
    }
    print(json.dumps(facts, indent=1))
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    write_json(options.out or ROOT / "results" / "bench" / f"offload-{machine}.json", facts)


@torch.inference_mode()
def routed(trained: Trained, ids_BS: torch.Tensor) -> tuple[list[list[list[int]]], list[torch.Tensor]]:
    """Of each layer: its trace, token by token, and the experts [B, S]."""
    chosen = [routing.ids[:, 0].view(ids_BS.shape) for routing in trained.model(ids_BS).routings]
    return [[[expert] for expert in layer.flatten().tolist()] for layer in chosen], chosen


def distinct(chosen: list[torch.Tensor], t: int, E: int) -> dict[str, Any]:
    """Experts that t neighbouring tokens touch, and as many tokens taken at random, beside N(t)."""
    shuffle = torch.randperm(chosen[0].numel(), generator=torch.Generator().manual_seed(0))
    found = {"law": distinct_experts(E, 1, t)}
    for name, order in (("neighbours", torch.arange(len(shuffle))), ("shuffled", shuffle)):
        per_layer = [[len(part.unique()) for part in layer.flatten()[order].split(t)] for layer in chosen]
        found[name] = [round(sum(counts) / len(counts), 2) for counts in per_layer]
    return found


def rates(traces: list[list[list[int]]], slots: int) -> dict[str, list[float]]:
    """Of each layer: LRU, LFU, and who knows the future."""
    return {
        "lru": [round(hit_rate(trace, slots, LRU()), 3) for trace in traces],
        "lfu": [round(hit_rate(trace, slots, LFU()), 3) for trace in traces],
        "best possible": [round(hit_rate(trace, slots, Clairvoyant(trace)), 3) for trace in traces],
    }


@torch.inference_mode()
def write(trained: Trained, ids_S: torch.Tensor) -> tuple[list[int], float]:
    """Read a text token by token, as if it had been sampled: (what the model would have said, seconds)."""
    cache, said = [KeyValueCache() for _ in trained.model.blocks], []
    begun = time.perf_counter()
    for token in ids_S:
        said.append(int(trained.model(token.view(1, 1), cache=cache).logits[0, -1].argmax()))
    return said, time.perf_counter() - begun


def generation(run: Path, ids_BS: torch.Tensor) -> dict[str, Any]:
    """One token after another with all experts in memory, and with 8 of 96, as fast as it goes and from a slow disk.

    All cases in turn, three times over; tokens a second are the best of three, the rest is over all.
    """
    whole, tokens = Trained(run), ids_BS.flatten()[:160]
    cases = {f"{policy}{', guesses' * guess}{', 20 MB/s' * bool(rate)}": (policy, guess, rate)
             for rate in (None, SLOW) for policy in ("lru", "lfu") for guess in (False, True)}  # fmt: skip
    models, sources = {"all resident": whole}, {}
    for name, (policy, guess, rate) in cases.items():
        models[name], file = Trained(run), newest_checkpoint(run)
        sources[name] = offload(models[name].model, file, policy=policy, prefetch=guess, bytes_per_second=rate)
    rounds = [{name: write(model, tokens) for name, model in models.items()} for _ in range(3)]
    found = {name: {"tokens_per_s": round(len(tokens) / min(r[name][1] for r in rounds), 1)} for name in models}
    for name, source in sources.items():
        c, written = source.counts, len(rounds) * len(tokens)
        found[name] |= {
            "same tokens": all(r[name][0] == r["all resident"][0] for r in rounds),
            "there, or on its way": round(c.hit_rate, 3),
            "by a right guess": round(c.guessed / c.asked, 3),
            "right guesses of those read": round(c.guessed / c.guesses, 3) if c.guesses else None,
            "bytes_per_token": round(c.moved_bytes / written),
            "waited_ms_per_token": round(1000 * c.waited_s / written, 2),
            "held_share": source.held_bytes / source.expert_bytes,
        }
        source.close()
    return found


@torch.inference_mode()
def ring(run: Path, ids_BS: torch.Tensor) -> list[dict[str, Any]]:
    """A pass over 4 rows with real computing, from disks that need a third and three times its time a layer.

    In each of eleven rounds a pass with all experts in memory gives the law its computing time, and the last of four passes
    of the ring is measured: the first three empty what was filled before. `off` is the median of the rounds.
    """
    ids_BS, spent, found, many = ids_BS[:4], [], [], 50
    whole = Trained(run).model
    N = len(whole.blocks)
    for block in whole.blocks:
        block.moe.experts.register_forward_pre_hook(lambda *_: spent.append(-time.perf_counter()))
        block.moe.experts.register_forward_hook(lambda *_: spent.append(time.perf_counter()))
    usual = statistics.median(passes(whole, ids_BS, 11)) / N
    for seconds in (usual / 3, usual * 3):
        for slots in (1, 2, 4):
            model = Trained(run).model
            layer_bytes = whole.config.ledger().experts * 4 / N
            source = RingOfLayers(model, newest_checkpoint(run), slots, layer_bytes / seconds)
            rounds = []
            for _ in range(11):
                spent.clear()
                compute, experts = passes(whole, ids_BS, 1)[0] / N, sum(spent) / N
                measured = passes(model, ids_BS, 4)[-1]
                each = [[one] * N * many for one in (experts, seconds, compute - experts)]
                rounds.append(
                    (measured / (ring_seconds(each[0], each[1], slots, each[2]) / many) - 1, measured, N * compute)
                )
            source.ring.close()
            off, measured, compute = (round(statistics.median(column), 4) for column in zip(*rounds, strict=True))
            row = {"load / compute": round(N * seconds / compute, 2), "slots": slots, "off": off}
            row |= {"held": source.held_bytes / source.expert_bytes, "compute_s": compute, "measured_s": measured}
            found.append(row)
    return found


def passes(model: torch.nn.Module, ids_BS: torch.Tensor, count: int) -> list[float]:
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        model(ids_BS)
        times.append(time.perf_counter() - begun)
    return times


def weights_read() -> dict[str, Any]:
    """Of Sigma-MoE-Tiny: parameters that a step reads for each token of a batch, in millions; a dense model reads all."""
    net = load_run([ROOT / "scaled_configs" / "sigma_moe_tiny.yaml"]).net
    found = {batch: round(reads(net, batch).all / batch / 1e6, 1) for batch in (1, 4, 16, 64, 256, 1024)}
    gains = {f"{n} drafted": {f"a = {a}": round(speculative_gain(net, a, n), 2) for a in (0.5, 0.7, 0.9)} for n in DRAFTED}
    needed = {f"{n} drafted": round(share_to_accept(net, n), 3) for n in DRAFTED}
    return {"million_per_token": found, "gain of a free draft": gains, "share of guesses that must be right": needed}


def speculation(trained: Trained, draft: Trained, ids_BS: torch.Tensor) -> list[dict[str, Any]]:
    """Real continuations of 6 texts: tokens a pass, weights read a token beside the law, and seconds."""
    net, found, alone = trained.model.config, [], None
    expert = net.ledger().experts / (net.n_layers * net.n_experts)
    shared, its = reads(net).shared, draft.model.config.ledger()
    its_reads = its.non_embedding + draft.model.config.vocab_size * draft.model.config.d_model
    for drafted in (0, *DRAFTED):
        begun = time.perf_counter()
        made = [
            speculate(
                trained.model, draft.model if drafted else None, row[:64], max_new_tokens=WRITTEN, drafted=drafted or 1
            )
            for row in ids_BS[:6]
        ]
        seconds = time.perf_counter() - begun
        tokens, rounds = sum(len(m.tokens) for m in made), sum(m.rounds for m in made)
        accepted, checked = sum(m.accepted for m in made), sum(m.checked for m in made)
        read = rounds * shared + sum(m.experts for m in made) * expert + sum(m.drafted for m in made) * its_reads
        alone = alone or {"tokens": [m.tokens for m in made], "read": read / tokens, "seconds": seconds}
        a = accepted / max(checked, 1)
        found.append({
            "drafted": drafted,
            "same tokens": [m.tokens for m in made] == alone["tokens"],
            "acceptance": round(a, 3),
            "tokens a pass": round(tokens / rounds, 2),
            "gain in weights read": round(alone["read"] / (read / tokens), 3),
            "gain by the law": round(speculative_gain(net, a, drafted, its_reads), 3) if drafted else 1.0,
            "gain in seconds": round(alone["seconds"] / seconds, 3),
        })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
