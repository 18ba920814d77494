"""Try the zip as a room would, without a network: `python book/tried.py [ZIP] [--keep FOLDER]`.

Unpacks it into a new folder, types the two lines of its CLASSROOM.txt, runs chapter 1 in fast mode, and lets the model that
comes with it write, if one came. Says what each took, and fails if all of it took more than ten minutes. pip is told that
there is no index; on Linux, a user who may do so cuts off the network as well.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from classroom import TOP, ZIP

LIMIT_SECONDS = 600
# nothing of this machine's own settings: no configured index, no cache, no package of a folder beside
CLEAN = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1", "SIGMA_FAST": "1"}
FORGOTTEN = ("PYTHONPATH", "VIRTUAL_ENV", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL")


def without_network() -> list[str]:
    """The command that starts another one with no network but the machine itself; nothing where that is not allowed."""
    cut = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    allowed = shutil.which("unshare") and subprocess.run([*cut, "true"], capture_output=True).returncode == 0
    return cut if allowed else []


def steps(folder: Path) -> dict[str, str]:
    """What to type, by what it does."""
    said = (folder / "CLASSROOM.txt").read_text("utf-8")
    venv, install = (line.strip() for line in re.findall(r"^    \S.*$", said, re.M))
    scripts = install.partition("python")[0]
    typed = {"make an environment": venv, "install": install}
    typed["run chapter 1"] = f"{scripts}jupyter execute notebooks/01_text_to_rows.ipynb"
    if "NOT IN THIS ZIP" not in said:
        typed["let the model write"] = f'{scripts}sigma-lite generate reference --prompt "import os" --max-new-tokens 40'
    return typed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ZIP", nargs="?", type=Path, default=ZIP)
    parser.add_argument("--keep", type=Path, help="unpack into this new folder, and leave it there")
    options = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if name not in FORGOTTEN} | CLEAN
    cut = without_network()
    print("network: cut off" if cut else "network: pip is told that there is no index")
    with tempfile.TemporaryDirectory() as scratch:
        room, begin = options.keep or Path(scratch) / "room", time.monotonic()
        shutil.unpack_archive(options.ZIP, room)
        print(f"{time.monotonic() - begin:6.0f} s  unpack {options.ZIP.name}", flush=True)
        for does, typed in steps(room / TOP).items():
            start = time.monotonic()
            shell = ["cmd", "/c", typed] if os.name == "nt" else ["sh", "-c", typed]
            done = subprocess.run([*cut, *shell], cwd=room / TOP, env=environment)
            print(f"{time.monotonic() - start:6.0f} s  {does}: {typed}", flush=True)
            if done.returncode:
                return done.returncode
        total, used = time.monotonic() - begin, os.times()
    print(f"{total:6.0f} s  in all, {used.children_user + used.children_system:.0f} s of them at work on one core")
    return 0 if total <= LIMIT_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
