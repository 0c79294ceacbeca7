"""The commands `m2-plugin retrieval` and `m2-plugin search`."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2_plugin.chunks import check_absent
from m2_plugin.data.formats import ENDINGS
from m2_plugin.data.rows import read_rows, text_of
from m2_plugin.data.write import write_rows
from m2_plugin.files import locked
from m2_plugin.inference import (
    add_batch_arguments,
    add_run_arguments,
    checked_rows,
    log_progress,
)
from m2_plugin.retrieval import measures
from m2_plugin.retrieval.collection import LAYOUTS
from m2_plugin.retrieval.evaluate import evaluate_retrieval
from m2_plugin.retrieval.report import table
from m2_plugin.retrieval.search import SCALES, open_index, search

__all__ = ["main_retrieval", "main_search"]

MODEL = "a transformers folder with an embedding model"
REBUILD = "replace embeddings that another model or another content of the file gave"


def main_retrieval(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin retrieval`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0.

    Raises:
        ValueError: As `evaluate_retrieval`.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin retrieval",
        description="Measure how well an embedding model finds the relevant documents, with BM25 "
        "beside it. If a run was stopped, run the same command again to continue.",
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help=LAYOUTS)
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument(
        "--out", required=True, help="the folder for results, rankings and embeddings"
    )
    parser.add_argument(
        "--split", default="test", help="the judgements of a folder as in BEIR (default: test)"
    )
    parser.add_argument(
        "--measures", nargs="+", dest="names", metavar="NAME", default=measures.DEFAULT,
        help="as ir-measures names them; AP averaged over queries is MAP, and RR is MRR "
        f"(default: {' '.join(measures.DEFAULT)})",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", type=int, default=1000, help="hits of a query that are scored (default: 1000)"
    )
    parser.add_argument("--no-bm25", dest="bm25", action="store_false", help="leave out BM25")
    parser.add_argument(
        "--keep-own-id", action="store_true",
        help="in a folder as in BEIR, keep a hit with the query's own id, which BEIR leaves out",
    )  # fmt: skip
    parser.add_argument("--rebuild", action="store_true", help=REBUILD)
    add_batch_arguments(parser)
    args = parser.parse_args(argv)
    log_progress()
    results = evaluate_retrieval(**vars(args))
    sys.stdout.write(f"{table(results)}{args.out}\n")
    return 0


def main_search(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin search`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0.

    Raises:
        ValueError: As `open_index` and `search`.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin search",
        description="Find the texts of a file that are closest to a query. The first search embeds "
        "the texts and keeps that as an index; if it was stopped, run the same command again to "
        "continue.",
    )
    parser.add_argument(
        "source", metavar="FILE|INDEX", help=f"an index, or a file of texts: {ENDINGS}"
    )
    parser.add_argument("--model", required=True, help=MODEL)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--query", action="append", metavar="TEXT", help="may be given repeatedly")
    asked.add_argument("--queries", metavar="FILE", help="a file of queries, as the file of texts")
    parser.add_argument("--query-column", default="text", help="its column (default: text)")
    parser.add_argument("--top-k", type=int, default=10, help="hits of a query (default: 10)")
    parser.add_argument(
        "--index", help="the folder for the index of a file (default: FILE.index, beside it)"
    )
    parser.add_argument("--id-column", help="a column with names of the texts, to show with hits")
    parser.add_argument(
        "--out", help="the .jsonl file to write, a line for each query; otherwise they are printed"
    )
    parser.add_argument("--rebuild", action="store_true", help=REBUILD)
    add_run_arguments(parser)
    args = vars(parser.parse_args(argv))
    out, overwrite, top_k, model = (args.pop(k) for k in ("out", "overwrite", "top_k", "model"))
    queries = args.pop("query"), args.pop("queries"), args.pop("query_column")
    if out:
        if Path(out).suffix != ".jsonl":
            raise ValueError(f"--out must end in .jsonl, not {out!r}")
        check_absent(Path(out), overwrite)
    if top_k < 1:
        raise ValueError(f"--top-k must be at least 1, not {top_k}")
    log_progress()
    texts = _queries(*queries)
    index = open_index(model=model, **args)
    for key in ("source", "index", "text_column", "id_column", "rebuild"):
        args.pop(key)
    found = search(index, texts, model, top_k, **args)
    if out:
        with locked(Path(out)):
            write_rows(Path(out), found, ["query", "hits"])
        sys.stdout.write(f"{len(found)} queries\n")
    else:
        sys.stdout.write(_printed(found))
    scale = SCALES[index.notes["similarity"]]
    sys.stdout.write(
        f"{scale} Scores order the texts; they are no probabilities, and those of two models do "
        f"not compare.\n{out or index.folder}\n"
    )
    return 0


def _queries(given: Sequence[str] | None, file: str | None, column: str) -> list[str]:
    if given:
        return list(given)

    def read(values: Mapping[str, Any]) -> str:
        return text_of(values, column, "--query-column")

    found = [query for _, query in checked_rows(read_rows(str(file), text_column=column), read)]
    if not found:
        raise ValueError(f"{file!r} has no rows")
    return found


def _printed(found: Iterable[Mapping[str, Any]]) -> str:
    lines = []
    for query in found:
        lines.append(f"{query['query']}\n")
        for hit in query["hits"]:
            name = hit.get("id", f"row {hit['row']}")
            lines.append(f"  {hit['score']:8.4f}  {name}  {hit['text']}\n")
        lines.append("\n")
    return "".join(lines)
