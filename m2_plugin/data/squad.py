"""Questions whose answers are parts of a text, as in SQuAD: read, encode, answer, and score them.

SQuAD 1.1 is Rajpurkar et al., arXiv 1606.05250; version 2.0, with questions that have no answer,
arXiv 1806.03822. Scores equal those of the official evaluation script of each version.
"""

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2_plugin.data.rows import Row, read_rows, text_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "DOC_STRIDE",
    "MAX_ANSWER_LENGTH",
    "Answer",
    "AnswerRules",
    "Feature",
    "Question",
    "answer_question",
    "best_spans",
    "encode_question",
    "find_answer",
    "question_rows",
    "read_questions",
    "score_answer",
]

# BERT's values for SQuAD, in tokens.
DOC_STRIDE = 128
MAX_ANSWER_LENGTH = 30

# Where a saved config has them, in transformers' field `task_specific_params`.
TASK = "question_answering"

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Question(NamedTuple):
    """A question, its text, and the answers that people gave.

    Attributes:
        place: `FILE:LINE`, or `FILE, question 'ID'`.
        id: Its name.
        question: The question.
        context: The text that holds the answer.
        answers: Each answer and the index in `context` of its first character; none if the text
            does not answer the question, or if the answers are not known.
        problem: Why the question cannot be read, or "".
    """

    place: str
    id: str
    question: str
    context: str
    answers: list[tuple[str, int]]
    problem: str = ""


# Reading


def read_questions(
    path: str, split: str | None = None, answered: bool = True
) -> Iterator[Question]:
    """Yield the questions of a file, or of a folder that `datasets` saved.

    The file is SQuAD's own JSON (version 1.1 or 2.0), or has a question per row: the columns
    `question`, `context` and `answers`, and optionally `id`. `answers` is a list of objects with
    `text` and `answer_start`, or one object of two lists, as `datasets` stores them.

    Args:
        path: The file or folder.
        split: The split to read, if the folder holds several.
        answered: Whether to read the answers. Each must be in the context at its `answer_start`.

    Raises:
        DataError: If the file is missing, of an unknown kind, or not readable at all.
    """
    for row in question_rows(path, split):
        number = re.split(r":|, row ", row.place)[-1]
        if row.problem:
            yield Question(row.place, number, "", "", [], row.problem)
        else:
            yield _question(row.place, row.values, number, answered)


def question_rows(path: str, split: str | None = None) -> Iterator[Row]:
    """Yield a row for each question of a file, as `read_questions` reads it, with all its values.

    Raises:
        DataError: As in `read_questions`.
    """
    for row in read_rows(path, split):
        if isinstance(row.values.get("data"), list) and "question" not in row.values:
            for values in _of_squad(row.values["data"]):
                yield Row(f"{path}, question {values.get('id')!r}", values)
        else:
            yield row


