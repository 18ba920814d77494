"""Rows of table files, packed or not: the text of one column, and an error that names file, row and fix."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sigma_lite.config import ConfigError, CorpusConfig, require
from sigma_lite.data.json_values import json_values
from sigma_lite.data.unpack import open_unpacked, optional, unpacked_name

MEND = "mend it or copy it again, or move it out of the corpus"
USUAL = ("text", "content", "body", "document", "article", "raw_content", "markdown", "code", "abstract", "sentence")
NAMED = 12  # columns in a message
BATCH = 1024  # parquet rows held together


class NoRows(Exception):
    """A .json file that is no table, such as a package.json; the message is the reason to leave it out."""


class Column(NamedTuple):
    name: str  # data.corpus.text_field
    missing: str = "refuse"  # data.corpus.missing_text

    @staticmethod
    def of(config: CorpusConfig) -> Column:
        return Column(config.text_field, config.missing_text)


Rows = Iterator[tuple[int, str]]
"""(number from 1, text) of each row; "" where there is none."""

Place = dict
"""{"row": the last row that was given, "byte": where the next begins, of a file in which one can jump}; {}: begin."""


def reader(file: Path) -> Callable[[Path, Column, Place], Rows] | None:
    """How the file's rows are read, by the end of its name; None for a file that is one document."""
    return _READERS.get(Path(unpacked_name(file)).suffix)


def table_rows(file: Path, column: Column, place: Place | None = None) -> Rows:
    """The rows of a table behind `place`, which is kept up to date: those before are not parsed, and where the file is one
    in which one can jump (plain lines, parquet) not read either.

    Raises ConfigError for one that is damaged, and NoRows before the first row of what is none.
    """
    place = {} if place is None else place
    number = place.get("row", 0)
    try:
        for number, text in reader(file)(file, column, place):
            place["row"] = number
            yield number, text
    except OSError as error:
        raise ConfigError(f"{file} cannot be read after row {number} ({error.strerror or error}): {MEND}") from error


# ---------------------------------------------------------------------------------------------------------------- json


def _json_lines(file: Path, column: Column, place: Place) -> Rows:
    with open_unpacked(file) as lines:
        if "byte" in place:
            lines.seek(place["byte"])
        else:
            deque(itertools.islice(lines, place.get("row", 0)), maxlen=0)
        byte = place.get("byte", 0)
        for number, line in enumerate(lines, start=place.get("row", 0) + 1):
            byte += len(line)
            if lines.seekable():
                place["byte"] = byte
            where = f"{file} line {number}"
            try:
                row = json.loads(line) if line.strip() else {column.name: ""}
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{where} is not valid JSON ({error}): each line must be one object; mend that line or take it out"
                ) from error
            require(isinstance(row, dict), f"{where} holds {type(row).__name__}: each line must be one JSON object")
            yield number, text_of(row, column, where)


def _json_file(file: Path, column: Column, place: Place) -> Rows:
    """An array of objects, or objects one after the other. A single object is a row if it has the column."""
    values = _watched(json_values(file), file)
    if (first := next(values, None)) is None:
        return
    second = next(values, None)
    if not isinstance(first.value, dict):
        raise NoRows("JSON without rows")
    if second is None and not first.in_array and column.name not in first.value:
        raise NoRows(f"JSON without {column.name!r}")
    for number, item in enumerate(itertools.chain([first], [second] if second else [], values), start=1):
        if number <= place.get("row", 0):
            continue
        where = f"{file} row {number}"
        kind = type(item.value).__name__
        require(isinstance(item.value, dict), f"{where} holds {kind}: each row must be a JSON object; {MEND}")
        yield number, text_of(item.value, column, where)


def _watched(values: Iterable, file: Path) -> Iterator:
    number = 0
    try:
        for number, item in enumerate(values, start=1):  # noqa: B007
            yield item
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON after row {number} ({error}): {MEND}") from error


# ----------------------------------------------------------------------------------------------------------------- csv


