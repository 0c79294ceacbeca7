"""A small model and a small collection in each layout."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from m2_plugin.cli import main
from tests.models.test_text_embedding import embedder
from tests.utils import TOKENIZER, write_rows

DOCUMENTS = {
    "d1": ("Bread", "Knead the dough, let it rise, and bake it for forty minutes."),
    "d2": ("", "The ship left the harbour at dawn."),
    "d3": ("Weather", "Rain is expected in the north, and wind on the coast."),
    "q2": ("Ships", "A ship needs a crew, a captain and a cook."),
    "d4": ("", ""),
}
QUERIES = {"q1": "How long does bread bake?", "q2": "Who works on a ship?", "q3": "not judged"}
QRELS = {"q1": {"d1": 2, "d3": 0}, "q2": {"d2": 1, "gone": 1}}


def save_model(folder: Path, **fields) -> Path:
    fields = {"mask_padding": True, "normalize_embeddings": True} | fields
    embedder(**fields).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def write_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": i, "title": title, "text": t} for i, (title, t) in DOCUMENTS.items()]
    write_rows(folder / "corpus.jsonl", documents)
    write_rows(folder / "queries.jsonl", [{"_id": i, "text": t} for i, t in QUERIES.items()])
    lines = [f"{q}\t{d}\t{grade}\n" for q, found in QRELS.items() for d, grade in found.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def retrieval(data, model, out, *flags) -> int:
    paths = data if isinstance(data, list) else [data]
    arguments = ["retrieval", *paths, "--model", model, "--out", out, *flags]
    return main([str(argument) for argument in arguments])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def read_run(file: Path) -> dict[str, dict[str, float]]:
    """Query → document → score, from a file in TREC's format."""
    found: dict[str, dict[str, float]] = {}
    for line in file.read_text().splitlines():
        query, _, document, rank, score, _ = line.split()
        hits = found.setdefault(query, {})
        hits[document] = float(score)
        assert int(rank) == len(hits)
    return found
