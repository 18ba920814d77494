"""Triton kernels without a GPU: Triton's own interpreter runs them, one program after the other, with numpy."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

from sigma_lite.config import require

INTERPRET = "TRITON_INTERPRET"  # environment variable that Triton reads when a function is decorated


def start() -> tuple[ModuleType, ModuleType]:
    """(triton, triton.language) of a process in which `@triton.jit` means: interpret.

    torch may have imported triton before, to see whether it is there; its library of small kernels (`tl.zeros`, `tl.sum`)
    is then decorated already, hence the reload. Kernels decorated earlier stay what they are.

    Raises: ConfigError where triton is not installed.
    """
    require(
        importlib.util.find_spec("triton") is not None,
        "triton is not installed, and these kernels are run by its interpreter: `pip install triton` (Linux; there is no"
        " build for macOS. The book shows what this chapter prints, and no other chapter needs it)",
    )
    os.environ[INTERPRET] = "1"
    language = importlib.import_module("triton.language")
    importlib.reload(importlib.import_module("triton.language.standard"))
    return importlib.import_module("triton"), importlib.reload(language)
