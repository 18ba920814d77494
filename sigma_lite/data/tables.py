"""Rows of .jsonl and .parquet files: the text of one column, and an error that names file, row and fix."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

from sigma_lite.config import ConfigError, require


def json_rows(file: Path, field: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each line, "" for a blank one. Raises ConfigError for what is no JSON object with text there."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file} line {number}"
            try:
                row = json.loads(line) if line.strip() else {field: ""}
            except ValueError as error:
                raise ConfigError(f"{where} is not valid JSON ({error}): each line must be one object") from error
            require(isinstance(row, dict), f"{where} holds {type(row).__name__}: each line must be one JSON object")
            yield number, text_of(row, field, where)


def parquet_rows(file: Path, field: str) -> Iterator[tuple[int, str]]:
    """(row, text) of each row. Raises ConfigError for a file that is no parquet, or a column without text."""
    table = _open_parquet(file)
    _require_column(table.schema_arrow.names, field, str(file))
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=[field]):
        for row in batch.to_pylist():
            number += 1
            yield number, text_of(row, field, f"{file} row {number}")


def _open_parquet(file: Path):
    parquet = optional("pyarrow.parquet", f"reading {file}", "pyarrow")
    try:
        return parquet.ParquetFile(file)
    except Exception as error:  # pyarrow's own classes
        raise ConfigError(f"{file} is not a parquet file ({error})") from error


def text_of(row: dict, field: str, where: str) -> str:
    """row[field], "" for a missing value. Raises ConfigError naming `where` and the columns that are there."""
    _require_column(list(row), field, where)
    text = row[field] if row[field] is not None else ""
    require(isinstance(text, str), f"{where}: {field!r} holds {type(text).__name__}; set text_field to a column of text")
    return text


def _require_column(names: list[str], field: str, where: str) -> None:
    if field not in names:
        close = difflib.get_close_matches(field, names, n=1, cutoff=0.0)
        hint = f"did you mean text_field={close[0]!r}? It has " if close else "it has "
        raise ConfigError(f"{where} has no column {field!r}; {hint}{', '.join(map(repr, names)) or 'no column'}")


ROWS = {".jsonl": json_rows, ".parquet": parquet_rows}  # by suffix: (file, column) -> (number, text) of each row


def count_rows(path: Path) -> int:
    """About how many documents a file holds, without reading them; 1 for a file that is no table."""
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) or 1
    if path.suffix == ".parquet":
        return _open_parquet(path).metadata.num_rows
    return 1


def optional(module: str, needed_for: str, package: str):
    """A module that only some corpora need. Raises ConfigError with the command that installs it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ConfigError(f"{needed_for} needs the package {package!r}: run `pip install {package}`") from error
