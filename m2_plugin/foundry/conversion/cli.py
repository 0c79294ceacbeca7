"""The commands convert-c4 and convert-text: read the arguments, and build the jobs."""

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2_plugin.data.formats import ENDINGS, is_remote
from m2_plugin.executor import open_workers
from m2_plugin.foundry.conversion.corpora import (
    C4_CHARS_PER_SAMPLE,
    C4_SPLITS,
    TEXT_CORPORA,
    TEXT_SPLITS,
    Split,
    is_held_out,
)
from m2_plugin.foundry.conversion.engine import convert
from m2_plugin.foundry.conversion.errors import ConversionError
from m2_plugin.foundry.conversion.job import Job, Recipe
from m2_plugin.foundry.conversion.sources import (
    CHARS_PER_TOKEN,
    TXT_DOCUMENTS,
    HubSource,
    InputFile,
    choose_block_bytes,
    input_files,
    text_bytes_estimate,
)
from m2_plugin.foundry.conversion.verify import verify

log = logging.getLogger(__name__)

_C4_FILE = re.compile(r"c4-(train|validation)\.\d+-of-\d+\.json")
_LABEL = re.compile(r"([A-Za-z0-9_\-]+)=(.+)")

OUT_HELP = """each split becomes a folder below it: a folder on disk, or a URL that fsspec knows
(s3://BUCKET/FOLDER), which needs --local."""
LOCAL_HELP = """the splits are converted in this folder on disk, and sent when they are finished; it
has room for all of them."""
LOCAL_FILES_HELP = f"""files, folders or patterns, on disk or as URLs (s3://BUCKET/c4/*.json.gz),
instead of the hub: {ENDINGS}. A path that exists is that file, otherwise it is a pattern.
SPLIT=PATH gives a file to one split (train=a.jsonl val=b.jsonl). Without SPLIT= the files are for
all of --splits; for training and validation splits together, --val_fraction is then needed."""
VAL_FRACTION_HELP = """hold out this share of the documents for validation; a hash of the text
decides, so that no document is in both splits, and copies of a document are in the same split."""
CONCAT_HELP = """tokenise, join, and cut to samples of N tokens, written as {"tokens":
ndarray:int32}. Without it a sample is a document, {"text": str}, tokenised while training."""

TXT_HELP = "a document in a text file: the whole file, a line, or lines between empty lines"
MAX_CHARS_HELP = """keep the first N characters of each document (M2: 4000, or 8000 with
concatenation)"""
WORKERS_HELP = "processes; default: one per core. The output does not depend on it"
ON_ERROR_HELP = "if a document cannot be read: stop and name it, or count it and continue"
CLUSTER_HELP = """the workers of a Dask cluster instead: the address of its scheduler, or its
scheduler file. They must see the input and --out_root under the same paths."""


# --- arguments -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose options may have underscores, as llm-foundry's do, or hyphens."""

    def option(self, name: str, help: str, **settings: Any) -> None:
        """Add the option --NAME."""
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*names, help=help, **settings)

    def add_run(self) -> None:
        """Add the options that all converters have for their output and their workers."""
        self.option("out_root", OUT_HELP, required=True, metavar="FOLDER")
        self.option("local", LOCAL_HELP, type=Path, metavar="FOLDER")
        self.option("compression", "of the shards, such as zstd", metavar="ALGO[:LEVEL]")
        self.option("overwrite", "remove existing splits, finished or not", action="store_true")
        self.option("num_workers", WORKERS_HELP, type=int, metavar="N")
        self.option("cluster", CLUSTER_HELP, metavar="ADDRESS|FILE")
        verify = "read and compare everything once it is written"
        self.option("verify", verify, action="store_true")


def places(arguments: argparse.Namespace, name: str) -> tuple[Path, str | None]:
    """Return the local folder of a split, and its URL if it is to be sent to one.

    Raises:
        ConversionError: If --out_root and --local do not fit each other.
    """
    root = arguments.out_root
    if not is_remote(root):
        if arguments.local is not None:
            raise ConversionError("--local is only used if --out_root is a URL")
        return Path(root, name), None
    if arguments.local is None:
        raise ConversionError(f"--out_root {root} needs --local FOLDER: {LOCAL_HELP}")
    return arguments.local / name, f"{root.rstrip('/')}/{name}"


