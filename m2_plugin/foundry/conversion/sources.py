"""Inputs: what the files and hub shards are, and how they are cut into blocks of documents.

A *lane* is one ordered stream of documents (plain files, a compressed file, a hub shard). It is cut
into *blocks* of about `block_bytes`, a block into *segments*, each from one file. Plain files are
only cut here and read by the workers; a compressed stream has to be read from its beginning, so the
main process decompresses it and hands out the lines.
"""

import bz2
import functools
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from m2_plugin.foundry.conversion.errors import ConversionError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".raw")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
LINE_FORMATS = ("json", "line")  # a document never crosses a line end, so a file can be cut at any
TXT_DOCUMENTS = ("file", "line", "paragraph")

# Small files share a lane until it holds this much; a full C4 file (320 MB) is a lane of its own.
LANE_BYTES = 64 << 20
# What compressed English text expands to; only the choice of the block size depends on it.
EXPANSION = 3
READ_BYTES = 1 << 20
# One document may not fill a shard: MDS stores 32-bit offsets.
MAX_DOCUMENT_BYTES = 1 << 31


@dataclass(frozen=True)
class InputFile:
    """A file on disk and how documents lie in it: "json", "line", "paragraph", "file" or "rows"."""

    path: str
    layout: str
    size: int
    mtime_ns: int

    @property
    def compressed(self) -> bool:
        """Whether the suffix says so."""
        return self.path.endswith(COMPRESSED_SUFFIXES)

    @property
    def seekable(self) -> bool:
        """Whether a worker can start in the middle."""
        return self.layout in ("file", "rows") or (
            self.layout in LINE_FORMATS and not self.compressed
        )


@dataclass(frozen=True)
class Segment:
    """A run of documents of one file.

    Args:
        kind: "range" (bytes start..end of a plain file), "lines" (`data`, of which line `start` is
            the first), "file" (one document), "rows" (row groups start..end), "texts" (`data`) or
            "bad" (`data` says why the rest of the file cannot be read; `start` is the line).
        path: The file, or the name of the hub shard.
        layout: As in `InputFile`.
        start: First byte, line or row group, by kind.
        end: One past the last.
        data: The documents themselves, where the main process had to read them.
        stored: How much of the input on disk this accounts for, in bytes.
    """

    kind: str
    path: str
    layout: str
    start: int = 0
    end: int = 0
    data: Any = None
    stored: int = 0


Block = list[Segment]


@dataclass(frozen=True)
class Lane:
    """One ordered stream of documents: files, or one shard of a hub data set."""

    files: tuple[InputFile, ...] = ()
    hub: "HubSource | None" = None
    hub_shard: int = 0
    text_column: str = "text"

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """Cut the lane into blocks, the same ones on every run."""
        if self.hub is not None:
            return self.hub.blocks(self.hub_shard, block_bytes)
        return _pack(self._sized_segments(block_bytes), block_bytes)

    def _sized_segments(self, block_bytes: int) -> Iterator[tuple[int, Segment]]:
        for file in self.files:
            if file.layout == "rows":
                yield from _parquet_segments(file, self.text_column)
            elif file.layout == "file":
                size = file.size * (EXPANSION if file.compressed else 1)
                yield size, Segment("file", file.path, "file", stored=file.size)
            elif file.seekable:
                yield from _range_segments(file, block_bytes)
            else:
                yield from _stream_segments(file, block_bytes)


def _pack(segments: Iterator[tuple[int, Segment]], block_bytes: int) -> Iterator[Block]:
    block: Block = []
    size = 0
    for segment_bytes, segment in segments:
        block.append(segment)
        size += segment_bytes
        if size >= block_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block


def _range_segments(file: InputFile, block_bytes: int) -> Iterator[tuple[int, Segment]]:
    for start in range(0, file.size, block_bytes):
        end = min(start + block_bytes, file.size)
        size = end - start
        yield size, Segment("range", file.path, file.layout, start, end, stored=size)


def _parquet_segments(file: InputFile, text_column: str) -> Iterator[tuple[int, Segment]]:
    metadata = open_parquet(file.path, text_column).metadata
    groups = metadata.num_row_groups
    for group in range(groups):
        size = metadata.row_group(group).total_byte_size
        stored = file.size // groups
        yield size, Segment("rows", file.path, "rows", group, group + 1, stored=stored)


