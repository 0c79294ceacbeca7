"""What a kind of model reads in a row of a file, and what it answers."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerBase

from m2_plugin.data.labels import answer_columns, answers, plain
from m2_plugin.data.rows import Row, read_rows, text_bytes, text_of
from m2_plugin.data.squad import (
    DOC_STRIDE,
    AnswerRules,
    answer_question,
    encode_question,
    question_rows,
)
from m2_plugin.data.token_labels import (
    Entity,
    are_entity_tags,
    encode_words,
    entities,
    is_conll,
    sentence_rows,
    word_predictions,
)
from m2_plugin.data.tokenizer import shorten
from m2_plugin.inference import (
    LONGEST,
    Settings,
    checked_rows,
    forward,
    max_length,
    move,
    padding_counts,
)

__all__ = [
    "TASKS",
    "Encoded",
    "QuestionAnswering",
    "Task",
    "TextClassification",
    "TextEmbedding",
    "TokenClassification",
]

Values = Mapping[str, Any]


class Encoded(NamedTuple):
    """The rows of a chunk as features.

    Attributes:
        features: Input of the model → one list for each feature; `input_ids` at least.
        cut: The number of rows that were longer than the model takes.
        detail: What else the task needs to make answers of the outputs.
    """

    features: dict[str, list[Any]]
    cut: int
    detail: Any = None


class Task(ABC):
    """A model, what it reads in a row, and what it answers.

    A row may become several features, as a long text that is read in windows. The model runs over
    the features of a chunk of rows by length.

    Attributes:
        fields: The Arrow schema of the columns that the answers add to a row.
        output: The fields of the model's output that the answers need.
        max_length: The largest number of tokens in a feature; None if it is unknown.
        pad_to: The length to pad every feature to, or None.
        has_classes: Whether a `prediction` is one of few classes, so that they can be counted.

    Args:
        model: The transformers model.
        tokenizer: Its tokenizer.
        settings: How it runs.

    Raises:
        ValueError: If the model is of a kind that is not offered.
    """

    fields: pyarrow.Schema
    output: Sequence[str] = ("logits",)
    has_classes = False

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: Settings):
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        self.settings = settings
        self.max_length = max_length(model.config, tokenizer)
        # Such a model was trained on texts of this length, padding included.
        self.pad_to = self.max_length if padding_counts(model.config) else None
        self.takes = inspect.signature(model.forward).parameters

    def rows(self, file: str) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yield the values of each row of a file, and what the task needs of them.

        Raises:
            ValueError: If the file or a row cannot be read; the message names the line.
        """
        return checked_rows(self.rows_of(file), self.read)

    def rows_of(self, file: str) -> Iterator[Row]:
        """Yield the rows of a file, with all their values."""
        return read_rows(file, text_column=self.settings.text_column)

    @abstractmethod
    def read(self, values: Values) -> Any:
        """Return what the task needs of a row; raise a ValueError if it is not there."""

    def shorten(self, row: Any) -> Any:
        """Leave out what the model would not read of a very long row."""
        return row

    def size(self, row: Any) -> int:
        """Return the number of characters in a row."""
        return sum(map(len, row))

    @abstractmethod
    def encode(self, inputs: Sequence[Any]) -> Encoded:
        """Return the features of some rows."""

    @abstractmethod
    def answer(
        self, inputs: Sequence[Any], encoded: Encoded, outputs: Sequence[tuple[np.ndarray, ...]]
    ) -> Sequence[Any]:
        """Return the answer for each row, from the output for each feature, padding included."""

    def move(self) -> None:
        """Move the model to its device; raise a ValueError if there is no such device."""
        move(self.model, self.settings.device)

    def run(self, inputs: Sequence[Any]) -> tuple[bytes, int]:
        """Return the answers for some rows, as lines of JSON, and how many of the rows were cut."""
        answers, cut = self.answers(inputs)
        return "".join(f"{json.dumps(a, ensure_ascii=False)}\n" for a in answers).encode(), cut

    def answers(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], int]:
        """Return the answer for each row, and how many of the rows were cut."""
        self.move()
        encoded = self.encode(inputs)
        outputs: list[Any] = [None] * len(encoded.features["input_ids"])
        how = self.settings.batch_tokens, self.settings.dtype, self.pad_to
        for batch, output in forward(self.model, self.tokenizer, encoded.features, *how):
            kept = [output[name].float().cpu().numpy() for name in self.output]
            for position, i in enumerate(batch):
                outputs[i] = tuple(values[position] for values in kept)
        return self.answer(inputs, encoded, outputs), encoded.cut


