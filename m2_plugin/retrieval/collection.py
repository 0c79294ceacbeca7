"""Read test collections: documents, queries, and which documents are relevant to each query.

Three layouts: a folder as in BEIR; a file of documents and one of queries, as of LoCoV1; a file of
pairs, as for `convert-pairs`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m2_plugin.data.formats import COMPRESSIONS, is_saved_dataset
from m2_plugin.data.rows import read_rows, text_bytes
from m2_plugin.inference import checked_rows, survey

__all__ = ["LAYOUTS", "Collection", "Document", "Query", "read_collection"]

log = logging.getLogger(__name__)

LAYOUTS = (
    "a folder as in BEIR (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv); or two files, DOCUMENTS "
    "(columns id and text) and QUERIES (id, text and relevant, a list of ids or an object from id "
    "to grade), or LoCoV1's two (pid, passage, dataset; qid, query, answer_pids, dataset); or a "
    "file of pairs (query, passage)"
)
# The columns by that of the ids: the text; and for queries, the relevant documents.
DOCUMENT_COLUMNS = {"id": "text", "_id": "text", "pid": "passage"}
QUERY_COLUMNS = {"id": ("text", "relevant"), "qid": ("query", "answer_pids")}
ALL = "all"  # the data set of rows that name none
QRELS = ("query-id", "corpus-id", "score")

Qrels = dict[str, dict[str, int]]  # query → document → grade


class Document(NamedTuple):
    """A document of a data set."""

    id: str
    text: str
    dataset: str


class Query(NamedTuple):
    """A query, which searches the documents of its own data set only."""

    id: str
    text: str
    dataset: str


class Collection:
    """A test collection. The texts of its documents stay in the file.

    Args:
        source: Its file or folder, for messages.
        documents: Reads the documents.
        queries: The queries that have judged documents.
        qrels: Their judgements.
        own_id: Whether a document with a query's own id may be a hit. BEIR leaves it out, since
            some of its data sets take documents as queries.

    Attributes:
        ids: The ids of the documents.
        datasets: The data set of each document.
        content: A digest of the documents.

    Raises:
        ValueError: If there are no documents or queries, or ids are there twice. The message names
            the file, and the id or the line.
    """

    def __init__(
        self,
        source: str,
        documents: Callable[[], Iterator[Document]],
        queries: Sequence[Query],
        qrels: Qrels,
        own_id: bool = True,
    ):
        self.documents, self.queries, self.qrels, self.own_id = documents, queries, qrels, own_id
        self.ids: list[str] = []
        self.datasets: list[str] = []
        _, self.content = survey(self._noted(), source)
        self._check(source)

    def _noted(self) -> Iterator[Document]:
        for document in self.documents():
            self.ids.append(document.id)
            self.datasets.append(document.dataset)
            yield document

    def _check(self, source: str) -> None:
        if not self.queries:
            raise ValueError(f"{source!r} has no query with a judged document")
        known = dict(zip(self.ids, self.datasets, strict=True))
        names = set(self.datasets)
        missing: list[str] = []
        for query in self.queries:
            if query.dataset not in names:
                raise ValueError(
                    f"{source!r}: query {query.id!r} is of data set {query.dataset!r}, of which "
                    "there are no documents"
                )
            judged = self.qrels[query.id].items()
            missing += [d for d, grade in judged if grade > 0 and known.get(d) != query.dataset]
        if missing:
            log.warning(
                "%d judgements name documents that are not there, such as %r: they count as "
                "relevant and not found, as in trec_eval", len(missing), missing[0],
            )  # fmt: skip
        own = sum(self.qrels[query.id].get(query.id, 0) > 0 for query in self.queries)
        if own and not self.own_id:
            log.warning(
                "%d queries have the document with their own id as relevant, and BEIR's rule "
                "leaves it out: --keep-own-id keeps it", own,
            )  # fmt: skip

    def texts(self, dataset: str) -> Iterator[str]:
        """Yield the texts of the documents of a data set."""
        return (document.text for document in self.documents() if document.dataset == dataset)


def read_collection(
    paths: Sequence[str | Path], split: str = "test", keep_own_id: bool = False
) -> Collection:
    """Read a collection of any layout.

    Args:
        paths: A folder as in BEIR, a file of pairs, or the files of documents and of queries.
        split: The name of the judgements in the folder `qrels`.
        keep_own_id: Whether to keep hits with the query's own id in a folder as in BEIR.

    Raises:
        ValueError: As `Collection`; or if a file is missing or a row is wrong.
    """
    first, *others = map(str, paths)
    if len(others) == 1:
        return _read_two_files(first, others[0])
    if others:
        raise ValueError(f"{len(paths)} paths are too many; give {LAYOUTS}")
    if os.path.isdir(first) and not is_saved_dataset(first):
        return _read_beir(Path(first), split, keep_own_id)
    return _read_pairs(first)


# Rows


def _id(value: Any, column: str) -> str:
    if type(value) not in (str, int):
        raise ValueError(f"{column!r} should be an id, got {type(value).__name__} {value!r:.80}")
    name = str(value)
    if not name or name.split() != [name]:
        raise ValueError(f"{column!r} is {name!r}: an id has no white space, which run files use")
    text_bytes(name, column)
    return name


def _text(values: Mapping[str, Any], column: str) -> str:
    if column not in values:
        raise ValueError(f"no column {column!r}; the row has {', '.join(map(repr, values))}")
    text_bytes(values[column], column)
    return str(values[column])


def _column(values: Mapping[str, Any], known: Mapping[str, Any], what: str) -> str:
    """Return the column with the ids."""
    for column in known:
        if column in values:
            return column
    names = ", ".join(map(repr, values)) or "nothing"
    raise ValueError(f"a {what} needs an id ({' or '.join(known)}); the row has {names}")


def _once(rows: Iterator[Any], what: str, source: str) -> Iterator[Any]:
    """Check that no id is there twice."""
    seen = set()
    for row in rows:
        if row.id in seen:
            raise ValueError(f"{source!r} has the {what} {row.id!r} twice")
        seen.add(row.id)
        yield row


def _dataset(values: Mapping[str, Any], default: str) -> str:
    return _text(values, "dataset") if values.get("dataset") is not None else default


def _documents(file: str, dataset: str) -> Iterator[Document]:
    def read(values: Mapping[str, Any]) -> Document:
        column = _column(values, DOCUMENT_COLUMNS, "document")
        text = _text(values, DOCUMENT_COLUMNS[column])
        if values.get("title"):
            text = f"{_text(values, 'title')} {text}"  # as BEIR joins them
        return Document(_id(values[column], column), text, _dataset(values, dataset))

    rows = (document for _, document in checked_rows(read_rows(file), read))
    return _once(rows, "document", file)


# Layouts


def _read_two_files(documents: str, queries: str) -> Collection:
    def read(values: Mapping[str, Any]) -> tuple[Query, dict[str, int]]:
        column = _column(values, QUERY_COLUMNS, "query")
        text, relevant = QUERY_COLUMNS[column]
        name = _id(values[column], column)
        query = Query(name, _text(values, text), _dataset(values, ALL))
        return query, _grades(values.get(relevant), relevant)

    found = [row for _, row in checked_rows(read_rows(queries), read)]
    qrels = {query.id: grades for query, grades in found if grades}
    all_queries = list(_once((query for query, _ in found), "query", queries))
    judged = [query for query in all_queries if query.id in qrels]
    if len(judged) < len(all_queries):
        log.warning(
            "%d queries of %d have no relevant document: they are left out",
            len(all_queries) - len(judged), len(all_queries),
        )  # fmt: skip
    return Collection(queries, lambda: _documents(documents, ALL), judged, qrels)


def _grades(value: Any, column: str) -> dict[str, int]:
    if isinstance(value, list):
        return {_id(item, column): 1 for item in value}
    if isinstance(value, dict) and all(type(grade) is int for grade in value.values()):
        return {_id(item, column): grade for item, grade in value.items()}
    raise ValueError(
        f"{column!r} should be a list of ids, or an object from id to grade (an integer), got "
        f"{type(value).__name__} {value!r:.80}"
    )


def _read_beir(folder: Path, split: str, keep_own_id: bool) -> Collection:
    corpus, queries = _find(folder, "corpus.jsonl"), _find(folder, "queries.jsonl")
    qrels, name = _read_qrels(folder / "qrels", split), folder.resolve().name

    def read(values: Mapping[str, Any]) -> Query:
        return Query(_id(values.get("_id"), "_id"), _text(values, "text"), name)

    rows = (query for _, query in checked_rows(read_rows(queries), read))
    judged = [query for query in _once(rows, "query", queries) if query.id in qrels]
    if missing := sorted(qrels.keys() - {query.id for query in judged}):
        raise ValueError(f"{queries!r} lacks the query {missing[0]!r}, which has judgements")
    return Collection(str(folder), lambda: _documents(corpus, name), judged, qrels, keep_own_id)


def _find(folder: Path, name: str) -> str:
    for ending in ("", *COMPRESSIONS):
        if (folder / f"{name}{ending}").is_file():
            return str(folder / f"{name}{ending}")
    raise ValueError(f"{str(folder)!r} has no {name}; give {LAYOUTS}")


def _read_qrels(folder: Path, split: str) -> Qrels:
    file = folder / f"{split}.tsv"
    if not file.is_file():
        splits = ", ".join(sorted(path.stem for path in folder.glob("*.tsv"))) or "none"
        raise ValueError(f"there is no file {str(file)!r}; --split can be: {splits}")
    qrels: Qrels = {}

    def read(values: Mapping[str, Any]) -> None:
        query, document = (_id(_text(values, name), name) for name in QRELS[:2])
        try:
            grade = int(_text(values, QRELS[2]))
        except ValueError as error:
            raise ValueError(f"{QRELS[2]!r} should be an integer: {error}") from None
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise ValueError(f"query {query!r} and document {document!r} have another grade above")

    for _ in checked_rows(read_rows(str(file), header=QRELS), read):
        pass
    return qrels


def _read_pairs(file: str) -> Collection:
    """Number the texts of a file of pairs. Equal texts are one document, or one query."""
    documents: dict[str, str] = {}
    queries: dict[str, Query] = {}
    qrels: Qrels = {}
    dataset = Path(file).name.partition(".")[0]

    def number(text: str) -> str:
        return documents.setdefault(text, str(len(documents)))

    def read(values: Mapping[str, Any]) -> None:
        text, passage = _text(values, "query"), _text(values, "passage")
        query = queries.setdefault(text, Query(str(len(queries)), text, dataset))
        qrels.setdefault(query.id, {})[number(passage)] = 1
        for negative in values.get("negatives") or []:
            text_bytes(negative, "negatives")
            number(negative)

    for _ in checked_rows(read_rows(file), read):
        pass
    rows = [Document(name, text, dataset) for text, name in documents.items()]
    return Collection(file, lambda: iter(rows), list(queries.values()), qrels)
