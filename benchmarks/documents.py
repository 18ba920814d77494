"""Attention inside documents: what a table of who may look at whom costs, and what blocks cost, in time and memory.

Both ways of model/documents.py that run on a CPU, forward and backward: one call of attention, and one whole layer
(attention and 96 experts, K = 1) that also makes the table or the cut. One row of S tokens; its documents are one of S, or
all of one length, or of drawn lengths as text has them. Each way has a process of its own; both are timed in each round, in
random order, and refused where their results or gradients differ. Seconds are of the CPU; memory is the most that torch's
allocator had given out at one time, exact to the byte, table included, inputs and weights left out. Writes
results/bench/documents-MACHINE.json.

    python benchmarks/documents.py [--rounds 15] [--lengths 1024 2048 4096] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import Elsewhere, interleave, summary
from torch import Tensor

from sigma_lite.config import PIECE, ModelConfig
from sigma_lite.model.attention import Allowed, attend, attention_mask
from sigma_lite.model.block import Block
from sigma_lite.model.documents import pieces
from sigma_lite.model.rotary import rotation
from sigma_lite.model.weights import fill, weight_of
from sigma_lite.scale.measure import largest
from sigma_lite.storage import write_json
from sigma_lite.train.memory import keep_freed_memory
from sigma_lite.train.provenance import device_name, git_commit

NET = ModelConfig(n_layers=1, d_model=256, n_heads=4, n_kv_heads=2, head_dim=64, n_experts=96, d_expert=64, top_k=1)
SHAPE = ("d_model", "n_heads", "n_kv_heads", "head_dim", "n_experts", "d_expert")
WAYS = {"masked": lambda docs_BS: attention_mask(*[docs_BS.shape[1]] * 2, docs_BS, docs_BS.device), "blocks": pieces}
SCOPES = ("attention", "layer")
TEXT = "drawn, mean 512"
DOCUMENTS = ("one", "each of 1024", "each of 256", "each of 32", TEXT)
MEMORY = -1  # a case's number times this, minus 1, asks for its bytes instead of running it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], metavar="S")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    every = itertools.product(SCOPES, options.lengths, DOCUMENTS)
    cases = [case for case in every if str(case[1]) not in case[2]]  # "each of S" is "one"
    before = os.getloadavg()
    ways = {way: Elsewhere(variant, way, cases) for way in WAYS}
    results: dict[str, dict] = {scope: {f"S = {length}": {} for length in options.lengths} for scope in SCOPES}
    for number, (scope, length, kind) in enumerate(cases):
        results[scope][f"S = {length}"][kind] = found = compare(ways, number, options.rounds)
        print(f"{scope:10s} S = {length}, {kind:16s}", *(f"{name} {value}" for name, value in found["times_blocks"].items()))
    for way in ways.values():
        way.close()
    facts = {
        "what": __doc__.split("\n")[0],
        "command": f"python benchmarks/documents.py --rounds {options.rounds}",
        "net": {name: getattr(NET, name) for name in SHAPE},
        "piece": PIECE,
        "machine": device_name(torch.device("cpu")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": git_commit(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "rounds": options.rounds,
        "results": results,
    }
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    out = options.out or Path(__file__).parents[1] / "results" / "bench" / f"documents-{machine}.json"
    write_json(out, facts)
    print(f"written to {out}")


def compare(ways: dict[str, Elsewhere], number: int, rounds: int) -> dict:
    """CPU seconds and bytes of both ways for one case, and the table's as multiples of the blocks'."""
    first = {name: way(number)[1] for name, way in ways.items()}
    torch.testing.assert_close(torch.tensor(first["blocks"]), torch.tensor(first["masked"]), rtol=1e-5, atol=1e-6)
    seconds = interleave({name: lambda _, way=way: way(number) for name, way in ways.items()}, rounds)
    found = {name: summary(spent, seconds["blocks"]) for name, spent in seconds.items()}
    size = {name: way(MEMORY * number - 1)[1] for name, way in ways.items()}
    times = {"seconds": found["masked"]["times_ours"], "interval_95": found["masked"]["times_ours_95"]}
    kept = ("median_s", "min_s", "wall_median_s")
    return {
        **{name: {key: found[name][key] for key in kept} | {"peak_bytes": size[name]} for name in ways},
        "times_blocks": {**times, "bytes": round(size["masked"] / size["blocks"], 3)},
    }


def variant(way: str, cases: list[tuple[str, int, str]]) -> Callable[[int], object]:
    """Runs case `number` and returns what must agree, or measures its bytes: see MEMORY."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as `sigma-lite fit` does
    made = {"attention": one_call, "layer": one_layer}
    runs = [made[scope](way, documents(length, kind)) for scope, length, kind in cases]
    return lambda number: runs[number]() if number >= 0 else largest(lambda: runs[-number - 1](fresh=True))


def documents(length: int, kind: str) -> Tensor:
    """Numbers of the documents of one row, int64 [1, S]."""
    if kind == TEXT:
        draw, lengths = random.Random(length), []
        while sum(lengths) < length:
            lengths.append(1 + int(draw.expovariate(1 / 511)))
    else:
        each = length if kind == "one" else int(kind.split()[-1])
        lengths = [each] * -(-length // each)
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None, :length]


def one_call(way: str, docs_BS: Tensor) -> Callable[..., list[float]]:
    """Attention alone; who may look at whom is known, as for all layers but the first, unless it shall be `fresh`."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, docs_BS.shape[1], NET.head_dim) for h in (NET.n_heads, NET.n_kv_heads, NET.n_kv_heads))
    dout, known = torch.randn_like(q), WAYS[way](docs_BS)

    def run(fresh: bool = False) -> list[float]:
        allowed: Allowed = WAYS[way](docs_BS) if fresh else known
        return step(lambda *inputs: attend(*inputs, allowed), (q, k, v), dout)

    return run


def one_layer(way: str, docs_BS: Tensor) -> Callable[..., list[float]]:
    """Attention and experts, as a model of one layer has them."""
    torch.manual_seed(0)
    block, S = Block(NET), docs_BS.shape[1]
    for name, weight in block.named_parameters():
        fill(weight, weight_of(block, name), name)
    x, dout = torch.randn(2, 1, S, NET.d_model)
    turn = rotation(torch.arange(S), NET.head_dim, NET.rope_theta, NET.rope_scaling)

    def forward(x_BSD: Tensor, *weights: Tensor) -> Tensor:
        return block(x_BSD, turn, WAYS[way](docs_BS))[0]

    return lambda fresh=True: step(forward, (x, *block.parameters()), dout)


def step(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> list[float]:
    """Forward and backward; what must be the same in both ways: the output's sum with the gradient, and norms."""
    inputs = tuple(t if isinstance(t, torch.nn.Parameter) else t.detach().requires_grad_() for t in inputs)
    out = forward(*inputs)
    grads = torch.autograd.grad(out, inputs, dout)
    return [float((out.detach() * dout).sum() / dout.numel() ** 0.5), *(float(g.norm()) for g in grads[:3])]


if __name__ == "__main__":
    main()
