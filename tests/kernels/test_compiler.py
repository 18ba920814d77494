"""A kernel is compiled once, again when anything changes, and a failure says why and leaves nothing to load."""

from pathlib import Path

import pytest

from sigma_lite.kernels.compiler import BuildError, build, cache_folder


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A stand-in for nvcc that counts its calls, and fails as long as a file `broken` stands beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "nvcc"
    path.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && cat "$0.version" && exit\necho call >> "$0.calls"\n'
        'for last; do :; done; echo half > "$last"\n[ -e "$0.broken" ] && { echo "line 3: no" >&2; exit 1; }\n'
        'echo whole > "$last"\n'
    )
    path.chmod(0o755)
    (tmp_path / "nvcc.version").write_text("1.0")
    build.cache_clear()
    yield path
    build.cache_clear()


def make(compiler: Path, option: str, machine: str = "") -> Path:
    source = compiler.with_name("kernel.cu")
    source.touch()
    return build((str(compiler), option), (source,), machine)


def calls(compiler: Path) -> int:
    return len(Path(f"{compiler}.calls").read_text("utf-8").splitlines())


def test_compiled_once_and_again_for_another_compiler_or_option(compiler):
    first = make(compiler, "-a")
    build.cache_clear()  # as in another process
    assert make(compiler, "-a") == first and calls(compiler) == 1
    other = make(compiler, "-b")
    build.cache_clear()
    Path(f"{compiler}.version").write_text("2.0")
    newer = make(compiler, "-a")
    assert len({first, other, newer}) == 3 and calls(compiler) == 3
    assert first.read_text("utf-8") == "whole\n"


def test_a_failed_compilation_says_why_and_leaves_nothing_to_load(compiler):
    broken = Path(f"{compiler}.broken")
    broken.touch()
    with pytest.raises(BuildError, match=r"(?s)this command failed.*line 3: no"):
        make(compiler, "-a")
    assert not list(cache_folder().glob("*.so"))
    broken.unlink()
    assert make(compiler, "-a").read_text("utf-8") == "whole\n"
