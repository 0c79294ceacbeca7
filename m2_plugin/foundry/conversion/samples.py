"""Turn a block of documents into samples: read, select, tokenise, cut to length."""

import codecs
import functools
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from m2_plugin.data.formats import DataError, is_corrupt, open_bytes
from m2_plugin.data.rows import decode, parse_object, read_row_groups
from m2_plugin.data.tokenizer import load_tokenizer, vocabulary_digest
from m2_plugin.foundry.conversion.errors import BadDocumentError, ConversionError
from m2_plugin.foundry.conversion.job import Recipe
from m2_plugin.foundry.conversion.shards import encode_array
from m2_plugin.foundry.conversion.sources import (
    Block,
    Document,
    Documents,
    document,
    documents_of,
    packed,
)

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]

# Characters per call of the tokenizer: enough to make the call itself cheap, and little memory.
BATCH_CHARS = 1 << 20
# Bad documents that a block names by file and line; it only counts the others.
MAX_BAD_NAMED = 20


# --- reading -------------------------------------------------------------------------------------


def _count_lines(path: str, start: int, end: int) -> int:
    """Count the line ends in a byte range of a file."""
    lines = 0
    with open_bytes(path) as file:
        file.seek(start)
        while start < end and (data := file.read(min(1 << 20, end - start))):
            lines += data.count(b"\n")
            start += len(data)
    return lines


