"""Which machine and which code: what every recorded number must carry."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def device_name(device: torch.device, processes: int = 1) -> str:
    """Such as "CPU AMD EPYC, 1 thread(s), 2 process(es)" or "8 x NVIDIA H200"."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name()}"
    return f"CPU {processor()}, {torch.get_num_threads()} thread(s), {processes} process(es)"


def processor() -> str:
    """The CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the code that runs, with a mark when files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
