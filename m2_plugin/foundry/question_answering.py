"""Question answering by parts of a text, as in SQuAD: the dataloader, the metrics and the models.

    model:
      name: m2_bert_question_answering  # or hf_bert_question_answering
      pretrained_model_name_or_path: ./exported/m2-bert-base

A context that is longer than `max_seq_len` becomes several features. In training, those without
the answer, and questions without an answer, point to [CLS]. In evaluation, the best span of all
features is scored as by the official scripts.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from composer.core.data_spec import DataSpec
from composer.metrics import LanguageCrossEntropy
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from transformers import (
    AutoModelForQuestionAnswering,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from m2_plugin.data.formats import DataError
from m2_plugin.data.squad import (
    DOC_STRIDE,
    MAX_ANSWER_LENGTH,
    AnswerRules,
    best_spans,
    encode_question,
    find_answer,
    read_questions,
    score_answer,
)
from m2_plugin.foundry.errors import one_line
from m2_plugin.foundry.loaders import (
    SHARED_KEYS,
    Padding,
    build_example_loader,
    check_section,
    leave_out,
    subset,
)
from m2_plugin.foundry.metrics import RowMetric
from m2_plugin.foundry.models import BertComposerModel

__all__ = [
    "ANSWER_METRICS",
    "HFBertQuestionAnswering",
    "M2BertQuestionAnswering",
    "QuestionCollator",
    "SquadExactMatch",
    "SquadF1",
    "build_question_answering_dataloader",
    "feature_rows",
]

log = logging.getLogger(__name__)

KEYS = SHARED_KEYS | {"doc_stride", "path", "version_2"}
INT, TEXT = datasets.Value("int32"), datasets.Value("string")
QUESTIONS = datasets.Features(
    {
        "question": TEXT,
        "context": TEXT,
        "answers": datasets.Sequence(TEXT),
        "answer_starts": datasets.Sequence(INT),
    }
)
FEATURES = datasets.Features(
    {
        "question": INT,
        "input_ids": datasets.Sequence(INT),
        "token_type_ids": datasets.Sequence(INT),
        "offsets": datasets.Sequence(datasets.Sequence(INT, 2)),
        "start": INT,
        "end": INT,
    }
)


# Data


def _read(dataset: Mapping[str, Any]) -> Dataset:
    """Read the questions of all files.

    Raises:
        ValueError: If a file or, with `on_error: raise`, a question cannot be read.
    """
    path = dataset["path"]
    files = [path] if isinstance(path, str) else list(path)
    columns: dict[str, list[Any]] = {name: [] for name in QUESTIONS}
    broken: list[str] = []
    for file in files:
        try:
            for question in read_questions(file, dataset.get("split")):
                if question.problem:
                    broken.append(f"{question.place}: {question.problem}")
                    continue
                columns["question"].append(question.question)
                columns["context"].append(question.context)
                columns["answers"].append([text for text, _ in question.answers])
                columns["answer_starts"].append([start for _, start in question.answers])
        except DataError as error:
            raise ValueError(f"dataset.path: {error}.") from error
    leave_out(broken, dataset.get("on_error", "raise"))
    return Dataset.from_dict(columns, QUESTIONS)


def _features(
    questions: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, doc_stride: int
) -> Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    lost = 0
    for i, row in enumerate(questions):
        features = encode_question(
            tokenizer, row["question"], row["context"], max_seq_len, doc_stride
        )
        spans = [(0, 0)] * len(features)
        if row["answers"]:
            text, start = row["answers"][0], row["answer_starts"][0]
            spans = [find_answer(feature, text, start) for feature in features]
            lost += not any(end for _, end in spans)
        for feature, (first, last) in zip(features, spans, strict=True):
            columns["question"].append(i)
            columns["input_ids"].append(feature.input_ids)
            columns["token_type_ids"].append(feature.token_type_ids)
            columns["offsets"].append(feature.offsets)
            columns["start"].append(first)
            columns["end"].append(last)
    if lost:
        log.warning(
            "%d answers are in no feature as a whole, so that training learns no answer for them: "
            "set a larger max_seq_len or a smaller doc_stride",
            lost,
        )
    return Dataset.from_dict(columns, FEATURES)


class QuestionCollator:
    """Pad features to a batch.

    Args:
        padding: Makes the tensors.
        questions: The questions, by the index in a feature.
        version_2: Whether a question may have no answer.
    """

    def __init__(self, padding: Padding, questions: Dataset, version_2: bool):
        self.padding = padding
        self.questions = questions
        self.version_2 = version_2

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of B features.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`, (B, L) int64; `start_positions` and
            `end_positions`, (B,), 0 for no answer; `offsets` (B, L, 2), the characters of each
            token of the context, −1 for other tokens; `question` (B,), the index of the question;
            `context`, B texts; `answers`, for each the right answers; `version_2`.
        """
        asked = [self.questions[row["question"]] for row in rows]
        return {
            **self.padding.inputs(rows),
            "start_positions": torch.tensor([row["start"] for row in rows]),
            "end_positions": torch.tensor([row["end"] for row in rows]),
            "offsets": self.padding([row["offsets"] for row in rows], -1),
            "question": torch.tensor([row["question"] for row in rows]),
            "context": [question["context"] for question in asked],
            "answers": [question["answers"] for question in asked],
            "version_2": self.version_2,
        }


