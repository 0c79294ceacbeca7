"""Turn a block of input into samples: parse, select, tokenise, cut to length."""

import codecs
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from m2_plugin.data.formats import DataError, is_corrupt, open_bytes
from m2_plugin.data.rows import decode, parse_object, read_row_groups, text_bytes
from m2_plugin.data.tokenizer import load_tokenizer
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError
from m2_plugin.foundry.conversion.sources import MAX_DOCUMENT_BYTES, Block, Documents

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]

# Characters per call of the tokenizer: enough to make the call itself cheap, and little memory.
BATCH_CHARS = 1 << 20
# Bad documents that a block names by file and line; it only counts the others.
MAX_BAD_NAMED = 20


@dataclass(frozen=True)
class TextOptions:
    """How to read documents, and which of them to keep.

    Args:
        text_column: The key or column that holds the text.
        max_chars_per_doc: The number of characters to keep of each document; None keeps all.
        held_out: Keep only the held-out documents (True), only the others (False), or all (None).
        val_fraction: The share of documents that is held out, chosen by a hash of their text.
        skip_bad: Whether to count bad documents and continue, instead of raising an error.
    """

    text_column: str = "text"
    max_chars_per_doc: int | None = None
    held_out: bool | None = None
    val_fraction: float = 0.0
    skip_bad: bool = False


# --- reading -------------------------------------------------------------------------------------

# The place of a document (or a function that finds it), and the document or its error.
Place = str | Callable[[], str]
Item = tuple[Place, Any]


class _LineCounter:
    """Count the lines before a byte of a file, from the byte of the previous call on."""

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


def _place_at(path: str, offset: int) -> str:
    return f"{path}:{1 + _line_counter.lines_before(path, offset)}"


def _range_lines(documents: Documents) -> Iterator[tuple[Place, bytes]]:
    """Yield the lines that begin in a byte range; their numbers are counted only if needed."""
    with open(documents.path, "rb") as file:
        position = documents.start
        if position:  # a line that began before `start` is in the previous range
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < documents.end and (line := file.readline()):
            mark = position == 0 and line.startswith(codecs.BOM_UTF8)
            yield (
                partial(_place_at, documents.path, position),
                line.removeprefix(codecs.BOM_UTF8) if mark else line,
            )
            position += len(line)


def _handed_lines(documents: Documents) -> Iterator[tuple[Place, bytes]]:
    data = documents.data
    if documents.start == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(data.split(b"\n"), documents.start):
        yield f"{documents.path}:{number}", line


def _line_items(documents: Documents, column: str) -> Iterator[Item]:
    lines: Iterable[tuple[Place, bytes]]
    lines = _range_lines(documents) if documents.kind == "range" else _handed_lines(documents)
    for place, line in lines:
        if not line.strip():
            continue
        try:
            if documents.layout == "json":
                yield place, parse_object(line)[column]
            else:
                yield place, decode(line.removesuffix(b"\n").removesuffix(b"\r"))
        except KeyError:
            yield place, ValueError(f"no key {column!r} (--text_column)")
        except ValueError as error:
            yield place, error


def _paragraph_items(documents: Documents) -> Iterator[Item]:
    line, data = documents.start, documents.data
    if line == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    for paragraph in data.split(b"\n\n"):
        place = f"{documents.path}:{line}"
        try:
            if paragraph.strip():
                yield place, decode(paragraph).strip("\n")
        except ValueError as error:
            yield place, error
        line += paragraph.count(b"\n") + 2


def _file_items(documents: Documents) -> Iterator[Item]:
    place = f"{documents.path}:1"
    try:
        with open_bytes(documents.path) as file:
            data = file.read()
        text = decode(data.removeprefix(codecs.BOM_UTF8)).replace("\r\n", "\n")
    except Exception as error:
        if not isinstance(error, ValueError) and not is_corrupt(error):
            raise
        yield place, ValueError(str(error))
    else:
        if text.strip():
            yield place, text


def _row_items(documents: Documents, column: str) -> Iterator[Item]:
    for row in read_row_groups(documents.path, documents.start, documents.end, column):
        yield row.place, ValueError(row.problem) if row.problem else row.values[column]


def _items(documents: Documents, column: str) -> Iterator[Item]:
    if documents.kind == "bad":
        place = f"{documents.path}:{documents.start}"
        return iter([(place, ValueError(documents.data))])
    if documents.kind == "texts":
        return iter(documents.data)
    if documents.kind == "rows":
        return _row_items(documents, column)
    if documents.kind == "file":
        return _file_items(documents)
    if documents.layout == "paragraph":
        return _paragraph_items(documents)
    return _line_items(documents, column)


def _utf8(text: Any, column: str) -> bytes:
    """Encode a document; raise its error if it has one."""
    if isinstance(text, ValueError):
        raise text
    data = text_bytes(text, column)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"document has {len(data)} bytes, more than {MAX_DOCUMENT_BYTES}")
    return data


@dataclass
class Counts:
    """The documents of a block, counted; `text_bytes` are bytes of UTF-8."""

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
    for documents in block:
        for place, text in _items(documents, options.text_column):
            try:
                data = _utf8(text, options.text_column)
            except ValueError as error:
                message = f"{place() if callable(place) else place}: {error}"
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
    """Turn documents into token ids, with bos and eos texts as in llm-foundry's converter.

    Args:
        name: A name on the hub or a folder, as for `AutoTokenizer`.
        kwargs: Further arguments of `AutoTokenizer.from_pretrained`.
        bos_text: A text before each document; it is tokenised without special tokens.
        eos_text: A text after each document; likewise.
    """

    def __init__(self, name: str, kwargs: dict[str, Any], bos_text: str, eos_text: str):
        try:
            tokenizer: Any = load_tokenizer(name, **kwargs)
        except DataError as error:
            raise ConversionError(f"--tokenizer: {error}") from error
        tokenizer.model_max_length = int(1e30)  # no warnings: we cut to length
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
                "the tokenizer adds special tokens itself, besides --bos_text and --eos_text"
            )
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            # `encode_batch_fast` computes no offsets; older versions of tokenizers lack it.
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
    documents: list[int], left_over: int, length: int, no_wrap: bool
) -> tuple[list[int], int]:
    """Find where sequences of a given length begin in a stream of documents.

    With wrapping, a sequence begins where the last one ended. Without, it begins at the next
    document: the rest of the document is dropped, as in llm-foundry's `ConcatTokensDataset`.

    Args:
        documents: The number of tokens in each document.
        left_over: The number of tokens left over from earlier documents; they come first.
        length: The number of tokens in a sequence.
        no_wrap: Whether a sequence must begin where a document begins.

    Returns:
        The starts, and the number of tokens left over at the end.
    """
    total = left_over + sum(documents)
    if not no_wrap:
        return list(range(0, total - length + 1, length)), total % length
    starts, begin, end = [], 0, left_over
    for document in documents:
        end += document
        if end - begin >= length:
            starts.append(begin)
            begin = end
    return starts, end - begin


# --- blocks --------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A block after reading and tokenising; the tokens left over before it are not known yet."""

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
