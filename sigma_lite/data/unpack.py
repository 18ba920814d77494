"""Files as they are, or unpacked while they are read: .gz, .bz2, .xz and .zst. A cut or damaged one is an OSError."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from sigma_lite.config import ConfigError

PACKED = (".gz", ".bz2", ".xz", ".zst")
BLOCK = 1 << 17  # bytes of a packed file that are unpacked together
LARGEST_WINDOW = 31  # log2 bytes: `zstd --long=31`, the most that it offers; frames ask only for what they need


def unpacked_name(path: Path) -> str:
    """The name, in small letters, that the file has once it is unpacked."""
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in PACKED if name.endswith(suffix)), name)


def open_unpacked(path: Path) -> BinaryIO:
    """The content of a file. Raises OSError, also while it is read, and ConfigError where a package is missing."""
    suffix = path.suffix.lower()
    if suffix not in PACKED:
        return open(path, "rb")
    begin = _zstd(path) if suffix == ".zst" else _of_python(suffix, path)
    return io.BufferedReader(_Unpacked(open(path, "rb"), begin))


class _Unpacked(io.RawIOBase):
    """A stream of packed frames, one after the other, as their content.

    The readers of the libraries differ in what they do at a missing end and at a second frame: some stop without a word.
    """

    def __init__(self, file: BinaryIO, begin: Callable[[], object]):
        self.file, self.begin = file, begin
        self.frame, self.packed, self.content = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.content:
            self.packed = self.packed or self.file.read(BLOCK)
            if not self.packed and self.frame is None:
                return 0
            if not self.packed:
                raise OSError("it ends in the middle: it was cut off")
            self._unpack()
        count = min(len(buffer), len(self.content))
        buffer[:count], self.content = self.content[:count], self.content[count:]
        return count

    def _unpack(self) -> None:
        try:
            self.frame = self.frame or self.begin()
            self.content = memoryview(self.frame.decompress(self.packed))
        except OSError:
            raise
        except Exception as error:  # each library has a class of its own
            raise OSError(f"it is damaged: {error}") from error
        self.packed = b""
        if self.frame.eof:
            self.packed, self.frame = self.frame.unused_data.lstrip(b"\0"), None  # tape and disk tools pad with zeros

    def close(self) -> None:
        self.file.close()
        super().close()


def _of_python(suffix: str, path: Path) -> Callable[[], object]:
    if suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    module, cls = {".bz2": ("bz2", "BZ2Decompressor"), ".xz": ("lzma", "LZMADecompressor")}[suffix]
    try:
        return getattr(__import__(module), cls)
    except ImportError as error:
        raise ConfigError(f"{path}: this Python was built without {module!r}: unpack the file first") from error


def _zstd(path: Path) -> Callable[[], object]:
    try:
        from compression.zstd import DecompressionParameter, ZstdDecompressor  # Python 3.14

        return lambda: ZstdDecompressor(options={DecompressionParameter.window_log_max: LARGEST_WINDOW})
    except ImportError:
        library = optional("zstandard", f"reading {path}", "zstandard")
        return lambda: library.ZstdDecompressor(max_window_size=1 << LARGEST_WINDOW).decompressobj()


def optional(module: str, needed_for: str, package: str):
    """A module that only some corpora need. Raises ConfigError with the command that installs it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ConfigError(f"{needed_for} needs the package {package!r}: run `pip install {package}`") from error
