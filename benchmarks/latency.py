"""Experts of two sizes on this machine: what a token costs in each, and when the last is done under two balance losses.

Half of 16 experts are narrow, or narrow and made of powers of two. The cost of a token in either kind is measured; free
logits then follow the usual LBL and the one that knows the costs (sigma_lite/papers/latency.py), and every expert is timed
with the tokens that it got, each as if it had a device of its own. Times are of one CPU thread, the shortest of several
passes. Writes results/bench/latency-MACHINE.json. Some 20 seconds of CPU time.

    python benchmarks/latency.py [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from sigma_lite.balance.balancer import Balancer, GlobalLBL
from sigma_lite.balance.losses import expert_counts, load_share
from sigma_lite.config import ModelConfig
from sigma_lite.model import Routing
from sigma_lite.model.experts import Experts
from sigma_lite.papers.latency import LatencyLBL, ShiftExperts, makespan, per_expert
from sigma_lite.storage import write_json
from sigma_lite.train.provenance import device_name, git_commit

D, E, WIDE, TOKENS, SEEDS = 128, 16, 512, 4096, (0, 1, 2)
NARROW = ((Experts, 256), (Experts, 128), (ShiftExperts, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [case(*narrow, seed) for narrow in NARROW for seed in SEEDS]
    facts = {
        "what": " ".join(__doc__.split("\n\n")[0].split()),
        "command": "python benchmarks/latency.py",
        "device": device_name(torch.device("cpu")),
        "commit": git_commit(),
        "experts": f"{E}, of width {WIDE} or narrow, d_model {D}, {TOKENS} tokens, K = 1",
        "cases": cases,
    }
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    write_json(options.out or Path(__file__).parents[1] / "results" / "bench" / f"latency-{machine}.json", facts)


def case(kind: type[Experts], width: int, seed: int) -> dict:
    """Costs in microseconds a token, and of both balances the narrow kind's share, and the last expert's milliseconds."""
    torch.manual_seed(seed)
    experts = []
    for of, F in ((Experts, WIDE), (kind, width)):
        net = dict(vocab_size=64, n_layers=1, d_model=D, n_heads=2, n_kv_heads=1, head_dim=64)
        experts.append(of(ModelConfig(**net, n_experts=E // 2, d_expert=F)))
        for weight in experts[-1].parameters():
            torch.nn.init.normal_(weight, std=0.05)
    share = TOKENS // E
    latency = [seconds(experts, expert, share, passes=30) / share for expert in (0, E - 1)]
    found = {"narrow": f"{kind.__name__}, width {width}", "seed": seed}
    found["microseconds_per_token"] = [round(1e6 * s, 3) for s in latency]
    found["share_of_the_narrow_by_the_law"] = round(latency[0] / sum(latency), 4)
    for name, balancer in (("even", GlobalLBL()), ("aware", LatencyLBL(latency))):
        counts_E = balanced(balancer, seed)
        alone = [seconds(experts, expert, int(n)) for expert, n in enumerate(counts_E)]
        predicted = makespan(counts_E, per_expert(latency, E))
        found[name] = {
            "share_of_the_narrow": round(float(counts_E[E // 2 :].sum() / TOKENS), 4),
            "last_ms_predicted": round(1e3 * predicted, 3),
            "last_ms": round(1e3 * max(alone), 3),
        }
    print(found)
    return found


def balanced(balancer: Balancer, seed: int) -> Tensor:
    """Tokens of each expert after the offsets of free logits have followed a loss, [E]."""
    logits_TE = torch.randn(TOKENS, E, generator=torch.Generator().manual_seed(seed))
    shift_E = torch.zeros(E, requires_grad=True)
    optimizer = torch.optim.SGD([shift_E], lr=0.2)
    for _ in range(300):
        z = logits_TE + shift_E
        probs, ids = z.softmax(-1), z.argmax(-1, keepdim=True)
        optimizer.zero_grad()
        balancer.loss(Routing(probs, ids, probs.gather(1, ids), z), load_share(expert_counts(ids, E))).backward()
        optimizer.step()
    return expert_counts((logits_TE + shift_E).argmax(-1, keepdim=True), E)


@torch.no_grad()
def seconds(experts: list[Experts], expert: int, tokens: int, passes: int = 15) -> float:
    """CPU time of the shortest pass of this expert over so many tokens."""
    kind, number = experts[expert * 2 // E], expert % (E // 2)
    x_TD, ids_T1, took = torch.randn(tokens, D), torch.full((tokens, 1), number), []
    for _ in range(passes):
        begun = time.process_time()
        kind(x_TD, ids_T1, torch.ones(tokens, 1))
        took.append(time.process_time() - begun)
    return min(took)


if __name__ == "__main__":
    main()
