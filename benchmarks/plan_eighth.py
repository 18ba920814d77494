"""An eighth of Sigma-MoE-Tiny's depth at its full width takes a step on every mesh of four CPU processes.

Seven layers of 96 experts, width 1,536, vocabulary 151,936: 2.65 B parameters. In fp32 with AdamW that is 40 GiB. So that it
fits a machine with 20 GiB, numbers and sums are bf16, plain SGD uses each gradient as it comes and lets it go, and the rows
are few and short. Layout, exchange, losses and initialisation are those of `sigma-lite fit`: on several ranks no process
ever holds the whole model. bf16 sums in another order send some tokens to another expert, so meshes agree roughly.
Writes results/bench/plan_eighth-MACHINE.json after each mesh, and keeps what other meshes have left there.

    python benchmarks/plan_eighth.py [--mesh 1x1 4x4 4x2 4x1] [--narrow] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plan_memory import Batch, batch, on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from sigma_lite.data.rows import together
from sigma_lite.model import transformer
from sigma_lite.runfile import RunConfig, load_run
from sigma_lite.scale import shard as sharding
from sigma_lite.scale.cluster import load_cluster
from sigma_lite.scale.layout import Layout
from sigma_lite.scale.memory import memory
from sigma_lite.storage import write_json
from sigma_lite.train.module import SigmaLit
from sigma_lite.train.provenance import device_name

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "scaled_configs"
ROWS, LENGTH, RATE, SEED = 4, 32, 0.5, 7
MESHES = ("1x1", "4x4", "4x2", "4x1")  # ranks x of them along the expert axis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mesh", nargs="+", choices=(*MESHES, "2x2", "2x1"), default=list(MESHES))
    parser.add_argument("--narrow", action="store_true", help="an eighth of the width too, to try the script out")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    overlays = ["eighth", "narrow"] if options.narrow else ["eighth"]
    run = load_run([CONFIGS / "sigma_moe_tiny.yaml", *(CONFIGS / "overlays" / f"{o}.yaml" for o in overlays)], changes())
    out = options.out or ROOT / "results" / "bench" / f"plan_eighth-{platform.machine()}-{os.cpu_count()}cpu.json"
    meshes = json.loads(out.read_text("utf-8"))["meshes"] if out.exists() else {}
    for mesh in options.mesh:
        meshes[mesh] = measured(run, *map(int, mesh.split("x")))
        print(mesh, json.dumps(meshes[mesh]), flush=True)
        write_json(out, facts(run) | {"meshes": meshes})
    print(f"written to {out}")


def changes() -> dict:
    trainer = {"precision": "bf16-true", "accelerator": "cpu", "num_nodes": 1, "devices": 4, "strategy": None}
    return {"trainer": trainer, "data": {"rows": {"length": LENGTH, "per_step": ROWS, "per_micro": 1}}}


def facts(run: RunConfig) -> dict:
    return {
        "what": "an SGD step in bf16 of seven layers of Sigma-MoE-Tiny on each mesh; loss before and after, same rows",
        "machine": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "parameters": run.net.ledger().total,
        "k": list(run.sparsity.head),
        "tokens": ROWS * LENGTH,
        "rate": RATE,
    }


def measured(run: RunConfig, ranks: int, expert_ranks: int) -> dict:
    folder = ROOT / "runs" / "eighth"
    folder.mkdir(parents=True, exist_ok=True)
    on_ranks(ranks, lambda: work(run, ranks, expert_ranks, folder))
    found = [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(ranks)]
    assert all(f["grad_norm"] == found[0]["grad_norm"] for f in found)
    return found[0] | {
        "resident_gib_per_rank": [f["resident_gib"] for f in found],
        "planned_gib_per_rank": round(planned(run, ranks, expert_ranks) / 2**30, 2),
    }


def planned(run: RunConfig, ranks: int, expert_ranks: int) -> int:
    """What the planner says, without the moments that SGD has not and the gradients that it does not keep."""
    layout = Layout(ranks, expert_ranks, ROWS // ranks, sharded=ranks > 1)
    items = memory(run, layout, load_cluster("laptop"), run.sparsity.head)
    return sum(size for name, size in items.items() if name not in ("gradients", "adamw_moments"))


def work(run: RunConfig, ranks: int, expert_ranks: int, folder: Path) -> int:
    """One rank's step. Writes its facts; returns its largest resident set."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # of all processes on the machine, end this one first
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if ranks > 1:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), ranks, rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    transformer.cross_entropy = whole_cross_entropy
    started = time.monotonic()
    module, norms = model(run, ranks, expert_ranks)
    built = time.monotonic()
    rows = own_rows(run, rank, ranks)
    before = module.training_step(rows, 0)
    before["loss"].backward()
    stepped, module.pooled = time.monotonic(), type(module.pooled)()
    with torch.no_grad():
        after = module.training_step(rows, 0)
    found = {
        "loss": mean(before["loss"], ranks),
        "terms": {name: mean(term, ranks) for name, term in before["terms"].items()},
        "loss_after": mean(after["loss"], ranks),
        "grad_norm": math.sqrt(sum(sizes := sums(norms, ranks))),
        "grad_norms": {name: round(math.sqrt(size), 5) for name, size in zip(sorted(norms), sizes, strict=True)},
        "seconds": {"build": round(built - started, 1), "step": round(stepped - built, 1)},
        "resident_gib": round(resident() / 2**30, 2),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    return resident()


def model(run: RunConfig, ranks: int, expert_ranks: int) -> tuple[SigmaLit, dict[str, Tensor]]:
    """The module, laid out, and where the squares of its gradients' norms will be, by kind of parameter."""
    torch.manual_seed(SEED)
    module = SigmaLit(run.net, run.sparsity, run.balance, run.optim)
    module.log = lambda *_, **__: None
    with torch.device("meta"):
        module.configure_model()
    net = module.model
    for name, parameter in list(net.named_parameters()):  # not buffers: the routers' biases stay fp32
        owner = net.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(parameter.to(torch.bfloat16)))
    net.head.weight = net.embedding.weight
    if ranks == 1:
        net.to_empty(device="cpu")
        net.head.weight = net.embedding.weight
        net.reset_parameters()
        net.set_bias(torch.zeros(run.net.n_layers, run.net.n_experts))
    else:
        sharding.MixedPrecisionPolicy = lambda *_, **__: MixedPrecisionPolicy(None, None, cast_forward_inputs=False)
        sharding.shard(net, sharding.make_mesh("cpu", ranks, expert_ranks))
        for block in net.blocks:
            block.set_modules_to_backward_prefetch([block])  # not the next one: memory is what is short here
            block.moe.experts.set_modules_to_backward_prefetch([block.moe.experts])
    net.set_k(module.k_at(0))
    norms: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        kind = re.sub(r"blocks\.\d+\.", "", name)
        norms.setdefault(kind, torch.zeros((), dtype=torch.float64))
        parameter.register_post_accumulate_grad_hook(lambda p, kind=kind: descend(p, norms[kind]))
    return module, norms


