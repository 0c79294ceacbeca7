"""Write rows to a file: `.csv`, `.jsonl` or `.parquet`."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from m2_plugin.files import replacing

__all__ = ["ENDINGS", "infer_schema", "write_rows"]

ENDINGS = (".csv", ".jsonl", ".parquet")
GROUP_ROWS = 8192  # of a row group of Parquet; so many rows are in memory

Values = Mapping[str, Any]


def write_rows(
    path: Path, rows: Iterable[Values], columns: Sequence[str], schema: Any = None
) -> None:
    """Write rows to a file, complete or not at all; memory does not grow with their number.

    In CSV null is an empty cell, and numbers, lists and objects are written as in JSON.

    Args:
        path: The file, in a folder that exists; its ending is one of `ENDINGS`. A file that exists
            is replaced.
        rows: The rows, each column → value. A row may lack columns.
        columns: All columns, in their order.
        schema: The Arrow schema that Parquet needs.

    Raises:
        ValueError: If a value does not fit the schema.
    """
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, rows, schema)
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                (_write_csv if path.suffix == ".csv" else _write_jsonl)(file, rows, columns)


class _Lines:
    """Ends the csv module's lines with a line feed.

    The module must end them with both characters, so that it quotes cells that have one of them.
    """

    def __init__(self, file: IO[str]):
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line.removesuffix("\r\n") + "\n")


def _write_csv(file: IO[str], rows: Iterable[Values], columns: Sequence[str]) -> None:
    writer = csv.writer(_Lines(file))
    writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _write_jsonl(file: IO[str], rows: Iterable[Values], columns: Sequence[str]) -> None:
    del columns  # a row that lacks some stays as it is
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _groups(rows: Iterable[Values]) -> Iterator[list[Values]]:
    rows = iter(rows)
    while group := list(islice(rows, GROUP_ROWS)):
        yield group


def infer_schema(rows: Iterable[Values], columns: Sequence[str]) -> Any:
    """Find the Arrow schema into which all rows fit.

    Raises:
        ValueError: If a column has values of types that cannot be joined, as numbers and texts.
    """
    import pyarrow

    found = pyarrow.schema([pyarrow.field(column, pyarrow.null()) for column in columns])
    try:
        for group in _groups(rows):
            lists = {column: [row.get(column) for row in group] for column in columns}
            own = pyarrow.Table.from_pydict(lists).schema
            found = pyarrow.unify_schemas([found, own], promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise ValueError(f"the columns have no one type each, as Parquet needs: {error}") from error
    return found


def _write_parquet(path: Path, rows: Iterable[Values], schema: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for group in _groups(rows):
            try:
                table = pyarrow.Table.from_pylist(group, schema=schema)
            except (pyarrow.ArrowException, OverflowError) as error:
                raise ValueError(f"a row does not fit the schema of Parquet: {error}") from error
            writer.write_table(table)
