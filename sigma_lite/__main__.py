"""`python -m sigma_lite` and the script `sigma-lite`."""

from __future__ import annotations

import os
import sys

from sigma_lite.cli import main


def run() -> None:
    """Begin again in Python's UTF-8 mode where file names could be ASCII only: LC_ALL=C, or a container without a locale.

    What is typed, and what is in configs, then means the same bytes as elsewhere; what is printed is still the terminal's.
    """
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        os.environ |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": os.environ.get("PYTHONIOENCODING") or f"{encoding}:replace"}
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    main()


if __name__ == "__main__":
    run()