def _of_squad(articles: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for article in articles:
        for paragraph in article.get("paragraphs", ()):
            for question in paragraph.get("qas", ()):
                yield {"context": paragraph.get("context"), **question}


def _question(place: str, values: Mapping[str, Any], number: str, answered: bool) -> Question:
    name = str(values.get("id", number))
    try:
        texts = {}
        for column in ("question", "context"):
            if column not in values:
                names = ", ".join(map(repr, values))
                raise ValueError(f"no column {column!r}; the row has {names}")
            text_bytes(values[column], column)
            texts[column] = values[column]
        answers = _answers(values, texts["context"]) if answered else []
        return Question(place, name, texts["question"], texts["context"], answers)
    except ValueError as error:
        where = "" if repr(name) in place else f"question {name!r}: "
        return Question(place, name, "", "", [], f"{where}{error}")


def _answers(values: Mapping[str, Any], context: str) -> list[tuple[str, int]]:
    if "answers" not in values:
        raise ValueError("no column 'answers'; a question without an answer has an empty list")
    if values.get("is_impossible"):  # SQuAD 2.0 then has only `plausible_answers`
        return []
    given = values["answers"] or []
    try:
        if isinstance(given, Mapping):
            pairs = list(zip(given["text"], given["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in given]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"answers should be objects with text and answer_start, got {given!r:.80}"
        ) from None
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int) or not text.strip():
            raise ValueError(
                f"an answer should be a text and an integer, got {text!r:.80} and {start!r}"
            )
        if start < 0 or not context.startswith(text, start):
            there = context[max(start, 0) : max(start, 0) + len(text)]
            at = context.find(text)
            hint = f"; it stands at {at}" if at >= 0 else ""
            raise ValueError(
                f"the answer {text!r:.80} does not stand at answer_start {start}, where the "
                f"context has {there!r:.80}{hint}"
            )
    return pairs


# Encoding


class Feature(NamedTuple):
    """A question with a part of its context, encoded.

    Attributes:
        input_ids: The ids of L tokens: [CLS], question, [SEP], part of the context, [SEP].
        token_type_ids: 0 for the question, 1 for the context.
        offsets: For each token the indices in the context of its first character and after its
            last one; (−1, −1) for tokens that are not of the context.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    offsets: list[tuple[int, int]]


def encode_question(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    context: str,
    max_seq_len: int,
    doc_stride: int = DOC_STRIDE,
) -> list[Feature]:
    """Encode a question with its context, in as many features as the context needs.

    Args:
        tokenizer: A fast tokenizer that puts [CLS] first.
        question: The question; of its tokens at most `max_seq_len` // 2 are used.
        context: The context.
        max_seq_len: The most tokens in a feature.
        doc_stride: The tokens from the start of one part of the context to that of the next.
            If a part is shorter, parts do not overlap.

    Raises:
        ValueError: If the tokenizer is not a fast one, or no context fits.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{tokenizer.name_or_path!r} is not a fast tokenizer (tokenizer.json).")
    alone = tokenizer(
        question.lstrip(), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    length = min(len(alone["input_ids"]), max_seq_len // 2)
    question = question.lstrip()[: alone["offset_mapping"][length - 1][1]] if length else ""
    room = max_seq_len - length - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1 or doc_stride < 1:
        raise ValueError(
            f"max_seq_len {max_seq_len} leaves no room for the context, or doc_stride {doc_stride} "
            "is not at least 1."
        )
    encoding = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_seq_len,
        stride=max(room - doc_stride, 0),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    features = []
    for i, ids in enumerate(encoding["input_ids"]):
        pairs = zip(encoding["offset_mapping"][i], encoding.sequence_ids(i), strict=True)
        offsets = [pair if part == 1 else (-1, -1) for pair, part in pairs]
        features.append(Feature(ids, encoding["token_type_ids"][i], offsets))
    return features


def find_answer(feature: Feature, text: str, start: int) -> tuple[int, int]:
    """Return the first and the last token of an answer; (0, 0), [CLS], if it is not all here.

    Args:
        feature: The feature.
        text: The answer.
        start: The index in the context of its first character.
    """
    start += len(text) - len(text.lstrip())
    end = start + len(text.strip())
    inside = [i for i, (a, b) in enumerate(feature.offsets) if a < end and b > start]
    if not inside:
        return 0, 0
    first, last = inside[0], inside[-1]
    starts = [i for i, (a, _) in enumerate(feature.offsets) if a >= 0]
    # A token at the border of the part may be only the rest of the answer.
    cut_before = first == starts[0] and feature.offsets[first][0] > start
    cut_after = last == starts[-1] and feature.offsets[last][1] < end
    return (0, 0) if cut_before or cut_after else (first, last)


# Answering


def best_spans(
    start_logits: NDArray[np.floating],
    end_logits: NDArray[np.floating],
    offsets: NDArray[np.integer],
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Find for each feature the span of the context with the largest start + end logit.

    Args:
        start_logits: (B, L).
        end_logits: (B, L).
        offsets: (B, L, 2), −1 for tokens that are not of the context.
        max_answer_length: The most tokens in an answer.

    Returns:
        The sum of the two logits, −inf if there is no context, and the first and the last token,
        (B,) each. Of equal spans it is the shortest, then the first.
    """
    allowed = offsets[:, :, 0] >= 0  # (B, L)
    starts = np.where(allowed, start_logits.astype(np.float64), -np.inf)
    ends = np.where(allowed, end_logits.astype(np.float64), -np.inf)
    rows = np.arange(len(starts))
    scores = np.full(len(starts), -np.inf)
    first = np.zeros(len(starts), dtype=np.int64)
    last = first.copy()
    for more in range(min(max_answer_length, starts.shape[1])):
        sums = starts[:, : starts.shape[1] - more] + ends[:, more:]
        at = sums.argmax(1)
        better = sums[rows, at] > scores
        scores = np.where(better, sums[rows, at], scores)
        first, last = np.where(better, at, first), np.where(better, at + more, last)
    return scores, first, last


class AnswerRules(NamedTuple):
    """What decides between the spans that a model finds.

    A model that was trained for questions has the rules of its evaluation in its config.

    Attributes:
        max_answer_length: The most tokens in an answer.
        null_threshold: How much larger the score of no answer must be than that of the best answer,
            if questions may have no answer.
    """

    max_answer_length: int = MAX_ANSWER_LENGTH
    null_threshold: float = 0.0

    @classmethod
    def of(cls, config: "PretrainedConfig") -> "AnswerRules":
        """Return the rules of a model; BERT's if its config has none."""
        saved = (getattr(config, "task_specific_params", None) or {}).get(TASK, {})
        return cls(**{name: saved[name] for name in cls._fields if name in saved})

    def write(self, config: "PretrainedConfig") -> None:
        """Write the rules to a model's config."""
        others = getattr(config, "task_specific_params", None) or {}
        config.task_specific_params = {**others, TASK: self._asdict()}


class Answer(NamedTuple):
    """An answer.

    Attributes:
        text: The answer; "" for none.
        start: The index in the context of its first character; −1 for none.
        end: The index after its last character; −1 for none.
        score: The sum of its start and end logits.
        null_score: The smallest sum of the logits at [CLS] over the features, which stands for
            "no answer".
    """

    text: str
    start: int
    end: int
    score: float
    null_score: float


def answer_question(
    context: str,
    features: Sequence[Feature],
    start_logits: Sequence[NDArray[np.floating]],
    end_logits: Sequence[NDArray[np.floating]],
    max_answer_length: int = MAX_ANSWER_LENGTH,
    null_threshold: float | None = None,
) -> Answer:
    """Answer a question by the best span of all its features.

    Args:
        context: The context.
        features: The question's features.
        start_logits: For each feature (L,) or longer; values of padding at the end are ignored.
        end_logits: The same for the last token.
        max_answer_length: The most tokens in an answer.
        null_threshold: If `null_score` − `score` is larger, there is no answer; None always gives
            one.
    """
    best = Answer("", -1, -1, -np.inf, np.inf)
    for feature, starts, ends in zip(features, start_logits, end_logits, strict=True):
        n = len(feature.input_ids)
        spans = best_spans(
            starts[None, :n], ends[None, :n], np.array(feature.offsets)[None], max_answer_length
        )
        score, first, last = (float(spans[0][0]), int(spans[1][0]), int(spans[2][0]))
        null = min(best.null_score, float(starts[0]) + float(ends[0]))
        if score > best.score:
            a, b = feature.offsets[first][0], feature.offsets[last][1]
            best = Answer(context[a:b], a, b, score, null)
        best = best._replace(null_score=null)
    if null_threshold is not None and best.null_score - best.score > null_threshold:
        return best._replace(text="", start=-1, end=-1)
    return best


# Scores


def _normalized(text: str) -> list[str]:
    """Return the words of an answer, lower-case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def score_answer(text: str, answers: Sequence[str], version_2: bool) -> tuple[float, float]:
    """Return exact match and F1 of an answer, 0 to 1: the best over the given answers.

    Args:
        text: The answer; "" for none.
        answers: The right answers; none if the question has no answer.
        version_2: Whether to score as the script of SQuAD 2.0. It leaves out right answers that
            are empty after normalisation, and two empty answers have an F1 of 1. In version 1.1
            they have 0, and a question without a right answer is not possible: it gives 0 here.
    """
    found = _normalized(text)
    right = [_normalized(answer) for answer in answers]
    if version_2:
        right = [words for words in right if words] or [[]]
    exact = f1 = 0.0
    for words in right:
        exact = max(exact, float(found == words))
        f1 = max(f1, _f1(found, words, version_2))
    return exact, f1


def _f1(found: list[str], right: list[str], version_2: bool) -> float:
    if version_2 and not (found and right):
        return float(found == right)
    same = sum((Counter(found) & Counter(right)).values())
    return 2 * same / (len(found) + len(right)) if same else 0.0
