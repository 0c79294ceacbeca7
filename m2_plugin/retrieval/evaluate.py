"""Measure how well an embedding model finds the relevant documents, with BM25 beside it."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from m2_plugin.data.bm25 import BM25, bm25s_library
from m2_plugin.data.write import write_rows
from m2_plugin.files import locked, replacing, write_atomically, write_json
from m2_plugin.inference import digest, survey
from m2_plugin.retrieval import measures
from m2_plugin.retrieval.collection import Collection, Document, Query, read_collection
from m2_plugin.retrieval.index import Index, build_index
from m2_plugin.retrieval.nearest import nearest
from m2_plugin.retrieval.report import MEAN, draw
from m2_plugin.retrieval.settings import Settings, read_settings

__all__ = ["evaluate_retrieval"]

log = logging.getLogger(__name__)

MODEL, WORDS = "model", "BM25"
SCORED = 512  # queries that are scored at once: each has 1,000 hits
Hits = tuple[NDArray[np.int64], NDArray[np.float32]]  # of a query: rows and scores


def evaluate_retrieval(
    data: Sequence[str | Path],
    model: str | Path,
    out: str | Path,
    split: str = "test",
    names: Sequence[str] = measures.DEFAULT,
    top_k: int = 1000,
    bm25: bool = True,
    keep_own_id: bool = False,
    rebuild: bool = False,
    **run: Any,
) -> dict[str, Any]:
    """Rank the documents of a test collection for each query, and score the rankings.

    If a run was killed, a new one goes on with the embeddings. The documents are searched in
    blocks, exactly; neither their texts nor their vectors are held in memory, except by BM25.

    Args:
        data: As `read_collection`.
        model: A transformers folder with an `M2BertForTextEmbedding` and a tokenizer.
        out: A folder for `results.json`, `results.png`, `per_query.jsonl`, `qrels.txt` and
            `model.run` (both in TREC's format), and the embeddings in `documents` and `queries`.
        split: The judgements of a folder as in BEIR.
        names: Measures by their names in `ir-measures`.
        top_k: The number of hits of a query that are scored.
        bm25: Whether to rank by BM25 too; writes `BM25.run`.
        keep_own_id: As `read_collection`.
        rebuild: Whether to replace embeddings of another collection or model in `out`.
        **run: Arguments of `embed_file`: `batch_tokens`, `device`, `dtype`.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: If the collection, the model or an argument is wrong, or `out` holds embeddings
            of something else. The message names the file, line, id or option.
    """
    if top_k < 1:
        raise ValueError(f"--top-k must be at least 1, not {top_k}")
    chosen = measures.parse(names)
    if bm25:
        bm25s_library(", or leave BM25 out: --no-bm25")  # rather now than after hours of embedding
    settings = read_settings(model)
    collection = read_collection(data, split, keep_own_id)
    out = Path(out)
    with locked(out):
        out.mkdir(exist_ok=True)
        documents, queries = _embed(collection, settings, model, out, rebuild, run)
        rankings = {MODEL: _by_model(collection, documents, queries, settings.similarity, top_k)}
        if bm25:
            rankings[WORDS] = _by_words(collection, top_k)
        rows: list[dict[str, Any]] = []
        for system, ranking in rankings.items():
            rows += _score(system, collection, ranking, top_k, chosen, out / f"{system}.run")
        results = {
            "data": [str(path) for path in data],
            "model": str(model),
            **settings._asdict(),
            "top_k": top_k,
            "documents": len(collection.ids),
            "queries": len(collection.queries),
            "own_id_is_a_hit": collection.own_id,
            "ir-measures": version("ir-measures"),
            "results": _means(rows, [str(measure) for measure in chosen]),
        }
        _write_qrels(out / "qrels.txt", collection)
        write_rows(out / "per_query.jsonl", rows, list(rows[0]))
        write_json(out / "results.json", results)
        write_atomically(out / "results.png", draw(results["results"]))
    return results


def _embed(
    collection: Collection,
    settings: Settings,
    model: str | Path,
    out: Path,
    rebuild: bool,
    run: Mapping[str, Any],
) -> list[Index]:
    """Return the embeddings of the documents and of the queries."""
    queries = collection.queries
    common = {"model": digest(Path(model)), "dtype": run.get("dtype", "float32")}
    contents: dict[str, tuple[str, str, Iterable[Document | Query]]] = {
        "documents": (collection.content, settings.document_prompt, collection.documents()),
        "queries": (survey(queries, "queries")[1], settings.query_prompt, queries),
    }
    return [
        build_index(
            out / name,
            ((text.id, text.text) for text in texts),
            {"content": content, "prompt": prompt, **common},
            model,
            rebuild,
            **run,
        )
        for name, (content, prompt, texts) in contents.items()
    ]


# Ranking


def _by_dataset(collection: Collection) -> Iterator[tuple[str, list[int], NDArray[np.int64]]]:
    """Yield each data set, its queries, and the rows of its documents."""
    names = np.array(collection.datasets)
    for name in sorted(set(collection.datasets)):
        queries = [i for i, query in enumerate(collection.queries) if query.dataset == name]
        if queries:
            yield name, queries, np.flatnonzero(names == name)


def _by_model(
    collection: Collection, documents: Index, queries: Index, similarity: str, top_k: int
) -> Iterator[tuple[Query, Hits]]:
    vectors = np.load(queries.vectors)
    for _, chosen, rows in _by_dataset(collection):
        some = None if len(rows) == len(collection.ids) else rows
        found = nearest(vectors[chosen], documents.vectors, top_k + 1, similarity, some)
        for i, *hits in zip(chosen, *found, strict=True):
            yield collection.queries[i], (hits[0], hits[1])


def _by_words(collection: Collection, top_k: int) -> Iterator[tuple[Query, Hits]]:
    for name, queries, rows in _by_dataset(collection):
        log.info("BM25: counting the words of %d documents", len(rows))
        words = BM25(collection.texts(name))
        for i in tqdm(queries, desc=WORDS, unit="query"):
            query = collection.queries[i]
            found, scores = words.nearest(query.text, top_k + 1)
            yield query, (rows[found], scores)


# Scoring


def _score(
    system: str,
    collection: Collection,
    ranked: Iterator[tuple[Query, Hits]],
    top_k: int,
    chosen: Sequence[Any],
    file: Path,
) -> list[dict[str, Any]]:
    """Write the ranking in TREC's format, and return the scores of each query."""
    rows: list[dict[str, Any]] = []
    part: dict[str, dict[str, float]] = {}
    datasets = {query.id: query.dataset for query in collection.queries}

    def finish() -> None:
        qrels = {name: collection.qrels[name] for name in part}
        for name, values in measures.score(chosen, qrels, part).items():
            rows.append({"system": system, "dataset": datasets[name], "query": name, **values})
        part.clear()

    with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for query, hits in ranked:
            part[query.id] = _run(collection, query, hits, top_k)
            for rank, (document, score) in enumerate(part[query.id].items(), 1):
                lines.write(f"{query.id} Q0 {document} {rank} {score!r} {system}\n")
            if len(part) == SCORED:
                finish()
        finish()
    return rows


def _run(collection: Collection, query: Query, hits: Hits, top_k: int) -> dict[str, float]:
    """Return document → score for a query's hits."""
    pairs = zip(hits[0].tolist(), hits[1].tolist(), strict=True)
    named = ((collection.ids[row], score) for row, score in pairs)
    kept = [(name, s) for name, s in named if collection.own_id or name != query.id]
    return dict(kept[:top_k])


def _means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return data set → system → measure → mean over queries; and `MEAN`, that of data sets."""
    found: dict[str, Any] = {}
    for row in rows:
        values = found.setdefault(row["dataset"], {}).setdefault(row["system"], [])
        values.append([row[name] for name in names])
    for systems in found.values():
        for system, values in systems.items():
            systems[system] = dict(zip(names, np.mean(values, axis=0).tolist(), strict=True))
    if len(found) > 1:
        found[MEAN] = {
            system: {
                name: float(np.mean([systems[system][name] for systems in found.values()]))
                for name in names
            }
            for system in next(iter(found.values()))
        }
    return found


def _write_qrels(file: Path, collection: Collection) -> None:
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for query in collection.queries:
            for document, grade in collection.qrels[query.id].items():
                lines.write(f"{query.id} 0 {document} {grade}\n")
