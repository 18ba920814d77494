"""Which machine and which code: what every recorded number must carry."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from sigma_lite.config import ModelConfig
from sigma_lite.identity import package_code
from sigma_lite.kernels.choose import choose_backend

HERE = Path(__file__).parents[1]
DIRTY = "-dirty"


def origin(device: torch.device, processes: int, net: ModelConfig, tokens: int, precision: str) -> dict[str, Any]:
    """Of the `run` entry: device, CPU, the experts' backend, commit and code.

    Args:
        tokens: of one forward pass, on which the backend may depend.
        precision: as Lightning writes it.
    """
    return {
        "device": device_name(device, processes),
        "cpu": {"model": processor(), "instructions": instructions()},
        "experts": experts_backend(device, net, tokens, precision),
        "commit": git_commit(),
        "code": package_code(),
    }


def device_name(device: torch.device, processes: int = 1) -> str:
    """Such as "CPU AMD EPYC with AVX512, 1 thread, 2 processes" or "8 x NVIDIA H200".

    The instruction set is the one that torch's kernels use: it decides speed, and the order in which sums are taken.
    """
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name()}"
    cpu = f"{processor()} with {torch.backends.cpu.get_cpu_capability()}"
    threads = torch.get_num_threads()
    return f"CPU {cpu}, {threads} thread{'s' * (threads > 1)}, {processes} process{'es' * (processes > 1)}"


def processor() -> str:
    """The CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def instructions() -> str:
    """The widest vector instructions that torch uses here, such as "avx512": sums over other widths round otherwise."""
    return torch.backends.cpu.get_cpu_capability().lower()


def experts_backend(device: torch.device, net: ModelConfig, tokens: int, precision: str) -> dict[str, str]:
    """{"backend": name, "why": reason} of what multiplies the experts: another one rounds otherwise."""
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    x_TD = torch.empty(tokens, net.d_model, dtype=dtype, device=device)
    w13 = torch.empty(net.n_experts, 2 * net.d_expert, net.d_model, dtype=dtype, device="meta")  # for its shape
    name, why = choose_backend(x_TD, w13, choices=net.top_k)
    return {"backend": name, "why": why}


def git_commit(package: Path = HERE) -> str | None:
    """The commit of the code that runs, marked `-dirty` where a file of the package is changed or new since.

    Results, notebooks and texts do not count: they change no run, and a recording writes results while it goes on. None
    outside a checkout, also where the package is installed inside a checkout of something else.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(package, "describe", "--always", "--abbrev=12"), _git(package, "status", "--porcelain", "--", ".")
    return None if commit is None else commit + DIRTY * bool(changes)


def _git(folder: Path, *command: str) -> str | None:
    whole = ["git", "--no-optional-locks", "-C", str(folder), *command]
    try:
        return subprocess.run(whole, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
