"""A block of input into samples: parse, select, tokenise, cut to length."""

import codecs
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError
from m2_plugin.foundry.conversion.sources import (
    MAX_DOCUMENT_BYTES,
    Block,
    Segment,
    is_corrupt_stream,
    open_parquet,
    open_stream,
)

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]

# Text handed to the tokenizer at once: large enough for its call to cost nothing, small in memory.
BATCH_CHARS = 1 << 20
# Bad documents a block remembers by file and line; the others are only counted.
MAX_BAD_NAMED = 20


@dataclass(frozen=True)
class TextOptions:
    """What is read of the input.

    Args:
        text_column: The key or column that holds the text.
        max_chars_per_doc: Documents are cut to their first so many characters.
        held_out: Keep only the held-out documents (True), only the others (False), or all (None).
        val_fraction: The share of documents that is held out, chosen by a hash of their text.
        skip_bad: Count bad documents and go on, instead of raising.
    """

    text_column: str = "text"
    max_chars_per_doc: int | None = None
    held_out: bool | None = None
    val_fraction: float = 0.0
    skip_bad: bool = False


# --- reading -------------------------------------------------------------------------------------

# A document, or what is wrong with it, after where it stands: its line (or how to find the line).
Line = int | Callable[[], int]
Item = tuple[Line, Any]


class _LineCounter:
    """Counts the lines before a byte of a file, going on from the last place asked for."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, int]] = {}

    def lines_before(self, path: str, offset: int) -> int:
        position, lines = self.known.get(path, (0, 0))
        if offset < position:
            position, lines = 0, 0
        with open(path, "rb") as file:
            file.seek(position)
            while position < offset and (data := file.read(min(1 << 20, offset - position))):
                lines += data.count(b"\n")
                position += len(data)
        self.known[path] = (position, lines)
        return lines


_line_counter = _LineCounter()


def _line_number(path: str, offset: int) -> int:
    return 1 + _line_counter.lines_before(path, offset)


def _range_lines(segment: Segment) -> Iterator[tuple[Line, bytes]]:
    """Yield the lines that begin in a byte range; their numbers are counted only if asked for."""
    with open(segment.path, "rb") as file:
        position = segment.start
        if position:  # the line that began before belongs to the range before
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < segment.end and (line := file.readline()):
            yield partial(_line_number, segment.path, position), line
            position += len(line)


def _decode(data: bytes) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error})") from None


def _parse_json(line: bytes, column: str) -> Any:
    text = _decode(line)
    try:
        return json.loads(text)[column]
    except KeyError:
        raise ValueError(f"no key {column!r} (--text_column)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    except (TypeError, IndexError):
        raise ValueError("not a JSON object (one per line is wanted, not an array)") from None


def _line_items(segment: Segment, column: str) -> Iterator[Item]:
    lines: Iterable[tuple[Line, bytes]]
    if segment.kind == "range":
        lines = _range_lines(segment)
    else:
        lines = enumerate(segment.data.split(b"\n"), segment.start)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            if segment.layout == "json":
                yield number, _parse_json(line, column)
            else:
                yield number, _decode(line.rstrip(b"\r\n"))
        except ValueError as error:
            yield number, error


def _paragraph_items(segment: Segment) -> Iterator[Item]:
    line = segment.start
    for paragraph in segment.data.split(b"\n\n"):
        try:
            if paragraph.strip():
                yield line, _decode(paragraph).strip("\n")
        except ValueError as error:
            yield line, error
        line += paragraph.count(b"\n") + 2


def _file_items(segment: Segment) -> Iterator[Item]:
    try:
        with open_stream(segment.path) as file:
            data = file.read()
        text = _decode(data).replace("\r\n", "\n")
    except Exception as error:
        if not isinstance(error, ValueError) and not is_corrupt_stream(error):
            raise
        yield 1, ValueError(str(error))
    else:
        if text.strip():
            yield 1, text


def _row_items(segment: Segment, column: str) -> Iterator[Item]:
    file = open_parquet(segment.path, column)
    number = 1 + sum(file.metadata.row_group(i).num_rows for i in range(segment.start))
    groups = list(range(segment.start, segment.end))
    batches = file.iter_batches(
        batch_size=512, row_groups=groups, columns=[column], use_threads=False
    )
    for batch in batches:
        yield from enumerate(batch.column(0).to_pylist(), number)
        number += len(batch)


def _items(segment: Segment, column: str) -> Iterator[Item]:
    if segment.kind == "bad":
        return iter([(segment.start, ValueError(segment.data))])
    if segment.kind == "texts":
        return iter(enumerate(segment.data, segment.start))
    if segment.kind == "rows":
        return _row_items(segment, column)
    if segment.kind == "file":
        return _file_items(segment)
    if segment.layout == "paragraph":
        return _paragraph_items(segment)
    return _line_items(segment, column)


def _utf8(text: Any) -> bytes:
    """Encode a document, or say why it is none."""
    if isinstance(text, ValueError):
        raise text
    if not isinstance(text, str):
        raise ValueError(f"the text is {type(text).__name__}, not a string (--text_column)")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair: not text") from None
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"a document of {len(data)} bytes; the most is {MAX_DOCUMENT_BYTES}")
    return data


@dataclass
class Counts:
    """What went into a block."""

    documents: int = 0
    text_bytes: int = 0
    bad: int = 0
    bad_named: list[str] = field(default_factory=list)

    def add_bad(self, message: str) -> None:
        """Count a document that cannot be used, and keep the first few messages."""
        self.bad += 1
        if len(self.bad_named) < MAX_BAD_NAMED:
            self.bad_named.append(message)


def read_texts(block: Block, options: TextOptions, counts: Counts) -> Iterator[str]:
    """Yield the documents of a block that belong to the split, and count them."""
    import xxhash

    threshold = int(options.val_fraction * 2**64)
    for segment in block:
        for line, text in _items(segment, options.text_column):
            try:
                data = _utf8(text)
            except ValueError as error:
                number = line() if callable(line) else line
                message = f"{segment.path}:{number}: {error}"
                if not options.skip_bad:
                    raise BadDocumentError(message) from error
                counts.add_bad(message)
                continue
            if options.held_out is not None:
                held_out = xxhash.xxh64_intdigest(data) < threshold
                if held_out != options.held_out:
                    continue
            counts.documents += 1
            counts.text_bytes += len(data)
            yield text[: options.max_chars_per_doc]


# --- tokenising ----------------------------------------------------------------------------------


class Tokenizer:
    """Documents to token ids, with the host's bos and eos texts around each.

    Args:
        name: A name on the hub or a folder, as for `AutoTokenizer`.
        kwargs: Further arguments of `AutoTokenizer.from_pretrained`.
        bos_text: Put before each document; it is tokenised without special tokens.
        eos_text: Put after each document.
    """

    def __init__(self, name: str, kwargs: dict[str, Any], bos_text: str, eos_text: str):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        except Exception as error:
            raise ConversionError(
                f"--tokenizer {name}: cannot be loaded ({type(error).__name__}: {error})"
            ) from error
        tokenizer.model_max_length = int(1e30)  # lengths are ours to cut: no warnings
        self._tokenizer = tokenizer
        self.bos = self._plain(bos_text)
        self.eos = self._plain(eos_text)
        if tokenizer("test")["input_ids"] == self._plain("test").tolist():
            if not bos_text + eos_text:
                raise ConversionError(
                    f"--tokenizer {name} adds no special tokens, so documents would be joined "
                    "without a mark between them: give --eos_text (or --bos_text)"
                )
        elif bos_text + eos_text:
            log.warning(
                "the tokenizer adds special tokens itself; --bos_text and --eos_text come on top"
            )
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            # The call without offsets; older versions of tokenizers do not have it.
            self._encode_batch = getattr(backend, "encode_batch_fast", backend.encode_batch)

    def _plain(self, text: str) -> Tokens:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def fingerprint(self) -> str:
        """Return a hash that changes when the tokenizer gives other tokens."""
        import xxhash

        if self._tokenizer.is_fast:
            data = self._tokenizer.backend_tokenizer.to_str()
        else:
            data = json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        return str(xxhash.xxh64_hexdigest(data.encode()))

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Tokenise documents, each between the bos and the eos tokens."""
        if self._tokenizer.is_fast:
            ids = [encoding.ids for encoding in self._encode_batch(texts)]
        else:
            ids = self._tokenizer(texts, truncation=False, padding=False)["input_ids"]
        return [np.concatenate([self.bos, np.asarray(i, np.int32), self.eos]) for i in ids]


