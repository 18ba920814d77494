"""Do all ranks reach each other, and sum alike? Asked before training, because a broken link shows itself only as waiting.

    srun python -m sigma_lite.scale.preflight        torchrun ... -m sigma_lite.scale.preflight

Every rank sums the same tensor with all others a few times, and the first prints the speed. A rank that does not come, or a
sum that is wrong, ends all of them with one sentence and a non-zero code, after PREFLIGHT_SECONDS (120) at most.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from sigma_lite.config import ConfigError, require

NUMBERS = 2**24  # of fp32 in the tensor on a GPU, 64 MiB; on a CPU a sixteenth
TIMES = 5


def placed(environment: dict[str, str]) -> tuple[int, int, int]:
    """(rank, ranks, rank on this node), as torchrun says it, or SLURM. ConfigError where neither does."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if all(name in environment for name in names):
            rank, ranks, local = (int(environment[name]) for name in names)
            return rank, ranks, local
    raise ConfigError("preflight: neither RANK, WORLD_SIZE, LOCAL_RANK nor SLURM's are set: start it with srun or torchrun")


def preflight(environment: dict[str, str]) -> str:
    """Meet, sum, compare; what the first rank says. ConfigError, on every rank that is there, when something is wrong."""
    rank, ranks, local = placed(environment)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        require(name in environment, f"preflight: {name} is not set: all ranks meet at the first one's address")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    patience = float(environment.get("PREFLIGHT_SECONDS", "120"))
    try:
        if gpu:
            torch.cuda.set_device(device)
        where = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        limit = timedelta(seconds=patience)
        dist.init_process_group("nccl" if gpu else "gloo", where, timeout=limit, world_size=ranks, rank=rank)
        return _summed(device, rank, ranks)
    except RuntimeError as error:  # torch's store and both backends raise kinds of it
        first = str(error).strip().split("\n")[0][:200]
        raise ConfigError(
            f"preflight: rank {rank} of {ranks} on {socket.gethostname()} did not reach all others in {patience:.0f} s:"
            f" start as many tasks as there are GPUs, and look at NCCL_SOCKET_IFNAME and the links ({first})"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _summed(device: torch.device, rank: int, ranks: int) -> str:
    numbers = NUMBERS if device.type == "cuda" else NUMBERS // 16
    seconds = []
    for _ in range(TIMES):
        mine = torch.full((numbers,), float(rank + 1), device=device)
        begun = time.perf_counter()
        dist.all_reduce(mine)
        total = float(mine.sum(dtype=torch.float64))  # and waits for it
        seconds.append(time.perf_counter() - begun)
        expected = ranks * (ranks + 1) / 2
        require(total == expected * numbers, f"preflight: rank {rank} on {socket.gethostname()} has a wrong sum: {total}")
    sent = 2 * (ranks - 1) / ranks * 4 * numbers  # by each rank of a ring
    return f"preflight     {ranks} ranks sum alike, {sent / min(seconds) / 1e9:.3g} GB/s out of each"


def main() -> None:
    try:
        said = preflight(dict(os.environ))
    except ConfigError as error:
        print(f"sigma-lite: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    if placed(dict(os.environ))[0] == 0:
        print(said, flush=True)


if __name__ == "__main__":
    main()
