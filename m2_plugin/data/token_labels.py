"""Sentences whose words have tags: read them, encode them, and find the entities in tags.

Tags of entities are IOB2 (BIO), IOB1, or BIOES. Entities are those of the evaluation script of
CoNLL-2000 and of seqeval's default mode, for any sequence of tags, a wrong one too.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2_plugin.data.formats import COMPRESSIONS
from m2_plugin.data.labels import label_names, spelling
from m2_plugin.data.rows import Row, class_names, read_lines, read_rows, text_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Entity",
    "Sentence",
    "WordWindow",
    "are_entity_tags",
    "encode_words",
    "entities",
    "is_conll",
    "read_sentences",
    "sentence_rows",
    "tag_names",
    "word_predictions",
]

CONLL = (".conll", ".bio", ".iob", ".txt")
DOCUMENT = "-DOCSTART-"
OUTSIDE = "O"
# BIOES calls the last word of an entity E and an entity of one word S; BILOU calls them L and U.
_ENTITY_TAG = re.compile(r"O|[BIESLU](-.*)?")
_TYPED_TAG = re.compile(r"[BIESLU]-.+")
_SPACES = re.compile(r" +")


class Sentence(NamedTuple):
    """A sentence in a file.

    Attributes:
        place: `FILE:LINE`, or `FILE, row N`.
        words: Its words.
        tags: The tag of each word, or none for data without tags.
        lines: The line of each word in a CoNLL file; empty for other files.
        problem: Why the sentence cannot be read, or "".
    """

    place: str
    words: list[str]
    tags: list[Any]
    lines: Sequence[int] = ()
    problem: str = ""

    def place_of(self, word: int) -> str:
        """Return `FILE:LINE` of a word, or the row and the word's number from 0."""
        if self.lines:
            return f"{self.place.rpartition(':')[0]}:{self.lines[word]}"
        return f"{self.place}, word {word}"


# Reading


def is_conll(path: str) -> bool:
    """Tell by its ending whether a file has a word per line; it may be compressed."""
    name = path.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return name.endswith(CONLL)


def read_sentences(
    path: str,
    split: str | None = None,
    tokens_column: str | int = "tokens",
    tags_column: str | int | None = "tags",
) -> Iterator[Sentence]:
    """Yield the sentences of a file, or of a folder that `datasets` saved.

    A CoNLL file (.conll .bio .iob .txt, also compressed) has a word per line: the word first and
    the tag last, in columns that tabs or spaces separate. Blank lines end a sentence. Lines with
    -DOCSTART- are left out. A line that begins with # before the first word of a sentence is a
    comment, as in CoNLL-U, unless it has a tab or ends in a tag such as O or B-PER. A file of
    another format has a sentence per row: a list of words and a list of tags.

    Args:
        path: The file or folder.
        split: The split to read, if the folder holds several.
        tokens_column: The column of the words. For a CoNLL file, a number counted from 0;
            a name means the first column.
        tags_column: The column of the tags; None does not read tags. For a CoNLL file, a number;
            a name means the last column.

    Raises:
        DataError: If the file is missing, of an unknown kind, or not readable at all.
    """
    if is_conll(path):
        word = tokens_column if isinstance(tokens_column, int) else 0
        tag = -1 if isinstance(tags_column, str) else tags_column
        yield from _conll_sentences(path, word, tag)
        return
    columns = [str(name) for name in (tokens_column, tags_column) if name is not None]
    classes = class_names(path, split)
    for row in read_rows(path, split, columns=columns):
        try:
            if row.problem:
                raise ValueError(row.problem)
            words = _list(row.values, columns[0], "tokens_column")
            for word in words:
                text_bytes(word, columns[0])
            tags: list[Any] = []
            if tags_column is not None:
                tags = _list(row.values, columns[1], "tags_column")
                names = classes.get(columns[1], ())
                tags = [names[t] if isinstance(t, int) and t < len(names) else t for t in tags]
                if len(tags) != len(words):
                    raise ValueError(f"{len(words)} words but {len(tags)} tags")
                if None in tags:
                    raise ValueError(f"word {tags.index(None)} has no tag")
            yield Sentence(row.place, words, tags)
        except ValueError as error:
            yield Sentence(row.place, [], [], problem=str(error))


def sentence_rows(path: str, split: str | None = None) -> Iterator[Row]:
    """Yield a row for each sentence of a file, with all its values.

    A row of a CoNLL file has `tokens`, the first column, and `tags`, the last one, unless its first
    sentence has one column only.

    Raises:
        DataError: As in `read_sentences`.
    """
    if not is_conll(path):
        yield from read_rows(path, split)
        return
    first = next(read_sentences(path), None)
    tagged = first is not None and not first.problem
    for place, words, tags, _, problem in read_sentences(
        path, tags_column="tags" if tagged else None
    ):
        yield Row(place, {"tokens": words} | ({"tags": tags} if tagged else {}), problem)


