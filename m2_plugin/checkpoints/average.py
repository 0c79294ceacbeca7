"""Average the weights of checkpoints of one model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2_plugin.checkpoints.card import metadata_of, new_card, shown_name
from m2_plugin.checkpoints.convert import ImportReport, read_checkpoint, save_tokenizer
from m2_plugin.checkpoints.folder import CARD, byte_count, save_folder
from m2_plugin.checkpoints.tokenizer import load_data_tokenizer
from m2_plugin.files import whole, write_atomically

__all__ = ["average_checkpoints", "mean"]

# What transformers adds to a config, and says nothing about the model.
INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def average_checkpoints(
    sources: Sequence[str | Path], out: str | Path, weights: Sequence[float] | None = None
) -> list[float]:
    """Write a transformers folder with the mean of checkpoints of one model.

    Checkpoints of one run's end, averaged, often evaluate better than each (arXiv 1803.05407), and
    in a constant phase of the learning rate about as well as after a decay (arXiv 2405.18392).

    Args:
        sources: Two or more sources of `import_checkpoint`: folders, files or names on the hub.
        out: The folder to write. It appears when it is complete. It gets the first tokenizer.
        weights: A number for each source, not negative; by default all are alike.

    Returns:
        The share of each source; the sum is 1.

    Raises:
        ValueError: If a source cannot be read; or configs, tensors or tokenizers differ (the
            message names the field); or the weights are no shares; or `out` exists.
    """
    shares = _shares(sources, weights)
    reports = [read_checkpoint(source) for source in sources]
    first = reports[0]
    for other in reports[1:]:
        _check_same(first, other)
    with_tokenizer = [report for report in reports if report.tokenizer is not None]
    _check_same_tokenizer(with_tokenizer)
    config, out = first.found.config, Path(out)
    with whole(out, byte_count(first.found.weights)) as temporary:
        temporary.mkdir()
        found = {
            name: mean([report.found.weights[name] for report in reports], shares)
            for name in first.found.weights
        }
        save_folder(temporary, config, found)
        if with_tokenizer:
            save_tokenizer(with_tokenizer[0], temporary)
        card = new_card(
            out.name,
            config,
            first.parameters,
            [("Average", _lines(reports, shares))],
            has_tokenizer=bool(with_tokenizer),
            **_common([metadata_of(report.local) for report in reports]),
        )
        write_atomically(temporary / CARD, card)
    return shares


def mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return a weighted mean, computed in fp64, in the dtype of the tensors.

    It is exact if all are equal.

    Args:
        tensors: Tensors of one shape.
        shares: A number for each, not all 0.
    """
    counted = [(t, share) for t, share in zip(tensors, shares, strict=True) if share > 0]
    result, total = counted[0][0].double(), counted[0][1]
    for tensor, share in counted[1:]:
        total += share
        moved = result + (tensor - result) * (share / total)
        result = torch.where(tensor == result, result, moved)  # −0 + 0 would be 0
    return result.to(tensors[0].dtype)


def _shares(sources: Sequence[Any], weights: Sequence[float] | None) -> list[float]:
    if len(sources) < 2:
        raise ValueError(f"an average needs two checkpoints or more, and there is {len(sources)}")
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources):
        raise ValueError(f"there are {len(weights)} weights for {len(sources)} checkpoints")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights must be numbers of at least 0, not {weight}")
    if not sum(weights):
        raise ValueError("one weight or more must be above 0")
    return [weight / sum(weights) for weight in weights]


def _check_same(first: ImportReport, other: ImportReport) -> None:
    """Refuse another model than the first one's."""

    def fields(report: ImportReport) -> dict[str, Any]:
        config = report.found.config.to_dict()
        return {key: value for key, value in config.items() if key not in INCIDENTAL}

    ours, theirs = fields(first), fields(other)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{other.source!r} is another model than {first.source!r}: its {key} is "
                f"{theirs.get(key)!r}, not {ours.get(key)!r}"
            )
    for name in sorted(first.found.weights.keys() ^ other.found.weights.keys()):
        lacking, having = (other, first) if name in first.found.weights else (first, other)
        raise ValueError(f"{lacking.source!r} lacks {name}, which {having.source!r} has")
    for name, tensor in first.found.weights.items():
        dtype = other.found.weights[name].dtype
        if dtype != tensor.dtype:
            raise ValueError(
                f"{name} is {_short(dtype)} in {other.source!r}, not {_short(tensor.dtype)} as in "
                f"{first.source!r}: average checkpoints of one precision"
            )


def _check_same_tokenizer(reports: Sequence[ImportReport]) -> None:
    if not reports:
        return
    first, *others = [
        (report, load_data_tokenizer(str(report.tokenizer), report.tokenizer_files))
        for report in reports
    ]
    ours = first[1].get_vocab()
    for report, tokenizer in others:
        theirs = tokenizer.get_vocab()
        differ = [
            token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
        ]
        if differ:
            token = min(differ)
            raise ValueError(
                f"{report.source!r} has another tokenizer than {first[0].source!r}: its id of "
                f"{token!r} is {theirs.get(token)}, not {ours.get(token)}"
            )


def _lines(reports: Sequence[ImportReport], shares: Sequence[float]) -> str:
    rows = zip(reports, shares, strict=True)
    return "The weights are the mean of these checkpoints, made by m2_plugin:\n\n" + "\n".join(
        f"- `{shown_name(report.source)}`, {share:.1%}" for report, share in rows
    )


def _common(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = metadata
    return {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
