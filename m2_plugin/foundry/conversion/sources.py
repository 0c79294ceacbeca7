"""Find the input files and the shards of the hub, and cut them into blocks of documents.

A *stream* is an ordered part of the input, and is cut into *blocks* of about `block_bytes` bytes.
The blocks of plain files and Parquet are known before anything is read: a block is some byte ranges
or row groups. Compressed files, CSV, Arrow, JSON arrays and shards of the hub are read from their
beginning: whoever needs a block of them reads past those before it.
"""

import functools
import glob
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from m2_plugin.data.formats import (
    file_format,
    filesystem,
    is_compressed,
    is_remote,
    is_saved_dataset,
    remote_errors,
)
from m2_plugin.data.pairs import Keys
from m2_plugin.data.rows import Row, is_json_stream, open_parquet, read_rows, text_of
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError

# In these layouts a document is one line, so a file can be cut at any line end.
LINE_LAYOUTS = ("json", "line")
TXT_DOCUMENTS = ("file", "line", "paragraph")

# Files that are read from their beginning share a stream until it has this many bytes.
STREAM_BYTES = 64 << 20
# How much compressed English text expands: an estimate for block sizes and progress only.
EXPANSION = 3
CHARS_PER_TOKEN = 4
# A block has at least this many samples of tokens, since the rest after the last one is dropped.
LEAST_SAMPLES = 64
# A document must be smaller than a shard can be: MDS has 32-bit offsets.
MAX_DOCUMENT_BYTES = 1 << 31

# What the storages of URLs call the hash of a file, or the time of its last change.
VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")

# A document, or why it cannot be used.
Document = str | BadDocumentError
Item = TypeVar("Item")


@dataclass(frozen=True)
class InputFile:
    """A file, or a folder that `datasets` saved.

    Args:
        path: The path of the file or folder, or the file's URL.
        layout: The way it stores documents: "json", "line", "paragraph", "file", "rows" (Parquet),
            "csv", "tsv", "arrow" or "dataset".
        size: The stored bytes.
        version: The time of the last change in nanoseconds, or what a URL's storage has for it.
    """

    path: str
    layout: str
    size: int
    version: int | str

    @property
    def compressed(self) -> bool:
        """Whether it is compressed as a whole, by its ending."""
        return is_compressed(self.path)

    @property
    def text_bytes(self) -> int:
        """An estimate of the bytes of its text."""
        return self.size * (EXPANSION if self.compressed else 1)

    def is_cuttable(self) -> bool:
        """Return whether a block in its middle can be read without what is before it."""
        if self.layout in ("file", "rows"):
            return True
        return (
            self.layout in LINE_LAYOUTS
            and not self.compressed
            and not (self.layout == "json" and is_json_stream(self.path))
        )


@dataclass(frozen=True)
class Documents:
    """Successive documents of a file: bytes start..end, row groups start..end, or the whole file.

    A range of bytes has the lines that begin in it.
    """

    path: str
    layout: str
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class Block:
    """Documents that are converted together.

    Args:
        stored: The bytes on disk that they take, for the progress bar.
        ranges: Where they are, if they are not read yet.
        texts: The documents, if they had to be read to find the block.
    """

    stored: int
    ranges: tuple[Documents, ...] = ()
    texts: tuple[Document, ...] = ()


def document(values: dict[str, Any], column: str, place: str) -> Document:
    """Return the document in a column of a row, or its error, which names its place."""
    try:
        text = text_of(values, column, "--text_column")
        if len(text) > MAX_DOCUMENT_BYTES // 4 and len(text.encode()) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"document has more than {MAX_DOCUMENT_BYTES} bytes")
    except ValueError as error:
        return BadDocumentError(f"{place}: {error}")
    return text


def documents_of(rows: Iterable[Row], column: str) -> Iterator[Document]:
    """Yield the documents in a column of rows."""
    for row in rows:
        if row.problem:
            yield BadDocumentError(f"{row.place}: {row.problem}")
        else:
            yield document(row.values, column, row.place)