def _list(values: dict[str, Any], column: str, key: str) -> list[Any]:
    if column not in values:
        names = ", ".join(map(repr, values)) or "nothing"
        raise ValueError(f"no column {column!r} ({key}); the row has {names}")
    value = values[column]
    if not isinstance(value, list):
        raise ValueError(f"{column!r} should be a list, got {type(value).__name__} {value!r:.80}")
    return value


def _conll_sentences(path: str, word: int, tag: int | None) -> Iterator[Sentence]:
    rows: list[tuple[int, list[str]]] = []
    problem = ""
    width = 0  # the columns of the file

    def sentence() -> Sentence:
        words, tags = [], []
        wrong = problem
        for _, cells in rows:
            words.append(cells[word])
            tags.append("" if tag is None else cells[tag])
        return Sentence(
            wrong.partition(": ")[0] if wrong else f"{path}:{rows[0][0]}",
            words,
            [] if tag is None else tags,
            [number for number, _ in rows],
            wrong.partition(": ")[2],
        )

    for number, text in read_lines(path):
        if isinstance(text, ValueError):
            problem = problem or f"{path}:{number}: {text}"
            continue
        if not text.strip(" \t\r") or text.startswith(DOCUMENT):
            if rows or problem:
                yield sentence()
            rows, problem = [], ""
            continue
        cells = text.split("\t") if "\t" in text else _SPACES.split(text.strip(" "))
        first = not rows and not problem
        tagged = len(cells) > 1 and ("\t" in text or _ENTITY_TAG.fullmatch(cells[-1]))
        if first and text.startswith("#") and not tagged:
            continue
        wrong = _wrong_cells(cells, width, word, tag)
        if wrong:
            problem = problem or f"{path}:{number}: {wrong}"
            continue
        width = width or len(cells)
        rows.append((number, cells))
    if rows or problem:
        yield sentence()


def _wrong_cells(cells: Sequence[str], width: int, word: int, tag: int | None) -> str:
    """Say what is wrong with the columns of a line, or return ""."""
    needed = [word] if tag is None else [word, tag]
    n = len(cells)
    if tag is not None and n == 1:
        return f"{cells[0]!r} has no tag: a line has a word first and its tag last"
    for column in needed:
        if not -n <= column < n:
            return f"no column {column}: the line has {n}"
        if not cells[column].strip(" "):
            return f"column {column} is empty"
    if tag is not None and width and n != width:
        return f"{n} columns where there should be {width}"
    return ""


# Tags


def tag_names(value: Any, key: str, tokens_column: str | int = "tokens") -> list[str] | None:
    """Return the names of the tags in the order of their ids; `label_names` for tags.

    Args:
        value: The value of `label_names`: a list of names; null; or `{path, column, split}`,
            alone or in a list, for the tags that occur in the data.
        key: The key in errors: `dataset.label_names`.
        tokens_column: As in `read_sentences`.

    Raises:
        ValueError: As `m2_plugin.data.labels.label_names`, or if some names are tags of entities
            and others are not.
    """
    places: dict[str, str] = {}

    def cells(path: str, column: str, split: str | None) -> Iterator[tuple[str, Any]]:
        if not is_conll(path) and (names := class_names(path, split).get(column)):
            yield path, list(names)
        for sentence in read_sentences(path, split, tokens_column, column):
            for i, tag in enumerate(sentence.tags):
                if spelling(tag) not in places:
                    places[spelling(tag)] = sentence.place_of(i)
            yield sentence.place, sentence.tags

    names = label_names(value, key, cells)
    if names and any(map(_TYPED_TAG.fullmatch, names)):
        for name in names:
            if not _ENTITY_TAG.fullmatch(name):
                raise ValueError(
                    f"{places.get(name, key)}: the tag {name!r} is not one of an entity, but others"
                    " are: such tags are O, or B-, I-, E- or S- with a type, e.g. B-PER."
                )
    return names


def are_entity_tags(names: Iterable[str]) -> bool:
    """Tell whether all names are tags of entities: O, B-PER, I-PER, E-PER, S-PER, B, I, ..."""
    return all(map(_ENTITY_TAG.fullmatch, names))


class Entity(NamedTuple):
    """An entity: its type, its first word, and the index after its last word."""

    type: str
    start: int
    end: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """Find the entities in the tags of a sentence, in their order.

    A word that is not O begins an entity if the word before it is O, ends an entity (E or S), or
    has another type, or if its own tag is B or S. Otherwise it continues that word's entity.
    """
    found: list[Entity] = []
    before, kind, start = OUTSIDE, "", 0
    for i, tag in enumerate([*tags, OUTSIDE]):
        prefix, own = tag[:1], tag[2:] or "_"
        # L and U are BILOU's names of E and S.
        begins = prefix in "BSU" or before in "OESLU" or own != kind
        if before != OUTSIDE and (prefix == OUTSIDE or begins):
            found.append(Entity(kind, start, i))
        if begins:
            start = i
        before, kind = prefix, own
    return found


