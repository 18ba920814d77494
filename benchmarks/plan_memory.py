"""The planner's memory against the bytes that training really allocates, on a CPU.

Each case trains three optimizer steps with Lightning, as `sigma-lite fit` does. `torch.profiler` records every block that
torch's CPU allocator hands out and takes back; the largest sum is the peak, exact to the byte and the same every time.
It covers tensors: not Python, not code, not what the operating system keeps. Saved activations are measured apart, by
`torch.autograd.graph.saved_tensors_hooks`: unique storages, weights left out.
Writes results/bench/plan_memory-MACHINE.json.

    python benchmarks/plan_memory.py [--case NAME ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import platform
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch

from sigma_lite.config import ConfigError
from sigma_lite.data.rows import Batch
from sigma_lite.runfile import RunConfig, load_run
from sigma_lite.scale.cluster import load_cluster
from sigma_lite.scale.layout import STRATEGY, layout_of, place
from sigma_lite.scale.measure import kept_for_backward, largest
from sigma_lite.scale.memory import memory, peak
from sigma_lite.scale.strategy import ExpertParallel
from sigma_lite.storage import write_json
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.provenance import device_name

ROOT = Path(__file__).parents[1]
TOY = ROOT / "scaled_configs" / "toy.yaml"
STEPS = 3


def parallel(ranks: int, **args: object) -> dict:
    return {"devices": ranks, "strategy": {"class_path": STRATEGY, "init_args": args}}


CASES: dict[str, dict] = {
    "toy, K = [8, 6, 4, 2]": {},
    "toy, K = 1": {"model": {"sparsity": {"head": [], "switch_step": 0}}},
    "8 layers, K = [8, 8, 6, 6, 4, 4, 2, 2]": {
        "model": {"net": {"n_layers": 8, "n_experts": 32}, "sparsity": {"head": [8, 8, 6, 6, 4, 4, 2, 2]}}
    },
    "long rows": {"data": {"rows": {"length": 1024, "per_step": 4, "per_micro": 4}}},
    "large vocabulary": {"model": {"net": {"vocab_size": 32_000}}},
    "wide, two micro-batches": {
        "model": {"net": {"d_model": 256, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32, "d_expert": 128, "n_experts": 16}},
        "data": {"rows": {"per_step": 16}},
    },
    "toy, bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "two ranks, experts shared out": {"trainer": parallel(2, expert_parallel=2), "data": {"rows": {"per_micro": 4}}},
    "two ranks, experts gathered, recompute": {
        "trainer": parallel(2, expert_parallel=1, recompute=True),
        "data": {"rows": {"per_micro": 4}},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results = {name: compare(load_run([TOY], CASES[name])) for name in options.case}
    facts = {
        "what": "bytes of torch's CPU allocator at the fullest moment of training, and what `sigma-lite plan` says",
        "machine": device_name(torch.device("cpu")),
        "versions": {"torch": torch.__version__, "lightning": pl.__version__},
        "results": results,
    }
    out = options.out or ROOT / "results" / "bench" / f"plan_memory-{platform.machine()}-{os.cpu_count()}cpu.json"
    write_json(out, facts)
    for name, result in results.items():
        print(f"{name:42s} peak {_ratio(result, 'peak')}   activations {_ratio(result, 'activations')}")
    print(f"written to {out}")


def _ratio(result: dict, what: str) -> str:
    if what not in result["measured"]:
        return "not measured apart"
    planned, measured = result["planned"][what], result["measured"][what]
    return f"{measured / 2**20:8.2f} MiB, planned {planned / measured:6.3f} of it"


def compare(run: RunConfig) -> dict:
    """Bytes planned and measured. Raises ConfigError when the schedule's switch would fall into the measured steps."""
    if 0 < run.sparsity.switch_step < STEPS:
        raise ConfigError(f"switch_step={run.sparsity.switch_step}: leave {STEPS} steps before it")
    module = SigmaLit(run.net, run.sparsity, run.balance, run.optim)
    cluster = place(run, load_cluster("cpu-core"), None)
    layout = dataclasses.replace(layout_of(run, cluster), imbalance=1.0)  # random rows in a fresh model: near balance
    items = memory(run, layout, cluster, module.k_at(0))
    measured = {"peak": on_ranks(layout.devices, lambda: largest(lambda: train(module, run)))}
    if layout.devices == 1:
        module.configure_model()
        module.model.set_k(module.k_at(0))
        measured["activations"] = saved(module, run)
    planned = {"peak": peak(items), "activations": items["activations"], "items": items}
    return {"k": list(module.k_at(0)), "planned": planned, "measured": measured}


def on_ranks(ranks: int, measure: Callable[[], int]) -> int:
    """The largest number that `measure` finds on any of so many processes, which Lightning joins to a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, ranks, measure, group, Path(folder)) for rank in range(ranks)]
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            raise SystemExit(f"a measured process ended with {codes}")
        return max(int((Path(folder) / str(rank)).read_text("utf-8")) for rank in range(ranks))


def _fork(rank: int, ranks: int, measure: Callable[[], int], group: dict[str, str], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {**group, "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        (folder / str(rank)).write_text(str(measure()))
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def train(module: SigmaLit, run: RunConfig) -> None:
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
    strategy = run.trainer.get("strategy")
    ranks = run.trainer["devices"]
    micros = run.rows.accumulation(ranks)
    trainer = pl.Trainer(
        max_steps=STEPS,
        accumulate_grad_batches=micros,
        accelerator="cpu",
        devices=ranks,
        strategy=ExpertParallel(**strategy["init_args"]) if strategy else "auto",
        precision=run.trainer.get("precision"),
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    batches = (batch(run) for _ in range(STEPS * micros))
    trainer.fit(module, torch.utils.data.DataLoader(Batches(batches, STEPS * micros), batch_size=None))


class Batches(torch.utils.data.IterableDataset):
    def __init__(self, batches, count: int):
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return self.batches


def batch(run: RunConfig) -> Batch:
    """Random rows of two or three documents each."""
    shape = (run.rows.per_micro, run.rows.length)
    ids = torch.randint(run.net.vocab_size, (shape[0], shape[1] + 1))
    documents = (torch.rand(shape) < 2 / shape[1]).cumsum(1)
    nothing = torch.zeros(shape, dtype=torch.uint8)
    whole = torch.zeros(shape[0], dtype=torch.int64)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents, nothing, nothing.int(), whole)


def saved(module: SigmaLit, run: RunConfig) -> int:
    """Bytes that autograd keeps of one forward pass through the layers and the losses on their routing."""
    rows, mixed = batch(run), "mixed" in str(run.trainer.get("precision"))
    module.log = lambda *_, **__: None

    def forward() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return module.training_step(rows, 0)

    return kept_for_backward(forward, [*module.model.state_dict().values(), rows.ids_BS])


if __name__ == "__main__":
    main()