class _OfTexts(Task):
    """A task for a text, or for a pair of texts, that is cut to the model's maximum."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.texts = {"--text-column": self.settings.text_column}
        if self.settings.pair_column is not None:
            self.texts["--pair-column"] = self.settings.pair_column

    def read(self, values: Values) -> tuple[str, ...]:
        """Return the text or the pair."""
        return tuple(text_of(values, column, option) for option, column in self.texts.items())

    def shorten(self, row: tuple[str, ...]) -> tuple[str, ...]:
        """Cut a giant text; the tokens stay the same."""
        return shorten(self.tokenizer, row, self.max_length)

    def encode(self, inputs: Sequence[tuple[str, ...]]) -> Encoded:
        """Tokenise as the dataloader `text_classification` does."""
        encoded = self.tokenizer(
            *map(list, zip(*inputs, strict=True)),
            truncation="longest_first",
            max_length=self.max_length,
            return_token_type_ids=True,
        )
        features = {name: encoded[name] for name in encoded if name in self.takes}
        return Encoded(features, _count_cut(self.tokenizer, inputs, encoded, self.max_length))


class TextEmbedding(_OfTexts):
    """The vector of a text: float32 (D,)."""

    output = ("sentence_embedding",)

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.max_length = self.config.max_sequence_length
        self.pad_to = None

    def rows_of(self, file: str) -> Iterator[Row]:
        """Yield the rows of a file, with their texts."""
        column = self.settings.text_column
        return read_rows(file, text_column=column, columns=[column])

    def answer(
        self, inputs: Sequence[Any], encoded: Encoded, outputs: Sequence[tuple[np.ndarray, ...]]
    ) -> Sequence[np.ndarray]:
        """Return the vectors."""
        return [vector for (vector,) in outputs]

    def run(self, inputs: Sequence[tuple[str, ...]]) -> tuple[bytes, int]:
        """Return the bytes of the vectors, (N, D), and how many of the texts were cut."""
        vectors, cut = self.answers(inputs)
        return np.stack(vectors).astype("<f4").tobytes(), cut


class TextClassification(_OfTexts):
    """The class of a text or of a pair of texts, or a number for it."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        config = self.config
        if config.problem_type == "multi_label_classification":
            raise ValueError("the model gives a text several classes at once, which is not offered")
        self.regression = config.num_labels == 1
        self.has_classes = not self.regression
        self.names = [str(config.id2label[i]) for i in range(config.num_labels)]
        columns = answer_columns(self.names, self.regression)
        if len(set(columns)) < len(columns):
            raise ValueError(f"two classes of the model have one name: {self.names}")
        types = {"prediction": pyarrow.string()}
        self.fields = pyarrow.schema((c, types.get(c, pyarrow.float32())) for c in columns)

    def answer(
        self, inputs: Sequence[Any], encoded: Encoded, outputs: Sequence[tuple[np.ndarray, ...]]
    ) -> list[dict[str, Any]]:
        """Return the names and probabilities of the classes, or the score."""
        return answers(np.stack([logits for (logits,) in outputs]), self.names, self.regression)


