"""A CPU's malloc set up for training, and how much memory a run takes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
NEVER = 1 << 30  # bytes: blocks up to this size come from the heap, and so much may lie free at its end


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next training step. True where that could be set: Linux with glibc.

    Each step frees its gradients and asks for the same sizes again. By default glibc hands blocks of megabytes back to the
    system at once, and gets them back page by page, each zeroed on first touch. The peak of memory is the same; it is held
    until the process ends. What it saves: `make bench`. If you have set glibc's own MALLOC_ variables, they stay.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(setting, NEVER) for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))


class Peak:
    """Most bytes that training has held at one time.

    On a GPU: of torch's allocator. On a CPU: by how much the process is larger than before there was a model, Python and
    libraries left out; Linux tells it, other systems do not.
    """

    def __init__(self) -> None:
        self.device, self._before = torch.device("cpu"), 0

    def begin(self, device: torch.device) -> None:
        """Call it before there is a model."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", "ascii")  # forget what was larger before, such as preparing data
        self._before = _resident("VmRSS")

    def bytes(self) -> int:
        """Since `begin`; 0 where nobody can tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _resident("VmHWM") - self._before)


def _resident(what: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))
    except (OSError, StopIteration):
        return 0