def _count_tokens(batch: Mapping[str, Any]) -> dict[str, int]:
    """Count the tokens of a batch. Each feature has one loss, which weights the microbatches."""
    return {
        "total": int(batch["attention_mask"].sum()),
        "loss_generating": len(batch["input_ids"]),
    }


@one_line()
def build_question_answering_dataloader(
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int | float,
    dataset: dict[str, Any],
    drop_last: bool = False,
    num_workers: int = 0,
    pin_memory: bool = True,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = True,
    timeout: int = 0,
) -> DataSpec:
    """Build the dataloader `question_answering`, for questions whose answers are parts of a text.

    The keys of `dataset` are

    * `path` (required): a file, or a list of files: SQuAD's JSON, of version 1.1 or 2.0; a question
      per row (.jsonl, .parquet, ...); or a folder that `datasets` saved; see
      `m2_plugin.data.squad.read_questions`;
    * `split`: the split of that folder;
    * `version_2`: whether an evaluation may find no answer, and scores as the script of SQuAD 2.0.
      By default it does so if the data has a question without an answer;
    * `max_seq_len` (required): the largest number of tokens of a question with a part of its
      context, and `doc_stride` (default: 128), the tokens between the starts of these parts;
    * `padding`: max_length (default) or longest;
    * `shuffle` (default: true for the split train only) and `shuffle_seed`: the order;
    * `max_samples`: the number of questions to use, chosen at random;
    * `on_error`: raise (default), or skip to leave out broken questions, such as one whose answer
      is not at its `answer_start`.

    `num_workers` to `timeout` are the arguments of `torch.utils.data.DataLoader`. All features are
    in memory, 20 bytes per token.

    Args:
        tokenizer: A fast tokenizer with a padding token.
        device_batch_size: The features per batch on this device.
        dataset: The keys above.
        drop_last: Whether to leave out a last batch that is not full.

    Returns:
        Composer's data spec, with the batches of `QuestionCollator`.

    Raises:
        ValueError: If a key, file, column or answer is missing or wrong; the message names it, and
            the question.
    """
    required = ("path", "max_seq_len")
    tokenizer = check_section("question_answering", dataset, KEYS, required, tokenizer)
    max_seq_len = int(dataset["max_seq_len"])
    padding = Padding(tokenizer, max_seq_len, dataset.get("padding", "max_length"))
    questions = subset(_read(dataset), dataset)
    if not len(questions):
        raise ValueError(f"There are no questions in {dataset['path']}.")
    version_2 = dataset.get("version_2")
    unanswered = sum(not answers for answers in questions["answers"])
    if version_2 is None:
        version_2 = unanswered > 0
    elif unanswered and not version_2:
        raise ValueError(
            f"dataset.version_2 is false, but {unanswered} questions in {dataset['path']} have no "
            "answer."
        )
    stride = int(dataset.get("doc_stride", DOC_STRIDE))
    examples = _features(questions, tokenizer, max_seq_len, stride)
    log.info("%d questions in %d features of %s", len(questions), len(examples), dataset["path"])
    return build_example_loader(
        examples,
        QuestionCollator(padding, questions, version_2),
        _count_tokens,
        dataset,
        device_batch_size,
        drop_last,
        num_workers,
        pin_memory,
        prefetch_factor,
        persistent_workers,
        timeout,
    )


# Metrics


class _SquadMetric(RowMetric):
    """A score of the answers to questions, 0 to 100 as in the official scripts.

    A row belongs to a feature: the question; the score of its best span, and of no answer; exact
    match and F1 of that span, and of no answer.

    Args:
        null_threshold: If the smallest score of no answer is larger than the best span's by more
            than this, there is no answer. Without effect for data of version 1.1.
    """

    column: int  # of the span's score; that of no answer is 2 columns further

    def __init__(self, null_threshold: float):
        super().__init__(columns=7)
        self.null_threshold = null_threshold

    def compute(self) -> Tensor:
        """Return the mean over questions."""
        rows = self.table()
        if not len(rows):
            return torch.tensor(0.0)
        rows = rows[np.lexsort((-rows[:, 1], rows[:, 0]))]  # a question's best span first
        starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
        best, null = rows[starts], np.minimum.reduceat(rows[:, 2], starts)
        with np.errstate(invalid="ignore"):  # −inf − −inf: no context, and version 1.1
            no_answer = null - best[:, 1] > self.null_threshold
        column = np.where(no_answer, self.column + 2, self.column)
        return torch.tensor(100 * best[np.arange(len(best)), column].mean())


