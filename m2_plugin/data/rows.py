"""Read the rows of a file of any format, each with its place.

Texts are exactly those in the file: no type is guessed, no row is dropped, and nothing comes from a
cache. A row that cannot be read is yielded too, with the reason. The caller decides whether that is
an error, or counts the row and leaves it out.
"""

import codecs
import contextlib
import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from m2_plugin.data.formats import (
    BrokenFileError,
    DataError,
    check_file,
    file_format,
    is_corrupt,
    is_remote,
    open_bytes,
    read_bytes,
)
from m2_plugin.files import read_json

__all__ = [
    "Row",
    "arrow_schema",
    "class_names",
    "decode",
    "is_json_stream",
    "open_parquet",
    "parse_object",
    "read_lines",
    "read_row_groups",
    "read_rows",
    "text_bytes",
    "text_of",
]

BATCH_ROWS = 512
# The start of a JSON file that does not hold one object per line: an array, or an indented object.
_JSON_STREAM = re.compile(rb"\s*(\[|\{[ \t]*\r?\n)")
_SPACE = re.compile(r"[ \t\r\n]*")
# Replaces a carriage return inside a line of CSV, because the csv module refuses those. No decoded
# text contains it, since it is half of a surrogate pair.
_RETURN = "\udc0d"


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: `FILE:LINE`, or `FILE, row N` (counted from 0) for formats without lines.
        values: Column → value.
        problem: Why the row cannot be read, or "". If it cannot, `values` is empty.
    """

    place: str
    values: dict[str, Any]
    problem: str = ""


# A row inside this module: its line or number, and its values or the error.
_Numbered = tuple[int, dict[str, Any] | ValueError]


def read_rows(
    path: str,
    split: str | None = None,
    text_column: str = "text",
    columns: Sequence[str] = (),
    header: Sequence[str] = (),
) -> Iterator[Row]:
    """Yield the rows of a file, or of a folder that `datasets` saved, in their order.

    In a text file a blank line is an empty text; other formats ignore blank lines. In `.csv`,
    quotes have their usual meaning, and the header shows whether `,`, `;` or a tab separates the
    columns. In `.tsv`, quotes are text and each line is a row.

    Args:
        path: The file, with any ending in `formats.FORMATS`, or its URL; or the folder.
        split: The split to read, if the folder holds several.
        text_column: The name to give to the only column of a text file.
        columns: The columns that are needed; for Parquet and Arrow no others are read.
        header: The columns of a `.tsv` file that may lack a header line.

    Raises:
        DataError: If the file is missing, of an unknown kind, or not readable at all.
    """
    kind = file_format(path)
    check_file(path)
    if kind in ("parquet", "arrow", "dataset"):
        numbered, mark = _batch_rows(_arrow_batches(path, kind, split, columns)), ", row "
    else:
        mark = ":"
        if kind == "text":
            numbered = _text_rows(path, text_column)
        elif kind == "csv":
            numbered = _csv_rows(path)
        elif kind == "tsv":
            numbered = _tsv_rows(path, header)
        elif is_json_stream(path):
            numbered = _JsonStream(path).rows()
        else:
            numbered = _json_lines(path)
    return _rows(numbered, path + mark)


def read_row_groups(path: str, start: int, end: int, column: str) -> Iterator[Row]:
    """Yield one column of some row groups of a Parquet file, like `read_rows`.

    Args:
        path: The file.
        start: The index of the first row group.
        end: The index after that of the last row group.
        column: The column, which must exist.

    Raises:
        DataError: If the file is not a complete Parquet file.
    """
    file = open_parquet(path)
    first = sum(file.metadata.row_group(i).num_rows for i in range(start))
    groups = list(range(start, end))
    batches = file.iter_batches(BATCH_ROWS, groups, columns=[column], use_threads=False)
    return _rows(_batch_rows(batches, first), f"{path}, row ")


def _rows(numbered: Iterator[_Numbered], place: str) -> Iterator[Row]:
    for number, values in numbered:
        if isinstance(values, dict):
            yield Row(f"{place}{number}", values)
        else:
            yield Row(f"{place}{number}", {}, str(values))


# Values


def text_bytes(value: Any, column: str) -> bytes:
    """Encode a text as UTF-8.

    Raises:
        ValueError: If the value is not a text, or contains half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise ValueError(f"{column!r} should be a text, got {type(value).__name__} {value!r:.80}")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{column!r} holds half of a surrogate pair, which is no text") from None


