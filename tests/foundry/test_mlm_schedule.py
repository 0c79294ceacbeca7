"""`mlm_probability_schedule`: the loader's own masks at each probability, and exact resumption."""

import copy

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.core import Callback
from composer.loggers import InMemoryLogger
from llmfoundry.utils.builders import build_callback, build_composer_model, build_dataloader

from m2_plugin.foundry.mlm_schedule import unmask
from m2_plugin.foundry.mlm_text import MLMCollator, threshold

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "long_conv_l_max": 32,
    "max_position_embeddings": 32,
    "hyena_filter_order": 8,
}
SCHEDULE = {"start": 0.3, "end": 0.15}


class Batches(Callback):
    """Keeps what the model is trained on."""

    def __init__(self):
        self.batches = {}

    def batch_start(self, state, logger):
        assert set(state.batch) == {
            *("input_ids", "attention_mask", "token_type_ids", "labels"),
            *("total_tokens", "loss_generating_tokens"),
        }
        self.batches[state.timestamp.batch.value] = copy.deepcopy(state.batch)


def samples(tokenizer, count=300, width=64):
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(1000, len(tokenizer), width)} for _ in range(count)]


@pytest.mark.parametrize("probability", [0.3, 0.21, 0.15, 0.01])
def test_the_masks_are_those_of_the_loader(tokenizer, probability):
    collator = MLMCollator(tokenizer, 0.3, 64)
    collator.give_draws = True
    batch = collator(samples(tokenizer))
    unmask(batch, probability)
    expected = MLMCollator(tokenizer, probability, 64)(samples(tokenizer))
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(batch[key], value) if torch.is_tensor(value) else batch[key] == value
        assert same, key
    assert len(set(expected["loss_generating_tokens"])) > 1


def test_no_threshold_is_rounded():
    for probability in (1e-3, 0.15, 0.3, 1 / 3, 0.999999999):
        assert threshold(probability) == int(probability * 2**64)


def train(mds, tokenizer, folder, duration, schedule=SCHEDULE, load_path=None, workers=0, **keys):
    dataset = {"local": str(mds), "split": "train", "shuffle": True, "max_seq_len": 32}
    loader = build_dataloader(
        {
            "name": "mlm_text",
            "dataset": {**dataset, "mlm_probability": 0.3},
            "drop_last": True,
            "num_workers": workers,
            "pin_memory": False,
        },
        tokenizer,
        24,
    )
    torch.manual_seed(0)
    model = build_composer_model("m2_bert_mlm", {"config_overrides": TINY}, tokenizer)
    kept, memory = Batches(), InMemoryLogger()
    callbacks = (
        [build_callback("mlm_probability_schedule", {**schedule, **keys})] if schedule else []
    )
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        max_duration=f"{duration}ba",
        callbacks=[build_callback("seed_each_batch", {}), *callbacks, kept],
        loggers=memory,
        save_folder=str(folder),
        save_filename="ba{batch}.pt",
        save_interval="5ba",
        load_path=load_path,
        device="cpu",
        device_train_microbatch_size=12,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        seed=3,
    )
    trainer.fit()
    trainer.close()
    return kept.batches, memory.data, model.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_share_follows_the_schedule_and_a_resumed_run_is_the_unbroken_one(
    mds, tokenizer, tmp_path, workers
):
    batches, logged, weights = train(mds, tokenizer, tmp_path / "whole", 16, workers=workers)
    shares = [0.3 - 0.15 * t / 16 for t in range(16)]
    assert [value for _, value in logged["mlm_probability"]] == pytest.approx(shares)
    for t, share in enumerate(shares):
        batch = batches[t]
        # [CLS], [SEP] and padding are never masked.
        tokens = int(batch["attention_mask"].sum()) - 2 * len(batch["labels"])
        masked = int((batch["labels"] != -100).sum())
        assert sum(batch["loss_generating_tokens"]) == masked
        assert abs(masked / tokens - share) < 4 * (share * (1 - share) / tokens) ** 0.5
    again, _, resumed = train(
        *(mds, tokenizer, tmp_path / "again", 16),
        load_path=str(tmp_path / "whole/ba10.pt"),
        workers=workers,
    )
    assert list(again) == list(range(10, 16))
    for t, batch in again.items():
        assert torch.equal(batch["input_ids"], batches[t]["input_ids"])
        assert torch.equal(batch["labels"], batches[t]["labels"])
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_a_constant_schedule_changes_nothing(mds, tokenizer, tmp_path):
    constant, _, weights = train(
        mds, tokenizer, tmp_path / "a", 10, {"start": 0.3, "end": 0.3, "t_max": "0.5dur"}
    )
    plain, _, expected = train(mds, tokenizer, tmp_path / "b", 10, None)
    for t, batch in plain.items():
        assert torch.equal(constant[t]["input_ids"], batch["input_ids"])
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_refuses_other_probabilities(mds, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="mlm_probability is 0.3, but must be the larger.*0.4"):
        train(mds, tokenizer, tmp_path, 2, {"start": 0.2, "end": 0.4})
    for bad in (0, 1.0, True, "0.3"):
        with pytest.raises(ValueError, match="mlm_probability_schedule.end must be a number"):
            build_callback("mlm_probability_schedule", {"start": 0.3, "end": bad})
