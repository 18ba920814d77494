"""One zip for a room without a network: `make classroom`, or `python book/classroom.py [--fast]` once the wheels are there.

book/_build/sigma_lite_classroom.zip holds this repository as it is committed, and beside it

CLASSROOM.txt       what is in the zip, and two lines that install it without a network
site/, executed/    the book with its slides, and the chapters with their outputs
wheels/             every package that the chapters need, for the system and the Python that made the zip
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from build import BUILD, ROOT, SITE, build, executed
from tqdm import tqdm

from sigma_lite.storage import REFERENCE

WHEELS = BUILD / "wheels"
ZIP = BUILD / "sigma_lite_classroom.zip"
TOP = "sigma_lite_classroom"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PACKED = (".whl", ".zip", ".safetensors")  # no use to pack these again
TEXT = """sigma_lite for a classroom, commit {commit}

To read:     open site/index.html in a browser: the book and its slides. No network, no Python; the sliders work.
To install:  two lines, in this folder, without a network. You need Python {python}:

    {venv}
    {install}

To run:      {bin}jupyter lab notebooks          the chapters, to be filled in
             {bin}sigma-lite --help              the commands; their configs are in scaled_configs/
             {bin}sigma-lite check FOLDER        grades the notebooks of a class

executed/    the chapters with their outputs{fast}
wheels/      {wheels} packages for {platform}, Python {python}, in the versions of constraints.txt. Another system or Python
             needs a zip that was made there.
The model:   {model}
"""
INSTALL = 'pip install --no-index --find-links wheels -c constraints.txt -e ".[notebooks,kernels]"'
SHIPPED = 'sigma_lite/reference/, {size:.1f} MB: {bin}sigma-lite generate reference --prompt "import os"'
MISSING = "NOT IN THIS ZIP: none was stored when it was made. Chapters that look into one train a small one in a minute."


def contents(fast: bool) -> dict[str, Path]:
    """Every file of the zip by its name in it. Raises SystemExit where a part has not been made."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = {name: ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    files |= {path.relative_to(ROOT).as_posix(): path for path in reference()}
    pages = [path for path in SITE.rglob("*") if path.is_file() and ".doctrees" not in path.parts]
    files |= {f"site/{path.relative_to(SITE).as_posix()}": path for path in pages if path.name != ".buildinfo"}
    files |= {f"executed/{path.name}": path for path in executed(fast)}
    files |= {f"executed/pictures/{path.name}": path for path in (ROOT / "notebooks" / "pictures").glob("*.svg")}
    wheels = sorted(WHEELS.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{WHEELS} holds no wheels: `make classroom` fetches them")
    return dict(sorted(files.items())) | {f"wheels/{path.name}": path for path in wheels}


def reference() -> list[Path]:
    """Files of the model that comes with the package; none where none was stored."""
    return [path for path in (ROOT / "sigma_lite" / REFERENCE).glob("*") if path.is_file()]


def text(files: dict[str, Path], fast: bool) -> str:
    windows = os.name == "nt"
    scripts = "env\\Scripts\\" if windows else "env/bin/"
    size = sum(path.stat().st_size for path in reference()) / 1e6
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    return TEXT.format(
        commit=commit.strip() or "unknown",
        python=PYTHON,
        venv=f"{f'py -{PYTHON}' if windows else f'python{PYTHON}'} -m venv env",
        install=f"{scripts}python -m {INSTALL}",
        bin=scripts,
        fast=": A TRIAL BUILD, of a few training steps each; their numbers mean nothing" if fast else "",
        wheels=sum(name.startswith("wheels/") for name in files),
        platform=sysconfig.get_platform(),
        model=SHIPPED.format(size=size, bin=scripts) if size else MISSING,
    )


def pack(fast: bool, target: Path = ZIP) -> Path:
    """Write the zip, without time stamps: equal content is an equal file."""
    files, partial = contents(fast), target.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{TOP}/CLASSROOM.txt"), text(files, fast))
        for name, path in tqdm(files.items(), desc="zip", unit="file", disable=None):
            entry = zipfile.ZipInfo(f"{TOP}/{name}")
            entry.compress_type = zipfile.ZIP_STORED if path.suffix in PACKED else zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            entry.file_size = path.stat().st_size  # says beforehand whether its header needs 64 bits
            with archive.open(entry, "w") as inside, open(path, "rb") as file:
                shutil.copyfileobj(file, inside, 1 << 20)
    os.replace(partial, target)
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="chapters of a few training steps: a trial of the zip")
    fast = parser.parse_args(arguments).fast
    status = build(fast)
    if status == 0:
        made = pack(fast)
        print(f"{made}: {made.stat().st_size / 1e6:.0f} MB")
        print("with the reference model" if reference() else f"the reference model is {MISSING}")
    return status


if __name__ == "__main__":
    sys.exit(main())
