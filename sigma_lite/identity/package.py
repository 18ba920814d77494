"""The part of this package that decides which weights a run ends with: which of its files have changed since a run?"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from sigma_lite.identity.fingerprint import PYTHON, Fingerprints, digest_of

ROOT = Path(__file__).parents[1]
TRAINING = ("balance", "config.py", "data", "kernels", "model", "papers", "train")


def package_code(root: Path = ROOT) -> dict[str, str]:
    """{"python": version, "balance/losses.py": fingerprint, ...} of the files in TRAINING. Comments do not count."""
    files = {path.relative_to(root).as_posix(): _file(path.read_bytes(), path.suffix) for path in _files(root)}
    return {"python": PYTHON, **files}


def edited_since_import() -> list[str]:
    """Files of TRAINING that are not those from which this process may have imported: it trains what it has in memory."""
    now = _stamps()
    return sorted(name for name in now.keys() | _IMPORTED.keys() if now.get(name) != _IMPORTED.get(name))


def _stamps() -> dict[str, tuple[int, int]]:
    found = ((path.relative_to(ROOT).as_posix(), path.stat()) for path in _files(ROOT))
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found}


def _files(root: Path) -> list[Path]:
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh")
    found = [path for name in TRAINING for path in ((root / name).rglob("*") if (root / name).is_dir() else [root / name])]
    return sorted(path for path in found if path.suffix in kinds and path.is_file())


@functools.cache
def _file(content: bytes, suffix: str) -> str:
    if suffix == ".py":
        with contextlib.suppress(SyntaxError, ValueError):  # it cannot have trained anything; its bytes will do
            code = compile(content, "<package>", "exec", dont_inherit=True, optimize=2)  # 2: no docstrings, no asserts
            return Fingerprints(None).of(code, "")[:8]
    return hashlib.sha256(content).hexdigest()[:8]


def changed_files(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Files of `package_code` that differ; of other versions of Python, where that cannot be told, one line says so."""
    if then.get("python") != now.get("python"):
        return [f"Python {str(then.get('python')).removeprefix('py')} then, {str(now.get('python')).removeprefix('py')} now"]
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def code_digest(code: Mapping[str, str]) -> str:
    """All of `package_code` in one word."""
    return digest_of(*(f"{name}={value}" for name, value in sorted(code.items())))[:12]


_IMPORTED = _stamps()
