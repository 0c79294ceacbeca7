"""Convert one split: the main process gives blocks to workers, and keeps their order."""

import logging
import multiprocessing
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from m2_plugin.foundry.conversion.errors import ConversionError, is_disk_full
from m2_plugin.foundry.conversion.folder import (
    Key,
    PartialFolder,
    content_digest,
    differences,
    read_manifest,
)
from m2_plugin.foundry.conversion.mds import mds
from m2_plugin.foundry.conversion.samples import Counts, TextOptions, Tokenizer, Tokens, cut_tokens
from m2_plugin.foundry.conversion.sources import (
    Block,
    HubSource,
    InputFile,
    Stream,
    file_streams,
    text_bytes_estimate,
)
from m2_plugin.foundry.conversion.worker import Output, Placement, Summary, worker_main, write_block

log = logging.getLogger(__name__)

# Streams to read at once. Reading is only decompression or the network; workers do the rest.
MAX_STREAMS_AT_ONCE = 4
# Blocks that a worker may hold while it waits for earlier blocks.
MAX_HELD = 2
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Job:
    """The conversion of one split.

    Args:
        out: The split's folder.
        files: The input files in order, if `hub` is None.
        hub: The data set of the hub to stream instead of files.
        options: How documents are read.
        tokenizer: A name or folder, for `concat_tokens`.
        tokenizer_kwargs: More arguments of `AutoTokenizer.from_pretrained`.
        bos_text: A text before each document, for `concat_tokens`.
        eos_text: A text after each document, for `concat_tokens`.
        concat_tokens: The tokens in a sample; None makes each document a sample.
        no_wrap: Whether to drop the rest of a document in which a sample ended.
        compression: The `compression` of `MDSWriter`.
        max_samples: The number of samples to stop at.
        expected_documents: The number of documents, if known, for the progress bar.
        block_bytes: The bytes of text in a block, about the size of a shard.
    """

    out: Path
    files: tuple[InputFile, ...] = ()
    hub: HubSource | None = None
    options: TextOptions = field(default_factory=TextOptions)
    tokenizer: str | None = None
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    bos_text: str = ""
    eos_text: str = ""
    concat_tokens: int | None = None
    no_wrap: bool = False
    compression: str | None = None
    max_samples: int | None = None
    expected_documents: int | None = None
    block_bytes: int = 48 << 20

    def streams(self) -> list[Stream]:
        """Return the ordered streams of the input."""
        if self.hub is not None:
            return self.hub.streams()
        return file_streams(list(self.files), self.options.text_column)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the output, without paths and times of files."""
        hub = None if self.hub is None else dict(self.hub.load_args)
        return {
            "format_version": FORMAT_VERSION,
            "hub": hub,
            "files": [[Path(f.path).name, f.layout, f.size] for f in self.files],
            "text_column": self.options.text_column,
            "max_chars_per_doc": self.options.max_chars_per_doc,
            "held_out": self.options.held_out,
            "val_fraction": self.options.val_fraction,
            "tokenizer": self.tokenizer,
            "tokenizer_kwargs": self.tokenizer_kwargs,
            "bos_text": self.bos_text,
            "eos_text": self.eos_text,
            "concat_tokens": self.concat_tokens,
            "no_wrap": self.no_wrap,
            "compression": self.compression,
            "max_samples": self.max_samples,
            "block_bytes": self.block_bytes,
        }


# --- reading ahead -------------------------------------------------------------------------------


class StreamReader:
    """Read the blocks of a stream in a thread, at most one ahead.

    A finished block is given as None; a compressed stream must still be read through it.
    """

    def __init__(self, index: int, stream: Stream, blocks: int | None, wake: Connection):
        self.index = index
        self.stream = stream
        self.known_blocks = blocks
        self.wake = wake
        self.queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
        self.stopping = threading.Event()
        self.done_blocks: set[int] = set()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self, done_blocks: set[int], block_bytes: int) -> None:
        """Start reading."""
        self.done_blocks = done_blocks
        self.block_bytes = block_bytes
        self.thread.start()

    def stop(self) -> None:
        """Stop reading, and drop what was read."""
        self.stopping.set()

    def _run(self) -> None:
        try:
            for number, block in enumerate(self._blocks()):
                self._put(("block", None if number in self.done_blocks else block))
                if self.stopping.is_set():
                    return
            self._put(("end", None))
        except Exception as error:
            self._put(("error", error))

    def _blocks(self) -> Iterator[Block | None]:
        known = self.known_blocks
        if known is not None and len(self.done_blocks) == known:
            return iter([None] * known)
        return iter(self.stream.blocks(self.block_bytes))

    def _put(self, item: tuple[str, Any]) -> None:
        while not self.stopping.is_set():
            try:
                self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            self.wake.send_bytes(b".")
            return


# --- order ---------------------------------------------------------------------------------------


@dataclass
class StreamState:
    """The state of a stream: which of its blocks have been given their place in the output."""

    reader: StreamReader
    rest: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    handed_out: int = 0
    next_to_place: int = 0
    summaries: dict[int, tuple["WorkerHandle | None", Any]] = field(default_factory=dict)
    ended: bool = False

    @property
    def finished(self) -> bool:
        """Whether all its blocks are placed."""
        return self.ended and self.next_to_place == self.handed_out


@dataclass
class WorkerHandle:
    """What the main process knows about a worker process."""

    process: BaseProcess
    connection: Connection
    busy_with: str = ""
    held: int = 0
    to_write: deque[tuple[Key, Placement]] = field(default_factory=deque)
    progress: tuple[int, int] = (0, 0)


class Progress:
    """The progress bar, in samples or documents if their number is known, else in bytes."""

    def __init__(self, job: Job):
        self.by_samples = job.max_samples is not None
        total = job.max_samples if self.by_samples else job.expected_documents
        self.by_documents = not self.by_samples and total is not None
        if total is None:
            total = sum(file.size for file in job.files) or None
        counted = self.by_samples or self.by_documents
        unit = ("samples" if self.by_samples else "docs") if counted else "B"
        self.bar = tqdm(total=total, desc=job.out.name, unit=unit, unit_scale=not self.by_samples)
        self.began = time.monotonic()
        self.documents = self.text_bytes = 0
        self.stored = 0

    def read(self, documents: int, text_bytes: int) -> None:
        """Count documents as they are read."""
        self.documents += documents
        self.text_bytes += text_bytes
        seconds = max(time.monotonic() - self.began, 1e-3)
        self.bar.set_postfix_str(
            f"{self.documents / seconds:,.0f} docs/s, {self.text_bytes / 1e6 / seconds:.1f} MB/s",
            refresh=False,
        )
        self.bar.update(documents if self.by_documents else 0)

    def close(self) -> None:
        """End the bar; the input may have fewer samples than expected."""
        if self.by_samples:
            self.bar.total = self.bar.n
        self.bar.close()

    def kept(self, record: dict[str, Any]) -> None:
        """Count a block of an earlier run, without adding to this run's rate."""
        self.placed(record["samples"], record["stored"])
        self.bar.update(record["counts"]["documents"] if self.by_documents else 0)

    def placed(self, samples: int, stored: int) -> None:
        """Count samples that have their place in the output."""
        if self.by_samples:
            self.bar.update(samples)
        elif not self.by_documents:  # estimated within a compressed file
            self.bar.update(min(stored, max(0, (self.bar.total or stored) - self.bar.n)))


