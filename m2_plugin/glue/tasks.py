"""The GLUE tasks: the names of their columns, labels, splits, metrics and files.

Names of tasks, columns, splits and labels are those of the hub's dataset `glue`; "official" names
are those of the files of https://gluebenchmark.com/tasks. The metrics, and which of them count, are
those of Monarch Mixer (arXiv 2310.12109). Imports the standard library only.
"""

import math
from dataclasses import dataclass

from m2_plugin.suggest import did_you_mean

__all__ = ["TASKS", "Task", "task"]

# The official file of a split, by the hub's name of the split.
SPLIT_FILES = {
    "train": "train",
    "validation": "dev",
    "test": "test",
    "validation_matched": "dev_matched",
    "validation_mismatched": "dev_mismatched",
    "test_matched": "test_matched",
    "test_mismatched": "test_mismatched",
}


@dataclass(frozen=True)
class Task:
    """One task of GLUE.

    Attributes:
        name: The config of the hub's dataset `glue`.
        folder: The folder of the official files.
        text_columns: The columns of the text, or of the pair of texts.
        label_names: The names of the classes in the order of their ids; empty for a regression.
        metrics: The metrics to report, by the names of `m2_bert_classification`.
        score_metrics: The metrics that count in the paper's average.
        official_text_columns: The names of `text_columns` in the official files.
        official_label_column: The name of the label column there.
        official_labels: The classes in the official files and on the GLUE server, by id.
        official_columns: The columns of a training or validation file without a header line.
        label_range: The smallest and the largest number of a regression.
        train_split: The training split, or None.
        eval_splits: The labelled splits to evaluate on.
        test_splits: The splits without labels, to predict for the GLUE server.
        submission_files: The names of the server's files, one for each test split.
    """

    name: str
    folder: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    score_metrics: tuple[str, ...]
    official_text_columns: tuple[str, ...]
    official_label_column: str
    official_labels: tuple[str, ...]
    submission_files: tuple[str, ...]
    official_columns: tuple[str, ...] = ()
    label_range: tuple[float, float] = (-math.inf, math.inf)
    train_split: str | None = "train"
    eval_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)

    @property
    def num_labels(self) -> int:
        """The number of classes; 1 for a regression, as in transformers."""
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number rather than a class."""
        return not self.label_names

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits of the task."""
        train = (self.train_split,) if self.train_split else ()
        return (*train, *self.eval_splits, *self.test_splits)

    def eval_label(self, split: str) -> str:
        """Return the label of a split in a YAML's `eval_loader`: `cola`, `mnli_matched`, ..."""
        return self.name + split.removeprefix("validation")

    def official_files(self, split: str) -> tuple[str, ...]:
        """Return possible paths of a split below the folder of all tasks, best first."""
        if self.name == "ax":
            return ("AX/AX.tsv", "AX/test.tsv", "AX.tsv", "diagnostic/diagnostic.tsv")
        return (f"{self.folder}/{SPLIT_FILES[split]}.tsv",)


SENTENCE = ("sentence",)
SENTENCES = ("sentence1", "sentence2")
QUESTIONS = ("question1", "question2")
NLI = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
BINARY = ("0", "1")

TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task(
            name="cola",
            folder="CoLA",
            text_columns=SENTENCE,
            label_names=("unacceptable", "acceptable"),
            metrics=("matthews",),
            score_metrics=("matthews",),
            official_text_columns=SENTENCE,
            official_label_column="label",
            official_labels=BINARY,
            official_columns=("source", "label", "star", "sentence"),
            submission_files=("CoLA.tsv",),
        ),
        Task(
            name="sst2",
            folder="SST-2",
            text_columns=SENTENCE,
            label_names=("negative", "positive"),
            metrics=("accuracy",),
            score_metrics=("accuracy",),
            official_text_columns=SENTENCE,
            official_label_column="label",
            official_labels=BINARY,
            submission_files=("SST-2.tsv",),
        ),
        Task(
            name="mrpc",
            folder="MRPC",
            text_columns=SENTENCES,
            label_names=("not_equivalent", "equivalent"),
            metrics=("f1", "accuracy"),
            score_metrics=("f1",),
            official_text_columns=("#1 String", "#2 String"),
            official_label_column="Quality",
            official_labels=BINARY,
            submission_files=("MRPC.tsv",),
        ),
        Task(
            name="stsb",
            folder="STS-B",
            text_columns=SENTENCES,
            label_names=(),
            metrics=("spearman", "pearson"),
            score_metrics=("spearman",),
            official_text_columns=SENTENCES,
            official_label_column="score",
            official_labels=(),
            label_range=(0.0, 5.0),
            submission_files=("STS-B.tsv",),
        ),
        Task(
            name="qqp",
            folder="QQP",
            text_columns=QUESTIONS,
            label_names=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            score_metrics=("accuracy", "f1"),
            official_text_columns=QUESTIONS,
            official_label_column="is_duplicate",
            official_labels=BINARY,
            submission_files=("QQP.tsv",),
        ),
        Task(
            name="mnli",
            folder="MNLI",
            text_columns=("premise", "hypothesis"),
            label_names=NLI,
            metrics=("accuracy",),
            score_metrics=("accuracy",),
            official_text_columns=SENTENCES,
            official_label_column="gold_label",
            official_labels=NLI,
            eval_splits=("validation_matched", "validation_mismatched"),
            test_splits=("test_matched", "test_mismatched"),
            submission_files=("MNLI-m.tsv", "MNLI-mm.tsv"),
        ),
        Task(
            name="qnli",
            folder="QNLI",
            text_columns=("question", "sentence"),
            label_names=ENTAILMENT,
            metrics=("accuracy",),
            score_metrics=("accuracy",),
            official_text_columns=("question", "sentence"),
            official_label_column="label",
            official_labels=ENTAILMENT,
            submission_files=("QNLI.tsv",),
        ),
        Task(
            name="rte",
            folder="RTE",
            text_columns=SENTENCES,
            label_names=ENTAILMENT,
            metrics=("accuracy",),
            score_metrics=("accuracy",),
            official_text_columns=SENTENCES,
            official_label_column="label",
            official_labels=ENTAILMENT,
            submission_files=("RTE.tsv",),
        ),
        Task(
            name="wnli",
            folder="WNLI",
            text_columns=SENTENCES,
            label_names=("not_entailment", "entailment"),
            metrics=("accuracy",),
            score_metrics=(),  # left out of the paper's average, as is usual
            official_text_columns=SENTENCES,
            official_label_column="label",
            official_labels=BINARY,
            submission_files=("WNLI.tsv",),
        ),
        Task(
            name="ax",  # diagnostic sentences; the model of MNLI predicts them
            folder="AX",
            text_columns=("premise", "hypothesis"),
            label_names=NLI,
            metrics=(),
            score_metrics=(),
            official_text_columns=SENTENCES,
            official_label_column="label",
            official_labels=NLI,
            train_split=None,
            eval_splits=(),
            submission_files=("AX.tsv",),
        ),
    )
}


def task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: If there is none; the message proposes the closest name.
    """
    found = TASKS.get(name)
    if found is None:
        spelling = str(name).lower()
        folders = {t.folder.lower(): t.name for t in TASKS.values()}
        hint = did_you_mean(folders.get(spelling, spelling), TASKS)
        raise ValueError(f"There is no GLUE task {name!r}.{hint} Tasks: {', '.join(TASKS)}.")
    return found
