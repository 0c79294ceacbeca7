"""Run a model over the chunks of a file's rows, as tasks of the executor.

    .vectors.npy.partial/          beside the output vectors.npy, until that is complete
        job.json                   what the results depend on
        DIGEST/                    that of the job
            000000001024-1024      the results for 1024 rows from row 1024 on, and their digest

These files are the only state: so any process may be killed at any time, and two may run the same
chunk. The results depend on the rows and the settings, not on the workers: a chunk is always the
same rows, and on a CPU one thread computes it.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from m2_plugin.executor import cores, open_workers, visible_gpus
from m2_plugin.files import is_disk_full, locked, read_json, write_atomically, write_json
from m2_plugin.inference import Settings, digest

__all__ = ["Parts", "Rows", "Work", "check_absent", "run_chunks", "writing"]

log = logging.getLogger(__name__)

# The most of a chunk. Batches do not cross chunks, and of a killed task all is done again.
CHUNK_ROWS = 1024
CHUNK_CHARS = 1 << 21
# Short files have smaller chunks, so that there is one for each core.
LEAST_ROWS, LEAST_CHUNKS = 128, 16

START_S = 5.0  # how long it takes to start other processes, about

Span = tuple[int, int]  # the first row of a chunk, and the number of its rows


# --- what a process runs -------------------------------------------------------------------------


class Model(Protocol):
    """A model that was loaded, and what it makes of rows."""

    def rows(self, file: str) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the values of each row of a file, and what the model reads of them."""

    def shorten(self, row: Any) -> Any:
        """Leave out what the model would not read of a very long row."""

    def size(self, row: Any) -> int:
        """Return the number of characters in a row."""

    def move(self) -> None:
        """Move the model to its device."""

    def run(self, rows: Sequence[Any]) -> tuple[bytes, int]:
        """Return the results for some rows, and how many of these were cut."""


@dataclass(frozen=True)
class Work:
    """A model that any process can load.

    Args:
        load: Loads it from its path; a function at the top of a module.
        path: A folder or a file, absolute.
        digest: The digest of its content.
        settings: How it runs.
    """

    load: Callable[[str, Settings], Model]
    path: str
    digest: str
    settings: Settings

    @classmethod
    def of(cls, load: Callable[[str, Settings], Any], path: str | Path, how: Settings) -> "Work":
        """Describe a model that lies at a path."""
        return cls(load, os.path.abspath(path), digest(Path(path)), how)

    def model(self) -> Any:
        """Return the model; a process loads it once.

        Raises:
            ValueError: If it cannot be loaded, or was changed.
        """
        return _loaded(self)


@lru_cache(maxsize=1)
def _loaded(work: Work) -> Any:
    model = work.load(work.path, work.settings)
    if digest(Path(work.path)) != work.digest:
        raise ValueError(f"{work.path!r} was changed meanwhile: run the same command again")
    return model


@dataclass(frozen=True)
class Chunk:
    """Rows that one task runs a model over.

    Args:
        work: The model.
        parts: Where the results go.
        first: The number of the first row.
        rows: What the model reads of each row.
    """

    work: Work
    parts: "Parts"
    first: int
    rows: list[Any]

    @property
    def span(self) -> Span:
        """Which rows these are."""
        return self.first, len(self.rows)


_one_at_a_time = threading.Lock()  # tokenizers are not made for threads, which a Dask worker has


