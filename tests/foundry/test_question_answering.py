"""The dataloader, the metrics and the models of question answering."""

import json
import random

import pytest
import torch
from llmfoundry.utils.builders import build_composer_model, build_dataloader

from m2_plugin.data.squad import Feature, answer_question, score_answer
from m2_plugin.foundry.question_answering import SquadExactMatch, SquadF1
from tests.utils import write_rows

L = 24
TINY = {
    "vocab_size": 30528, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "hyena_filter_order": 4, "long_conv_l_max": 32, "max_position_embeddings": 32,
    "mask_padding": True,
}  # fmt: skip


@pytest.fixture
def rows(sentences):
    """Questions on contexts of 5 to 24 words, with one or two answers."""
    rng = random.Random(1)
    found = []
    for i, text in enumerate(sentences[:30]):
        answers = []
        for word in rng.sample(text.split(), 1 + i % 2):
            answers.append({"text": word, "answer_start": text.index(word)})
        found.append({"id": f"q{i}", "question": "Which?", "context": text, "answers": answers})
    return found


def build(tokenizer, path, batch_size=4, **dataset):
    dataset = {"path": str(path), "max_seq_len": L, "doc_stride": 6} | dataset
    config = {"name": "question_answering", "dataset": dataset, "pin_memory": False}
    return build_dataloader(config | {"drop_last": False}, tokenizer, batch_size)


def model(name="m2_bert_question_answering", **keys):
    fields = TINY if name.startswith("m2") else {"num_hidden_layers": 1, "hidden_size": 12}
    torch.manual_seed(0)
    return build_composer_model(name, keys | {"config_overrides": fields}, None).eval()


def evaluate(composer_model, spec):
    """What Composer's evaluation does; also the logits of each question's features."""
    metrics = composer_model.get_metrics(is_train=False)
    found = {}
    for batch in spec.dataloader:
        for micro in spec.split_batch(batch, 3):
            with torch.no_grad():
                outputs = composer_model.eval_forward(micro)
            for metric in metrics.values():
                composer_model.update_metric(micro, outputs, metric)
            for i, question in enumerate(micro["question"].tolist()):
                n = int(micro["attention_mask"][i].sum())
                ids, kinds = (micro[key][i, :n].tolist() for key in ("input_ids", "token_type_ids"))
                offsets = [tuple(pair) for pair in micro["offsets"][i, :n].tolist()]
                logits = (outputs[key][i].numpy() for key in ("start_logits", "end_logits"))
                found.setdefault(question, []).append((Feature(ids, kinds, offsets), *logits))
    return {name: metric.compute().item() for name, metric in metrics.items()}, found


def test_batches_point_to_the_answers(tokenizer, rows, tmp_path):
    spec = build(tokenizer, write_rows(tmp_path / "a.jsonl", rows), padding="longest")
    answered, parts = set(), 0
    for batch in spec.dataloader:
        assert batch["input_ids"].shape[1] <= L
        assert spec.get_num_samples_in_batch(batch) == len(batch["context"])
        for i, question in enumerate(batch["question"].tolist()):
            row = rows[question]
            assert batch["context"][i] == row["context"]
            assert batch["answers"][i] == [answer["text"] for answer in row["answers"]]
            first, last = int(batch["start_positions"][i]), int(batch["end_positions"][i])
            parts += 1
            if last:
                a, b = int(batch["offsets"][i, first, 0]), int(batch["offsets"][i, last, 1])
                assert row["context"][a:b] == row["answers"][0]["text"]
                answered.add(question)
    assert answered == set(range(len(rows))) and parts > len(rows)


@pytest.mark.parametrize("name", ["m2_bert_question_answering", "hf_bert_question_answering"])
@pytest.mark.parametrize("version_2", [False, True])
def test_evaluation_equals_the_answers_scores(name, version_2, tokenizer, rows, tmp_path):
    """Each question is answered by all its features, whatever batches they are in."""
    for row in rows[:: 3 if version_2 else 99][1 - version_2 :]:
        row["answers"] = []
    spec = build(tokenizer, write_rows(tmp_path / "a.jsonl", rows), shuffle=True)

    def answers(found: dict, threshold: float | None) -> dict:
        return {
            i: answer_question(rows[i]["context"], *zip(*parts, strict=True), 30, threshold)
            for i, parts in found.items()
        }

    _, found = evaluate(model(name), spec)
    assert len(found) == len(rows) and max(map(len, found.values())) > 1
    apart = [answer.null_score - answer.score for answer in answers(found, None).values()]
    threshold = sum(apart) / len(apart)  # so that some have no answer
    values, found = evaluate(model(name, null_threshold=threshold), spec)
    scores, empty = [], 0
    for question, answer in answers(found, threshold if version_2 else None).items():
        row = rows[question]
        right = [answer["text"] for answer in row["answers"]]
        scores.append(score_answer(answer.text, right, version_2))
        empty += not answer.text
    exact, f1 = torch.tensor(scores).mean(0).mul(100).tolist()
    assert values["SquadExactMatch"] == pytest.approx(exact)
    assert values["SquadF1"] == pytest.approx(f1)
    assert (0 < empty < len(rows)) == version_2
    assert 0 < values["LanguageCrossEntropy"] < 10