def _parser(about: str, splits: dict[str, Split], dataset_help: str, **defaults: str) -> Parser:
    parser = Parser(
        description=f"Convert {about} to MDS. Run the same command again to continue an "
        "interrupted run."
    )
    add = parser.option
    add("dataset", dataset_help)
    add("data_subset", "configuration on the hub")
    add("local_files", LOCAL_FILES_HELP, nargs="+", metavar="[SPLIT=]PATH")
    parser.add_run()
    which = f"splits to make, each in its folder below --out_root: {', '.join(splits)}"
    add("splits", which, nargs="+", default=["train", "val"], metavar="SPLIT")
    add("val_fraction", VAL_FRACTION_HELP, type=float, metavar="F")
    add("text_column", "column with the documents", default="text", metavar="KEY")
    add("txt_documents", TXT_HELP, choices=TXT_DOCUMENTS, default="file")
    add("max_chars_per_doc", MAX_CHARS_HELP, type=int, metavar="N")
    add("concat_tokens", CONCAT_HELP, type=int, metavar="N")
    add("tokenizer", "for --concat_tokens", metavar="NAME_OR_FOLDER")
    add("tokenizer_kwargs", "of AutoTokenizer", type=json.loads, default={}, metavar="JSON")
    add("bos_text", "put before each document", default="")
    add("eos_text", "put after each document", default="")
    add("no_wrap", "drop the rest of a document in which a sample ended", action="store_true")
    add("on_error", ON_ERROR_HELP, choices=("fail", "skip"), default="fail")
    add("verify_only", "convert nothing; check existing splits", action="store_true")
    parser.set_defaults(**defaults)
    return parser


def c4_parser() -> Parser:
    """Build the parser of convert_c4.py."""
    about, names = "C4, from the hub or from files,", {"dataset": "allenai/c4", "data_subset": "en"}
    return _parser(about, C4_SPLITS, "name on the hub", **names)


def text_parser() -> Parser:
    """Build the parser of convert_text.py."""
    dataset = f"{', '.join(TEXT_CORPORA)}, or any name on the hub; or --local_files"
    return _parser("Wikipedia, BookCorpus or your own files", TEXT_SPLITS, dataset)


# --- jobs ----------------------------------------------------------------------------------------


def _requested_splits(arguments: argparse.Namespace) -> list[str]:
    names = [name for item in arguments.splits for name in item.split(",") if name]
    return list(dict.fromkeys(names))


def _label_fits(label: str, name: str, splits: dict[str, Split]) -> bool:
    hub_split = splits[name].hub_split if name in splits else name
    return label == name or label in (hub_split, {"validation": "val"}.get(hub_split))


class LocalFiles:
    """The files of --local_files, and the splits that they are for."""

    def __init__(self, arguments: argparse.Namespace, splits: dict[str, Split]):
        self.splits = splits
        self.fraction = arguments.val_fraction
        self.requested = _requested_splits(arguments)
        self.labelled: list[tuple[str, InputFile]] = []
        self.plain: list[InputFile] = []
        for item in arguments.local_files:
            match = None if Path(item).exists() else _LABEL.fullmatch(item)
            label, pattern = match.groups() if match else (None, item)
            for file in input_files([pattern], arguments.txt_documents):
                native = _C4_FILE.match(Path(file.path).name) if splits is C4_SPLITS else None
                if name := label or (native and native[1]):
                    self.labelled.append((name, file))
                else:
                    self.plain.append(file)

    def known_splits(self) -> set[str]:
        """Return the split names in SPLIT=PATH."""
        return {label for label, _ in self.labelled}

    def unused_labels(self) -> list[str]:
        """Return the split names in SPLIT=PATH that no requested split reads."""
        return [label for label in sorted(self.known_splits()) if not self._fits(label)]

    def _fits(self, label: str) -> bool:
        return any(_label_fits(label, name, self.splits) for name in self.requested)

    def files_of(self, name: str) -> tuple[tuple[InputFile, ...], bool | None]:
        """Return the files of a split, and whether it takes their held-out documents."""
        files = tuple(f for label, f in self.labelled if _label_fits(label, name, self.splits))
        if files:
            return files, None
        if not self.plain:
            raise ConversionError(
                f"--local_files has no file for the split {name!r}: give {name}=PATH"
            )
        if self.fraction:
            return tuple(self.plain), is_held_out(name)
        unlabelled = [n for n in self.requested if not any(
            _label_fits(label, n, self.splits) for label in self.known_splits()
        )]  # fmt: skip
        if len({is_held_out(n) for n in unlabelled}) > 1:
            raise ConversionError(
                f"--local_files would put the same documents into {', '.join(unlabelled)}. Assign "
                "files to splits (train=PATH val=PATH), or hold some out: --val_fraction 0.01"
            )
        return tuple(self.plain), None


def _check(arguments: argparse.Namespace, splits: dict[str, Split]) -> None:
    if arguments.concat_tokens is not None and arguments.concat_tokens < 1:
        raise ConversionError("--concat_tokens must be at least 1")
    if arguments.concat_tokens is not None and not arguments.tokenizer:
        raise ConversionError("--concat_tokens needs a --tokenizer (a name or a folder)")
    if arguments.concat_tokens is None and arguments.tokenizer:
        raise ConversionError(
            "--tokenizer is only used with --concat_tokens: texts are not tokenised"
        )
    if arguments.val_fraction is not None and not 0 < arguments.val_fraction < 1:
        raise ConversionError("--val_fraction must be between 0 and 1")
    if not arguments.local_files and not arguments.dataset:
        raise ConversionError("give --dataset NAME (on the hub) or --local_files PATH ...")
    if arguments.val_fraction and splits is C4_SPLITS and not arguments.local_files:
        raise ConversionError(
            "--val_fraction is for --local_files: C4 has its own validation split"
        )