def whole_cross_entropy(x_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """For a head of 0.43 GiB in bf16, torch's chunked one takes 4.1 GiB on a CPU; for few tokens all logits are little."""
    return F.cross_entropy(F.linear(x_TD, head_VD).float(), targets_T)


@torch.no_grad()
def descend(parameter: nn.Parameter, square: Tensor) -> None:
    """Take a step along this gradient and let it go."""
    grad = local(parameter.grad)
    for piece in grad.flatten().split(1 << 22):
        square += piece.float().square().sum(dtype=torch.float64)
    local(parameter).add_(grad, alpha=-RATE)
    parameter.grad = None


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def own_rows(run: RunConfig, rank: int, ranks: int) -> Batch:
    """This rank's part of rows that are the same in every layout."""
    torch.manual_seed(SEED)
    rows, each = [batch(run) for _ in range(ROWS)], ROWS // ranks
    return together(rows[rank * each : (rank + 1) * each])


def mean(value: Tensor, ranks: int) -> float:
    return round(float(sums({"": value.detach()}, ranks)[0]) / ranks, 6)


def sums(values: dict[str, Tensor], ranks: int) -> list[float]:
    """Over all ranks, by name."""
    total = torch.stack([values[name].double() for name in sorted(values)])
    if ranks > 1:
        dist.all_reduce(total)
    return total.tolist()


def resident() -> int:
    """Most bytes of memory that this process has held, by the kernel's count."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[1]) * 1024


if __name__ == "__main__":
    main()
