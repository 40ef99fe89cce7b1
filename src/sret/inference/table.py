"""Writes rows of results to a file: CSV, JSON lines or parquet, by the suffix of its name."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from sret.errors import InputError
from sret.files import replacing

SUFFIXES = (".csv", ".jsonl", ".parquet")
ROWS_PER_GROUP = 1024  # of a parquet file


def check_table_path(path: Path) -> None:
    """Raises `InputError` for a wrong file name, before the rows are computed."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: the name of a table ends in {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet  # noqa: F401  # raises an error here if the package is missing


def write_table(path: Path, columns: Mapping[str, type], rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows one after the other; the file gets its name when all are written.

    Args:
        columns: names and types: `str`, `int`, `float`, or `list` of numbers, which has a column for each in CSV.
        rows: one value per column, or None.

    Raises `InputError` for a suffix other than .csv, .jsonl and .parquet.
    """
    check_table_path(path)
    write = {".csv": _write_csv, ".jsonl": _write_json, ".parquet": _write_parquet}[path.suffix.lower()]
    with replacing(path) as temporary, temporary.open("wb") as file:
        write(file, columns, iter(rows))


def _write_csv(file: IO[bytes], columns: Mapping[str, type], rows: Iterator[Sequence[Any]]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    first = next(rows, None)
    header = []
    for i, (name, kind) in enumerate(columns.items()):
        header += [f"{name}_{k}" for k in range(len(first[i]))] if kind is list and first else [name]
    writer.writerow(header)
    for row in chain([first] if first else [], rows):
        writer.writerow(chain.from_iterable(value if isinstance(value, list) else [value] for value in row))
    text.detach()


def _write_json(file: IO[bytes], columns: Mapping[str, type], rows: Iterator[Sequence[Any]]) -> None:
    for row in rows:
        file.write(json.dumps(dict(zip(columns, row, strict=True))).encode() + b"\n")


def _write_parquet(file: IO[bytes], columns: Mapping[str, type], rows: Iterator[Sequence[Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = {
        str: pyarrow.string(),
        int: pyarrow.int64(),
        float: pyarrow.float32(),
        list: pyarrow.list_(pyarrow.float32()),
    }
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            values = [dict(zip(columns, row, strict=True)) for row in group]
            writer.write_table(pyarrow.Table.from_pylist(values, schema))