def run_chunk(chunk: Chunk) -> tuple[int, int]:
    """Write the results for a chunk, unless they are there; return its rows, and those cut."""
    span = chunk.span
    with _one_at_a_time, _one_thread():
        found = chunk.parts.read(span)
        if found is None:
            found = chunk.work.model().run(chunk.rows)
            chunk.parts.write(span, *found)
    return len(chunk.rows), found[1]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one thread: with more, a product may be summed in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- what it leaves ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """The results of chunks, each in a file of its own.

    Args:
        folder: The folder of the files.
    """

    folder: Path

    def _file(self, span: Span) -> Path:
        return self.folder / f"{span[0]:012}-{span[1]}"

    def write(self, span: Span, content: bytes, cut: int) -> None:
        """Write the results of a chunk, and how many of its rows were cut."""
        body = b"%d\n%b" % (cut, content)
        write_atomically(self._file(span), _digest(body) + b"\n" + body)

    def read(self, span: Span) -> tuple[bytes, int] | None:
        """Return what was written; None if it is missing, or, after a warning, damaged."""
        file = self._file(span)
        try:
            found, _, body = file.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if found != _digest(body):
            log.warning("%s is damaged: its %d rows are done again", file, span[1])
            file.unlink()
            return None
        cut, _, content = body.partition(b"\n")
        return content, int(cut)

    def contents(self, spans: Iterable[Span]) -> Iterator[bytes]:
        """Yield the results of chunks.

        Raises:
            ValueError: If those of a chunk are missing or damaged.
        """
        for span in spans:
            part = self.read(span)
            if part is None:
                file = str(self._file(span))
                raise ValueError(f"{file!r} was changed meanwhile: run the same command again")
            yield part[0]

    def rows(self) -> int:
        """Return for how many rows there are results."""
        return sum(int(file.name.partition("-")[2]) for file in self.folder.glob("[0-9]*-*"))


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def check_absent(out: Path, overwrite: bool) -> None:
    """Check that a file does not exist.

    If it does, it is complete, and what a run that was killed at its very end has left is removed.

    Raises:
        ValueError: If it does, and may not be replaced.
    """
    if out.exists() and not overwrite:
        with locked(out):
            _refuse(out)


def _refuse(out: Path) -> None:
    shutil.rmtree(_partial(out), ignore_errors=True)
    raise ValueError(f"{str(out)!r} exists already: give another name, or --overwrite")


def _partial(out: Path) -> Path:
    return Path(os.path.abspath(out.with_name(f".{out.name}.partial")))


@contextmanager
def writing(out: Path, job: Mapping[str, Any], overwrite: bool) -> Iterator[Parts]:
    """Keep other processes from writing a file, and yield what a killed run has left of it.

    Args:
        out: The file that the caller writes at the end. Its folder is created.
        job: What the results depend on. A run continues another one only if they agree.
        overwrite: Whether the file may exist.

    Raises:
        ValueError: If it cannot be written, exists, or another process writes it.
        OSError: If the disk is full.
    """
    partial = _partial(out)
    with locked(out):
        if out.exists() and not overwrite:  # another process has finished it meanwhile
            _refuse(out)
        try:
            parts = _open(partial, dict(job))
            yield parts
        except BaseException as error:
            if not any(partial.glob("*/[0-9]*")):
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and is_disk_full(error):  # not a hidden file's name
                reason = error.strerror or "no space left on the disk"
                raise OSError(errno.ENOSPC, reason, str(out)) from error
            raise
        shutil.rmtree(partial, ignore_errors=True)


def _open(partial: Path, job: dict[str, Any]) -> Parts:
    parts = Parts(partial / _digest(json.dumps(job, sort_keys=True).encode()).decode()[:16])
    if parts.folder.is_dir():
        if rows := parts.rows():
            log.info("%s: continuing after %d rows", partial, rows)
    elif partial.exists():
        log.warning("%s was made with another %s: starting again", partial, _changed(partial, job))
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    parts.folder.mkdir(parents=True, exist_ok=True)
    write_json(partial / "job.json", job)
    return parts


def _changed(partial: Path, job: Mapping[str, Any]) -> str:
    """Name what differs from the job in a folder."""
    try:
        found = read_json(partial / "job.json")
    except ValueError:
        found = {}
    changed = [key for key in job if job[key] != found.get(key)]
    return ", ".join(changed) if found and changed else "version of this program"