class SquadExactMatch(_SquadMetric):
    """The share of questions whose answer equals a right one after normalisation."""

    column = 3


class SquadF1(_SquadMetric):
    """The mean over questions of the F1 of words, with the best of the right answers."""

    column = 4


ANSWER_METRICS: dict[str, type[_SquadMetric]] = {"exact_match": SquadExactMatch, "f1": SquadF1}


def feature_rows(
    batch: Mapping[str, Any],
    start_logits: NDArray[np.floating],
    end_logits: NDArray[np.floating],
    max_answer_length: int,
) -> Tensor:
    """Return the rows of the metrics for a batch of B features, (B, 7) fp64.

    Args:
        batch: A batch of `QuestionCollator`.
        start_logits: (B, L).
        end_logits: (B, L).
        max_answer_length: The most tokens in an answer.
    """
    offsets = batch["offsets"].cpu().numpy()
    scores, first, last = best_spans(start_logits, end_logits, offsets, max_answer_length)
    version_2 = batch["version_2"]
    rows = []
    for i, (context, right) in enumerate(zip(batch["context"], batch["answers"], strict=True)):
        found = context[offsets[i, first[i], 0] : offsets[i, last[i], 1]]
        null = float(start_logits[i, 0]) + float(end_logits[i, 0]) if version_2 else -np.inf
        given = score_answer(found if scores[i] > -np.inf else "", right, version_2)
        none = score_answer("", right, version_2)
        rows.append([int(batch["question"][i]), scores[i], null, *given, *none])
    return torch.tensor(rows, dtype=torch.float64)


# Models


class _QuestionAnswering(BertComposerModel):
    """Answers to questions: the first and the last token of a part of the text.

    The saved config has the first two arguments, for `m2-plugin evaluate` and `predict`.

    Args:
        max_answer_length: The most tokens in an answer of the evaluation.
        null_threshold: How much larger the score of no answer must be than that of the best answer,
            if questions may have no answer.
        **kwargs: More arguments of `BertComposerModel`. `metrics` may name exact_match and f1 (0 to
            100, as the official scripts give them) and cross_entropy; the default is all of these.
    """

    auto_class = AutoModelForQuestionAnswering

    @one_line()
    def __init__(
        self,
        max_answer_length: int = MAX_ANSWER_LENGTH,
        null_threshold: float = 0.0,
        **kwargs: Any,
    ):
        if max_answer_length < 1:
            raise ValueError(
                f"model.max_answer_length must be at least 1, got {max_answer_length}."
            )
        self.rules = AnswerRules(max_answer_length, null_threshold)
        super().__init__(**kwargs)
        self.rules.write(self.model.config)

    @staticmethod
    def default_metrics(config: PretrainedConfig) -> Sequence[str]:
        """Return the names of the default metrics."""
        return (*ANSWER_METRICS, "cross_entropy")

    def build_metric(self, name: str, config: PretrainedConfig) -> Metric:  # type: ignore[override]
        """Build a metric by its name."""
        if name == "cross_entropy":
            return LanguageCrossEntropy()
        if name not in ANSWER_METRICS:
            raise ValueError(
                f"model.metrics: {name!r} is not one of {', '.join(ANSWER_METRICS)}, cross_entropy."
            )
        return ANSWER_METRICS[name](self.rules.null_threshold)

    def eval_forward(self, batch: Mapping[str, Any], outputs: Any | None = None) -> dict[str, Any]:
        """Answer questions.

        Args:
            batch: A batch of `QuestionCollator`.
            outputs: The outputs of `forward` on this batch, if it ran already.

        Returns:
            `start_logits` and `end_logits`, fp32 (B, L), and `rows`, as of `feature_rows`.
        """
        outputs = self.forward(batch) if outputs is None else outputs
        starts, ends = (outputs[f"{which}_logits"].detach().float() for which in ("start", "end"))
        logits = starts.cpu().numpy(), ends.cpu().numpy()
        rows = feature_rows(batch, *logits, self.rules.max_answer_length)
        return {"start_logits": starts, "end_logits": ends, "rows": rows.to(starts.device)}

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> dict[str, Any]:
        """Update a metric with the outputs of `eval_forward`."""
        if isinstance(metric, RowMetric):
            metric.update(outputs["rows"])
        else:
            for which in ("start", "end"):
                metric.update(outputs[f"{which}_logits"], batch[f"{which}_positions"])
        return {}


class M2BertQuestionAnswering(_QuestionAnswering):
    """M2-BERT for question answering; `m2_bert_question_answering` in a YAML."""

    default_model_type = "m2_bert"


class HFBertQuestionAnswering(_QuestionAnswering):
    """Any transformers model for question answering; `hf_bert_question_answering` in a YAML."""

    default_model_type = "bert"
