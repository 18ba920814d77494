"""Build the book: `python book/build.py [--fast]`, from anywhere.

book/_build/html            the site; opens from the disk, needs no network
book/_build/html/slides     each chapter as slides
book/_build/executed        the chapters with their outputs
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from slides import write_slides
from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "book" / "_build"
SITE = BUILD / "html"


def executed(fast: bool) -> list[Path]:
    """Today's chapters with their outputs; chapters that were renamed stay in the folder, and are none of these."""
    return [BUILD / "executed" / ("fast" if fast else "full") / path.name for path in chapters()]


def chapters() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def build(fast: bool) -> int:
    """Run the chapters that changed, then build the pages and the slides; returns Sphinx's exit status."""
    os.environ["SIGMA_FAST"] = "1" if fast else "0"
    os.chdir(ROOT)
    status = sphinx(["-W", "--keep-going", "-b", "html", "-c", "book", ".", str(SITE)])
    if status == 0:
        write_slides(executed(fast), SITE / "slides")
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a few training steps: tests the build, not for reading")
    status = build(parser.parse_args(arguments).fast)
    if status == 0:
        print(f"{SITE / 'index.html'}\n{SITE / 'slides' / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
