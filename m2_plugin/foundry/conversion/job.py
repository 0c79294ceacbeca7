"""What is converted, and how."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from m2_plugin.data.pairs import Keys
from m2_plugin.foundry.conversion.sources import (
    HubShard,
    HubSource,
    InputFile,
    Stream,
    file_streams,
)

# The columns of llm-foundry's own converter (for Delta tables); the negatives are a JSON list.
PAIRS = {"query_text": "str", "positive_passage": "str", "negative_passages": "str"}
# Raised whenever the same settings give other shards.
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Recipe:
    """How documents become samples. It determines the shards, together with the input.

    Args:
        text_column: The key or column that holds the text.
        max_chars_per_doc: The number of characters to keep of each document; None keeps all.
        held_out: Keep only the held-out documents (True), only the others (False), or all (None).
        val_fraction: The share of documents that is held out, chosen by a hash of their text.
        tokenizer: A name or folder, for `concat_tokens`.
        tokenizer_kwargs: More arguments of `AutoTokenizer.from_pretrained`.
        bos_text: A text before each document, for `concat_tokens`.
        eos_text: A text after each document, for `concat_tokens`.
        concat_tokens: The tokens in a sample; None makes each document a sample.
        no_wrap: Whether to drop the rest of a document in which a sample ended.
        compression: The `compression` of `MDSWriter`: "zstd", "zstd:7" ...
        max_samples: The number of samples to stop at.
        pairs: The columns of pairs of query and passage, if a document is such a pair.
        block_bytes: The bytes of text in a block, about the size of a shard.
    """

    text_column: str = "text"
    max_chars_per_doc: int | None = None
    held_out: bool | None = None
    val_fraction: float = 0.0
    tokenizer: str | None = None
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    bos_text: str = ""
    eos_text: str = ""
    concat_tokens: int | None = None
    no_wrap: bool = False
    compression: str | None = None
    max_samples: int | None = None
    pairs: Keys | None = None
    block_bytes: int = 48 << 20

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the shards, which llm-foundry's dataloaders read, and their encodings."""
        if self.pairs is not None:
            return PAIRS
        return {"text": "str"} if self.concat_tokens is None else {"tokens": "ndarray:int32"}


@dataclass(frozen=True)
class Job:
    """The conversion of one split.

    Args:
        out: The split's folder on a disk.
        files: The input files in order, if `hub` is None.
        hub: The data set of the hub to stream instead of files.
        recipe: How documents become samples.
        skip_bad: Whether to count bad documents and continue, instead of raising an error.
        expected_documents: The number of documents, if known, for the progress bar.
        url: Where the split goes when it is finished, such as s3://BUCKET/FOLDER/train.
    """

    out: Path
    files: tuple[InputFile, ...] = ()
    hub: HubSource | None = None
    recipe: Recipe = field(default_factory=Recipe)
    skip_bad: bool = False
    expected_documents: int | None = None
    url: str | None = None

    def streams(self) -> list[Stream]:
        """Return the ordered streams of the input."""
        if self.hub is not None:
            return [HubShard(self.hub, i) for i in range(self.hub.shards())]
        return file_streams(list(self.files), self.recipe.text_column, self.recipe.pairs)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the output, without paths and times of files."""
        return {
            "format_version": FORMAT_VERSION,
            "hub": None if self.hub is None else dict(self.hub.load_args),
            "files": named(self.files),
            **asdict(self.recipe),
        }


def named(files: Iterable[InputFile]) -> list[Any]:
    """Return what tells input files apart, without their folders and times."""
    return [[Path(file.path).name, file.layout, file.size] for file in files]


def digest(settings: Mapping[str, Any]) -> str:
    """Return a short hash of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
