"""Convert one split: give its parts to workers, and put their shards together.

A task converts one block of files that can be cut, or every n-th block of a stream that must be
read from its beginning, which several tasks then read at once: to decompress text takes far less
time than to tokenise it. What a task converts depends on nothing but the input and the settings;
each block is cut to samples by itself. The records that tasks leave are the only state, so the main
process knows as much after it was killed as before.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m2_plugin.data.formats import is_remote
from m2_plugin.executor import Workers
from m2_plugin.files import is_disk_full
from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.conversion.folder import (
    Blocks,
    Key,
    PartialFolder,
    finished_samples,
)
from m2_plugin.foundry.conversion.job import Job
from m2_plugin.foundry.conversion.remote import begin_split, send_split
from m2_plugin.foundry.conversion.sources import (
    CuttableFiles,
    FilesInOrder,
    Stream,
    text_bytes_estimate,
)
from m2_plugin.foundry.conversion.worker import Part, check_recipe, convert_part

log = logging.getLogger(__name__)

# Tasks for each worker if files are read in order: more tasks end at more equal times, and read
# more often what others have read.
TASKS_PER_WORKER = 4

Record = dict[str, Any]


class Progress:
    """The progress bar, in samples or documents if their number is known, else in bytes."""

    def __init__(self, job: Job, blocks: Blocks):
        self.blocks = blocks
        self.seen: set[Key] = set()
        self.unit, total = "B", sum(file.size for file in job.files) or None
        if job.recipe.max_samples is not None:
            self.unit, total = "samples", job.recipe.max_samples
        elif job.expected_documents is not None:
            self.unit, total = "docs", job.expected_documents
        self.bar = tqdm(total=total, desc=job.out.name, unit=self.unit, unit_scale=True)
        self.documents = self.text_bytes = 0
        self.tick()  # what an earlier run converted adds nothing to the rates
        self.documents = self.text_bytes = 0
        self.began = time.monotonic()

    def tick(self) -> None:
        """Count the blocks that were finished since the last call."""
        for key in set(self.blocks.finished()) - self.seen:
            if (record := self.blocks.find(key)) is None:
                continue
            self.seen.add(key)
            self.documents += record["documents"]
            self.text_bytes += record["text_bytes"]
            done = {"B": "stored", "samples": "samples", "docs": "documents"}[self.unit]
            left = math.inf if self.bar.total is None else self.bar.total - self.bar.n
            self.bar.update(max(0, min(record[done], left)))

    def close(self) -> None:
        """End the bar, with the rates of this run."""
        seconds = max(time.monotonic() - self.began, 1e-3)
        self.bar.set_postfix_str(
            f"{self.documents / seconds:,.0f} docs/s, {self.text_bytes / 1e6 / seconds:.1f} MB/s"
        )
        self.bar.close()


# --- the parts -----------------------------------------------------------------------------------


def _parts(
    job: Job, blocks: Blocks, streams: list[tuple[int, Stream]], workers: int
) -> Iterator[Part]:
    """Yield what is left to convert of some streams."""
    in_order = sum(not isinstance(stream, CuttableFiles) for _, stream in streams)
    for number, stream in streams:
        common = blocks, job.recipe, job.skip_bad, number
        if isinstance(stream, CuttableFiles):
            for i, block in enumerate(stream.blocks(job.recipe.block_bytes)):
                if blocks.find((number, i)) is None:
                    yield Part(*common, block, first=i)
        elif not blocks.has_all(number):
            step = _tasks_of(stream, job.recipe.block_bytes, workers, in_order)
            for first in range(step):
                yield Part(*common, stream, first, step)


def _tasks_of(stream: Stream, block_bytes: int, workers: int, streams: int) -> int:
    """Return how many tasks share the blocks of a stream that is read in order."""
    if not isinstance(stream, FilesInOrder) or is_remote(stream.files[0].path):
        return 1  # do not download it twice
    about = math.ceil(text_bytes_estimate(stream.files) / block_bytes)
    return max(1, min(workers, about, math.ceil(TASKS_PER_WORKER * workers / streams)))


def _convert_blocks(job: Job, blocks: Blocks, workers: Workers) -> list[Record]:
    """Convert what is left; return the records of all blocks, in order."""
    streams = list(enumerate(job.streams()))
    # With `max_samples`, the first streams may be enough.
    groups = [[stream] for stream in streams] if job.recipe.max_samples else [streams]
    progress = Progress(job, blocks)
    try:
        for group in groups:
            if _is_enough(job, blocks, group[0][0]):
                break
            parts = _parts(job, blocks, group, workers.count())
            for _ in workers.run(convert_part, parts, progress.tick):
                pass
        progress.tick()
    finally:
        progress.close()
    return _first_samples(job, blocks, streams, workers)


def _is_enough(job: Job, blocks: Blocks, stream: int) -> bool:
    limit = job.recipe.max_samples
    return limit is not None and blocks.samples_before((stream, 0)) >= limit


def _first_samples(
    job: Job, blocks: Blocks, streams: list[tuple[int, Stream]], workers: Workers
) -> list[Record]:
    """Return the records in order, up to `max_samples`; the last block is cut for that."""
    left: float = math.inf if job.recipe.max_samples is None else job.recipe.max_samples
    records = []
    for key in blocks.finished():
        record = blocks.find(key)
        if left and record is not None and record["samples"] > left:
            number, stream = streams[key[0]]
            part = Part(
                blocks, job.recipe, job.skip_bad, number, stream, first=key[1], limit=int(left)
            )
            list(workers.run(convert_part, [part]))
            record = blocks.find(key)
        if left and record is not None:
            records.append(record)
            left -= record["samples"]
    return records


# --- the split -----------------------------------------------------------------------------------


def _out_of_space(job: Job, folder: PartialFolder) -> ConversionError:
    free = shutil.disk_usage(folder.path).free
    written = 0
    for path in folder.path.glob("shards-*/*"):
        with suppress(FileNotFoundError):  # other workers still write, and rename what is whole
            written += path.stat().st_size
    need = "some space"
    if text := text_bytes_estimate(job.files):
        more = max(text - written, 0)
        need = f"about {more / 1e6:,.0f} MB more for {text / 1e6:,.0f} MB of input"
    return ConversionError(
        f"no space left on the disk of {folder.path} ({free / 1e6:,.1f} MB free, "
        f"{written / 1e6:,.1f} MB written). Nothing is lost: free {need}, then run the same "
        "command again to continue"
    )


def convert(job: Job, workers: Workers, overwrite: bool = False) -> int:
    """Convert one split to MDS, or continue a conversion that was interrupted.

    A split with a URL is converted into its local folder, and sent when it is finished.

    Args:
        job: The conversion.
        workers: What converts the blocks. The output does not depend on their number.
        overwrite: Whether to remove an existing split, finished or not.

    Returns:
        The number of samples in the split.

    Raises:
        ValueError: If the conversion cannot continue; the message says what to do.
        OSError: If a disk or the storage of a URL fails.
        WorkersError: If a worker died.
    """
    settings = job.settings()
    if job.url:
        samples = begin_split(job.url, settings, overwrite)
        if samples is not None:
            return _report_finished(job.url, samples)
    samples = _convert_here(job, settings, workers, overwrite)
    if job.url:
        send_split(job.out, job.url, workers)
    return samples


def _convert_here(job: Job, settings: Record, workers: Workers, overwrite: bool) -> int:
    """Convert a split into its local folder."""
    folder = PartialFolder(job.out)
    samples = None if overwrite else finished_samples(job.out, settings)
    if samples is None:
        about_tokenizer = next(workers.run(check_recipe, [job.recipe]))
    elif not folder.path.exists():
        return _report_finished(job.out, samples)
    with folder.locked():
        if overwrite:
            folder.remove()
        elif (samples := finished_samples(job.out, settings)) is not None:
            folder.clean()
            return _report_finished(job.out, samples)
        try:
            return _convert_in(folder, job, about_tokenizer, workers)
        except OSError as error:
            if is_disk_full(error):
                raise _out_of_space(job, folder) from error
            raise


def _report_finished(place: Path | str, samples: int) -> int:
    log.info("%s is finished: %d samples, nothing to do", place, samples)
    return samples


def _convert_in(folder: PartialFolder, job: Job, about_tokenizer: Record, workers: Workers) -> int:
    began = time.monotonic()
    inputs = [[file.path, file.version] for file in job.files]
    blocks = folder.open(job.settings() | about_tokenizer | {"inputs": inputs})
    if found := len(blocks.finished()):
        log.info("%s: continuing after %d finished blocks", job.out, found)
    records = _convert_blocks(job, blocks, workers)
    totals = {
        key: sum(record[key] for record in records)
        for key in ("samples", "documents", "text_bytes", "bad", "tokens", "dropped")
    }
    if totals["bad"]:
        named = [name for record in records for name in record["bad_named"]]
        log.warning("skipped %d bad documents:\n  %s", totals["bad"], "\n  ".join(named[:50]))
    if not totals["samples"]:
        raise ConversionError(
            f"{job.out}: the input has no samples ({totals['documents']} documents)"
        )
    entries = [entry for record in records for entry in record["shards"]]
    folder.finish(blocks, entries, {"settings": job.settings()} | about_tokenizer | totals)
    log.info("%s: %d samples in %.1f s", job.out, totals["samples"], time.monotonic() - began)
    if totals["dropped"]:
        share = totals["dropped"] / totals["tokens"]
        log.info("%s: %.4f%% of the tokens filled no sample", job.out, 100 * share)
    return int(totals["samples"])