def text_of(values: Mapping[str, Any], column: str, option: str) -> str:
    """Return the text in a column of a row.

    Args:
        values: The row.
        column: The column.
        option: The option that names the column, for the error message: `--text_column`.

    Raises:
        ValueError: If there is no such column, or its value is not a text.
    """
    if column not in values:
        names = ", ".join(map(repr, values)) or "nothing"
        raise ValueError(f"no column {column!r} ({option}); the row has {names}")
    text_bytes(values[column], column)
    return str(values[column])


def decode(data: bytes) -> str:
    """Decode UTF-8.

    Raises:
        ValueError: If the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error})") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a line that holds one JSON object.

    Raises:
        ValueError: If the line is not UTF-8, not JSON, or holds another value.
    """
    text = decode(line.removeprefix(codecs.BOM_UTF8))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    return _as_object(value)


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object, but {type(value).__name__} {value!r:.40}")
    return value


# Lines


def _lines(path: str) -> Iterator[tuple[int, bytes | BrokenFileError]]:
    r"""Yield numbers and lines, split at \n only; at a damaged place, yield the error and stop."""
    number = 1
    pending: list[bytes] = []
    skip = len(codecs.BOM_UTF8)
    try:
        for data in read_bytes(path):
            first, *others = data.split(b"\n")
            pending.append(first)
            if not others:
                continue
            for line in chain((b"".join(pending),), others[:-1]):
                mark = number == 1 and line.startswith(codecs.BOM_UTF8)
                yield number, line[skip:] if mark else line
                number += 1
            pending = [others[-1]]
    except BrokenFileError as error:
        yield number, error
        return
    last = b"".join(pending)
    last = last.removeprefix(codecs.BOM_UTF8) if number == 1 else last
    if last:
        yield number, last


def _text_line(line: bytes | BrokenFileError) -> str:
    if isinstance(line, BrokenFileError):
        raise line
    return decode(line.removesuffix(b"\r"))


def read_lines(path: str) -> Iterator[tuple[int, str | ValueError]]:
    """Yield the number, from 1, and the text of each line of a file, or why it cannot be read.

    Raises:
        DataError: If there is no such file.
    """
    check_file(path)
    for number, line in _lines(path):
        try:
            yield number, _text_line(line)
        except ValueError as error:
            yield number, error


def _text_rows(path: str, column: str) -> Iterator[_Numbered]:
    for number, line in read_lines(path):
        yield number, line if isinstance(line, ValueError) else {column: line}


def _json_lines(path: str) -> Iterator[_Numbered]:
    for number, line in _lines(path):
        if isinstance(line, BrokenFileError):
            yield number, line
        elif line.strip():
            try:
                yield number, parse_object(line)
            except ValueError as error:
                yield number, error


def _wrong_count(cells: Sequence[str], header: Sequence[str]) -> ValueError:
    return ValueError(f"{len(cells)} columns where there should be {len(header)}")


def _check_header(path: str, header: Sequence[str]) -> None:
    for name in header:
        if name and header.count(name) > 1:
            raise DataError(f"{path}: two columns are called {name!r}")


def _tsv_rows(path: str, columns: Sequence[str]) -> Iterator[_Numbered]:
    header: list[str] = []
    for number, line in _lines(path):
        try:
            text = _text_line(line)
        except ValueError as error:
            if not header:
                raise DataError(f"{path}:{number}: {error}") from error
            yield number, error
            continue
        if not text:
            continue
        cells = text.split("\t")
        if not header:
            has_header = not columns or set(columns) & set(cells)
            header = cells if has_header else list(columns)
            _check_header(path, header)
            if has_header:
                continue
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        else:
            yield number, _wrong_count(cells, header)


class _CsvLines:
    """Lines for the csv module. Bytes that are not UTF-8 become surrogates; `_csv_cells` checks."""

    def __init__(self, path: str):
        self._lines = _lines(path)
        self.problem: BrokenFileError | None = None

    def __iter__(self) -> Iterator[str]:
        for _, line in self._lines:
            if isinstance(line, BrokenFileError):
                self.problem = line
                return
            text = line.decode("utf-8", "surrogateescape")
            if "\r" in text:
                end = "\r" if text.endswith("\r") else ""
                text = text.removesuffix("\r").replace("\r", _RETURN) + end
            yield f"{text}\n"


