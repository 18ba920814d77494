"""A .json file value by value: the elements of an array, or objects one after the other; only one of them is in memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sigma_lite.data.unpack import open_unpacked

BLOCK = 1 << 20  # characters
_BETWEEN = re.compile(r"[\s,]*")


class Item(NamedTuple):
    value: object
    in_array: bool


def json_values(file: Path) -> Iterator[Item]:
    """Raises ValueError (RecursionError where it nests too deep) for what is no JSON, OSError for what cannot be read."""
    with open_unpacked(file) as content:
        yield from _values(io.TextIOWrapper(content, "utf-8-sig", newline=""))


def _values(source: io.TextIOBase) -> Iterator[Item]:
    decoder, text, place, in_array = json.JSONDecoder(), source.read(BLOCK), 0, False
    started = False
    while True:
        place = _BETWEEN.match(text, place).end()
        if place == len(text):
            text, place = source.read(BLOCK), 0
            if not text:
                break
        elif not started and text[place] == "[":
            started, in_array, place = True, True, place + 1
        elif in_array and text[place] == "]":
            if (text[place + 1 :] + source.read(BLOCK)).strip():
                raise ValueError("something follows the end of the array")
            return
        else:
            started = True
            value, text, place = _next(decoder, text, place, source)
            yield Item(value, in_array)
    if in_array:
        raise ValueError("the array has no end: the file was cut off")


def _next(decoder: json.JSONDecoder, text: str, place: int, source: io.TextIOBase) -> tuple[object, str, int]:
    """(value, text, place behind it); reads on until the value is whole, each time as much as is there already."""
    while True:
        try:
            value, end = decoder.raw_decode(text, place)
            if end < len(text) or isinstance(value, (dict, list, str)):
                return value, text, end
            failed = None
        except ValueError as error:
            failed = error
        more = source.read(max(BLOCK, len(text) - place))
        if not more and failed:
            raise failed
        if not more:
            return value, text, end
        text, place = text[place:] + more, 0
