"""A worker process: it prepares and writes blocks for the main process."""

import contextlib
import ctypes
import os
import shutil
import signal
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from m2_plugin.files import write_json
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError, is_disk_full
from m2_plugin.foundry.conversion.folder import Key
from m2_plugin.foundry.conversion.mds import mds
from m2_plugin.foundry.conversion.samples import (
    Counts,
    Prepared,
    TextOptions,
    Tokenizer,
    Tokens,
    cut_tokens,
    prepare_text,
    prepare_tokens,
)
from m2_plugin.foundry.conversion.sources import Block
from m2_plugin.foundry.mds_index import shard_file

HASHES = ["xxh64"]
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Output:
    """How samples are written.

    Args:
        partial: The partial folder.
        compression: The `compression` of `MDSWriter`: "zstd", "zstd:7" ...
        concat_tokens: The tokens in a sample; None writes texts.
        no_wrap: Whether to drop the rest of a document in which a sample ended.
    """

    partial: Path
    compression: str | None = None
    concat_tokens: int | None = None
    no_wrap: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """Return the columns that llm-foundry's `text` dataloader reads."""
        return {"text": "str"} if self.concat_tokens is None else {"tokens": "ndarray:int32"}


@dataclass(frozen=True)
class Summary:
    """What the main process needs to know about a prepared block to find its place."""

    counts: Counts
    tail: Tokens  # the last tokens, at most one fewer than a sample
    lengths: list[int]  # tokens in each document; with wrapping, their sum alone


@dataclass(frozen=True)
class Placement:
    """The place of a block: the tokens that are left over before it and after it."""

    rest_before: Tokens
    rest_after: Tokens
    samples: int  # the number of its samples to write: fewer than all at the end of the split
    stored: int  # bytes of input, for the progress bar


# --- writing -------------------------------------------------------------------------------------


def token_samples(prepared: Prepared, placement: Placement, output: Output) -> list[Tokens]:
    """Cut the tokens left over before a block, and its own tokens, into samples."""
    assert output.concat_tokens is not None
    length = output.concat_tokens
    starts, _ = cut_tokens(prepared.lengths, len(placement.rest_before), length, output.no_wrap)
    tokens = np.concatenate([placement.rest_before, prepared.tokens])
    return [tokens[start : start + length] for start in starts]


def _digests(samples: list[Any], counts: list[int]) -> Iterator[str]:
    begin = 0
    for count in counts:
        yield samples_digest(samples[begin : begin + count])
        begin += count


def samples_digest(samples: list[Any]) -> str:
    """Hash length and content of each sample, independent of the files."""
    import xxhash

    state = xxhash.xxh3_128()
    for sample in samples:
        data = sample.encode() if isinstance(sample, str) else sample.tobytes()
        state.update(b"%d\n" % len(data))
        state.update(data)
    return str(state.hexdigest())


def write_block(
    key: Key, samples: list[Any], counts: Counts, rest_after: Tokens, stored: int, output: Output
) -> dict[str, Any]:
    """Write the shards of a block, and then its record; without the record it does not count."""
    name = f"{key[0]:05}-{key[1]:05}"
    tmp = output.partial / "tmp" / name
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        shards = _write_shards(name, samples, tmp, output)
        record = {
            "samples": len(samples),
            "counts": asdict(counts),
            "rest": rest_after.tolist(),
            "stored": stored,
            "shards": shards,
        }
        write_json(output.partial / "records" / f"{name}.json", record, indent=None)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return record


def _write_shards(name: str, samples: list[Any], tmp: Path, output: Output) -> list[dict[str, Any]]:
    if not samples:
        return []
    # Not as a context manager: its exit writes an index even after an error.
    writer = mds().MDSWriter(
        columns=output.columns, out=str(tmp), compression=output.compression, hashes=HASHES
    )
    column = next(iter(output.columns))
    for sample in samples:
        writer.write({column: sample})
    writer.finish()
    shards = []
    digests = _digests(samples, [entry["samples"] for entry in writer.shards])
    for i, (entry, digest) in enumerate(zip(writer.shards, digests, strict=True)):
        basename = shard_file(entry)["basename"]
        file = f"part-{name}.{i:05}.{basename.split('.', 2)[2]}"
        os.replace(tmp / basename, output.partial / file)
        shards.append({"file": file, "entry": entry, "samples": entry["samples"], "digest": digest})
    return shards


# --- the process ---------------------------------------------------------------------------------


def _count_written(counts: Counts, samples: list[Any]) -> None:
    """Count the documents again if the split ends within a block."""
    if samples and isinstance(samples[0], str):
        counts.documents = len(samples)
        counts.text_bytes = sum(len(text.encode()) for text in samples)


class Worker:
    """Serve the main process's requests: ("prepare", key, block) and ("write", key, placement)."""

    def __init__(
        self,
        connection: Connection,
        options: TextOptions,
        tokenizer: Tokenizer | None,
        output: Output,
    ):
        self.connection = connection
        self.options = options
        self.tokenizer = tokenizer
        self.output = output
        self.prepared: dict[Key, Prepared] = {}

    def run(self) -> None:
        """Serve until the main process kills this process or closes the connection."""
        while True:
            action, key, content = self.connection.recv()
            answer = self.prepare(key, content) if action == "prepare" else self.write(key, content)
            self.connection.send((f"{action} done", key, answer))

    def prepare(self, key: Key, block: Block) -> Summary:
        """Read a block, and keep it until its place is known."""
        if self.tokenizer is None:
            prepared = prepare_text(block, self.options, self.progress)
            lengths = []
        else:
            prepared = prepare_tokens(block, self.options, self.tokenizer, self.progress)
            no_wrap = self.output.no_wrap
            lengths = prepared.lengths if no_wrap else [sum(prepared.lengths)]
        self.prepared[key] = prepared
        most = (self.output.concat_tokens or 1) - 1
        tail = prepared.tokens[max(0, len(prepared.tokens) - most) :].copy()
        return Summary(prepared.counts, tail, lengths)

    def write(self, key: Key, placement: Placement) -> dict[str, Any]:
        """Write a prepared block."""
        prepared = self.prepared.pop(key)
        samples: list[Any] = prepared.texts
        if self.tokenizer is not None:
            samples = token_samples(prepared, placement, self.output)
        if len(samples) > placement.samples:
            samples = samples[: placement.samples]
            _count_written(prepared.counts, samples)
        rest_after, stored = placement.rest_after, placement.stored
        return write_block(key, samples, prepared.counts, rest_after, stored, self.output)

    def progress(self, counts: Counts) -> None:
        """Report the progress of a block."""
        self.connection.send(("progress", None, (counts.documents, counts.text_bytes)))


def _die_with_parent() -> None:
    # Otherwise a worker whose parent was killed finishes its block first, and holds the lock.
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def worker_main(
    connection: Connection,
    others: list[Connection],
    options: TextOptions,
    tokenizer: Tokenizer | None,
    output: Output,
) -> None:
    """Run a worker in a forked process.

    Args:
        connection: The connection to the main process.
        others: The main process's ends of the pipes, which the fork inherits. While they are open
            here, this worker and earlier ones cannot notice that the main process has ended.
        options: How documents are read.
        tokenizer: The tokenizer, for samples of tokens.
        output: How samples are written.
    """
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes run in parallel already
    for other in others:
        other.close()
    try:
        Worker(connection, options, tokenizer, output).run()
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        connection.send(("error", None, _for_main_process(error)))


def _for_main_process(error: Exception) -> Exception:
    if isinstance(error, BadDocumentError | ConversionError) or is_disk_full(error):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))