def _separator(header: str) -> str:
    for separator in (",", ";", "\t"):
        with contextlib.suppress(csv.Error):
            if len(next(csv.reader([header], delimiter=separator, strict=True))) > 1:
                return separator
    return ","


def _csv_cells(cells: list[str]) -> list[str]:
    cells = [cell.replace(_RETURN, "\r") for cell in cells]
    if not all(map(str.isascii, cells)):
        try:
            "".join(cells).encode()
        except UnicodeEncodeError:
            raise ValueError("not UTF-8") from None
    return cells


def _csv_rows(path: str) -> Iterator[_Numbered]:
    csv.field_size_limit((1 << 31) - 1)  # the csv module's default is 131,072 characters
    source = _CsvLines(path)
    lines = iter(source)
    blank = 0
    first = ""
    for first in lines:
        if first.strip():
            break
        blank += 1
    reader = csv.reader(chain((first,), lines), delimiter=_separator(first), strict=True)
    header: list[str] = []
    while True:
        number = blank + reader.line_num + 1
        try:
            cells = _csv_cells(next(reader))
        except StopIteration:
            break
        except ValueError as error:
            yield number, error
            continue
        except csv.Error as error:
            if source.problem is None:  # otherwise the damaged file caused this error too
                yield number, ValueError(f"not CSV: {error}")
            continue
        if not header:
            header = cells
            _check_header(path, header)
        elif len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        elif cells:
            yield number, _wrong_count(cells, header)
    if source.problem is not None:
        yield blank + reader.line_num + 1, source.problem


# JSON that is not one object per line


def is_json_stream(path: str) -> bool:
    """Tell whether a JSON file is an array or holds objects of several lines.

    Other JSON files hold one object per line.
    """
    try:
        with open_bytes(path) as file:
            head = file.read(1 << 12).removeprefix(codecs.BOM_UTF8)
    except Exception as error:
        if not is_corrupt(error):
            raise
        return False  # the reader of lines reports the error
    return _JSON_STREAM.match(head) is not None


class _JsonStream:
    """Reads objects in a JSON array or in sequence, without holding the whole file in memory."""

    def __init__(self, path: str):
        self._chunks = codecs.iterdecode(read_bytes(path), "utf-8-sig")
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0  # position in the buffer of the next character to parse
        self._counted = 0  # lines are counted up to this position
        self._line = 1  # line of that position, from 1

    def rows(self) -> Iterator[_Numbered]:
        """Yield the objects; after a syntax error, yield the error and stop."""
        try:
            while char := self._peek():
                if char == "[":
                    yield from self._array()
                else:
                    yield self._row()
        except (ValueError, RecursionError) as error:
            yield self._here(), ValueError(f"{error}; the rest of the file is not read")

    def _array(self) -> Iterator[_Numbered]:
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            yield self._row()
            char = self._peek()
            if char not in (",", "]"):
                raise ValueError("not JSON (the array goes on without a ',' or ends without a ']')")
            self._at += 1
            if char == "]":
                return

    def _row(self) -> _Numbered:
        self._peek()
        number = self._here()
        value = self._value()
        try:
            return number, _as_object(value)
        except ValueError as error:
            return number, error

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # Tokens other than strings have fewer than 16 characters. So an error elsewhere
                # cannot come from a token that the end of the buffer cuts.
                near_end = error.pos >= len(self._buffer) - 16
                if (near_end or error.msg.startswith("Unterminated")) and self._more():
                    continue
                self._at = min(error.pos, len(self._buffer))
                raise ValueError(f"not JSON ({error.msg})") from None
            if end == len(self._buffer) and self._more():  # a number may go on
                continue
            self._at = end
            return value

    def _peek(self) -> str:
        """Skip white space, and return the next character; "" at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Read more, at least doubling the unused text, so that long values are parsed rarely."""
        self._here()
        rest = self._buffer[self._at :]
        pieces, size = [rest], 0
        try:
            while size <= len(rest) and (piece := next(self._chunks, "")):
                pieces.append(piece)
                size += len(piece)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 ({error.reason})") from None
        self._buffer = "".join(pieces)
        self._at = self._counted = 0
        return size > 0

    def _here(self) -> int:
        """Return the line of the next character."""
        self._line += self._buffer.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line


# Parquet, Arrow, and folders that `datasets` saved


