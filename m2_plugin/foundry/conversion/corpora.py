"""The corpora known by name: their splits on the hub, as llm-foundry names and cuts them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """One split of a corpus.

    Args:
        hub_split: The split on the hub that it is read from.
        documents: How many documents are read of it; None if unknown.
        max_samples: How many samples are kept, from the first; None keeps all.
    """

    hub_split: str
    documents: int | None = None
    max_samples: int | None = None


# Equal to llmfoundry's CONSTS["allenai/c4"] (a test compares them), whose import costs 25 s.
C4_SPLITS = {
    "train": Split("train", 364_868_892),
    "train_small": Split("train", 100_000, 100_000),
    "val": Split("validation", 364_608),
    "val_small": Split("validation", 10_000, 10_000),
    "val_xsmall": Split("validation", 3_000, 3_000),
    "val_xxsmall": Split("validation", 100, 100),
}
C4_CHARS_PER_SAMPLE = 2163
CHARS_PER_TOKEN = 4

TEXT_SPLITS = {"train": Split("train"), "val": Split("validation"), "test": Split("test")}

# Short name: (name on the hub, default subset).
TEXT_CORPORA: dict[str, tuple[str, str | None]] = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "bookcorpus": ("bookcorpus/bookcorpus", None),
}


def is_held_out(split_name: str) -> bool:
    """Whether a split evaluates (val, val_small, test ...) rather than trains."""
    return split_name.startswith(("val", "test", "eval", "dev"))
