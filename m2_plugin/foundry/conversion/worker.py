"""A worker process: prepares blocks and writes them, as the main process asks it to."""

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
        compression: As for `MDSWriter`: "zstd", "zstd:7" ...
        concat_tokens: Tokens in a sample; None writes the text.
        no_wrap: As in `cut_tokens`.
    """

    partial: Path
    compression: str | None = None
    concat_tokens: int | None = None
    no_wrap: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """Return the columns that the host's `text` dataloader reads."""
        return {"text": "str"} if self.concat_tokens is None else {"tokens": "ndarray:int32"}


@dataclass(frozen=True)
class Summary:
    """What the main process has to know of a prepared block to place it in the whole."""

    counts: Counts
    tail: Tokens  # the last tokens, at most one fewer than a sample
    lengths: list[int]  # tokens in each document; with wrapping, their sum alone


@dataclass(frozen=True)
class Placement:
    """Where a block stands: what the blocks before left over, and what it leaves over itself."""

    carry: Tokens
    carry_out: Tokens
    samples: int  # how many of its samples are written: fewer than it has where the split ends
    stored: int  # bytes of input, for the progress bar of a run that goes on


# --- writing -------------------------------------------------------------------------------------


def token_samples(prepared: Prepared, placement: Placement, output: Output) -> list[Tokens]:
    """Cut a prepared block into samples, together with what was left over before it."""
    assert output.concat_tokens is not None
    length = output.concat_tokens
    starts, _ = cut_tokens(prepared.lengths, len(placement.carry), length, output.no_wrap)
    stream = np.concatenate([placement.carry, prepared.tokens])
    return [stream[start : start + length] for start in starts]


def _digests(samples: list[Any], counts: list[int]) -> Iterator[str]:
    begin = 0
    for count in counts:
        yield samples_digest(samples[begin : begin + count])
        begin += count


def samples_digest(samples: list[Any]) -> str:
    """Hash samples: each one's length and content, whatever file they are in."""
    import xxhash

    state = xxhash.xxh3_128()
    for sample in samples:
        data = sample.encode() if isinstance(sample, str) else sample.tobytes()
        state.update(b"%d\n" % len(data))
        state.update(data)
    return str(state.hexdigest())


def write_part(
    key: Key, samples: list[Any], counts: Counts, carry_out: Tokens, stored: int, output: Output
) -> dict[str, Any]:
    """Write the shards of one block and its record, which is what makes it count."""
    name = f"{key[0]:05}-{key[1]:05}"
    tmp = output.partial / "tmp" / name
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        shards = _write_shards(name, samples, tmp, output)
        record = {
            "samples": len(samples),
            "counts": asdict(counts),
            "carry_out": carry_out.tolist(),
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
    # Not as a context manager: leaving one writes an index even after an error.
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
    """Count the documents again where the split ends within a block of them."""
    if samples and isinstance(samples[0], str):
        counts.documents = len(samples)
        counts.text_bytes = sum(len(text.encode()) for text in samples)


class Worker:
    """Answers the main process: ("prepare", key, block) and ("write", key, placement)."""

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
        """Answer until the other side kills this process or hangs up."""
        while True:
            action, key, content = self.connection.recv()
            answer = self.prepare(key, content) if action == "prepare" else self.write(key, content)
            self.connection.send((f"{action} done", key, answer))

    def prepare(self, key: Key, block: Block) -> Summary:
        """Read a block, and keep it until it is known what comes before."""
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
        carry_out, stored = placement.carry_out, placement.stored
        return write_part(key, samples, prepared.counts, carry_out, stored, self.output)

    def progress(self, counts: Counts) -> None:
        """Tell how far the block is."""
        self.connection.send(("progress", None, (counts.documents, counts.text_bytes)))


def _die_with_parent() -> None:
    # Without it a worker whose parent was killed finishes its block first, holding the lock.
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux
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
        connection: To the main process.
        others: The main process's ends, inherited by the fork. Open here, they would keep this
            worker and those before it from noticing that the main process is gone.
        options: What is read.
        tokenizer: For samples of tokens.
        output: What is written.
    """
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the parallelism is that of the processes
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