def open_parquet(path: str) -> Any:
    """Open a Parquet file, local or remote, with pyarrow.

    Raises:
        DataError: If it is not a complete Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    check_file(path)
    source = open_bytes(path) if is_remote(path) else pyarrow.OSFile(path)
    try:
        return pyarrow.parquet.ParquetFile(source)
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and not is_corrupt(error):
            raise
        raise DataError(f"{path}: not a whole Parquet file ({error})") from error


def _open_arrow(path: str) -> tuple[Any, Iterator[Any]]:
    """Return the schema and the batches of an Arrow file or stream."""
    import pyarrow

    check_file(path)
    source = pyarrow.PythonFile(open_bytes(path), mode="r")
    try:
        head = source.read(6)
        source.seek(0)
        if head == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        reader = pyarrow.ipc.open_stream(source)
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and not is_corrupt(error):
            raise
        raise DataError(f"{path}: not a whole Arrow file ({error})") from error
    return reader.schema, iter(reader)


def _split_folder(path: str, split: str | None) -> str:
    """Return the folder of one split in a folder that `datasets` saved.

    Raises:
        DataError: If the folder holds several splits, and the split is not given or not one of
            them.
    """
    if not os.path.isfile(f"{path}/dataset_dict.json"):
        return path
    splits = read_json(f"{path}/dataset_dict.json").get("splits", [])
    if split not in splits:
        wrong = "holds several splits" if split is None else f"has no split {split!r}"
        raise DataError(f"{path!r} {wrong}; it has {splits}, each in a folder of its name")
    return f"{path}/{split}"


def _dataset_files(folder: str) -> list[str]:
    state = read_json(f"{folder}/state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder!r} was saved by an old version of `datasets`: save it again")
    return [f"{folder}/{file['filename']}" for file in state["_data_files"]]


def _arrow_batches(
    path: str, kind: str, split: str | None, columns: Sequence[str]
) -> Iterator[Any]:
    if kind == "parquet":
        file = open_parquet(path)
        chosen = list(columns) if set(columns) <= set(file.schema_arrow.names) else []
        # If none of the columns exist, read all: batches without columns would lose their rows.
        yield from file.iter_batches(BATCH_ROWS, columns=chosen or None, use_threads=False)
        return
    files = [path] if kind == "arrow" else _dataset_files(_split_folder(path, split))
    for name in files:
        schema, batches = _open_arrow(name)
        chosen = list(columns) if set(columns) <= set(schema.names) else []
        for batch in batches:
            yield batch.select(chosen) if chosen else batch


def _batch_rows(batches: Iterator[Any], number: int = 0) -> Iterator[_Numbered]:
    import pyarrow

    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and not is_corrupt(error):
                raise
            yield number, ValueError(f"cannot be read any further: {error}")
            return
        if batch is None:
            return
        for start in range(0, len(batch), BATCH_ROWS):
            for values in _values(batch.slice(start, BATCH_ROWS)):
                yield number, values
                number += 1


def _values(batch: Any) -> Iterator[dict[str, Any] | ValueError]:
    def of(i: int) -> dict[str, Any] | ValueError:
        try:
            return batch.slice(i, 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            return ValueError(str(error))

    try:
        return iter(batch.to_pylist())
    except (ValueError, OverflowError):  # bytes that are not UTF-8, a date that Python lacks
        return map(of, range(len(batch)))


def arrow_schema(path: str, split: str | None = None) -> Any:
    """Return the Arrow schema of a file, or of a folder that `datasets` saved; None if it has none.

    Raises:
        DataError: If it is damaged.
    """
    kind = file_format(path)
    if kind == "parquet":
        return open_parquet(path).schema_arrow
    if kind == "dataset":
        path, kind = _dataset_files(_split_folder(path, split))[0], "arrow"
    return _open_arrow(path)[0] if kind == "arrow" else None


def class_names(path: str, split: str | None = None) -> dict[str, tuple[str, ...]]:
    """Return column → names of its classes, if `datasets` stored them in a file or folder.

    Such a column holds indices into its list of names, or lists of such indices.
    """
    kind = file_format(path)
    features: Mapping[str, Any] = {}
    if kind == "dataset":
        info = f"{_split_folder(path, split)}/dataset_info.json"
        features = read_json(info).get("features") or {}
    elif kind in ("parquet", "arrow"):
        noted = (arrow_schema(path).metadata or {}).get(b"huggingface")
        features = json.loads(noted)["info"]["features"] if noted else {}
    found = {}
    for column, feature in features.items():
        if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]  # of the items of a list
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            found[column] = tuple(feature["names"])
    return found
