"""Each task's metrics equal scikit-learn's and scipy's, through the model's own update."""

import warnings

import numpy as np
import pytest
import torch
from llmfoundry.utils.builders import build_composer_model
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from m2_plugin.glue.tasks import TASKS

N = 203  # batches of 32, and a last one of 11
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
KEYS = {
    "accuracy": "MulticlassAccuracy",
    "f1": "BinaryF1Score",
    "matthews": "MulticlassMatthewsCorrCoef",
    "pearson": "PearsonCorrCoef",
    "spearman": "SpearmanCorrCoef",
}
TRUTH = {
    "accuracy": accuracy_score,
    "f1": lambda y, p: f1_score(y, p, zero_division=0.0),
    "matthews": matthews_corrcoef,
    # scipy says NaN of a constant; we say 0
    "pearson": lambda y, p: np.nan_to_num(pearsonr(y, p)[0]),
    "spearman": lambda y, p: np.nan_to_num(spearmanr(y, p)[0]),
}
TASK_NAMES = [name for name, task in TASKS.items() if task.metrics]


@pytest.fixture(scope="module")
def models():
    """A model for each kind of task, for its metrics only."""
    found = {}
    for name in TASK_NAMES:
        task = TASKS[name]
        kind = (task.num_labels, task.metrics)
        if kind not in found:
            config = {"config_overrides": TINY | {"vocab_size": 16, "max_position_embeddings": 8}}
            config |= {"num_labels": task.num_labels, "metrics": list(task.metrics)}
            found[kind] = build_composer_model("hf_bert_classification", config, None)
    return found


def compute(model, outputs, labels, size):
    """What an evaluation does, batch by batch; a second one, to see that nothing is left over."""
    for _ in range(2):
        metrics = model.get_metrics(is_train=False)
        for metric in metrics.values():
            metric.reset()
        for start in range(0, len(labels), size):
            model.labels = labels[start : start + size]
            for metric in metrics.values():
                model.update_metric({}, outputs[start : start + size], metric)
    return {name: metric.compute().item() for name, metric in metrics.items()}


def cases(num_labels, seed):
    """Logits or numbers, and labels: random, of one class, constant, perfect, all wrong."""
    rng = np.random.default_rng(seed)
    if num_labels == 1:
        labels = np.round(rng.uniform(0, 5, N) * 4) / 4  # with ties, as STS-B's
        noisy = labels + rng.normal(0, 2, N)
        yield "random", rng.normal(0, 1, N), labels
        yield "correlated", noisy, labels
        yield "ties", np.round(noisy), labels
        yield "nearly constant", 2.5 + 1e-4 * noisy, labels
        yield "large", 1e4 + noisy, labels
        yield "constant predictions", np.full(N, 2.5), labels
        yield "constant labels", noisy, np.full(N, 3.0)
        yield "both constant", np.full(N, 1.0), np.full(N, 3.0)
        yield "perfect", labels, labels
        yield "reversed", -labels, labels
        return
    labels = rng.integers(0, num_labels, N)
    one_hot = np.eye(num_labels)
    yield "random", rng.normal(0, 1, (N, num_labels)), labels
    yield "better than chance", rng.normal(0, 1, (N, num_labels)) + one_hot[labels], labels
    for c in range(num_labels):
        constant = np.tile(one_hot[c], (N, 1))
        yield f"always {c}", constant, labels
        yield f"always {c}, and right", constant, np.full(N, c)
        yield f"always {c}, and wrong", constant, np.full(N, (c + 1) % num_labels)
        yield f"labels all {c}", rng.normal(0, 1, (N, num_labels)), np.full(N, c)
    yield "perfect", one_hot[labels], labels
    yield "all wrong", one_hot[(labels + 1) % num_labels], labels


@pytest.mark.filterwarnings("ignore")  # scipy and torchmetrics warn of constants
@pytest.mark.parametrize("name", TASK_NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_sklearn_and_scipy(models, name, seed):
    task = TASKS[name]
    model = models[task.num_labels, task.metrics]
    dtype = torch.float32 if task.is_regression else torch.int64
    checked = 0
    for case, outputs, labels in cases(task.num_labels, seed):
        # scipy sees the values in fp32 too: rounding makes ties.
        outputs = torch.tensor(outputs, dtype=torch.float32)
        labels = torch.tensor(labels, dtype=dtype)
        guess = outputs if task.is_regression else outputs.argmax(1)
        for size in (32, N):
            found = compute(model, outputs, labels, size)
            assert set(found) == {KEYS[metric] for metric in task.metrics}
            for metric in task.metrics:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    expected = TRUTH[metric](labels.double().numpy(), guess.double().numpy())
                assert found[KEYS[metric]] == pytest.approx(expected, abs=2e-6), (case, metric)
                checked += 1
    assert checked >= 20


def test_score_metrics_are_reported():
    for task in TASKS.values():
        assert set(task.score_metrics) <= set(task.metrics) <= set(KEYS)
