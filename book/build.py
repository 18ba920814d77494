"""Build the book and the zip to hand out: `python book/build.py [--fast]`, from anywhere.

book/_build/html                        the site; opens from the disk, needs no network
book/_build/sigma_lite_workshop.zip     the site, the executed notebooks, and how to open them
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from pathlib import Path

from sphinx.cmd.build import main as sphinx
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "book" / "_build"
README = """sigma_lite workshop

To read:  open site/index.html in a browser. No network, no Python; the sliders in the figures work.

To run:   the chapters are in notebooks/, with their outputs. They need the sigma_lite package: in a clone of
          its repository, `make lab` installs everything and opens JupyterLab on the same chapters.
          Opened anywhere else, the notebooks show their figures, and the sliders wait for a kernel.
"""


def site(fast: bool) -> int:
    """Run the chapters that changed, then build the pages; returns Sphinx's exit status."""
    os.environ["SIGMA_FAST"] = "1" if fast else "0"
    os.chdir(ROOT)
    return sphinx(["-W", "--keep-going", "-b", "html", "-c", "book", ".", str(BUILD / "html")])


def pack(fast: bool) -> Path:
    """Zip the site and the executed notebooks, with time stamps left out so that equal content is an equal file."""
    target, partial = BUILD / "sigma_lite_workshop.zip", BUILD / "sigma_lite_workshop.zip.partial"
    pages = (path for path in sorted((BUILD / "html").rglob("*")) if path.is_file())
    files = {f"site/{path.relative_to(BUILD / 'html').as_posix()}": path for path in pages}
    executed = BUILD / "executed" / ("fast" if fast else "full")
    files |= {f"notebooks/{p.name}": executed / p.name for p in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    pictures = ROOT / "notebooks" / "pictures"
    files |= {f"notebooks/pictures/{p.name}": p for p in sorted(pictures.glob("*.svg"))}
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("sigma_lite_workshop/README.txt"), README)
        for name, path in tqdm(files.items(), desc="zip", unit="file"):
            if ".doctrees" not in name and ".buildinfo" not in name:
                entry = zipfile.ZipInfo(f"sigma_lite_workshop/{name}")
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, path.read_bytes())
    os.replace(partial, target)
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a few training steps: tests the build, not for reading")
    fast = parser.parse_args(arguments).fast
    status = site(fast)
    if status == 0:
        print(f"{BUILD / 'html' / 'index.html'}\n{pack(fast)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
