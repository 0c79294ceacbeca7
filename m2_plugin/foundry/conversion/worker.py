"""What a worker does: convert some blocks, each to its shards and its record."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from m2_plugin.foundry.conversion.folder import Blocks, Key
from m2_plugin.foundry.conversion.job import Recipe
from m2_plugin.foundry.conversion.samples import make_samples, tokenizer_of
from m2_plugin.foundry.conversion.shards import check_compression, write_shards
from m2_plugin.foundry.conversion.sources import Block, Stream


@dataclass(frozen=True)
class Part:
    """The blocks of a stream that one task converts: every `step`-th from number `first` on.

    Args:
        blocks: Where the results go.
        recipe: How documents become samples.
        skip_bad: Whether to count bad documents and continue.
        stream: The number of the stream.
        source: The stream, to be read from its beginning; or its block number `first` alone.
        first: The number of the first block.
        step: The distance between the blocks.
        limit: Convert the first block alone, even if it is finished, and keep so many samples.
    """

    blocks: Blocks
    recipe: Recipe
    skip_bad: bool
    stream: int
    source: Stream | Block
    first: int = 0
    step: int = 1
    limit: int | None = None


def convert_part(part: Part) -> None:
    """Convert the blocks of a part that have no record yet.

    Raises:
        BadDocumentError: If a document cannot be read, unless bad ones are skipped.
        ConversionError: If the input cannot be read.
    """
    number = -1
    for number, block in _numbered(part):
        if number < part.first or (number - part.first) % part.step:
            continue
        key = part.stream, number
        if part.limit is None and part.blocks.find(key) is not None:
            continue
        if _is_enough(part, key):
            return
        _write_block(part, key, block)
        if part.limit is not None:
            return
    if not isinstance(part.source, Block):
        part.blocks.end(part.stream, number + 1)


def _numbered(part: Part) -> Iterator[tuple[int, Block]]:
    if isinstance(part.source, Block):
        return iter([(part.first, part.source)])
    return enumerate(part.source.blocks(part.recipe.block_bytes))


def _is_enough(part: Part, key: Key) -> bool:
    """Return whether the finished blocks before a block have all samples of a limited split."""
    limit = part.recipe.max_samples
    return part.limit is None and limit is not None and part.blocks.samples_before(key) >= limit


def _write_block(part: Part, key: Key, block: Block) -> None:
    recipe = part.recipe
    samples, counts = make_samples(block, recipe, part.skip_bad, part.limit)
    entries = write_shards(
        samples,
        *(recipe.columns, recipe.compression, part.blocks.shards),
        name=f"shard.{key[0]:05}-{key[1]:05}",
    )
    record = {"samples": len(samples), "stored": block.stored, "shards": entries}
    part.blocks.add(key, record | asdict(counts))


def check_recipe(recipe: Recipe) -> dict[str, Any]:
    """Check what the arguments name; return what the manifest says about the tokenizer.

    Raises:
        ConversionError: If the compression is unknown, or the tokenizer cannot be loaded.
    """
    check_compression(recipe.compression)
    if recipe.concat_tokens is None:
        return {}
    tokenizer = tokenizer_of(recipe)
    return {"tokenizer_hash": tokenizer.fingerprint(), "vocabulary": tokenizer.vocabulary()}
