"""`flops_per_batch` against torch's counter of matrix products, and what `speed_monitor` logs."""

import math

import pytest
import torch
from composer import Trainer
from composer.callbacks import SpeedMonitor
from composer.loggers import InMemoryLogger
from llmfoundry.utils.builders import build_composer_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m2_plugin.foundry.flops import FlopCounter

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
M2 = {**SIZES, "long_conv_l_max": 24, "max_position_embeddings": 24, "hyena_filter_order": 8}
BERT = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 24}
CASES = {
    "m2": ("m2_bert_mlm", {"config_overrides": M2}),
    "m2_dense": (
        "m2_bert_mlm",
        {"config_overrides": {**M2, "use_monarch_mlp": False, "residual_long_conv": False}},
    ),
    "m2_attention": (
        "m2_bert_mlm",
        {"config_overrides": {**M2, "sequence_mixer": "alibi_attention", "num_attention_heads": 2}},
    ),
    "m2_pads": ("m2_bert_mlm", {"config_overrides": {**M2, "pad_inputs": True}}),
    "m2_classifier": ("m2_bert_classification", {"config_overrides": M2, "num_labels": 3}),
    "bert": ("hf_bert_mlm", {"config_overrides": BERT}),
    "bert_classifier": ("hf_bert_classification", {"config_overrides": BERT, "num_labels": 3}),
    "roberta_classifier": (
        "hf_bert_classification",
        {"config_overrides": BERT, "num_labels": 3, "model_type": "roberta"},
    ),
    "distilbert": (
        "hf_bert_mlm",
        {
            "model_type": "distilbert",
            "config_overrides": {
                **{"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 2, "vocab_size": 96},
                "max_position_embeddings": 24,
            },
        },
    ),
    "albert": (
        "hf_bert_mlm",
        {
            "model_type": "albert",
            "config_overrides": {**BERT, "embedding_size": 16, "num_hidden_layers": 4},
        },
    ),
}


def batch_of(name, length=16):
    ids = torch.randint(5, 90, (3, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.endswith("classification"):
        return {**batch, "labels": torch.tensor([0, 1, 2])}
    labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
    return {**batch, "labels": labels}


def fft_operations(model, batch):
    """Of a training step's long convolutions, in closed form."""
    if getattr(model.config, "sequence_mixer", None) != "monarch_mixer":
        return 0
    length = model.config.padded_length or batch["input_ids"].shape[1]
    convs = 1 + model.config.residual_long_conv
    channels = convs * model.config.num_hidden_layers * model.config.hidden_size
    fft = 5 * length * math.log2(2 * length)
    return 3 * channels * (len(batch["labels"]) * (2 * fft + 6 * (length + 1)) + fft)


@pytest.mark.parametrize("case", CASES)
def test_matrix_products_are_those_that_torch_counts(case):
    name, keys = CASES[case]
    model = build_composer_model(name, keys, None)
    batch = batch_of(name)
    # torch does not count its fused attention on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(model(batch), batch).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "convolution" not in str(op))  # the short ones
    counted = model.flops_per_batch(batch) - fft_operations(model, batch)
    assert counted == pytest.approx(products, rel=1e-12)
    counts = (batch["labels"] != -100).sum(1).tolist() if name.endswith("mlm") else None
    if counts is not None:
        assert model.flops_per_batch({**batch, "loss_generating_tokens": counts}) == (
            model.flops_per_batch(batch)
        )


def test_a_batch_of_pairs_counts_every_text(tokenizer):
    fields = {"config_overrides": {**M2, "vocab_size": len(tokenizer)}}
    model = build_composer_model("m2_bert_contrastive", fields, tokenizer)
    ids = torch.randint(5, 90, (4, 3, 16))
    pairs = model.flops_per_batch({"input_ids": ids})
    assert pairs == model.flops_per_batch({"input_ids": ids.flatten(0, 1)})
    # The pooler sees one vector of each text.
    assert pairs - FlopCounter(model.model.model)({"input_ids": ids}) == 3 * 12 * 2 * 32 * 32


def test_speed_monitor_logs_the_rate_and_mfu():
    model = build_composer_model("m2_bert_mlm", {"config_overrides": M2}, None)
    batches = [batch_of("m2_bert_mlm") for _ in range(4)]
    memory = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=batches,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.0),
        max_duration="4ba",
        callbacks=SpeedMonitor(window_size=2, gpu_flops_available=1e12),
        loggers=memory,
        device="cpu",
        device_train_microbatch_size=1,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    logged = {key: [float(value) for _, value in memory.data[key]] for key in memory.data}
    for i, rate in enumerate(logged["throughput/flops_per_sec"]):
        mean = sum(map(model.flops_per_batch, batches[i + 1 : i + 3])) / 2
        assert rate == pytest.approx(mean * logged["throughput/batches_per_sec"][i], rel=1e-5)
        assert logged["throughput/device/mfu"][i] == pytest.approx(rate / 1e12)