def _lines(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in a byte range, each with the position where it begins."""
    position = start
    if position:  # a line that began before `start` is in the range before
        file.seek(position - 1)
        position += len(file.readline()) - 1
    while position < end and (line := file.readline()):
        yield position, line if position else line.removeprefix(codecs.BOM_UTF8)
        position += len(line)


def _range_documents(documents: Documents, column: str) -> Iterator[Document]:
    counted = lines = 0  # lines are counted up to this position, only if they are needed
    with open_bytes(documents.path) as file:
        for position, line in _lines(file, documents.start, documents.end):
            if not line.strip():
                continue
            try:
                if documents.layout == "json":
                    values = parse_object(line)
                else:
                    values = {column: decode(line.removesuffix(b"\n").removesuffix(b"\r"))}
                found = document(values, column, "")
            except ValueError as error:
                found = BadDocumentError(f": {error}")
            if not isinstance(found, str):
                lines += _count_lines(documents.path, counted, position)
                counted = position
                found = BadDocumentError(f"{documents.path}:{lines + 1}{found}")
            yield found


def _file_document(path: str, column: str) -> Iterator[Document]:
    try:
        with open_bytes(path) as file:
            data = file.read()
        text = decode(data.removeprefix(codecs.BOM_UTF8)).replace("\r\n", "\n")
    except Exception as error:
        if not isinstance(error, ValueError) and not is_corrupt(error):
            raise
        yield BadDocumentError(f"{path}:1: {error}")
    else:
        if text.strip():
            yield document({column: text}, column, f"{path}:1")


def _documents(block: Block, column: str) -> Iterator[Document]:
    yield from block.texts
    for documents in block.ranges:
        if documents.layout == "file":
            yield from _file_document(documents.path, column)
        elif documents.layout == "rows":
            rows = read_row_groups(documents.path, documents.start, documents.end, column)
            yield from documents_of(rows, column)
        else:
            yield from _range_documents(documents, column)


@dataclass
class Counts:
    """What a block has: `text_bytes` of UTF-8; `dropped` of its `tokens` are in no sample."""

    documents: int = 0
    text_bytes: int = 0
    bad: int = 0
    bad_named: list[str] = field(default_factory=list)
    tokens: int = 0
    dropped: int = 0


def read_texts(block: Block, recipe: Recipe, skip_bad: bool, counts: Counts) -> Iterator[str]:
    """Yield the documents of a block that belong to the split, and count them.

    Raises:
        BadDocumentError: If a document cannot be read, unless bad ones are skipped.
    """
    import xxhash

    threshold = int(recipe.val_fraction * 2**64)
    for text in _documents(block, recipe.text_column):
        if not isinstance(text, str):
            if not skip_bad:
                raise text
            counts.bad += 1
            if counts.bad <= MAX_BAD_NAMED:
                counts.bad_named.append(str(text))
            continue
        data = text.encode()
        if recipe.held_out is not None:
            held_out = xxhash.xxh64_intdigest(data) < threshold
            if held_out != recipe.held_out:
                continue
        counts.documents += 1
        counts.text_bytes += len(data)
        yield text[: recipe.max_chars_per_doc]


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
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers run in parallel already
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

    def vocabulary(self) -> str:
        """Return a hash of the tokens and their ids, which a training run compares with its own."""
        return vocabulary_digest(self._tokenizer)

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Tokenise documents, each between the bos and the eos tokens."""
        if self._tokenizer.is_fast:
            ids = [encoding.ids for encoding in self._encode_batch(texts)]
        else:
            ids = self._tokenizer(texts, truncation=False, padding=False)["input_ids"]
        return [np.concatenate([self.bos, np.asarray(i, np.int32), self.eos]) for i in ids]

    def encode_all(self, texts: Iterable[str]) -> Iterator[Tokens]:
        """Tokenise documents in batches."""
        for batch in packed(((text, len(text)) for text in texts), BATCH_CHARS):
            yield from self.encode(batch)


@functools.lru_cache(maxsize=1)
def _load(name: str, kwargs: str, bos_text: str, eos_text: str) -> Tokenizer:
    return Tokenizer(name, json.loads(kwargs), bos_text, eos_text)


def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """Return the tokenizer of a recipe; a process loads it once.

    Raises:
        ConversionError: If it cannot be loaded, or would not mark where documents end.
    """
    assert recipe.tokenizer is not None
    kwargs = json.dumps(recipe.tokenizer_kwargs, sort_keys=True)
    return _load(recipe.tokenizer, kwargs, recipe.bos_text, recipe.eos_text)


def cut_tokens(documents: Sequence[int], length: int, no_wrap: bool) -> list[int]:
    """Find where sequences of a given length begin in joined documents.

    With wrapping, a sequence begins where the last one ended. Without, it begins at the next
    document: the rest of the document is dropped, as in llm-foundry's `ConcatTokensDataset`.

    Args:
        documents: The number of tokens in each document.
        length: The number of tokens in a sequence.
        no_wrap: Whether a sequence must begin where a document begins.
    """
    if not no_wrap:
        return list(range(0, sum(documents) - length + 1, length))
    starts, begin, end = [], 0, 0
    for tokens in documents:
        end += tokens
        if end - begin >= length:
            starts.append(begin)
            begin = end
    return starts


def make_samples(
    block: Block, recipe: Recipe, skip_bad: bool, limit: int | None = None
) -> tuple[list[list[bytes]], Counts]:
    """Read a block, and return its samples.

    Args:
        block: The block.
        recipe: How documents become samples.
        skip_bad: Whether to count bad documents and continue.
        limit: The number of samples to stop at.

    Returns:
        The samples, each with the encoded value of every column, sorted by column name; and the
        counts of the block.

    Raises:
        BadDocumentError: If a document cannot be read, unless bad ones are skipped.
    """
    counts = Counts()
    texts = read_texts(block, recipe, skip_bad, counts)
    if recipe.concat_tokens is None:
        encode = _encode_text if recipe.pairs is None else _encode_pair
        return list(map(encode, itertools.islice(texts, limit))), counts
    length = recipe.concat_tokens
    documents = list(tokenizer_of(recipe).encode_all(texts))
    starts = cut_tokens([len(d) for d in documents], length, recipe.no_wrap)[:limit]
    tokens = np.concatenate(documents) if documents else np.empty(0, np.int32)
    counts.tokens, counts.dropped = len(tokens), len(tokens) - len(starts) * length
    return [[encode_array(tokens[start : start + length])] for start in starts], counts


def _encode_text(text: str) -> list[bytes]:
    return [text.encode()]


def _encode_pair(text: str) -> list[bytes]:
    """Encode the columns `PAIRS`; their alphabetical order is that of the shard."""
    pair = json.loads(text)
    columns = json.dumps(pair["negatives"]), pair["passage"], pair["query"]
    return [value.encode() for value in columns]
