"""Find the texts of a file that are closest to a query, by an index that is made once."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2_plugin.data.formats import check_file, is_remote
from m2_plugin.data.rows import read_rows, text_of
from m2_plugin.data.write import write_rows
from m2_plugin.embed import embed_file
from m2_plugin.files import locked, read_json
from m2_plugin.inference import checked_rows, digest
from m2_plugin.retrieval.index import NOTES, Index, build_index, check_notes
from m2_plugin.retrieval.nearest import nearest
from m2_plugin.retrieval.settings import read_settings

__all__ = ["SCALES", "open_index", "search"]

KEYS = ("file", "content", "model", "prompt", "query_prompt", "similarity")  # of an index's notes
SNIPPET = 200  # characters of a text that are shown
SCALES = {
    "cosine": "A score is a cosine, from -1 to 1.",
    "dot": "A score is a dot product, of any size.",
}


def open_index(
    source: str | Path,
    model: str | Path,
    index: str | Path | None = None,
    text_column: str = "text",
    id_column: str | None = None,
    rebuild: bool = False,
    **run: Any,
) -> Index:
    """Open an index, or make that of a file. If the making was killed, it goes on.

    Args:
        source: An index, or a file of any format in `m2_plugin.data.formats`.
        model: A transformers folder with an `M2BertForTextEmbedding` and a tokenizer.
        index: The folder for the index of a file; None takes `FILE.index` beside the file. It holds
            a copy of the texts, so it can be searched without the file.
        text_column: The column with the texts of a file; ignored for a text file.
        id_column: A column with names for the texts, to be shown with hits.
        rebuild: Whether to replace the index of another model, or of what the file was before.
        **run: Arguments of `embed_file`: `batch_tokens`, `device`, `dtype`.

    Raises:
        ValueError: If the index was made by another model or the file has changed since, the file
            cannot be read, or the index is not complete. The message says how to go on.
    """
    if (Path(source) / NOTES).is_file():
        return _open(Path(source), digest(Path(model)))
    if is_remote(str(source)):
        raise ValueError(f"{str(source)!r} is not on this machine: download it first")
    check_file(str(source))
    folder = Path(index or f"{str(source).rstrip('/')}.index")
    settings = read_settings(model)
    notes = {
        "file": str(Path(source).resolve()),
        "content": digest(Path(source)),
        "text_column": text_column,
        "id_column": id_column,
        "dtype": run.get("dtype", "float32"),
        "model": digest(Path(model)),
        "prompt": settings.document_prompt,
        "query_prompt": settings.query_prompt,
        "similarity": settings.similarity,
    }
    with locked(folder):
        rows = _rows(str(source), text_column, id_column)
        return build_index(folder, rows, notes, model, rebuild, **run)


def _open(folder: Path, model: str) -> Index:
    notes = read_json(folder / NOTES)
    if missing := [key for key in KEYS if not isinstance(notes.get(key), str)]:
        raise ValueError(
            f"{str(folder / NOTES)!r} lacks {missing[0]!r}: it is not of m2-plugin search"
        )
    file = Path(notes["file"])
    now = {"content": digest(file)} if file.exists() else {}
    try:
        check_notes(folder, notes, {"model": model, **now})
    except ValueError as error:
        raise ValueError(f"{error}; search {str(file)!r} itself for that") from None
    found = Index(folder, notes)
    if not found.vectors.exists():
        raise ValueError(
            f"{str(folder)!r} is not complete: search {str(file)!r} with --index to go on"
        )
    return found


def _rows(file: str, text_column: str, id_column: str | None) -> Iterator[tuple[Any, str]]:
    def read(values: Mapping[str, Any]) -> tuple[Any, str]:
        text = text_of(values, text_column, "--text-column")
        if id_column is None:
            return None, text
        if id_column not in values:
            raise ValueError(f"no column {id_column!r} (--id-column)")
        return values[id_column], text

    columns = [text_column] if id_column is None else [text_column, id_column]
    return (row for _, row in checked_rows(read_rows(file, None, text_column, columns), read))


def search(
    index: Index, queries: Sequence[str], model: str | Path, top_k: int = 10, **run: Any
) -> list[dict[str, Any]]:
    """Find the texts with the highest scores for each query.

    Args:
        index: The index, made by this model.
        queries: The queries.
        model: The model's folder.
        top_k: The number of hits of a query.
        **run: As for `open_index`.

    Returns:
        For each query `query` and `hits`, the best first: `row` (from 0), `id` if the index has
        ids, `score`, and `text`, its first 200 characters with single spaces.

    Raises:
        ValueError: As `nearest`, or if the index is damaged.
    """
    prompt, similarity = index.notes["query_prompt"], index.notes["similarity"]
    vectors = _embed([prompt + query for query in queries], model, run)
    rows, scores = nearest(vectors, index.vectors, top_k, similarity)
    texts = index.read(set(rows.ravel().tolist()))

    def hit(row: int, score: float) -> dict[str, Any]:
        name, text = texts[row]
        names = {} if name is None else {"id": name}
        return {"row": row, **names, "score": round(score, 6), "text": _snippet(text)}

    return [
        {"query": query, "hits": [hit(*pair) for pair in zip(*found, strict=True)]}
        for query, *found in zip(queries, rows.tolist(), scores.tolist(), strict=True)
    ]


def _snippet(text: str) -> str:
    return " ".join(text[: 4 * SNIPPET].split())[:SNIPPET]


def _embed(texts: Sequence[str], model: str | Path, run: Mapping[str, Any]) -> NDArray[np.float32]:
    with TemporaryDirectory() as made:
        file, out = Path(made) / "texts.jsonl", Path(made) / "vectors.npy"
        write_rows(file, ({"text": text} for text in texts), ["text"])
        # By this process: a cluster may not see the folder, and queries are few.
        own = {key: run[key] for key in ("batch_tokens", "device", "dtype") if key in run}
        embed_file(file, model, out, **own)
        return np.load(out)
