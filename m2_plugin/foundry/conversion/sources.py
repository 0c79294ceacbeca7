"""Find the input files and the shards of the hub, and cut them into blocks of documents.

A *stream* is an ordered sequence of documents: plain files, a compressed file, a shard on the hub.
It is cut into *blocks* of about `block_bytes` bytes; a block is a list of `Documents`, each from
one file. Workers read plain files; this module only chooses the bytes. The main process reads the
files that must be read from their beginning (compressed files, CSV, JSON arrays), and sends the
documents to the workers.
"""

import functools
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from m2_plugin.data.formats import (
    READ_BYTES,
    DataError,
    file_format,
    is_compressed,
    is_corrupt,
    is_saved_dataset,
    open_bytes,
)
from m2_plugin.data.rows import is_json_stream, open_parquet, read_rows, text_of
from m2_plugin.foundry.conversion.errors import ConversionError

# In these layouts a document is one line, so a file can be cut at any line end.
LINE_LAYOUTS = ("json", "line")
# These layouts are read from the beginning, row by row.
ROW_LAYOUTS = ("csv", "tsv", "arrow", "dataset")
TXT_DOCUMENTS = ("file", "line", "paragraph")

# Small files share a stream until it has this many bytes; a full C4 file has 320 MB.
STREAM_BYTES = 64 << 20
# How much compressed English text expands: an estimate for block sizes and progress only.
EXPANSION = 3
# A document must be smaller than a shard can be: MDS has 32-bit offsets.
MAX_DOCUMENT_BYTES = 1 << 31


@dataclass(frozen=True)
class InputFile:
    """A file on disk, or a folder that `datasets` saved.

    Args:
        path: The path of the file or folder.
        layout: The way it stores documents: "json", "line", "paragraph", "file", "rows" (Parquet),
            or one of `ROW_LAYOUTS`.
        size: The bytes on disk.
        mtime_ns: The time of the last change, in nanoseconds.
    """

    path: str
    layout: str
    size: int
    mtime_ns: int

    @property
    def compressed(self) -> bool:
        """Whether it is compressed as a whole, by its ending."""
        return is_compressed(self.path)

    @property
    def seekable(self) -> bool:
        """Whether a worker can start in the middle."""
        return self.layout in ("file", "rows") or (
            self.layout in LINE_LAYOUTS and not self.compressed
        )


@dataclass(frozen=True)
class Documents:
    """Successive documents of one file.

    Args:
        kind: "range" (bytes start..end of a plain file), "lines" (`data`, of which line `start` is
            the first), "file" (one document), "rows" (row groups start..end), "texts" (`data`
            lists the place of each document, and its text or error) or "bad" (`data` says why the
            rest of the file cannot be read; `start` is the line).
        path: The file, or the name of the hub shard.
        layout: As in `InputFile`.
        start: The first byte, line or row group, depending on `kind`.
        end: The byte or row group after the last.
        data: The documents, if the main process had to read them.
        stored: The bytes on disk that these documents take, for the progress bar.
    """

    kind: str
    path: str
    layout: str
    start: int = 0
    end: int = 0
    data: Any = None
    stored: int = 0


Block = list[Documents]
_Sized = Iterator[tuple[int, Documents]]  # with an estimate of the bytes of text


@dataclass(frozen=True)
class Stream:
    """An ordered sequence of documents: files, or one shard of a hub data set."""

    files: tuple[InputFile, ...] = ()
    hub: "HubSource | None" = None
    hub_shard: int = 0
    text_column: str = "text"

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """Cut the stream into blocks, the same ones on every run."""
        if self.hub is not None:
            return self.hub.blocks(self.hub_shard, block_bytes)
        return _pack(self._sized_documents(block_bytes), block_bytes)

    def _sized_documents(self, block_bytes: int) -> _Sized:
        for file in self.files:
            if file.layout == "rows":
                yield from _row_groups(file, self.text_column)
            elif file.layout == "file":
                size = file.size * (EXPANSION if file.compressed else 1)
                yield size, Documents("file", file.path, "file", stored=file.size)
            elif file.layout in ROW_LAYOUTS or (
                file.layout == "json" and is_json_stream(file.path)
            ):
                yield from _texts(file, self.text_column, block_bytes)
            elif file.seekable:
                yield from _ranges(file, block_bytes)
            else:
                yield from _lines(file, block_bytes)


def _pack(documents: _Sized, block_bytes: int) -> Iterator[Block]:
    block: Block = []
    size = 0
    for documents_bytes, found in documents:
        block.append(found)
        size += documents_bytes
        if size >= block_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block