class TokenClassification(Task):
    """The tag of each word of a sentence with its probability, and the entities in the tags.

    A row has a list of words, as in `tokens` of a CoNLL file, or a text: that is split at white
    space and punctuation. An entity's `start` and `end` count words, or characters of a text. Its
    probability is the mean over its words.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        _refuse_pairs(self.settings.pair_column, "token classification")
        self.names = [str(self.config.id2label[i]) for i in range(self.config.num_labels)]
        self.has_entities = are_entity_tags(self.names)
        text, index, share = pyarrow.string(), pyarrow.int64(), pyarrow.float32()
        entity = pyarrow.struct(
            {"type": text, "start": index, "end": index, "text": text, "probability": share}
        )
        columns = {"prediction": pyarrow.list_(text), "probability": pyarrow.list_(share)}
        columns |= {"entities": pyarrow.list_(entity)} if self.has_entities else {}
        self.fields = pyarrow.schema(columns)
        self.split = BertPreTokenizer().pre_tokenize_str

    def rows_of(self, file: str) -> Iterator[Row]:
        """Yield the rows of a file, or the sentences of a CoNLL file."""
        return sentence_rows(file) if is_conll(file) else super().rows_of(file)

    def read(self, values: Values) -> tuple[list[str], list[tuple[int, int]], str]:
        """Return the words, their places in the text, and the text; a list has no places."""
        given = self.settings.text_column
        column = given if given in values else "tokens"
        if not isinstance(values.get(column), list):
            text = text_of(values, given, "--text-column")
            words = self.split(text)
            return [word for word, _ in words], [place for _, place in words], text
        for word in values[column]:
            text_bytes(word, column)
        return values[column], [], ""

    def size(self, row: tuple[list[str], list[tuple[int, int]], str]) -> int:
        """Return the number of characters in the words of a row."""
        return sum(map(len, row[0]))

    def encode(self, inputs: Sequence[tuple[list[str], list[tuple[int, int]], str]]) -> Encoded:
        """Encode the sentences in windows, which decide each word once."""
        windows = [
            encode_words(self.tokenizer, words, self.max_length or LONGEST)
            for words, _, _ in inputs
        ]
        ids = [window.input_ids for own in windows for window in own]
        return Encoded({"input_ids": ids}, 0, windows)

    def answer(
        self, inputs: Sequence[Any], encoded: Encoded, outputs: Sequence[tuple[np.ndarray, ...]]
    ) -> list[dict[str, Any]]:
        """Return the tags and entities of each sentence."""
        logits = iter(outputs)
        answers = []
        for (words, places, text), windows in zip(inputs, encoded.detail, strict=True):
            own = [next(logits)[0] for _ in windows]
            ids, shares = word_predictions(windows, own)
            tags = [self.names[i] for i in ids]
            answers.append({"prediction": tags, "probability": [plain(s) for s in shares]})
            if self.has_entities:
                answers[-1]["entities"] = [
                    _found(e, words, places, text)
                    | {"probability": plain(shares[e.start : e.end].mean())}
                    for e in entities(tags)
                ]
        return answers


def _found(
    entity: Entity, words: Sequence[str], places: Sequence[tuple[int, int]], text: str
) -> dict[str, Any]:
    kind, start, end = entity
    found = " ".join(words[start:end])
    if places:
        start, end = places[start][0], places[end - 1][1]
        found = text[start:end]
    return {"type": kind, "start": start, "end": end, "text": found}


class QuestionAnswering(Task):
    """The part of `context` that answers `question`.

    `prediction_start` and `prediction_end` count characters of the context. `score` is the sum of
    the answer's two logits, `null_score` that of no answer: a model of SQuAD 2.0 means no answer if
    `null_score` is larger by more than the `null_threshold` of its training.
    """

    output = ("start_logits", "end_logits")
    fields = pyarrow.schema(
        {
            "prediction": pyarrow.string(),
            "prediction_start": pyarrow.int64(),
            "prediction_end": pyarrow.int64(),
            "score": pyarrow.float32(),
            "null_score": pyarrow.float32(),
        }
    )

    def __init__(self, *args: Any):
        super().__init__(*args)
        _refuse_pairs(self.settings.pair_column, "question answering")
        self.max_answer_length = AnswerRules.of(self.config).max_answer_length

    def rows_of(self, file: str) -> Iterator[Row]:
        """Yield a row for each question, also of SQuAD's own JSON."""
        return question_rows(file)

    def read(self, values: Values) -> tuple[str, str]:
        """Return the question and the context."""
        return text_of(values, "question", "question"), text_of(values, "context", "context")

    def encode(self, inputs: Sequence[tuple[str, str]]) -> Encoded:
        """Encode each question with its context, in as many features as the context needs."""
        length = self.max_length or LONGEST
        stride = min(DOC_STRIDE, length // 2)
        rows = [encode_question(self.tokenizer, *pair, length, stride) for pair in inputs]
        flat = [feature for row in rows for feature in row]
        features: dict[str, list[Any]] = {"input_ids": [feature.input_ids for feature in flat]}
        if "token_type_ids" in self.takes:
            features["token_type_ids"] = [feature.token_type_ids for feature in flat]
        return Encoded(features, 0, rows)

    def answer(
        self, inputs: Sequence[Any], encoded: Encoded, outputs: Sequence[tuple[np.ndarray, ...]]
    ) -> list[dict[str, Any]]:
        """Return the best span of each question."""
        logits = iter(outputs)
        answers = []
        for (_, context), features in zip(inputs, encoded.detail, strict=True):
            starts, ends = zip(*(next(logits) for _ in features), strict=True)
            best = answer_question(context, features, starts, ends, self.max_answer_length)
            # An empty context has no span, and JSON no infinity.
            scores = [s if np.isfinite(s) else None for s in (best.score, best.null_score)]
            values = (best.text, best.start, best.end, *scores)
            answers.append(dict(zip(self.fields.names, values, strict=True)))
        return answers


# The kind of a model (`inference.HEADS`) → its task.
TASKS: dict[str, type[Task]] = {
    "ForSequenceClassification": TextClassification,
    "ForTokenClassification": TokenClassification,
    "ForQuestionAnswering": QuestionAnswering,
}


def _refuse_pairs(pair_column: str | None, task: str) -> None:
    if pair_column is not None:
        raise ValueError(f"--pair-column is for pairs of texts; this model is one for {task}")


def _count_cut(
    tokenizer: PreTrainedTokenizerBase, inputs: Sequence[Any], encoded: Any, limit: int | None
) -> int:
    """Count the texts that were longer than the model takes."""
    if limit is None:
        return 0
    if encoded.encodings is not None:
        return sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    full = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) >= limit]
    return sum(len(tokenizer(*inputs[i])["input_ids"]) > limit for i in full)
