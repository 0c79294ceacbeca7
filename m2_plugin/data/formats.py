"""Find the format of a path by its ending, and read its bytes, decompressed.

If a path exists, it is that file. It is a URL only if it begins with a scheme, such as `s3://`,
and no such file exists. No character in a path is a pattern.
"""

import bz2
import errno
import functools
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

__all__ = [
    "COMPRESSIONS",
    "ENDINGS",
    "FORMATS",
    "BrokenFileError",
    "DataError",
    "check_file",
    "file_format",
    "filesystem",
    "is_compressed",
    "is_corrupt",
    "is_remote",
    "is_saved_dataset",
    "open_bytes",
    "read_bytes",
    "remote_errors",
]

# The format of each ending. Files may be compressed as a whole, except Parquet and Arrow, which
# compress inside the file.
FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".raw": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COLUMNAR = ("parquet", "arrow")
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
ENDINGS = (
    f"{' '.join(e for e, f in FORMATS.items() if f not in COLUMNAR)}, each also with "
    f"{' '.join(COMPRESSIONS)}; {' '.join(e for e, f in FORMATS.items() if f in COLUMNAR)}; "
    "or a folder that `datasets` saved"
)
READ_BYTES = 1 << 20
# In bytes: the window of `zstd --long=31`, the format's maximum.
ZSTD_WINDOW = 1 << 31
ZSTD_READ_BYTES = 1 << 16

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")


class DataError(ValueError):
    """A file or a folder cannot be read; the message names it."""


class BrokenFileError(DataError):
    """A file cannot be read to its end; the message does not name the file."""


def is_remote(path: str) -> bool:
    """Tell whether a path is a URL: it begins with a scheme, and no such file exists."""
    return bool(_SCHEME.match(path)) and not os.path.exists(path)


def is_saved_dataset(path: str) -> bool:
    """Tell whether a path is a folder in which `datasets` saved one data set or several splits."""
    return any(os.path.isfile(f"{path}/{name}") for name in ("state.json", "dataset_dict.json"))


def _compression(path: str) -> str:
    return next((ending for ending in COMPRESSIONS if path.lower().endswith(ending)), "")


def is_compressed(path: str) -> bool:
    """Tell by its ending whether a file is compressed as a whole."""
    return bool(_compression(path))


def file_format(path: str) -> str:
    """Return the format of a path: a value in `FORMATS`, or `dataset`.

    Raises:
        DataError: If the ending is unknown; the message lists the known ones.
    """
    if is_saved_dataset(path):
        return "dataset"
    compression = _compression(path)
    stem = path[: len(path) - len(compression)]
    found = FORMATS.get(os.path.splitext(stem)[1].lower())
    if found is None or (compression and found in COLUMNAR):
        raise DataError(f"{path}: unknown kind of file; the endings known are {ENDINGS}")
    return found


def check_file(path: str) -> None:
    """Check that a path is a file, a folder that `datasets` saved, or a URL.

    Raises:
        DataError: If it is none of these.
    """
    if is_remote(path) or is_saved_dataset(path) or os.path.isfile(path):
        return
    if os.path.isdir(path):
        raise DataError(f"{path!r} is a folder that `datasets` did not save: give a file")
    raise DataError(f"there is no file {path!r}")


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it.

    Raises:
        DataError: If the scheme is unknown, or the package that reads it is not installed.
    """
    from fsspec.core import url_to_fs  # fsspec.open would read * and [ as patterns

    with remote_errors(url):
        try:
            return cast(tuple[Any, str], url_to_fs(url))
        except (ImportError, ValueError) as error:
            hint = ": pip install 'm2-plugin[s3]'" if url.startswith("s3://") else ""
            raise DataError(f"{url}: {error}{hint}") from error


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn what a network raises, in one of many classes, into an OSError that names the URL.

    Raises:
        DataError: If there is no such file.
        OSError: For any other error. It has a number: without one it would mean damaged data.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no file {url!r} ({error})") from error
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", url) from error


class _RemoteFile(io.RawIOBase):
    """The bytes of a URL, with errors that name it."""

    def __init__(self, url: str):
        self._url = url
        source, name = filesystem(url)
        with remote_errors(url):
            self._file = source.open(name, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with remote_errors(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of a .zst file.

    It reads windows of any size and several frames, and raises an error if the file is truncated.
    The stream readers of zstandard and pyarrow each lack one of these.
    """

    def __init__(self, file: BinaryIO):
        import zstandard

        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        self._file = file
        self._frame: Any = None
        self._stored = b""
        self._data = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data:
            stored = self._stored or self._file.read(ZSTD_READ_BYTES)
            if not stored:
                if self._frame is not None:
                    raise EOFError("the compressed data end too early")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._data = memoryview(self._frame.decompress(stored))
            self._stored = b""
            if self._frame.eof:
                self._stored, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._data))
        buffer[:size] = self._data[:size]
        self._data = self._data[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def open_bytes(path: str) -> BinaryIO:
    """Open a local or remote file for reading bytes, decompressed by its ending.

    Raises:
        DataError: If there is no such file.
    """
    check_file(path)
    remote = is_remote(path)
    source: Any = io.BufferedReader(_RemoteFile(path), READ_BYTES) if remote else path
    compression = _compression(path)
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(source))
    if compression == ".xz":
        return cast(BinaryIO, lzma.open(source))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.open(source))
    file = open(source, "rb") if isinstance(source, str) else source  # noqa: SIM115
    return io.BufferedReader(_ZstdFile(file), READ_BYTES) if compression == ".zst" else file


@functools.cache
def _corrupt_errors() -> tuple[type[Exception], ...]:
    import zstandard

    return (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def is_corrupt(error: BaseException) -> bool:
    """Tell whether an error means bad data. Errors of a disk or network have an errno."""
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, _corrupt_errors())


def read_bytes(path: str) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed, about a MiB at a time.

    Raises:
        DataError: If there is no such file.
        BrokenFileError: If the compressed data are damaged; all bytes before the damage are yielded
            first.
    """
    with open_bytes(path) as file:
        # read1 returns the bytes before a damaged place; read would lose them.
        read = getattr(file, "read1", file.read)
        while True:
            try:
                data = read(READ_BYTES)
            except Exception as error:
                if not is_corrupt(error):
                    raise
                raise BrokenFileError(f"cannot be read any further: {error}") from error
            if not data:
                return
            yield data