# --- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a file.

    Args:
        file: Its name.
        count: The number of its rows.
        content: The digest of its content.
    """

    file: str
    count: int
    content: str

    def job(self, work: Work) -> dict[str, Any]:
        """Return what the results of a model depend on."""
        how = {key: value for key, value in vars(work.settings).items() if key != "device"}
        chunks = [CHUNK_ROWS, CHUNK_CHARS, LEAST_ROWS, LEAST_CHUNKS]
        return {"file": self.content, "model": work.digest, **how, "chunks": chunks}


def _chunks(rows: Rows, work: Work, parts: Parts) -> Iterator[Chunk]:
    """Yield all rows in chunks.

    Raises:
        ValueError: If there are fewer rows than before.
    """
    model = work.model()
    most = min(CHUNK_ROWS, max(LEAST_ROWS, rows.count // LEAST_CHUNKS))
    first, chunk, chars = 0, list[Any](), 0
    for _, found in islice(model.rows(rows.file), rows.count):
        row = model.shorten(found)
        size = model.size(row)
        if chunk and (len(chunk) == most or chars + size > CHUNK_CHARS):
            yield Chunk(work, parts, first, chunk)
            first, chunk, chars = first + len(chunk), [], 0
        chunk.append(row)
        chars += size
    if first + len(chunk) < rows.count:
        raise ValueError(f"{rows.file!r} was changed while it was read: start again")
    yield Chunk(work, parts, first, chunk)


def run_chunks(
    rows: Rows,
    work: Work,
    parts: Parts,
    title: str,
    num_workers: int | None = None,
    cluster: str | None = None,
) -> list[Span]:
    """Run a model over the rows that have no results yet.

    Args:
        rows: The rows.
        work: The model.
        parts: Where the results go.
        title: The name of the progress bar.
        num_workers: The processes on this machine; None means one per GPU, or one per core if
            there is more to do than this process can do in `START_S`.
        cluster: As in `open_workers`.

    Returns:
        All chunks, in order.

    Raises:
        ValueError: If there is no such device, or the file or the model was changed meanwhile.
        WorkersError: If the cluster cannot be reached, or a worker died.
    """
    gpus = _gpus(work.settings.device)
    processes = num_workers or _processes(work.settings.device, gpus)
    if cluster is None and not gpus:
        work.model().move()  # so that an error appears before the work starts
    spans: list[Span] = []
    cut = 0

    def left() -> Iterator[Chunk]:
        nonlocal cut
        for chunk in _chunks(rows, work, parts):
            spans.append(chunk.span)
            if (found := parts.read(chunk.span)) is None:
                yield chunk
            else:
                cut += found[1]
                progress.initial += len(chunk.rows)  # for the rate
                progress.update(len(chunk.rows))

    with tqdm(total=rows.count, unit="row", desc=title) as progress, ExitStack() as stack:
        todo = left()
        if cluster is None and num_workers is None and not gpus:
            for count, longer in _first_seconds(todo):
                progress.update(count)
                cut += longer
        first = list(islice(todo, 2))
        todo = chain(first, todo)
        results: Iterable[tuple[int, int]] = map(run_chunk, todo)
        stack.callback(_loaded.cache_clear)
        if (first and cluster is not None) or (len(first) > 1 and processes > 1):
            modules = [work.load.__module__]
            workers = stack.enter_context(open_workers(processes, cluster, modules, gpus))
            results = workers.run(run_chunk, todo)
        for count, longer in results:
            progress.update(count)
            cut += longer
    if cut:
        log.warning("%d texts of %d were cut to the model's maximum", cut, rows.count)
    return spans


def _first_seconds(todo: Iterator[Chunk]) -> Iterator[tuple[int, int]]:
    """Run in this process what takes no longer than to start others."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and (chunk := next(todo, None)) is not None:
        yield run_chunk(chunk)


def _gpus(device: str) -> list[str] | None:
    """Return the names of the GPUs for workers, if these may choose; None if they may not."""
    if device not in ("auto", "cuda"):
        return None
    return visible_gpus()


def _processes(device: str, gpus: Sequence[str] | None) -> int:
    if gpus:
        return len(gpus)
    return cores() if device in ("auto", "cpu") else 1