def cut_tokens(
    documents: list[int], carry: int, length: int, no_wrap: bool
) -> tuple[list[int], int]:
    """Say where sequences of a given length begin in a stream of documents.

    With wrapping they follow each other. Without, the rest of the document in which one ended is
    dropped, as llm-foundry's `ConcatTokensDataset` does.

    Args:
        documents: Tokens in each document.
        carry: Tokens left over from before, which come first.
        length: Tokens in a sequence.
        no_wrap: Whether a sequence must begin where a document begins.

    Returns:
        The starts, and how many tokens are left over at the end.
    """
    total = carry + sum(documents)
    if not no_wrap:
        return list(range(0, total - length + 1, length)), total % length
    starts, begin, end = [], 0, carry
    for document in documents:
        end += document
        if end - begin >= length:
            starts.append(begin)
            begin = end
    return starts, end - begin


# --- blocks --------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A block read and tokenised, before it is known what was left over by the block before."""

    counts: Counts
    texts: list[str] = field(default_factory=list)
    tokens: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    lengths: list[int] = field(default_factory=list)


def prepare_text(
    block: Block, options: TextOptions, progress: Callable[[Counts], None]
) -> Prepared:
    """Read a block of documents."""
    counts = Counts()
    texts = list(read_texts(block, options, counts))
    progress(counts)
    return Prepared(counts, texts=texts)


def prepare_tokens(
    block: Block,
    options: TextOptions,
    tokenizer: Tokenizer,
    progress: Callable[[Counts], None],
) -> Prepared:
    """Read and tokenise a block of documents."""
    counts = Counts()
    encoded: list[Tokens] = []
    batch: list[str] = []
    chars = 0
    for text in read_texts(block, options, counts):
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            encoded += tokenizer.encode(batch)
            progress(counts)
            batch, chars = [], 0
    if batch:
        encoded += tokenizer.encode(batch)
    progress(counts)
    tokens = np.concatenate(encoded) if encoded else np.empty(0, np.int32)
    return Prepared(counts, tokens=tokens, lengths=[len(e) for e in encoded])
