"""What is known of MDS streams of tokens before a run reads them: their length and vocabulary."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from streaming.base.format import reader_from_json

from m2_plugin.foundry.conversion.folder import read_manifest
from m2_plugin.foundry.mds_index import is_whole, read_index

__all__ = ["TokenStream", "first_lengths", "local_streams", "read_token_stream"]

LOOKED_AT = 8  # samples; llm-foundry's converters give all samples one length


class TokenStream(NamedTuple):
    """A split whose samples are tokens.

    Attributes:
        folder: Its folder.
        length: The tokens in each sample; None if that is not known, or differs.
        longest: The tokens in the longest sample that is known; None if none is.
        vocabulary: The `vocabulary_digest` of the tokenizer that wrote it, or None.
        tokenizer: The name of that tokenizer, or None.
    """

    folder: str
    length: int | None = None
    longest: int | None = None
    vocabulary: str | None = None
    tokenizer: str | None = None


def local_streams(dataset: Mapping[str, Any]) -> tuple[list[tuple[str, str, str | None]], bool]:
    """Find the streams of a loader's `dataset` that are not downloaded.

    Returns:
        (local, split, validate_hash) of each; and whether these are all streams.
    """
    streams = list((dataset.get("streams") or {}).values()) or [dataset]
    folders = []
    for stream in streams:
        local, remote = stream.get("local"), stream.get("remote")
        if local is not None and remote in (None, local):
            split = stream.get("split") or dataset.get("split") or ""
            validate_hash = stream.get("validate_hash") or dataset.get("validate_hash")
            folders.append((local, split, validate_hash))
    return folders, len(folders) == len(streams)


def read_token_stream(folder: str, encoding: str = "int64") -> TokenStream | None:
    """Read what is known of a split.

    Args:
        folder: The folder of the split.
        encoding: The dtype of tokens that are stored as bytes, the loader's `token_encoding_type`.

    Returns:
        None if its samples are texts.

    Raises:
        ValueError: If the folder has no index, or a broken one.
    """
    entries = read_index(folder)
    columns = entries[0].get("column_names", []) if entries else []
    if "text" in columns or "tokens" not in columns:
        return None
    manifest = read_manifest(Path(folder))
    if manifest is not None and manifest["settings"].get("concat_tokens"):
        length = manifest["settings"]["concat_tokens"]
        name = manifest["settings"].get("tokenizer")
        return TokenStream(folder, length, length, manifest.get("vocabulary"), name)
    raw = entries[0]["raw_data"]
    if raw is None or not is_whole(os.path.join(folder, raw["basename"]), raw):
        return TokenStream(folder)  # still compressed, or damaged: known when it is read
    reader = reader_from_json(folder, None, entries[0])
    lengths = first_lengths(reader, encoding)
    longest = max(lengths, default=None)
    return TokenStream(folder, longest if len(lengths) == 1 else None, longest)


def first_lengths(shard: Any, encoding: str) -> set[int]:
    """Read the lengths of the first samples of tokens in a shard of Streaming's.

    Args:
        shard: The shard, whose file is there.
        encoding: As in `read_token_stream`.
    """
    samples = [shard[i]["tokens"] for i in range(min(LOOKED_AT, len(shard)))]
    size = np.dtype(encoding).itemsize
    return {len(s) // size if isinstance(s, bytes) else len(s) for s in samples}