def _csv(file: Path, column: Column, place: Place) -> Rows:
    """Rows below a line of names, with commas, or tabs in a .tsv."""
    csv.field_size_limit(2**31 - 1)  # a document is longer than the 131,072 characters that csv expects
    number = 0
    with open_unpacked(file) as content:
        lines = io.TextIOWrapper(content, "utf-8-sig", newline="")
        table = csv.DictReader(lines, delimiter="\t" if ".tsv" in unpacked_name(file) else ",", strict=True)
        try:
            for number, row in enumerate(table, start=1):
                if number <= place.get("row", 0):
                    continue
                where = f"{file} row {number} (line {table.line_num})"
                named = {name: value for name, value in row.items() if value is not None}
                require(None not in row, f"{where} has more values than the {len(table.fieldnames)} columns: {MEND}")
                yield number, text_of(named, column, where)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read after row {number} ({error}): {MEND}") from error


# ------------------------------------------------------------------------------------------------------------- parquet


def _parquet(file: Path, column: Column, place: Place) -> Rows:
    """Groups of rows that are done are passed over unread."""
    table, done = _open_parquet(file), place.get("row", 0)
    names, number, groups = table.schema_arrow.names, 0, list(range(table.metadata.num_row_groups))
    if column.name not in names:
        if column.missing == "refuse":
            kinds = map(str, table.schema_arrow.types)
            raise _no_column(names, column, str(file), [n for n, k in zip(names, kinds, strict=True) if "string" in k])
        yield from ((number, "") for number in range(done + 1, table.metadata.num_rows + 1))
        return
    while groups and number + (rows := table.metadata.row_group(groups[0]).num_rows) <= done:
        number, groups = number + rows, groups[1:]
    batches = iter(table.iter_batches(batch_size=BATCH, row_groups=groups, columns=[column.name]))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # pyarrow's own classes
            raise ConfigError(f"{file} cannot be read after row {number} ({error}): {MEND}") from error
        if batch is None:
            return
        for row in batch.to_pylist():
            number += 1
            if number > done:
                yield number, text_of(row, column, f"{file} row {number}")


def _open_parquet(file: Path):
    parquet = optional("pyarrow.parquet", f"reading {file}", "pyarrow")
    require(file.suffix.lower() == ".parquet", f"{file}: parquet is packed inside already: unpack the file")
    try:
        return parquet.ParquetFile(file)
    except Exception as error:  # pyarrow's own classes
        raise ConfigError(f"{file} is not a parquet file ({error}): {MEND}") from error


_READERS: dict[str, Callable[[Path, Column, Place], Rows]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    ".json": _json_file,
    ".parquet": _parquet,
}

# -------------------------------------------------------------------------------------------------------------- column


def text_of(row: dict, column: Column, where: str) -> str:
    """The row's text, "" for a missing value. Raises ConfigError naming `where` and the columns that are there."""
    if column.name not in row and column.missing == "refuse":
        raise _no_column(list(row), column, where, [name for name, value in row.items() if isinstance(value, str)])
    text = row.get(column.name)
    text = "" if text is None else text
    kind = type(text).__name__
    require(isinstance(text, str), f"{where}: {column.name!r} holds {kind}; set text_field to a column of text")
    return text


def _no_column(names: list[str], column: Column, where: str, texts: list[str]) -> ConfigError:
    """`texts` are the columns that hold text: one of them may be meant."""
    meant = difflib.get_close_matches(column.name, texts, n=1) or [name for name in USUAL if name in texts]
    meant = meant or (texts if len(texts) == 1 else [])
    hint = f"did you mean text_field={meant[0]!r}? It has " if meant else "it has "
    listed = ", ".join(map(repr, names[:NAMED])) or "no column"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    fix = "set data.corpus.text_field to the column of text, or missing_text to 'empty' to leave out rows without it"
    return ConfigError(f"{where} has no column {column.name!r}; {hint}{listed}{more}; {fix}")


def count_rows(file: Path) -> int | None:
    """About how many documents a file holds; 1 for one that is no table, None where only reading would tell."""
    name = file.name.lower()
    if reader(file) is None:
        return 1
    if name.endswith((".jsonl", ".ndjson")):
        with open(file, "rb") as content:
            return sum(block.count(b"\n") for block in iter(lambda: content.read(1 << 20), b"")) or 1
    return _open_parquet(file).metadata.num_rows if name.endswith(".parquet") else None