@pytest.mark.parametrize(
    ("threshold", "exact", "f1"),
    [(0.5, 2, 2.25), (1.0, 1, 1.75), (1e9, 1, 1.75), (-1e9, 2, 2.25)],
)
def test_a_question_has_one_answer_in_any_order_of_rows(threshold, exact, f1):
    inf = torch.inf
    rows = [  # question, score, null score; exact match and F1 of the span, of no answer
        (0, 1.0, 9.0, 1, 1, 0, 0),
        (0, 2.0, 3.0, 0, 0.5, 0, 0),  # its best span; it has no answer if 3 − 2 is too much
        (1, 1.0, 2.0, 0, 0, 1, 1),
        (2, -inf, 0.0, 0, 0, 1, 1),  # no context, so there is no answer at any threshold
        (3, 5.0, -inf, 0, 0.25, 0, 0),  # version 1.1: there is always an answer
    ]
    rows = torch.tensor(rows + rows[:2], dtype=torch.float64)
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [3, 0, 4, 2, 6, 1, 5]):
        for metric, expected in ((SquadExactMatch, exact), (SquadF1, f1)):
            own = metric(threshold)
            for part in rows[order].split(2):
                own.update(part)
            assert own.compute().item() == pytest.approx(100 * expected / 4)
    assert SquadF1(0.0).compute() == 0


@pytest.mark.parametrize(
    ("dataset", "error"),
    [
        ({"max_seq_len": 4}, "leaves no room for the context"),
        ({"doc_stride": 0}, "doc_stride 0 is not at least 1"),
        ({"path": "none.json"}, "dataset.path: there is no file"),
        ({"version_2": False}, "version_2 is false, but 1 questions"),
        ({"stride": 3}, "Did you mean 'doc_stride'"),
    ],
)
def test_errors_name_the_key(tokenizer, rows, tmp_path, dataset, error):
    rows[3]["answers"] = []
    with pytest.raises(ValueError, match=error):
        path = write_rows(tmp_path / "a.jsonl", rows)
        build(tokenizer, dataset.pop("path", path), **dataset)


def test_a_misplaced_answer_is_named_or_left_out(tokenizer, rows, tmp_path, caplog):
    rows[2]["answers"][0]["answer_start"] += 1
    data = [{"paragraphs": [{"context": row.pop("context"), "qas": [row]}]} for row in rows]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    with pytest.raises(ValueError, match=r"a.json, question 'q2': the answer .* does not stand"):
        build(tokenizer, path)
    spec = build(tokenizer, path, on_error="skip")
    assert len(set(spec.dataloader.dataset["question"])) == len(rows) - 1
    assert "Left out 1 broken rows" in caplog.text


def test_answers_that_no_part_has_are_counted(tokenizer, rows, tmp_path, caplog):
    text = rows[0]["context"] = " ".join(["word"] * 60)
    rows[0]["answers"] = [{"text": text, "answer_start": 0}]
    build(tokenizer, write_rows(tmp_path / "a.jsonl", rows))
    assert "1 answers are in no feature as a whole" in caplog.text


def test_a_model_learns_to_answer(tokenizer, tmp_path):
    rows = [
        {"question": "Where?", "context": c, "answers": [{"text": a, "answer_start": c.index(a)}]}
        for c, a in (("he went to london by train", "london"), ("in paris we saw her", "paris"))
    ]
    spec = build(tokenizer, write_rows(tmp_path / "a.jsonl", rows))
    trained = model().train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    batch = next(iter(spec.dataloader))
    for _ in range(60):
        loss = trained.loss(trained(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values, _ = evaluate(trained.eval(), spec)
    assert values["SquadExactMatch"] == values["SquadF1"] == 100
