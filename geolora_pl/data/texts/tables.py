"""Read tables of plain columns from CSV, TSV, JSON lines and Parquet files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_info
from pyarrow import csv, json, parquet

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_BLOCK = 1 << 26  # bytes read at once, which limits the length of a row


def read_table(path: str | Path, columns: Sequence[str]) -> pa.Table:
    """Read some columns of a file; its suffix says how it is read.

    In ``.csv`` a field may be quoted; in ``.tsv`` quotes are data. Both are read as UTF-8, and every column as strings.
    ``.jsonl`` (or ``.json`` with one object per line) and ``.parquet`` have types, and a string stays a string even if
    it looks like a date.

    Args:
        path: The file.
        columns: The columns to keep, in this order.

    Raises:
        ValueError: The file is missing, empty, broken or of another kind, or a column does not exist or is not plain.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}: the ending says how it is read")
    if suffix in (".csv", ".tsv"):
        return read_delimited(path, columns, tab=suffix == ".tsv")
    _refuse_missing(path)
    try:
        if suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                there, table = file.schema_arrow.names, file.read(columns=list(columns))
        else:
            table = _read_json_lines(path)
            there = table.column_names
    except pa.ArrowInvalid as error:
        remedy = "" if suffix == ".parquet" else "; it must hold one object per line"
        raise ValueError(f"{path} cannot be read: {error}{remedy}") from error
    if not set(columns) <= set(there):
        raise _absent(path, columns, there)
    return _not_empty(path, plain(table.select(list(columns)), path))


def _read_json_lines(path: Path) -> pa.Table:
    read = json.ReadOptions(block_size=_BLOCK)
    table = json.read_json(path, read_options=read)
    dates = [(field.name, pa.string()) for field in table.schema if pa.types.is_temporal(field.type)]
    if not dates:
        return table
    return json.read_json(path, read_options=read, parse_options=json.ParseOptions(explicit_schema=pa.schema(dates)))


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
    _refuse_missing(path)
    malformed: list[csv.InvalidRow] = []

    def skip(row: csv.InvalidRow) -> str:
        malformed.append(row)
        return "skip" if skip_malformed else "error"

    delimiter = "\t" if tab else ","
    with path.open("rb") as file:
        one_column = delimiter.encode() not in file.readline()
    parse = csv.ParseOptions(
        delimiter=delimiter,
        quote_char=False if tab else '"',
        newlines_in_values=not tab,
        ignore_empty_lines=not one_column,
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
        table = csv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)
    except KeyError:
        with csv.open_csv(path, read_options=read, parse_options=parse) as reader:
            raise _absent(path, columns, reader.schema.names) from None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if malformed:
        rank_zero_info(
            f"{path}: lines left out because they do not have {malformed[0].expected_columns} fields: {len(malformed)}"
        )
    return _not_empty(path, table)


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is not a file (from {Path.cwd()})")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read: give yourself the permission to read it")


def _absent(path: Path, columns: Sequence[str], there: Sequence[str]) -> ValueError:
    absent = [name for name in columns if name not in there]
    return ValueError(f"{path} has no column {', '.join(map(repr, absent))}; it has {', '.join(map(repr, there))}")


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
