"""Compile a C++ or CUDA source at first use and keep the library, so that the second use only loads it."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from sigma_lite.storage import exclusive


class BuildError(RuntimeError):
    """A kernel cannot be compiled here. The message names what is missing and the fix."""


def find_cxx(what: str) -> str:
    """The C++ compiler: CXX, else g++, else clang++. Raises BuildError, which says that `what` needs one."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")  # macOS has the latter
    if compiler is None:
        raise BuildError(f"{what} needs a C++ compiler: install g++ or set CXX")
    return compiler


@functools.cache
def build(command: tuple[str, ...], sources: tuple[Path, ...], machine: str = "") -> Path:
    """Path of the shared library made from sources[0], which includes the others.

    Compiles only when source, options, compiler or `machine` (what else the result depends on) are new. Safe with several
    processes. Raises BuildError with what the compiler said.
    """
    key = hashlib.sha256()
    for part in (*command, version_of(command[0]), machine):
        key.update(part.encode() + b"\0")
    for source in sources:
        key.update(source.read_bytes())
    library = cache_folder() / f"{sources[0].stem}-{sources[0].suffix[1:]}-{key.hexdigest()[:16]}.so"
    with exclusive(library.parent / "lock"):
        if not library.exists():
            partial = library.with_suffix(".partial")
            run([*command, str(sources[0]), "-o", str(partial)])
            os.replace(partial, library)  # whole or absent, also when the compiler is killed
    return library


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sigma_lite" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def version_of(compiler: str) -> str:
    return run([compiler, "--version"])


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).splitlines()[:20])
        raise BuildError(f"this command failed, so the kernel cannot be used:\n  {' '.join(command)}\n{said}")
    return done.stdout
