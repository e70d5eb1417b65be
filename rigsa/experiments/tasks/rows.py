"""Rows of data files and of data sets on the hub, each with its place for messages.

Files of lines and of comma-separated values are read here, line by line, as an error has to name the line. Parquet is
read by pyarrow, and the hub's data sets by `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from rigsa.errors import RigsaError
from rigsa.files import naming, require_regular

LONGEST_LINE = 2**26
"""Bytes of a line: a small gzip file could unpack to one that fills the memory."""
Row = tuple[str, dict[str, Any]]
"""Where it stands (``chats.jsonl, line 3``), and column to value."""


def read_rows(path: Path, option: str = "data") -> list[Row]:
    """All rows of a ``.jsonl``, ``.jsonl.gz``, ``.csv`` or ``.parquet`` file, in their order; empty lines are skipped.

    Args:
        path: of the file.
        option: that named it, for messages.

    Raises:
        RigsaError: the file is missing, damaged or cut short, is not UTF-8, or a row is no object. The line is named.
    """
    with naming(f"--{option}"):
        require_regular(path)
    try:
        if path.suffix == ".parquet":
            return _parquet_rows(path, option)
        if path.suffix == ".csv":
            return list(_csv_rows(path, option))
        return [(place, _json_object(line, f"--{option}: {place}")) for place, line in _lines(path, option)]
    except (OSError, EOFError, zlib.error) as error:
        raise RigsaError(f"--{option}: cannot read {path}: {error}") from error


def _lines(path: Path, option: str) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not empty."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        while line := cast(BinaryIO, file).readline(LONGEST_LINE + 1):
            number += 1
            place = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise RigsaError(f"--{option}: {place}: expected at most {LONGEST_LINE:,} bytes in a line")
            text = _decode(line, f"--{option}: {place}").removeprefix("\ufeff")
            if text.strip():
                yield place, text


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RigsaError(f"{place}: expected text in UTF-8, got the byte 0x{data[error.start]:02x}") from error


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RigsaError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise RigsaError(f"{place}: expected an object with columns, got {line.strip()[:60]}")
    return value


def _csv_rows(path: Path, option: str) -> Iterator[Row]:
    text = "".join(_decode(line, f"--{option}: {path}, line {number}") for number, line in _raw_lines(path))
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise RigsaError(f"--{option}: {path}, line 1: expected columns of different names, got {columns}")
        first = reader.line_num + 1
        for cells in reader:
            place, first = f"{path}, line {first}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(columns):
                raise RigsaError(f"--{option}: {place}: expected {len(columns)} columns, got {len(cells)}")
            yield place, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise RigsaError(f"--{option}: {path}, line {reader.line_num}: not CSV ({error})") from error


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, 1)


def _parquet_rows(path: Path, option: str) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path, memory_map=False).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RigsaError(f"--{option}: {path} cannot be read as Parquet ({reason})") from error
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def hub_rows(name: str) -> dict[str, list[Row]]:
    """Split to rows of a data set on the hub. Raises RigsaError where it is neither cached nor to be had."""
    import datasets

    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RigsaError(
            f"--data {name}: no such file or folder, and no data set of that name is cached or to be had from the hub "
            f"({reason})"
        ) from error
    return {
        str(split): [(f"{name}, {split} row {number}", row) for number, row in enumerate(rows, 1)]
        for split, rows in found.items()
    }