# Word pieces


class WordWindow(NamedTuple):
    """A part of a sentence, encoded.

    Attributes:
        input_ids: The ids of L tokens, with the special ones.
        words: For each token, the index in the sentence of the word whose first piece it is and
            whose tag this window decides; −1 for other pieces, special tokens, and words that are
            only context here.
    """

    input_ids: list[int]
    words: list[int]


def encode_words(
    tokenizer: "PreTrainedTokenizerBase", words: Sequence[str], max_seq_len: int
) -> list[WordWindow]:
    """Encode a sentence in windows of at most `max_seq_len` tokens that decide each word once.

    Windows begin and end between words. Neighbours share up to a quarter of a window as context:
    the first half of these words belongs to the first window, the second half to the second. A word
    without any piece, such as a zero-width space, becomes the unknown token. A word of more pieces
    than a window is cut.

    Args:
        tokenizer: A fast tokenizer.
        words: The words.
        max_seq_len: The most tokens in a window.

    Returns:
        The windows; none for a sentence without words.

    Raises:
        ValueError: If the tokenizer is not a fast one, or the window too short for a piece.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{tokenizer.name_or_path!r} is not a fast tokenizer (tokenizer.json).")
    words = list(words)
    if not words:
        return []
    encoding = tokenizer(words, is_split_into_words=True, verbose=False)
    counts = np.bincount([w for w in encoding.word_ids() if w is not None], minlength=len(words))
    if not counts.all():
        spare = next(filter(None, (tokenizer.unk_token, tokenizer.mask_token, tokenizer.sep_token)))
        words = [word if n else spare for word, n in zip(words, counts, strict=True)]
        encoding = tokenizer(words, is_split_into_words=True, verbose=False)
        counts = np.maximum(counts, 1)
    ids = encoding["input_ids"]
    if len(ids) <= max_seq_len:
        return [_window(ids, encoding.word_ids(), 0, 0, len(words))]
    room = max_seq_len - (len(ids) - int(counts.sum()))
    if room < 1:
        raise ValueError(f"max_seq_len {max_seq_len} leaves no room for a word.")
    spans = _spans(np.minimum(counts, room).tolist(), room)
    # A word shared by two windows belongs to the one in whose half of the shared part it is.
    borders = [(b[0] + a[1] + 1) // 2 for a, b in zip(spans, spans[1:], strict=False)]
    windows = []
    for (start, end), first, last in zip(spans, [0, *borders], [*borders, len(words)], strict=True):
        part = tokenizer(
            words[start:end], is_split_into_words=True, truncation=True, max_length=max_seq_len
        )
        windows.append(_window(part["input_ids"], part.word_ids(), start, first, last))
    return windows


def _spans(lengths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Cut words into overlapping spans (start, end) of at most `room` pieces."""
    spans: list[tuple[int, int]] = []
    start = 0
    while True:
        end, used = start, 0
        while end < len(lengths) and used + lengths[end] <= room:
            used += lengths[end]
            end += 1
        spans.append((start, end))
        if end == len(lengths):
            return spans
        back, shared = end, 0
        most = min(room // 4, room - lengths[end])  # the next window must hold a new word
        while back - 1 > start and shared + lengths[back - 1] <= most:
            back -= 1
            shared += lengths[back]
        start = back


def _window(
    ids: list[int], word_ids: Sequence[int | None], start: int, first: int, last: int
) -> WordWindow:
    words = []
    before = None
    for word in word_ids:
        own = word is not None and word != before and first <= word + start < last
        words.append(word + start if own and word is not None else -1)
        before = word
    return WordWindow(ids, words)


def word_predictions(
    windows: Sequence[WordWindow], logits: Sequence[NDArray[np.floating]]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the most probable tag of each word, and its probability.

    Args:
        windows: The windows of one sentence.
        logits: For each window (L, num_labels); rows of padding at the end are ignored.

    Returns:
        Tag ids and probabilities, (number of words,) each.
    """
    found: dict[int, tuple[int, float]] = {}
    for window, scores in zip(windows, logits, strict=True):
        best = scores.argmax(-1)
        below = scores.astype(np.float64) - scores.max(-1, keepdims=True)
        shares = 1 / np.exp(below).sum(-1)  # of the largest logit
        found |= {
            word: (int(best[i]), float(shares[i]))
            for i, word in enumerate(window.words)
            if word >= 0
        }
    words = [found[i] for i in range(len(found))]
    ids = np.array([tag for tag, _ in words], dtype=np.int64)
    return ids, np.array([share for _, share in words], dtype=np.float32)