def packed(items: Iterable[tuple[Item, int]], least: int) -> Iterator[list[Item]]:
    """Yield lists of successive items, each (item, size), of at least some size together."""
    together: list[Item] = []
    size = 0
    for item, its_size in items:
        together.append(item)
        size += its_size
        if size >= least:
            yield together
            together, size = [], 0
    if together:
        yield together


# --- streams -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CuttableFiles:
    """A stream of files whose blocks are known before they are read."""

    files: tuple[InputFile, ...]
    text_column: str = "text"

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """Cut the stream into blocks, the same ones on every run."""
        found = itertools.chain(*(self._ranges(file, block_bytes) for file in self.files))
        for ranges in packed(found, block_bytes):
            yield Block(sum(stored for _, stored in ranges), tuple(part for part, _ in ranges))

    def _ranges(
        self, file: InputFile, block_bytes: int
    ) -> Iterator[tuple[tuple[Documents, int], int]]:
        """Yield parts of a file, each with its bytes on disk, and those of its text."""
        if file.layout == "file":
            yield (Documents(file.path, "file"), file.size), file.text_bytes
        elif file.layout == "rows":
            sizes = _row_group_sizes(file.path, self.text_column)
            for i, size in enumerate(sizes):
                yield (Documents(file.path, "rows", i, i + 1), file.size // len(sizes)), size
        else:
            for start in range(0, file.size, block_bytes):
                end = min(start + block_bytes, file.size)
                yield (Documents(file.path, file.layout, start, end), end - start), end - start


def _row_group_sizes(path: str, text_column: str) -> list[int]:
    parquet = open_parquet(path)
    names = parquet.schema_arrow.names
    if text_column not in names:
        raise ConversionError(f"{path}: no column {text_column!r} (--text_column); it has {names}")
    groups = range(parquet.metadata.num_row_groups)
    return [parquet.metadata.row_group(i).total_byte_size for i in groups]


def _cut(documents: Iterator[tuple[Document, int]], block_bytes: int) -> Iterator[Block]:
    """Cut documents, each with the bytes that it takes on disk, into blocks."""
    sized = ((found, _length(found[0])) for found in documents)
    for found in packed(sized, block_bytes):
        yield Block(sum(stored for _, stored in found), texts=tuple(text for text, _ in found))


def _length(text: Document) -> int:
    return len(text) if isinstance(text, str) else 0


def _paragraphs(path: str, column: str) -> Iterator[Row]:
    """Join the lines of a text file between empty lines."""
    place, problem = "", ""
    lines: list[str] = []
    for row in read_rows(path, text_column=column):
        line = row.values.get(column, "")
        if line or row.problem:
            lines.append(line)
            place, problem = place or row.place, problem or row.problem
        elif lines:
            yield Row(place, {column: "\n".join(lines)}, problem)
            place, problem, lines = "", "", []
    if lines:
        yield Row(place, {column: "\n".join(lines)}, problem)


def read_pairs(path: str, keys: Keys) -> Iterator[Document]:
    """Yield the pairs of a file, each a JSON object with `query`, `passage` and `negatives`.

    All pairs of a file have as many negatives as its first one: llm-foundry makes one tensor of a
    batch.
    """
    first = None
    for row in read_rows(path):
        try:
            if row.problem:
                raise ValueError(row.problem)
            pair = keys.pair(row.values)
            count = len(pair["negatives"])
            first = count if first is None else first
            if count != first:
                raise ValueError(f"{count} negatives, but the rows before it have {first}")
        except ValueError as error:
            yield BadDocumentError(f"{row.place}: {error}")
        else:
            yield json.dumps(pair, ensure_ascii=False)


@dataclass(frozen=True)
class FilesInOrder:
    """A stream of files that must be read from their beginning: texts, or pairs."""

    files: tuple[InputFile, ...]
    text_column: str = "text"
    pairs: Keys | None = None

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """Cut the stream into blocks, the same ones on every run."""
        yield from _cut(self._documents(), block_bytes)

    def _documents(self) -> Iterator[tuple[Document, int]]:
        for file in self.files:
            left = file.size
            for text in self._documents_of(file):
                stored = min(left, _length(text) // (EXPANSION if file.compressed else 1))
                left -= stored
                yield text, stored

    def _documents_of(self, file: InputFile) -> Iterator[Document]:
        if self.pairs is not None:
            yield from read_pairs(file.path, self.pairs)
            return
        column = self.text_column
        if file.layout == "paragraph":
            rows = _paragraphs(file.path, column)
        else:
            rows = read_rows(file.path, text_column=column, columns=[column])
        if file.layout in ("line", "paragraph"):
            rows = (row for row in rows if row.problem or row.values[column].strip())
        yield from documents_of(rows, column)


@functools.lru_cache(maxsize=1)
def _load_stream(load_args: str) -> Any:
    """Open a data set once for all of its shards, since each time asks the hub."""
    import datasets

    return datasets.load_dataset(**json.loads(load_args), streaming=True)


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub, or any that `datasets.load_dataset` can stream.

    Args:
        load_args: Keyword arguments of `datasets.load_dataset`: path, name, split ...
        text_column: The column that holds the documents.
    """

    load_args: tuple[tuple[str, Any], ...]
    text_column: str = "text"

    def load(self) -> Any:
        """Open the data set."""
        return _load_stream(json.dumps(dict(self.load_args)))

    def shards(self) -> int:
        """Return the number of shards of the data set.

        Raises:
            ConversionError: If it cannot be read.
        """
        name = dict(self.load_args)["path"]
        if os.path.isdir(name):  # `datasets` would read it, and guess types
            raise ConversionError(
                f"--dataset {name}: there is a folder of this name here. To read it, give "
                "--local_files; to use the hub, run in another folder"
            )
        try:
            return int(self.load().num_shards)
        except Exception as error:  # mostly the network, in one of many classes
            raise ConversionError(
                f"cannot read {name!r} from the hub ({type(error).__name__}: {error}). "
                "Without a connection, give files: --local_files"
            ) from error


@dataclass(frozen=True)
class HubShard:
    """A stream of one shard of a data set of the hub."""

    source: HubSource
    shard: int

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """Cut the stream into blocks, the same ones on every run."""
        name = f"{dict(self.source.load_args)['path']} (shard {self.shard})"
        with remote_errors(name):
            yield from _cut(self._documents(name), block_bytes)

    def _documents(self, name: str) -> Iterator[tuple[Document, int]]:
        column = self.source.text_column
        data = self.source.load()
        row = 0
        data = data.shard(num_shards=data.num_shards, index=self.shard)
        for batch in data.iter(batch_size=256):
            if column not in batch:
                raise ConversionError(
                    f"{name}: no column {column!r} (--text_column); it has {list(batch)}"
                )
            for text in batch[column]:
                found = document({column: text}, column, f"{name}, row {row}")
                yield found, _length(found)
                row += 1


Stream = CuttableFiles | FilesInOrder | HubShard


def file_streams(
    files: list[InputFile], text_column: str = "text", pairs: Keys | None = None
) -> list[Stream]:
    """Group successive files into streams."""
    streams: list[Stream] = []
    for cuttable, group in itertools.groupby(files, InputFile.is_cuttable):
        if cuttable and pairs is None:
            streams.append(CuttableFiles(tuple(group), text_column))
            continue
        for together in packed(((file, file.size) for file in group), STREAM_BYTES):
            streams.append(FilesInOrder(tuple(together), text_column, pairs))
    return streams


# --- files ---------------------------------------------------------------------------------------


def _layout_of(path: str, txt_documents: str) -> str:
    layout = file_format(path)
    return {"text": txt_documents, "parquet": "rows"}.get(layout, layout)


def _files_below(folder: str) -> Iterator[str]:
    """Yield the files of a folder and its subfolders; a saved data set counts as one file."""
    if is_saved_dataset(folder):
        yield folder
        return
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(entry.path)
        elif entry.is_file() and not entry.name.startswith("."):
            yield entry.path


def _matches(pattern: Path) -> list[str]:
    """Return what a pattern matches; its leading folders are taken literally if they exist."""
    there = next((p for p in pattern.parents if p.exists()), Path())
    rest = str(pattern.relative_to(there))
    return sorted(glob.glob(os.path.join(glob.escape(str(there)), rest), recursive=True))


def _expand(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(_files_below(str(path)))
    elif path.exists():
        found = [str(path)]
    else:
        found = _matches(path)
    if not found:
        raise ConversionError(f"--local_files: {pattern!r} does not exist or matches no file")
    return found


def _files_at(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the files at a URL, with what its storage tells: itself, those below it, or matches."""
    source, name = filesystem(pattern)
    with remote_errors(pattern):
        if source.isfile(name):
            found = {name: source.info(name)}
        else:
            found = source.find(name, detail=True) if source.exists(name) else {}
            found = found or source.glob(name, detail=True)
    names = [
        path for path, about in sorted(found.items())
        if about["type"] == "file" and not path.rpartition("/")[2].startswith(".")
    ]  # fmt: skip
    if not names:
        raise ConversionError(f"--local_files: {pattern!r} does not exist or matches no file")
    yield from ((source.unstrip_protocol(path), found[path]) for path in names)


def _local_file(path: str, txt_documents: str) -> InputFile:
    layout = _layout_of(path, txt_documents)
    there = sorted(Path(path).glob("*.arrow")) if layout == "dataset" else [Path(path)]
    if layout == "dataset" and not there:
        splits = sorted(p.name for p in Path(path).iterdir() if p.is_dir())
        raise ConversionError(
            f"{path} is a data set of several splits: give the folder of one of {splits}"
        )
    status = [p.stat() for p in there]
    size, mtime_ns = sum(s.st_size for s in status), max(s.st_mtime_ns for s in status)
    return InputFile(path, layout, size, mtime_ns)


def input_files(patterns: list[str], txt_documents: str = "file") -> list[InputFile]:
    """Find the input files of files, folders and patterns, local ones or URLs, in the order given.

    A path that exists is never read as a pattern, whatever characters it has.

    Raises:
        ValueError: If a path or pattern matches nothing, or a file has an unknown format.
        OSError: If the storage of a URL does not answer.
    """
    files: dict[str, InputFile] = {}
    for pattern in patterns:
        if is_remote(pattern):
            for url, about in _files_at(pattern):
                layout = _layout_of(url, txt_documents)
                version = next((str(about[key]) for key in VERSION_KEYS if about.get(key)), "")
                files[url] = InputFile(url, layout, int(about["size"]), version)
        else:
            for path in _expand(pattern):
                files[path] = _local_file(path, txt_documents)
    return list(files.values())


def text_bytes_estimate(files: Iterable[InputFile]) -> int:
    """Estimate the bytes of text in the files."""
    return sum(file.text_bytes for file in files)


def choose_block_bytes(text_bytes: int | None, concat_tokens: int | None = None) -> int:
    """Choose a block size of 2 to 48 MiB, which gives about 128 blocks or more if possible.

    At the end, one worker converts the last block while the others wait, so small inputs get small
    blocks. 48 MiB leave room below Streaming's limit of 64 MiB for a shard. Long samples of tokens
    need larger blocks, since each block drops what is left after its last sample.
    """
    largest, smallest = 48 << 20, 2 << 20
    chosen = largest if text_bytes is None else max(smallest, min(largest, text_bytes // 128))
    return max(chosen, LEAST_SAMPLES * (concat_tokens or 0) * CHARS_PER_TOKEN)
