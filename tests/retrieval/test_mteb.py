"""mteb runs on our folders, and measures what `m2-plugin retrieval` measures.

It is not among the packages for development: `pip install mteb` to run this.
"""

import pytest

from tests.retrieval.helpers import (
    DOCUMENTS,
    QRELS,
    QUERIES,
    results,
    retrieval,
    save_model,
    write_beir,
)

mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install mteb")


def task(queries, documents, qrels):
    """A retrieval task in memory; `load_data` is all that a task of one's own needs."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class Ships(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Ships",
            dataset={"path": "none", "revision": "none"},
            description="Ships, bread and weather.",
            type="Retrieval",
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            category="t2t",
        )

        def load_data(self, *_, **__):
            self.queries = {"test": queries}
            self.corpus = {"test": documents}
            self.relevant_docs = {"test": qrels}
            self.data_loaded = True

    return Ships()


def test_the_same_numbers(tmp_path):
    from sentence_transformers import SentenceTransformer

    model, out = save_model(tmp_path / "model"), tmp_path / "out"
    flags = ["--keep-own-id", "--no-bm25", "--measures", "nDCG@1", "nDCG@3", "R@3", "AP@3", "RR@3"]
    assert retrieval(write_beir(tmp_path / "ships"), model, out, *flags) == 0
    documents = {i: {"title": title, "text": text} for i, (title, text) in DOCUMENTS.items()}
    queries = {i: QUERIES[i] for i in QRELS}
    loaded = SentenceTransformer(str(model), device="cpu")
    result = mteb.evaluate(
        loaded, task(queries, documents, QRELS), cache=None, show_progress_bar=False
    )
    theirs = result.task_results[0].scores["test"][0]
    ours = results(out)["results"]["ships"]["model"]
    names = {
        "nDCG@1": "ndcg_at_1", "nDCG@3": "ndcg_at_3", "R@3": "recall_at_3", "AP@3": "map_at_3",
        "RR@3": "mrr_at_3",
    }  # fmt: skip
    assert ours == pytest.approx({n: theirs[m] for n, m in names.items()}, abs=1e-5)
    assert 0 < ours["nDCG@3"] < 1