def _check_names(names: list[str], splits: dict[str, Split], local: LocalFiles | None) -> None:
    known = set(splits) | (local.known_splits() if local and splits is TEXT_SPLITS else set())
    unknown = [name for name in names if name not in known]
    if unknown:
        choice = ", ".join(dict.fromkeys([*splits, *sorted(known)]))
        raise ConversionError(f"unknown split {', '.join(unknown)}; known: {choice}")


def _hub_source(arguments: argparse.Namespace, split: Split, name: str) -> HubSource:
    dataset, subset = TEXT_CORPORA.get(arguments.dataset, (arguments.dataset, None))
    hub_split = "train" if arguments.val_fraction else split.hub_split
    load = {"path": dataset, "name": arguments.data_subset or subset, "split": hub_split}
    return HubSource(tuple(load.items()), arguments.text_column)


def _text_bytes(
    arguments: argparse.Namespace, split: Split, files: tuple[InputFile, ...]
) -> int | None:
    """Estimate the text of a split, to choose the size of its shards."""
    estimates = []
    if files:
        estimates.append(text_bytes_estimate(list(files)))
    if split.max_samples and arguments.concat_tokens:
        estimates.append(split.max_samples * arguments.concat_tokens * CHARS_PER_TOKEN)
    elif split.max_samples:
        estimates.append(split.max_samples * C4_CHARS_PER_SAMPLE)
    return min(estimates, default=None)


def _job(
    arguments: argparse.Namespace, splits: dict[str, Split], name: str, local: LocalFiles | None
) -> Job:
    split = splits.get(name, Split(name))
    hub: HubSource | None = None
    files: tuple[InputFile, ...] = ()
    held_out: bool | None = None
    if local is not None:
        files, held_out = local.files_of(name)
    else:
        hub = _hub_source(arguments, split, name)
        held_out = is_held_out(name) if arguments.val_fraction else None
    recipe = Recipe(
        text_column=arguments.text_column,
        max_chars_per_doc=arguments.max_chars_per_doc,
        held_out=held_out,
        val_fraction=arguments.val_fraction or 0.0,
        tokenizer=arguments.tokenizer,
        tokenizer_kwargs=arguments.tokenizer_kwargs,
        bos_text=arguments.bos_text,
        eos_text=arguments.eos_text,
        concat_tokens=arguments.concat_tokens,
        no_wrap=arguments.no_wrap,
        compression=arguments.compression,
        max_samples=split.max_samples,
        block_bytes=choose_block_bytes(
            _text_bytes(arguments, split, files), arguments.concat_tokens
        ),
    )
    out, url = places(arguments, name)
    return Job(
        out=out,
        url=url,
        files=files,
        hub=hub,
        recipe=recipe,
        skip_bad=arguments.on_error == "skip",
        expected_documents=split.documents if hub is not None else None,
    )


def _jobs(arguments: argparse.Namespace, splits: dict[str, Split]) -> list[Job]:
    names = _requested_splits(arguments)
    _check(arguments, splits)
    local = LocalFiles(arguments, splits) if arguments.local_files else None
    _check_names(names, splits, local)
    if local is not None and (unused := local.unused_labels()):
        log.warning("--local_files: no requested split uses %s=", ", ".join(unused))
    return [_job(arguments, splits, name, local) for name in names]


def run_jobs(arguments: argparse.Namespace, jobs: list[Job], existing: Sequence[str] = ()) -> None:
    """Convert splits, and verify them if that is requested; verify existing ones.

    Raises:
        ConversionError: If --num_workers is less than 1; else as `convert` and `verify`.
    """
    if arguments.num_workers is not None and arguments.num_workers < 1:
        raise ConversionError("--num_workers must be at least 1")
    preload = {
        "transformers.models.auto.tokenization_auto": any(j.recipe.concat_tokens for j in jobs),
        "streaming": arguments.verify or existing or arguments.compression,
    }
    modules = [name for name, needed in preload.items() if needed]  # slow to import
    with open_workers(arguments.num_workers, arguments.cluster, modules) as workers:
        for job in jobs:
            convert(job, workers, arguments.overwrite)
            if arguments.verify:
                verify(job.url or str(job.out), workers)
        for place in existing:
            verify(place, workers)


def _run(parser: Parser, argv: list[str] | None, splits: dict[str, Split]) -> int:
    log_to_stderr()
    arguments = parser.parse_args(argv)
    if arguments.verify_only:
        names = _requested_splits(arguments)
        run_jobs(arguments, [], [f"{arguments.out_root.rstrip('/')}/{name}" for name in names])
    else:
        run_jobs(arguments, _jobs(arguments, splits))
    return 0


def log_to_stderr() -> None:
    """Show what happens while a converter runs."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)


def main_c4(argv: list[str] | None = None) -> int:
    """Run convert_c4.py.

    Raises:
        ValueError: If the arguments, the input or the output are wrong.
        OSError: If a disk or the storage of a URL fails.
    """
    return _run(c4_parser(), argv, C4_SPLITS)


def main_text(argv: list[str] | None = None) -> int:
    """Run convert_text.py; errors as those of `main_c4`."""
    return _run(text_parser(), argv, TEXT_SPLITS)