class Conversion:
    """One run over one split."""

    def __init__(self, job: Job, folder: PartialFolder, tokenizer: Tokenizer | None, workers: int):
        self.job = job
        self.folder = folder
        self.tokenizer = tokenizer
        self.output = Output(folder.path, job.compression, job.concat_tokens, job.no_wrap)
        self.num_workers = workers
        self.workers: list[WorkerHandle] = []
        self.records: dict[Key, dict[str, Any]] = {}
        self.kept: set[Key] = set()
        self.stored: dict[Key, int] = {}
        self.streams: list[Stream] = []
        self.active: dict[int, StreamState] = {}
        self.rests: dict[int, Tokens] = {}
        self.samples = 0
        self.wake_receive, self.wake_send = multiprocessing.Pipe(duplex=False)

    # --- the run ---

    def run(self, records: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
        """Write all blocks without a record; return all records in order."""
        self.records = records
        self.kept = set(records)
        self._start_workers()
        try:
            self.streams = self.job.streams()
            self.progress = Progress(self.job)
            try:
                self._loop()
            finally:
                self.progress.close()
        finally:
            self._stop()
        if not self.full:
            self._join_rests()
        return [record for _, record in sorted(self.records.items())]

    @property
    def full(self) -> bool:
        """Whether the split has `max_samples` samples."""
        return self.job.max_samples is not None and self.samples >= self.job.max_samples

    def _loop(self) -> None:
        self.waiting_streams = deque(range(len(self.streams)))
        while True:
            self._open_streams()
            for worker in self.workers:
                if not worker.busy_with:
                    self._give_work(worker)
            writing = any(w.busy_with == "write" or w.to_write for w in self.workers)
            if self.full and not writing:
                return
            working = any(w.busy_with for w in self.workers)
            if working or writing or self.active:
                self._receive()
            elif not self.waiting_streams:
                return

    def _open_streams(self) -> None:
        # With max_samples the order decides which samples are kept: read one stream at a time.
        at_once = 1 if self.job.max_samples else min(MAX_STREAMS_AT_ONCE, self.num_workers)
        while self.waiting_streams and len(self.active) < at_once and not self.full:
            index = self.waiting_streams.popleft()
            blocks = self.folder.stream_blocks(index)
            reader = StreamReader(index, self.streams[index], blocks, self.wake_send)
            done = {block for stream, block in self.kept if stream == index}
            reader.start(done, self.job.block_bytes)
            self.active[index] = StreamState(reader)

    def _give_work(self, worker: WorkerHandle) -> None:
        if worker.to_write:
            self._send(worker, "write", *worker.to_write.popleft())
        elif worker.held < MAX_HELD and not self.full and (found := self._next_block()):
            worker.held += 1
            self._send(worker, "prepare", *found)

    def _send(self, worker: WorkerHandle, action: str, key: Key, content: Any) -> None:
        # Send to an idle worker only: if both sides sent at once, both could block.
        assert not worker.busy_with
        worker.busy_with = action
        try:
            worker.connection.send((action, key, content))
        except BrokenPipeError:
            self._worker_died(worker)

    def _next_block(self) -> tuple[Key, Block] | None:
        for index, stream in list(self.active.items()):
            while True:
                try:
                    kind, content = stream.reader.queue.get_nowait()
                except queue.Empty:
                    break
                if kind == "error":
                    raise content
                if kind == "end":
                    stream.ended = True
                    self.folder.set_stream_blocks(index, stream.handed_out)
                    self._place(index)
                    break
                key = (index, stream.handed_out)
                stream.handed_out += 1
                if content is not None:
                    self.stored[key] = sum(documents.stored for documents in content)
                    return key, content
                stream.summaries[key[1]] = (None, None)
                self._place(index)
        return None

    def _receive(self) -> None:
        connections = {worker.connection: worker for worker in self.workers}
        for ready in wait([*connections, self.wake_receive]):
            if ready is self.wake_receive:
                while self.wake_receive.poll():
                    self.wake_receive.recv_bytes()
                continue
            worker = connections[ready]  # type: ignore[index]
            try:
                kind, key, content = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                self._worker_died(worker)
            self._handle(worker, kind, key, content)

    def _handle(self, worker: WorkerHandle, kind: str, key: Key, content: Any) -> None:
        if kind == "error":
            raise content
        if kind == "progress":
            before = worker.progress
            self.progress.read(content[0] - before[0], content[1] - before[1])
            worker.progress = content
            return
        worker.busy_with = ""
        if kind == "prepare done":
            worker.progress = (0, 0)
            self.active[key[0]].summaries[key[1]] = (worker, content)
            self._place(key[0])
        else:
            self.records[key] = content

    # --- order ---

    def _place(self, index: int) -> None:
        """Place the blocks of a stream whose predecessors are all placed."""
        stream = self.active[index]
        while stream.next_to_place in stream.summaries and not self.full:
            key = (index, stream.next_to_place)
            worker, summary = stream.summaries.pop(stream.next_to_place)
            stream.next_to_place += 1
            if worker is None:
                record = self.records[key]
                stream.rest = np.asarray(record["rest"], np.int32)
                self.samples += record["samples"]
                self.progress.kept(record)
                continue
            placement = self._placement(stream.rest, summary, self.stored.pop(key))
            stream.rest = placement.rest_after
            worker.held -= 1
            worker.to_write.append((key, placement))
            self.samples += placement.samples
            self.progress.placed(placement.samples, placement.stored)
        if stream.finished:
            self.rests[index] = stream.rest
            del self.active[index]

    def _placement(self, rest_before: Tokens, summary: Summary, stored: int) -> Placement:
        length = self.job.concat_tokens
        if length is None:
            samples, rest_after = summary.counts.documents, rest_before
        else:
            no_wrap = self.job.no_wrap
            starts, left = cut_tokens(summary.lengths, len(rest_before), length, no_wrap)
            samples = len(starts)
            rest_after = np.concatenate([rest_before, summary.tail])
            rest_after = rest_after[len(rest_after) - left :]
        if self.job.max_samples is not None:
            samples = min(samples, self.job.max_samples - self.samples)
        return Placement(rest_before, rest_after, samples, stored)

    def _join_rests(self) -> None:
        """Cut the rests of all streams to samples; only the last incomplete sample is lost."""
        length, key = self.job.concat_tokens, (len(self.streams), 0)
        if length is None or len(self.streams) < 2 or key in self.records:
            return
        rests = [self.rests[index] for index in sorted(self.rests)]
        starts, _ = cut_tokens([len(rest) for rest in rests], 0, length, self.job.no_wrap)
        tokens = np.concatenate(rests)
        samples = [tokens[start : start + length] for start in starts]
        empty = np.empty(0, np.int32)
        self.records[key] = write_block(key, samples, Counts(), empty, 0, self.output)

    # --- processes ---

    def _start_workers(self) -> None:
        # Fork before there are threads, and after the imports, which the workers then share.
        context = multiprocessing.get_context("fork")
        ours: list[Connection] = []
        for _ in range(self.num_workers):
            our_end, their_end = context.Pipe()
            ours.append(our_end)
            arguments = (their_end, list(ours), self.job.options, self.tokenizer, self.output)
            process = context.Process(target=worker_main, args=arguments, daemon=True)
            process.start()
            their_end.close()
            self.workers.append(WorkerHandle(process, our_end))

    def _worker_died(self, worker: WorkerHandle) -> None:
        worker.process.join(5)
        code = worker.process.exitcode
        raise ConversionError(
            f"a worker process ended unexpectedly (exit code {code}; -9 usually means too little "
            "memory: try fewer --num_workers). Run the same command again to continue"
        )

    def _stop(self) -> None:
        for stream in self.active.values():
            stream.reader.stop()
        # Nothing is lost: a block counts once its record is written. SIGTERM does not always end a
        # worker, since a fork inherits Python handlers that programs such as Composer install.
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()
        for stream in self.active.values():  # so that the next split forks without threads
            stream.reader.thread.join(timeout=1)


# --- the split -----------------------------------------------------------------------------------


def _finished_already(job: Job) -> bool:
    """Return whether the split is finished; raise if the folder has other settings or content."""
    if not job.out.exists() or (job.out.is_dir() and not any(job.out.iterdir())):
        return False
    manifest = read_manifest(job.out)
    if manifest is None:
        raise ConversionError(
            f"{job.out} exists, is not empty, and was not written by this program. Choose another "
            "--out_root, or pass --overwrite to remove it"
        )
    if manifest["settings"] != job.settings():
        changed = differences(manifest["settings"], job.settings())
        raise ConversionError(
            f"{job.out} is finished, with other settings ({changed}). Choose another --out_root, "
            "or pass --overwrite to convert again"
        )
    return True


def _partial_settings(job: Job, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the settings that must not change while a conversion is unfinished."""
    settings = job.settings()
    settings["inputs"] = [[file.path, file.mtime_ns] for file in job.files]
    settings["tokenizer_hash"] = tokenizer.fingerprint() if tokenizer else None
    return settings


def _out_of_space(job: Job, partial: Path) -> ConversionError:
    free = shutil.disk_usage(partial if partial.exists() else job.out.parent).free
    written = sum(p.stat().st_size for p in partial.glob("part-*"))
    text = text_bytes_estimate(list(job.files))
    need = "some space"
    if text:
        more = max(text - written, 0)
        need = f"about {more / 1e6:,.0f} MB more for {text / 1e6:,.0f} MB of input"
    return ConversionError(
        f"no space left on the disk of {partial} ({free / 1e6:,.1f} MB free, "
        f"{written / 1e6:,.1f} MB written). Nothing is lost: free {need}, then run the same "
        "command again to continue"
    )


def convert(
    job: Job, num_workers: int | None = None, overwrite: bool = False, alone: bool = False
) -> int:
    """Convert one split to MDS, or continue a conversion that was interrupted.

    Args:
        job: The conversion.
        num_workers: The worker processes; None means one per core. The output does not depend on
            it.
        overwrite: Whether to remove an existing split, finished or not.
        alone: Whether to import only some modules of `streaming`, in a process that needs no
            others.

    Returns:
        The number of samples in the split.

    Raises:
        ConversionError: If the conversion cannot continue; the message says what to do.
    """
    folder = PartialFolder(job.out, {})
    if overwrite:
        folder.remove()
    if _finished_already(job):
        manifest = read_manifest(job.out)
        assert manifest is not None
        folder.clean()
        log.info("%s is finished: %d samples, nothing to do", job.out, manifest["samples"])
        return int(manifest["samples"])
    if job.concat_tokens is not None and job.tokenizer is None:
        raise ConversionError("--concat_tokens needs a --tokenizer")
    began = time.monotonic()
    is_compression = mds(alone).is_compression
    if job.compression is not None and not is_compression(job.compression):
        raise ConversionError(f"--compression {job.compression}: unknown; try zstd or zstd:7")
    tokenizer = None
    if job.concat_tokens is not None and job.tokenizer is not None:
        tokenizer = Tokenizer(job.tokenizer, job.tokenizer_kwargs, job.bos_text, job.eos_text)
    folder.settings = _partial_settings(job, tokenizer)
    ready = time.monotonic()
    try:
        samples = _convert_in(folder, job, tokenizer, num_workers or len(os.sched_getaffinity(0)))
    except OSError as error:
        if is_disk_full(error):
            raise _out_of_space(job, folder.path) from error
        raise
    finally:
        folder.close()
    log.info(
        "%s: %d samples in %.1f s, and %.1f s to start",
        job.out, samples, time.monotonic() - ready, ready - began,
    )  # fmt: skip
    return samples


def _convert_in(
    folder: PartialFolder, job: Job, tokenizer: Tokenizer | None, num_workers: int
) -> int:
    records = folder.open()
    if folder.is_indexed():
        folder.publish()
        _finished_already(job)
        manifest = read_manifest(job.out)
        assert manifest is not None
        return int(manifest["samples"])
    if records:
        log.info("%s: continuing after %d finished blocks", job.out, len(records))
    done = Conversion(job, folder, tokenizer, num_workers).run(records)
    manifest = _manifest(job, done)
    _report_bad(manifest, done)
    if not manifest["samples"]:
        raise ConversionError(
            f"{job.out}: the input has no samples ({manifest['documents']} documents)"
        )
    folder.finish(done, manifest)
    return int(manifest["samples"])


def _manifest(job: Job, records: list[dict[str, Any]]) -> dict[str, Any]:
    shards = [shard for record in records for shard in record["shards"]]
    return {
        "settings": job.settings(),
        "samples": sum(record["samples"] for record in records),
        "documents": sum(record["counts"]["documents"] for record in records),
        "text_bytes": sum(record["counts"]["text_bytes"] for record in records),
        "bad_documents": sum(record["counts"]["bad"] for record in records),
        "content_digest": content_digest(shards),
    }


def _report_bad(manifest: dict[str, Any], records: list[dict[str, Any]]) -> None:
    if not manifest["bad_documents"]:
        return
    named = [name for record in records for name in record["counts"]["bad_named"]]
    log.warning(
        "skipped %d bad documents:\n  %s", manifest["bad_documents"], "\n  ".join(named[:50])
    )
