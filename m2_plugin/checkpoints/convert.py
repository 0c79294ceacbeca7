"""Import checkpoints of the M2 reference and of Composer as transformers folders; export them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from m2_plugin.checkpoints.card import add_section, shown_name
from m2_plugin.checkpoints.config import (
    Resolved,
    expected_tensors,
    listed,
    model_class_of,
    reference_config,
    resolve,
)
from m2_plugin.checkpoints.fetch import fetch
from m2_plugin.checkpoints.folder import (
    byte_count,
    copy_card,
    load_folder,
    save_folder,
    weights_file,
)
from m2_plugin.checkpoints.names import to_reference
from m2_plugin.checkpoints.read import read_file
from m2_plugin.checkpoints.tokenizer import (
    folder_has_tokenizer,
    holds_tokenizer,
    load_data_tokenizer,
)
from m2_plugin.data.tokenizer import vocabularies_fit, vocabulary_size
from m2_plugin.files import read_json, whole
from m2_plugin.models.modeling_m2_bert import M2BertForTokenClassification

__all__ = [
    "ImportReport",
    "export_checkpoint",
    "import_checkpoint",
    "read_checkpoint",
    "save_tokenizer",
]


@dataclass
class ImportReport:
    """The result of an import.

    Args:
        source: The path that was read.
        found: The model in it.
        missing: Tensors that the source lacks and was allowed to lack, in its naming. They get
            random values.
        tokenizer: The source of the tokenizer, or None if there is no tokenizer.
        tokenizer_files: Its files, if a file of weights holds them: name → content.
        local: The path of the source on this machine.
    """

    source: str
    found: Resolved
    missing: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    tokenizer_files: Mapping[str, Any] = field(default_factory=dict)
    local: str = ""

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(tensor.numel() for tensor in self.found.weights.values())

    def lines(self, verbose: bool = False) -> Iterator[str]:
        """Yield the lines of the report; `verbose` lists every tensor."""
        found, config = self.found, self.found.config
        yield (
            f"{self.source}: {found.model_class.__name__}, {config.num_hidden_layers} layers, "
            f"hidden_size {config.hidden_size}, intermediate_size {config.intermediate_size}, "
            f"up to {config.max_sequence_length or 'any number of'} tokens"
        )
        yield (
            f"{len(found.mapped)} tensors mapped, {len(found.derived)} derived, "
            f"{len(found.unknown)} unused, {len(self.missing)} missing"
        )
        if verbose:
            width = max(map(len, found.mapped), default=0)
            yield from (f"  {name:{width}}  {ours}" for name, ours in found.mapped.items())
            yield from (f"  {name:{width}}  derived" for name in found.derived)
        for reason in dict.fromkeys(found.dropped.values()):
            names = [name for name, why in found.dropped.items() if why == reason]
            yield f"{len(names)} dropped, {reason}: {listed(names)}"
        yield from (f"  {name}: not what M2-BERT computes, as allowed" for name in found.different)
        if found.rounded:
            yield (
                f"{len(found.rounded)} derived differ in their last bits from the values that "
                f"M2-BERT computes and that an export will write: {listed(found.rounded)}"
            )
        yield from (f"  {name}: unused" for name in found.unknown)
        yield from (f"  {name}: missing, starts with random values" for name in self.missing)
        if config.padded_length is not None and found.of_reference:
            yield (
                f"pad_inputs true: the model pads every text to {config.padded_length} tokens "
                f"itself, as the reference pads all that it is given"
            )
        if self.tokenizer is None:
            yield "the source has no tokenizer: give one with --tokenizer"
        if found.unread:
            yield f"ignored keys of the config, which no M2-BERT has: {', '.join(found.unread)}"
        if found.assumed:
            values = ", ".join(f"{key} {value}" for key, value in found.assumed.items())
            yield f"weights and config do not give these, so by default: {values}"


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    config: str | Path | None = None,
    tokenizer: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    allow_different: Sequence[str] = (),
) -> ImportReport:
    """Convert a checkpoint to a transformers folder, without running code in it.

    Args:
        source: A Composer checkpoint or bare weights, of the M2 reference or of this package; or a
            folder with weights and perhaps `config.json`; or the name or URL of such a file or
            folder on the hub (see `fetch`). Tensors have the reference's names or ours.
        out: The folder to write. It appears when it is complete.
        config: A JSON file with the reference's fields or ours. It replaces the folder's
            `config.json` or the config that Composer saved. It gives fields that the weights do not
            show; see `resolve`.
        tokenizer: The folder or hub name of a tokenizer to save too. The default is the tokenizer
            in the source, if it has one.
        allow_missing: Patterns (`cls.*`) of names, as in the source, of tensors that it may lack.
        allow_unused: Patterns of names of tensors that may be left out.
        allow_different: Patterns of names of tensors that the reference stores and our model
            computes, and whose values may differ.

    Returns:
        The config, and what happened to each tensor.

    Raises:
        ValueError: If a file cannot be read, or if a tensor or field is missing, unused or
            contradicts another; the message names it. Nothing is written then.
    """
    report = read_checkpoint(
        source, config, tokenizer, allow_missing, allow_unused, allow_different
    )
    out = Path(out)
    with whole(out, byte_count(report.found.weights)) as temporary:
        temporary.mkdir()
        save_folder(temporary, report.found.config, report.found.weights)
        if report.tokenizer is not None:
            save_tokenizer(report, temporary)
        copy_card(Path(report.local), temporary)
        name = shown_name(report.source)
        add_section(
            temporary,
            "Import",
            f"Imported by m2_plugin from `{name}`.",
            name=out.name,
            config=report.found.config,
            parameters=report.parameters,
            base_model=name if "/" in name else None,
        )
    return report


def read_checkpoint(
    source: str | Path,
    config: str | Path | None = None,
    tokenizer: str | None = None,
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    allow_different: Sequence[str] = (),
) -> ImportReport:
    """Read a checkpoint as `import_checkpoint` does, which has the same arguments and errors."""
    source = str(source)
    local = fetch(source)
    file, given, where = _find(local, config)
    raw, saved = read_file(file)
    if given is None and saved.config is not None:
        given, where = saved.config, f"the config saved in {file}"
    try:
        found = resolve(raw, given, where=where, allow_different=allow_different)
    except ValueError as error:
        raise ValueError(f"{source!r}: {error}") from error
    report = ImportReport(source, found, local=local)
    _check_names(report, allow_missing, allow_unused)
    found.config.architectures = [found.model_class.__name__]
    others = [t for name, t in found.weights.items() if ".filter." not in name]  # always fp32
    dtypes = {tensor.dtype for tensor in others if tensor.is_floating_point()}
    found.config.torch_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    own, files = (local if folder_has_tokenizer(local) else None), {}
    if own is None and holds_tokenizer(saved.tokenizer):
        own, files = file, saved.tokenizer
    report.tokenizer, report.tokenizer_files = own, files
    if tokenizer is not None:
        _check_tokenizer(tokenizer, own, files)
        report.tokenizer, report.tokenizer_files = tokenizer, {}
    return report


def export_checkpoint(folder: str | Path, out: str | Path) -> int:
    """Write the model in a transformers folder as a Composer checkpoint of the M2 reference.

    It undoes `import_checkpoint`: the file has every tensor again, buffers included.

    Args:
        folder: A transformers folder with an M2-BERT.
        out: The `.pt` file to write. It appears when it is complete.

    Returns:
        The number of tensors written.

    Raises:
        ValueError: If the folder has no complete M2-BERT, the reference cannot compute this model,
            or `out` exists.
    """
    config, weights = load_folder(folder)
    if config.mask_padding:
        raise ValueError(
            f"{str(folder)!r} has mask_padding: true, which the reference cannot compute"
        )
    if config.hyena_extended_from:
        raise ValueError(
            f"{str(folder)!r} was extended with --method continue, which the reference cannot "
            f"compute: its filters decay differently (hyena_extended_from: "
            f"{config.hyena_extended_from})"
        )
    if model_class_of(weights, config) is M2BertForTokenClassification:
        raise ValueError(f"{str(folder)!r} classifies tokens, for which the reference has no model")
    tensors = {f"model.{name}": tensor for name, tensor in to_reference(weights).items()}
    content = reference_config(config)
    integrations = {"huggingface": {"model": {"config": {"content": content}}}}
    saved = {"state": {"model": tensors, "integrations": integrations}, "rng": []}
    # Given a path, torch would write the file's name into the file, and hide a full disk.
    with whole(Path(out), byte_count(tensors)) as temporary, temporary.open("wb") as file:
        torch.save(saved, file)
    return len(tensors)


def _find(source: str, config: str | Path | None) -> tuple[str, dict[str, Any] | None, str]:
    """Return the file of weights, the config given with it, and the path of that config."""
    if not os.path.isdir(source):
        given = None if config is None else read_json(config)
        return source, given, str(config)
    weights, own = weights_file(source), os.path.join(source, "config.json")
    if config is None and not os.path.exists(own):
        return weights, None, own
    return weights, read_json(config or own), str(config or own)


def _check_names(
    report: ImportReport, allow_missing: Sequence[str], allow_unused: Sequence[str]
) -> None:
    """Refuse missing and unknown tensors unless they are allowed; drop unknown ones."""
    found = report.found
    expected = expected_tensors(found.model_class, found.config)
    # Report names in the naming of the source, also for tensors that it lacks.
    named = to_reference(expected) if found.of_reference else expected
    names = dict(zip(expected, named, strict=False))
    report.missing = [names[ours] for ours in expected if ours not in found.weights]
    for theirs in [name for name, ours in found.mapped.items() if ours not in expected]:
        del found.weights[found.mapped.pop(theirs)]
        found.unknown.append(theirs)
    for tensors, allowed, what, option in (
        (report.missing, allow_missing, "lacks", "allow-missing"),
        (found.unknown, allow_unused, "has tensors that this model lacks:", "allow-unused"),
    ):
        refused = [n for n in tensors if not any(fnmatch(n, pattern) for pattern in allowed)]
        if refused:
            raise ValueError(
                f"{report.source!r} {what} {listed(refused)}. To import it anyway, add "
                f"--{option} {refused[0]!r}"
            )


def _check_tokenizer(name: str, own: str | None, files: Mapping[str, Any]) -> None:
    """Refuse a tokenizer with another vocabulary than that of the source."""
    if own is None:
        return
    try:
        theirs = load_data_tokenizer(own, files)
    except ValueError:  # damaged, so another one is needed
        return
    if not vocabularies_fit(load_data_tokenizer(name, {}), theirs):
        raise ValueError(
            f"the tokenizer {name!r} has another vocabulary than the one in {own!r}: leave out "
            f"--tokenizer"
        )


def save_tokenizer(report: ImportReport, folder: Path) -> None:
    """Save the tokenizer of a checkpoint, which has one, with the model's maximum length.

    Raises:
        ValueError: If it cannot be loaded, or has ids beyond the model's vocabulary.
    """
    name, config = str(report.tokenizer), report.found.config
    tokenizer = load_data_tokenizer(name, report.tokenizer_files)
    needed = vocabulary_size(tokenizer)
    if needed > config.vocab_size:
        raise ValueError(
            f"the tokenizer {name!r} has ids up to {needed - 1}, but the model's vocab_size is "
            f"only {config.vocab_size}"
        )
    if config.max_sequence_length is not None:
        tokenizer.model_max_length = config.max_sequence_length
    tokenizer.save_pretrained(folder)
