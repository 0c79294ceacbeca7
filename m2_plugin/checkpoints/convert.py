"""Import checkpoints of the M2 reference and of Composer as transformers folders; export them."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

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
    TOKENIZER_FILES,
    copy_tokenizer,
    load_folder,
    read_json_object,
    save_folder,
    weights_file,
)
from m2_plugin.checkpoints.names import to_reference
from m2_plugin.checkpoints.read import read_file
from m2_plugin.data.tokenizer import load_tokenizer
from m2_plugin.files import whole
from m2_plugin.models.configuration_m2_bert import M2BertConfig
from m2_plugin.models.modeling_m2_bert import M2BertForTokenClassification

__all__ = ["ImportReport", "export_checkpoint", "import_checkpoint"]

VOCABULARIES = ("tokenizer.json", "vocab.txt")  # a tokenizer needs one of them


@dataclass
class ImportReport:
    """The result of an import.

    Args:
        source: The path that was read.
        found: The model in it.
        missing: Tensors that the source lacks and was allowed to lack, in its naming. They get
            random values.
        tokenizer: The source of the tokenizer, or None if there is no tokenizer.
    """

    source: str
    found: Resolved
    missing: list[str] = field(default_factory=list)
    tokenizer: str | None = None

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
    source, out = str(source), Path(out)
    local = fetch(source)
    file, given, where = _find(local, config)
    raw, saved = read_file(file)
    if given is None and saved.config is not None:
        given, where = saved.config, f"the config saved in {file}"
    try:
        found = resolve(raw, given, where=where, allow_different=allow_different)
    except ValueError as error:
        raise ValueError(f"{source!r}: {error}") from error
    report = ImportReport(source, found)
    _check_names(report, allow_missing, allow_unused)
    found.config.architectures = [found.model_class.__name__]
    others = [t for name, t in found.weights.items() if ".filter." not in name]  # always fp32
    dtypes = {tensor.dtype for tensor in others if tensor.is_floating_point()}
    found.config.torch_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    report.tokenizer, files = tokenizer or _own_tokenizer(local), {}
    if report.tokenizer is None and any(name in saved.tokenizer for name in VOCABULARIES):
        report.tokenizer, files = file, saved.tokenizer
    with whole(out) as temporary:
        temporary.mkdir()
        save_folder(temporary, found.config, found.weights)
        if report.tokenizer is not None:
            _save_tokenizer(report.tokenizer, files, found.config, temporary)
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
    with whole(Path(out)) as temporary:
        torch.save(
            {"state": {"model": tensors, "integrations": integrations}, "rng": []}, temporary
        )
    return len(tensors)


def _find(source: str, config: str | Path | None) -> tuple[str, dict[str, Any] | None, str]:
    """Return the file of weights, the config given with it, and the path of that config."""
    if not os.path.isdir(source):
        given = None if config is None else read_json_object(Path(config))
        return source, given, str(config)
    weights, own = weights_file(source), os.path.join(source, "config.json")
    if config is None and not os.path.exists(own):
        return weights, None, own
    return weights, read_json_object(Path(config or own)), str(config or own)


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


def _own_tokenizer(source: str) -> str | None:
    there = any(os.path.isfile(os.path.join(source, name)) for name in VOCABULARIES)
    return source if there else None


def _save_tokenizer(
    name: str, files: Mapping[str, Any], config: M2BertConfig, folder: Path
) -> None:
    """Save the tokenizer that `files` make, or if there are none the one called `name`.

    Only data is read from files and folders, whatever they name: no code, and no other files.
    """
    try:
        with TemporaryDirectory() as made, TemporaryDirectory() as scratch:
            for file in TOKENIZER_FILES:
                if file in files:
                    content = files[file]
                    text = json.dumps(content) if file.endswith(".json") else "\n".join(content)
                    (Path(made) / file).write_text(text, encoding="utf-8")
            where = Path(made) if files else Path(name)
            if where.is_dir():
                copy_tokenizer(where, Path(scratch))
            tokenizer = load_tokenizer(scratch if where.is_dir() else name)
    except Exception as error:  # the files may hold anything, so any error can occur
        cause = error.__cause__ or error  # without the name of the scratch folder
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise ValueError(f"the tokenizer {name!r} cannot be loaded: {reason}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer {name!r} has {len(tokenizer)} entries, but the model's vocab_size is "
            f"only {config.vocab_size}"
        )
    if config.max_sequence_length is not None:
        tokenizer.model_max_length = config.max_sequence_length
    tokenizer.save_pretrained(folder)