def open_parquet(path: str, text_column: str) -> Any:
    """Open a parquet file that has the text column."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ConversionError(f"{path}: not a whole parquet file ({error})") from error
    names = file.schema_arrow.names
    if text_column not in names:
        raise ConversionError(f"{path}: no column {text_column!r} (--text_column); it has {names}")
    return file


def open_stream(path: str) -> Any:
    """Open a file for reading bytes, decompressing by its suffix."""
    if path.endswith(".gz"):
        return gzip.open(path)
    if path.endswith(".xz"):
        return lzma.open(path)
    if path.endswith(".bz2"):
        return bz2.open(path)
    if path.endswith(".zst"):
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd")
    return open(path, "rb")


def is_corrupt_stream(error: BaseException) -> bool:
    """Whether the error means bad data rather than a failing disk (which has an errno)."""
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, EOFError | zlib.error | lzma.LZMAError)


def _stream_segments(file: InputFile, block_bytes: int) -> Iterator[tuple[int, Segment]]:
    """Read a compressed (or paragraph) file in pieces that end where a document ends."""
    line = 1
    reader = _PieceReader(file)
    with open_stream(file.path) as stream:
        while True:
            try:
                piece = reader.next_piece(stream, block_bytes)
            except Exception as error:
                if not is_corrupt_stream(error):
                    raise
                piece = reader.rest_of_whole_lines()
                broken = f"cannot be read any further: {error}"
            else:
                broken = ""
            stored = reader.stored_since_last() if piece and not broken else 0
            if piece:
                yield (
                    len(piece),
                    Segment("lines", file.path, file.layout, line, data=piece, stored=stored),
                )
                line += piece.count(b"\n")
            if broken:
                yield 0, Segment("bad", file.path, file.layout, line, data=broken)
            if broken or not piece:
                return


class _PieceReader:
    """Cuts a byte stream where a line (or a paragraph) ends."""

    def __init__(self, file: InputFile):
        self.end_mark = b"\n\n" if file.layout == "paragraph" else b"\n"
        self.file = file
        self.pending = bytearray()
        self.produced = 0
        self.reported = 0

    def next_piece(self, stream: BinaryIO, block_bytes: int) -> bytes:
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
        # read1 hands over what was decompressed before the place where a broken file breaks.
        read = getattr(stream, "read1", stream.read)
        data = read(READ_BYTES)
        if self.file.layout == "paragraph":
            data = data.replace(b"\r", b"")
        self.produced += len(data)
        return data

    def rest_of_whole_lines(self) -> bytes:
        """Return what was read before the break, without the line that the break cut."""
        return self._take(self.pending.rfind(b"\n") + 1)

    def _take(self, size: int) -> bytes:
        piece = bytes(self.pending[:size])
        del self.pending[:size]
        return piece

    def stored_since_last(self) -> int:
        """Estimate the bytes on disk behind the pieces handed out since the last call."""
        if not self.file.compressed:
            stored = self.produced
        else:
            stored = min(self.file.size, self.produced // EXPANSION)
        stored, self.reported = stored - self.reported, stored
        return stored


@functools.lru_cache(maxsize=1)
def _load_stream(load_args: str) -> Any:
    """Open a data set once, not once for each of its shards: every time asks the hub."""
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

    def lanes(self) -> list[Lane]:
        """Return one lane for each shard of the data set."""
        name = dict(self.load_args)["path"]
        try:
            shards = self._load().num_shards
        except Exception as error:
            raise ConversionError(
                f"cannot read {name!r} from the hub ({type(error).__name__}: {error}). "
                "Without a connection, give files: --local_files"
            ) from error
        return [Lane(hub=self, hub_shard=i, text_column=self.text_column) for i in range(shards)]

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
                "again to go on"
            ) from error

    def _blocks(self, name: str, shard: int, block_bytes: int) -> Iterator[Block]:
        data = self._load()
        data = data.shard(num_shards=data.num_shards, index=shard)
        texts: list[str] = []
        size, start = 0, 1
        for batch in data.iter(batch_size=256):
            if self.text_column not in batch:
                raise ConversionError(
                    f"{name}: no column {self.text_column!r} (--text_column); it has {list(batch)}"
                )
            for text in batch[self.text_column]:
                texts.append(text)
                size += len(text or "")
                if size >= block_bytes:
                    yield [Segment("texts", name, "texts", start, data=texts, stored=size)]
                    start += len(texts)
                    texts, size = [], 0
        if texts:
            yield [Segment("texts", name, "texts", start, data=texts, stored=size)]


def _layout_of(path: str, txt_documents: str) -> str:
    stem = path
    for suffix in COMPRESSED_SUFFIXES:
        stem = stem.removesuffix(suffix)
    if stem.endswith(JSON_SUFFIXES):
        return "json"
    if stem.endswith(TEXT_SUFFIXES):
        return txt_documents
    if path.endswith(".parquet"):
        return "rows"
    known = " ".join(JSON_SUFFIXES + TEXT_SUFFIXES)
    raise ConversionError(
        f"{path}: unknown kind of file. Known: .parquet {known}, "
        f"the latter also with {' '.join(COMPRESSED_SUFFIXES)}"
    )


def _expand(pattern: str) -> list[str]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
    elif path.exists():
        found = [str(path)]
    else:
        found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise ConversionError(f"--local_files: {pattern!r} does not exist or matches no file")
    return found


def input_files(patterns: list[str], txt_documents: str = "file") -> list[InputFile]:
    """Find the input files: files, folders and globs, in the order given."""
    files = []
    for path in dict.fromkeys(p for pattern in patterns for p in _expand(pattern)):
        status = Path(path).stat()
        layout = _layout_of(path, txt_documents)
        files.append(InputFile(path, layout, status.st_size, status.st_mtime_ns))
    return files


def file_lanes(files: list[InputFile], text_column: str = "text") -> list[Lane]:
    """Group files into lanes: a new one after LANE_BYTES of files that must be read in order."""
    lanes: list[Lane] = []
    group: list[InputFile] = []
    streamed = 0
    for file in files:
        group.append(file)
        streamed += 0 if file.seekable else file.size
        if streamed >= LANE_BYTES:
            lanes.append(Lane(tuple(group), text_column=text_column))
            group, streamed = [], 0
    if group:
        lanes.append(Lane(tuple(group), text_column=text_column))
    return lanes


def text_bytes_estimate(files: list[InputFile]) -> int:
    """Estimate how much text the files hold."""
    return sum(f.size * (EXPANSION if f.compressed else 1) for f in files)


def choose_block_bytes(text_bytes: int | None) -> int:
    """Choose a block size: at least some 128 blocks to share out, and no tiny or huge shards.

    The last block keeps one worker alone, so small inputs get blocks of 2 MiB. 48 MiB leave room
    below streaming's 64 MiB for a shard.
    """
    largest, smallest = 48 << 20, 2 << 20
    if text_bytes is None:
        return largest
    return max(smallest, min(largest, text_bytes // 128))
