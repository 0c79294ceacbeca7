"""Measure a trained model on other data: the command `m2-plugin evaluate`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from m2_plugin.data.formats import ENDINGS
from m2_plugin.files import locked, write_json
from m2_plugin.inference import add_model_arguments, log_progress

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin evaluate`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0.

    Raises:
        ValueError: If the model, the data or an option is wrong, or the result cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin evaluate",
        description="Measure a model on data: a masked language model (cross-entropy, perplexity, "
        "accuracy at masked tokens), a classifier of texts or words, or a model that answers "
        "questions (the metrics of its training). The same data and masks give what the evaluation "
        "of a training run gives.",
    )
    parser.add_argument(
        "model", help="a transformers folder, or a Composer checkpoint (.pt) of an M2-BERT"
    )
    parser.add_argument(
        "--data",
        required=True,
        help=f"a file: {ENDINGS}; for words also CoNLL, for questions SQuAD's JSON, for a masked "
        "language model a folder of MDS shards",
    )
    parser.add_argument("--split", help="the split in a folder (default: val for MDS)")
    parser.add_argument(
        "--text-column",
        help="the column with the texts (default: text) or the lists of words (tokens); for CoNLL "
        "a number (0)",
    )
    parser.add_argument("--pair-column", help="the column with the second texts of pairs")
    parser.add_argument(
        "--label-column",
        help="the column with the labels (default: label) or the lists of tags (tags); for CoNLL a "
        "number (the last)",
    )
    parser.add_argument(
        "--label-names",
        nargs="+",
        metavar="NAME",
        help="the names of the classes in the order of their ids (default: those of the model)",
    )
    parser.add_argument(
        "--mlm-probability",
        type=float,
        help="the share of the tokens to mask (default: 0.15)",
    )
    parser.add_argument(
        "--mask-seed", type=int, help="the seed of the masks (default: that of training runs)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="the texts or windows in a batch (default: 64)"
    )
    add_model_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result to a JSON file too")
    args = vars(parser.parse_args(argv))
    out = args.pop("json")
    log_progress()
    with nullcontext() if out is None else locked(Path(out)):
        # Only here, since llm-foundry takes half a minute to import.
        from m2_plugin.foundry.evaluation import evaluate

        result = evaluate(**args)
        if out is not None:
            write_json(out, result)
    sys.stdout.write(f"{_line(result)}\n")
    return 0


def _line(result: Mapping[str, Any]) -> str:
    numbers = ", ".join(
        f"{name} {'undefined' if value is None else f'{value:.6g}'}"
        for name, value in result["metrics"].items()
    )
    detail = f"{result['rows']} rows"
    if commonest := result.get("commonest"):
        detail += f"; always {commonest['label']!r}: accuracy {commonest['accuracy']:.6g}"
    return f"{numbers} ({detail})"
