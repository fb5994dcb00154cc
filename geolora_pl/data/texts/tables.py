"""Read tables of plain columns from CSV, TSV, JSON lines and Parquet files."""

from __future__ import annotations

import csv as python_csv
import io
import json
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from geolora_pl.lfs import refuse_pointer
from geolora_pl.notes import note

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_BLOCK = 1 << 26  # bytes read at once, which limits the length of a row


def read_table(path: str | Path, columns: Sequence[str], *, nested: bool = False) -> pa.Table:
    """Read some columns of a file; its suffix says how it is read.

    In ``.csv`` a field may be quoted; in ``.tsv`` quotes are data. Both are read as UTF-8, and every column as strings.
    ``.jsonl`` (or ``.json`` with one object per line) and ``.parquet`` have types, and a string stays a string even if
    it looks like a date.

    Args:
        path: The file.
        columns: The columns to keep, in this order.
        nested: Whether a column may hold lists and structures, which only the last two kinds of files can.

    Raises:
        ValueError: The file is missing, empty, broken or of another kind, or a column does not exist or is not plain.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}: the ending says how it is read")
    if suffix in (".csv", ".tsv"):
        return read_delimited(path, columns, tab=suffix == ".tsv")
    read = read_parquet if suffix == ".parquet" else _read_json_lines
    table = read(path, columns)
    return _not_empty(path, table if nested else plain(table, path))


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read some columns of a Parquet file, or all of them.

    Raises:
        ValueError: The file is missing, empty or broken, or a column does not exist.
    """
    refuse_missing(path)
    try:
        with parquet.ParquetFile(path) as file:
            if columns is None:
                return file.read()
            _check_columns(path, columns, file.schema_arrow.names)
            return file.read(columns=list(columns)).select(list(columns))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_json_lines(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read some keys of the objects of a file; whatever the other keys hold, it does not matter."""
    values: dict[str, list[Any]] = {name: [] for name in columns}
    there: dict[str, None] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=tuple)  # so that a key that is there twice is seen
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} cannot be read: line {number}: {error}; it must hold one object per line"
            ) from error
        if not isinstance(row, tuple):
            raise ValueError(f"{path} cannot be read: line {number} is not an object; it must hold one object per line")
        found = [name for name, _ in row]
        _refuse_doubles(f"{path}: line {number}", columns, found)
        there.update(dict.fromkeys(found))
        of_row = dict(row)
        for name in columns:
            values[name].append(_objects(of_row.get(name)))
    if not there:
        raise ValueError(f"{path} holds no rows")
    _check_columns(path, columns, list(there))
    return pa.table({name: _column(path, name, of_column) for name, of_column in values.items()})


def _objects(value: Any) -> Any:
    """A value in which the pairs of every object have become a mapping."""
    if isinstance(value, list):
        return [_objects(inner) for inner in value]
    return {name: _objects(inner) for name, inner in value} if isinstance(value, tuple) else value


def _column(path: Path, name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        row = bisect_left(range(1, len(values)), True, key=lambda count: not _fits(values[:count])) + 1
        raise ValueError(
            f"{path}: {name} must hold values of one kind, and row {row} is of another: {error}; fix the row"
        ) from error


def _fits(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return False
    return True


def read_delimited(
    path: Path, columns: Sequence[str], *, tab: bool, header: Sequence[str] = (), skip_malformed: bool = False
) -> pa.Table:
    """Read some columns of a file of lines as strings; an empty line is a row if there is only one column.

    Args:
        path: The file; a byte-order mark at its start is ignored.
        columns: The columns to keep, in this order.
        tab: Whether tabs separate the fields and quotes are data; otherwise commas do, and a field may be quoted.
        header: The names of all columns, for a file without a header line.
        skip_malformed: Whether to leave out lines with too many or too few fields, with a message that says how many,
            instead of refusing the file.

    Raises:
        ValueError: The file is missing, empty or broken, or a column does not exist.
    """
    content = read_text(path).encode()
    delimiter = "\t" if tab else ","
    if (tab or b'"' not in content) and (returns := re.findall(rb"\r(?!\n)", content)):
        # pyarrow would end a line there.
        content = re.sub(rb"\r(?!\n)", b" ", content)
        note(f"{path}: carriage returns inside lines that are read as spaces: {len(returns)}")
    names = list(header) or _header(path, content, tab)
    _check_columns(
        path, columns, names, f"; its first line must name the columns, with {'tabs' if tab else 'commas'} between them"
    )
    malformed: list[csv.InvalidRow] = []

    def skip(row: csv.InvalidRow) -> str:
        malformed.append(row)
        return "skip" if skip_malformed else "error"

    parse = csv.ParseOptions(
        delimiter=delimiter,
        quote_char=False if tab else '"',
        newlines_in_values=not tab,
        ignore_empty_lines=len(names) > 1,
        invalid_row_handler=skip,
    )
    # With several threads, pyarrow would not say the number of a wrong row.
    read = csv.ReadOptions(column_names=list(header) or None, block_size=_BLOCK, use_threads=False)
    convert = csv.ConvertOptions(
        include_columns=list(columns),
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=False,
    )
    try:
        table = csv.read_csv(pa.py_buffer(content), read_options=read, parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if malformed:
        note(
            f"{path}: lines left out because they do not have {malformed[0].expected_columns} fields: {len(malformed)}"
        )
    return _not_empty(path, table)


def _header(path: Path, content: bytes, tab: bool) -> list[str]:
    lines = io.TextIOWrapper(io.BytesIO(content), "utf-8", newline="")
    reader = (
        python_csv.reader(lines, delimiter="\t", quoting=python_csv.QUOTE_NONE) if tab else python_csv.reader(lines)
    )
    try:
        return next((row for row in reader if row), [])
    except python_csv.Error as error:
        raise ValueError(f"{path} cannot be read: its first line does not name columns ({error})") from error


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte-order mark.

    Lines end with a line feed, after a carriage return or not. A carriage return alone belongs to its line, unless the
    file has no line feed at all, as on an old Mac.

    Raises:
        ValueError: The file is missing, empty, a Git LFS pointer or not in UTF-8.
    """
    refuse_missing(path)
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is text in UTF-16: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not text in UTF-8 (line {line}: {error.reason}): save it as UTF-8") from error
    if not text:
        raise ValueError(f"{path} is empty")
    if "\n" not in text and "\r" in text:
        note(f"{path} has no line feed, so that its lines end with carriage returns")
        text = text.replace("\r", "\n")
    return text


def refuse_missing(path: Path) -> None:
    """Refuse a file that is missing, empty, a Git LFS pointer or not readable."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file (from {Path.cwd()})")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read: give yourself the permission to read it")
    refuse_pointer(path)


def _check_columns(path: Path, columns: Sequence[str], there: Sequence[str], remedy: str = "") -> None:
    if absent := [name for name in columns if name not in there]:
        names = ", ".join(repr(name if len(name) < 40 else f"{name[:40]}...") for name in there)
        raise ValueError(f"{path} has no column {', '.join(map(repr, absent))}; it has {names}{remedy}")
    _refuse_doubles(path, columns, there)


def _refuse_doubles(source: object, columns: Sequence[str], there: Sequence[str]) -> None:
    if doubles := [name for name in columns if there.count(name) > 1]:
        raise ValueError(f"{source} has two columns {doubles[0]!r}, and it is not known which is meant: rename one")


def plain(table: pa.Table, source: object) -> pa.Table:
    """Replace columns of categories, as pandas writes them, by their values; leave other columns unchanged.

    Raises:
        ValueError: A column holds lists or structures.
    """
    for index, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            raise ValueError(f"{source}: {field.name} holds {field.type}, but must hold strings or numbers")
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, table[index].cast(field.type.value_type))
    return table


def _not_empty(path: Path, table: pa.Table) -> pa.Table:
    if not len(table):
        raise ValueError(f"{path} holds no rows")
    return table
