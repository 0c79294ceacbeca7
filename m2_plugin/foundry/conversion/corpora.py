"""The corpora with short names, and their splits, which are those of llm-foundry."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """One split of a corpus.

    Args:
        hub_split: The name of the split on the hub.
        documents: The number of documents to read; None if unknown.
        max_samples: The number of samples to keep, from the first on; None keeps all.
    """

    hub_split: str
    documents: int | None = None
    max_samples: int | None = None


# A copy of llm-foundry's CONSTS["allenai/c4"], whose import takes 25 s. A test compares them.
C4_SPLITS = {
    "train": Split("train", 364_868_892),
    "train_small": Split("train", 100_000, 100_000),
    "val": Split("validation", 364_608),
    "val_small": Split("validation", 10_000, 10_000),
    "val_xsmall": Split("validation", 3_000, 3_000),
    "val_xxsmall": Split("validation", 100, 100),
}
C4_CHARS_PER_SAMPLE = 2163

TEXT_SPLITS = {"train": Split("train"), "val": Split("validation"), "test": Split("test")}

# Short name: (name on the hub, default subset).
TEXT_CORPORA: dict[str, tuple[str, str | None]] = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "bookcorpus": ("bookcorpus/bookcorpus", None),
}


def is_held_out(split_name: str) -> bool:
    """Return whether a split is for evaluation (val, val_small, test ...), not for training."""
    return split_name.startswith(("val", "test", "eval", "dev"))
