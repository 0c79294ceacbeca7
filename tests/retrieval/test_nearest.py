"""Exact search in blocks finds what a sort of all scores finds, ties and borders included."""

import weakref

import numpy as np
import pytest
import torch

from m2_plugin.retrieval import nearest as module
from m2_plugin.retrieval.nearest import nearest

WIDTH = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)
    monkeypatch.setattr(module, "QUERIES", 3)


@pytest.fixture
def save(tmp_path):
    def write(vectors):
        np.save(tmp_path / "vectors.npy", vectors)
        return tmp_path / "vectors.npy"

    return write


def with_ties(count, seed):
    """Vectors of few values: their products are exact, and many are equal."""
    generator = np.random.default_rng(seed)
    vectors = np.zeros((count, WIDTH), np.float32)
    for row in vectors:  # four entries of 1 or -1, so that the length is 2
        row[generator.choice(6, 4, replace=False)] = generator.choice([-1, 1], 4)
    return vectors


def brute_force(queries, vectors, k, rows=None):
    rows = np.arange(len(vectors)) if rows is None else rows
    scores = queries @ vectors[rows].T
    order = [np.lexsort((rows, -each))[:k] for each in scores]
    return rows[np.array(order)], np.take_along_axis(scores, np.array(order), 1)


@pytest.mark.parametrize("count", [1, 6, 7, 8, 14, 15, 50])
@pytest.mark.parametrize("k", [1, 5, 7, 20, 60])
def test_equals_a_sort_of_all(count, k, save):
    queries, vectors = with_ties(4, 1), with_ties(count, 2)
    rows, scores = nearest(queries, save(vectors), k, "dot")
    expected = brute_force(queries, vectors, k)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(scores, expected[1])
    assert rows.shape == (4, min(k, count)) and scores.dtype == np.float32
    if count == 50 and k > 1:
        assert (np.diff(scores) == 0).any()  # there are ties
    cosines = nearest(queries, save(vectors), k, "cosine")
    np.testing.assert_array_equal(cosines[0], expected[0])
    np.testing.assert_array_equal(cosines[1], expected[1] / 4)


def test_some_rows_only(save):
    queries, vectors = with_ties(4, 1), with_ties(50, 2)
    rows = np.arange(1, 50, 3)
    found, _ = nearest(queries, save(vectors), 6, "dot", rows)
    np.testing.assert_array_equal(found, brute_force(queries, vectors, 6, rows)[0])


def test_cosine_of_vectors_of_any_length(save):
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(5, WIDTH)).astype(np.float32)
    vectors = generator.normal(size=(100, WIDTH)).astype(np.float32) * 10
    vectors[3] = 0
    rows, scores = nearest(queries, save(vectors), 100)
    exact = queries.astype(float) @ vectors.T.astype(float)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1)
    exact = np.divide(exact, lengths, out=np.zeros_like(exact), where=lengths > 0)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), atol=1e-6)
    assert (np.diff(scores) <= 0).all()
    assert (scores[rows == 3] == 0).all()


def best(scores, k):
    keys = module._keys(torch.from_numpy(scores), torch.arange(scores.shape[1]))
    return module._unpack(module._top(keys, k))


def test_scores_of_every_sign_and_size():
    values = [0.0, -0.0, 1e-45, -1e-45, 1.5, -1.5, 3e38, -3e38, 1.5, 2.0**-126]
    rows, scores = best(np.array([values], np.float32), 10)
    assert rows.tolist() == [[6, 4, 8, 9, 2, 0, 1, 3, 5, 7]]
    np.testing.assert_array_equal(scores[0], np.array(values, np.float32)[rows[0]])


def test_many_equal_scores_keep_the_first_rows():
    """torch.topk alone would keep any of them."""
    rows, _ = best(np.ones((2, 5000), np.float32), 100)
    assert rows.tolist() == [list(range(100))] * 2


def test_what_is_refused(save, tmp_path):
    vectors = with_ties(20, 2)
    with pytest.raises(ValueError, match=r"vectors.npy' has vectors of width 16.* have 8: .*model"):
        nearest(with_ties(2, 1)[:, :8], save(vectors), 3)
    vectors[11, 2] = np.nan
    with pytest.raises(ValueError, match=r"vectors.npy: a score is NaN or infinite"):
        nearest(with_ties(2, 1), save(vectors), 3)
    file = save(with_ties(20, 2))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"vectors.npy' is no file of vectors"):
        nearest(with_ties(2, 1), file, 3)
    for other in (np.zeros(3, np.float32), np.zeros((3, WIDTH))):
        with pytest.raises(ValueError, match=r"instead of float32 \(N, D\)"):
            nearest(with_ties(2, 1), save(other), 3)


def test_memory_does_not_grow_with_the_vectors(tmp_path, monkeypatch):
    """No block is kept: at most a few are in memory, whatever their number."""
    monkeypatch.setattr(module, "ROWS", 16)
    np.save(tmp_path / "vectors.npy", np.zeros((1600, WIDTH), np.float32))
    alive, most = [], 0
    read = module._blocks

    def counted(*args):
        nonlocal most
        for rows, block in read(*args):
            alive.append(weakref.ref(block))
            most = max(most, sum(ref() is not None for ref in alive))
            yield rows, block

    monkeypatch.setattr(module, "_blocks", counted)
    nearest(torch.ones(1, WIDTH).numpy(), tmp_path / "vectors.npy", 3)
    assert len(alive) == 100 and most <= 3