def _ranges(file: InputFile, block_bytes: int) -> _Sized:
    for start in range(0, file.size, block_bytes):
        end = min(start + block_bytes, file.size)
        size = end - start
        yield size, Documents("range", file.path, file.layout, start, end, stored=size)


def _row_groups(file: InputFile, text_column: str) -> _Sized:
    try:
        parquet = open_parquet(file.path)
    except DataError as error:
        raise ConversionError(str(error)) from error
    names = parquet.schema_arrow.names
    if text_column not in names:
        raise ConversionError(
            f"{file.path}: no column {text_column!r} (--text_column); it has {names}"
        )
    groups = parquet.metadata.num_row_groups
    for group in range(groups):
        size = parquet.metadata.row_group(group).total_byte_size
        stored = file.size // groups
        yield size, Documents("rows", file.path, "rows", group, group + 1, stored=stored)


def _texts(file: InputFile, column: str, block_bytes: int) -> _Sized:
    """Read a file that cannot be cut before it is read."""
    texts: list[tuple[str, str | ValueError]] = []
    size = 0
    reported = 0

    def cut() -> tuple[int, Documents]:
        nonlocal texts, size, reported
        stored = min(size // (EXPANSION if file.compressed else 1), file.size - reported)
        reported += stored
        found = size, Documents("texts", file.path, file.layout, data=texts, stored=stored)
        texts, size = [], 0
        return found

    try:
        for row in read_rows(file.path, columns=[column]):
            try:
                if row.problem:
                    raise ValueError(row.problem)
                text: str | ValueError = text_of(row.values, column, "--text_column")
                size += len(str(text))
            except ValueError as error:
                text = error
            texts.append((row.place, text))
            if size >= block_bytes:
                yield cut()
    except DataError as error:
        raise ConversionError(str(error)) from error
    if texts:
        yield cut()


def _lines(file: InputFile, block_bytes: int) -> _Sized:
    """Read a compressed file (or one of paragraphs), and cut it where a document ends."""
    line = 1
    cutter = _Cutter(file)
    with open_bytes(file.path) as stream:
        while True:
            try:
                data = cutter.next(stream, block_bytes)
            except Exception as error:
                if not is_corrupt(error):
                    raise
                data = cutter.rest_of_whole_lines()
                broken = f"cannot be read any further: {error}"
            else:
                broken = ""
            stored = cutter.stored_since_last() if data and not broken else 0
            if data:
                yield (
                    len(data),
                    Documents("lines", file.path, file.layout, line, data=data, stored=stored),
                )
                line += data.count(b"\n")
            if broken:
                yield 0, Documents("bad", file.path, file.layout, line, data=broken)
            if broken or not data:
                return


class _Cutter:
    """Cut the bytes of a file where a line (or a paragraph) ends."""

    def __init__(self, file: InputFile):
        self.end_mark = b"\n\n" if file.layout == "paragraph" else b"\n"
        self.file = file
        self.pending = bytearray()
        self.produced = 0
        self.reported = 0

    def next(self, stream: BinaryIO, block_bytes: int) -> bytes:
        """Return at least `block_bytes` up to the end of a document, or what is left."""
        searched = block_bytes - 1
        while True:
            cut = self.pending.find(self.end_mark, searched)
            if cut >= 0:
                return self._take(cut + len(self.end_mark))
            searched = max(searched, len(self.pending) - 1)
            data = self._read(stream)
            if not data:
                return self._take(len(self.pending))
            self.pending += data

    def _read(self, stream: BinaryIO) -> bytes:
        # read1 returns the data before the damage in a broken file.
        read = getattr(stream, "read1", stream.read)
        data = read(READ_BYTES)
        if self.file.layout == "paragraph":
            data = self._without_returns(data, read)
        self.produced += len(data)
        return data

    @staticmethod
    def _without_returns(data: bytes, read: Any) -> bytes:
        r"""Make every line end \n; a carriage return elsewhere stays."""
        while data.endswith(b"\r") and (more := read(1)):
            data += more
        return data.replace(b"\r\n", b"\n")

    def rest_of_whole_lines(self) -> bytes:
        """Return the complete lines that were read before the damage."""
        return self._take(self.pending.rfind(b"\n") + 1)

    def _take(self, size: int) -> bytes:
        taken = bytes(self.pending[:size])
        del self.pending[:size]
        return taken

    def stored_since_last(self) -> int:
        """Estimate the bytes on disk that were used since the last call."""
        if not self.file.compressed:
            stored = self.produced
        else:
            stored = min(self.file.size, self.produced // EXPANSION)
        stored, self.reported = stored - self.reported, stored
        return stored


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

    def _load(self) -> Any:
        return _load_stream(json.dumps(dict(self.load_args)))

    def streams(self) -> list[Stream]:
        """Return one stream for each shard of the data set."""
        name = dict(self.load_args)["path"]
        if os.path.isdir(name):  # `datasets` would read it, and guess types
            raise ConversionError(
                f"--dataset {name}: there is a folder of this name here. To read it, give "
                "--local_files; to use the hub, run in another folder"
            )
        try:
            shards = self._load().num_shards
        except Exception as error:
            raise ConversionError(
                f"cannot read {name!r} from the hub ({type(error).__name__}: {error}). "
                "Without a connection, give files: --local_files"
            ) from error
        return [Stream(hub=self, hub_shard=i, text_column=self.text_column) for i in range(shards)]

    def blocks(self, shard: int, block_bytes: int) -> Iterator[Block]:
        """Stream one shard and cut it into blocks of texts."""
        name = f"{dict(self.load_args)['path']} (shard {shard})"
        try:
            yield from self._blocks(name, shard, block_bytes)
        except ConversionError:
            raise
        except Exception as error:  # mostly the network, in one of many classes
            raise ConversionError(
                f"{name}: reading stopped ({type(error).__name__}: {error}). Run the same command "
                "again to continue"
            ) from error

    def _blocks(self, name: str, shard: int, block_bytes: int) -> Iterator[Block]:
        data = self._load()
        data = data.shard(num_shards=data.num_shards, index=shard)
        texts: list[tuple[str, Any]] = []
        size = row = 0
        for batch in data.iter(batch_size=256):
            if self.text_column not in batch:
                raise ConversionError(
                    f"{name}: no column {self.text_column!r} (--text_column); it has {list(batch)}"
                )
            for text in batch[self.text_column]:
                texts.append((f"{name}, row {row}", text))
                row += 1
                size += len(text or "")
                if size >= block_bytes:
                    yield [Documents("texts", name, "texts", data=texts, stored=size)]
                    texts, size = [], 0
        if texts:
            yield [Documents("texts", name, "texts", data=texts, stored=size)]


def _layout_of(path: str, txt_documents: str) -> str:
    try:
        layout = file_format(path)
    except DataError as error:
        raise ConversionError(str(error)) from error
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


def input_files(patterns: list[str], txt_documents: str = "file") -> list[InputFile]:
    """Find the input files of files, folders and patterns, in the order given.

    A path that exists is never read as a pattern, whatever characters it has.

    Raises:
        ConversionError: If a path or pattern matches nothing, or a file has an unknown format.
    """
    files = []
    for path in dict.fromkeys(p for pattern in patterns for p in _expand(pattern)):
        layout = _layout_of(path, txt_documents)
        there = sorted(Path(path).glob("*.arrow")) if layout == "dataset" else [Path(path)]
        if layout == "dataset" and not there:
            splits = sorted(p.name for p in Path(path).iterdir() if p.is_dir())
            raise ConversionError(
                f"{path} is a data set of several splits: give the folder of one of {splits}"
            )
        status = [p.stat() for p in there]
        size, mtime_ns = sum(s.st_size for s in status), max(s.st_mtime_ns for s in status)
        files.append(InputFile(path, layout, size, mtime_ns))
    return files


def file_streams(files: list[InputFile], text_column: str = "text") -> list[Stream]:
    """Group files to streams; each ends after STREAM_BYTES that must be read in order."""
    streams: list[Stream] = []
    group: list[InputFile] = []
    in_order = 0
    for file in files:
        group.append(file)
        in_order += 0 if file.seekable else file.size
        if in_order >= STREAM_BYTES:
            streams.append(Stream(tuple(group), text_column=text_column))
            group, in_order = [], 0
    if group:
        streams.append(Stream(tuple(group), text_column=text_column))
    return streams


def text_bytes_estimate(files: list[InputFile]) -> int:
    """Estimate the bytes of text in the files."""
    return sum(f.size * (EXPANSION if f.compressed else 1) for f in files)


def choose_block_bytes(text_bytes: int | None) -> int:
    """Choose a block size of 2 to 48 MiB, which gives about 128 blocks or more if possible.

    At the end, one worker converts the last block while the others wait, so small inputs get small
    blocks. 48 MiB leave room below Streaming's limit of 64 MiB for a shard.
    """
    largest, smallest = 48 << 20, 2 << 20
    if text_bytes is None:
        return largest
    return max(smallest, min(largest, text_bytes // 128))
