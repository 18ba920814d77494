"""One setting of the C library's malloc, for training on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform

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
