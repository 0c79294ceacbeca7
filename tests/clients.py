"""Run clients of transformers against the models: train, save, load, quantise, offload, search.

    python -m tests.clients                   # all of them
    python -m tests.clients peft_lora mteb    # those whose names begin so

Each client prints one line: `ok`, `none` if its package is not installed, or its error. The exit
code is the number of errors. `tests/matrix.py` makes environments with other versions and runs this
there. It needs no model hub, no GPU and no llm-foundry.
"""

import argparse
import copy
import importlib.util
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from m2_plugin import models
from m2_plugin.models import M2BertConfig
from tests.utils import TOKENIZER

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "peft",
    "accelerate",
    "torchao",
    "mteb",
)
TEXTS = ["A ship.", "He did not know what to say, and so he said nothing at all.", "Rain", "No!"]
CLIENTS: dict[str, tuple[Callable[[Path], Any], str]] = {}  # name → function, package that it needs


class Absent(Exception):
    """A package that a client needs is missing."""


def client(needs: str = "transformers") -> Callable:
    def register(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
        CLIENTS[function.__name__] = function, needs
        return function

    return register


def build(name: str, **fields: Any) -> Any:
    """Make a small model whose filters and head are far from zero."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    filters = {"hyena_filter_order": 16, "long_conv_l_max": 64, "max_position_embeddings": 64}
    config = M2BertConfig(
        **size | filters | {"mask_padding": True, "initializer_range": 0.2} | fields
    )
    return getattr(models, name)(config).eval()


def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TOKENIZER)


def batch() -> Any:
    return tokenizer()(TEXTS, return_tensors="pt", padding=True)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def output(model: Any, **inputs: Any) -> Tensor:
    """Return a model's first output that is no loss, on the batch, without gradients."""
    model.eval()
    with torch.no_grad():
        found = model(**dict(batch()), **inputs)
    names = ("logits", "sentence_embedding", "start_logits", "last_hidden_state")
    return next(found[name] for name in names if found.get(name) is not None)


def same(actual: Any, expected: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=atol
    )


def differs(actual: Tensor, expected: Tensor, least: float = 1e-3) -> None:
    error = (actual - expected).abs().max().item()
    assert error > least, f"nothing changed: the largest difference is {error:.2g}"


def alike(actual: Tensor, expected: Tensor, least: float = 0.99) -> None:
    cosine = torch.cosine_similarity(actual.flatten().float(), expected.flatten().float(), dim=0)
    assert cosine > least, f"cosine {cosine:.4f} to the fp32 model's outputs"


def train(model: nn.Module, steps: int = 2, lr: float = 1e-2, **inputs: Any) -> None:
    """Train a few steps on the batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    model.train()
    for _ in range(steps):
        loss = model(**dict(batch()), **inputs).loss
        assert loss.isfinite(), loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


LABELS = {"labels": torch.tensor([0, 1, 0, 1])}


# PEFT


def lora(**kwargs: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["in_proj", "out_proj"]} | kwargs)


@client("peft")
def peft_lora_classification(folder: Path) -> None:
    """Train, switch the adapter off and on, save, load, merge, and save what was merged."""
    from peft import PeftModel, get_peft_model

    base = build("M2BertForSequenceClassification")
    exact = output(base)
    model = get_peft_model(copy.deepcopy(base), lora(task_type="SEQ_CLS"))
    with torch.no_grad():
        same(output(model), exact)
    train(model, **LABELS)
    adapted = output(model)
    differs(adapted, exact)
    head = model.base_model.model.classifier.modules_to_save["default"].state_dict()
    with model.disable_adapter():
        same(output(model), exact)
    same(output(model), adapted)
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
    same(output(loaded), adapted)
    merged = loaded.merge_and_unload()
    same(output(merged), adapted)
    same(merged.classifier.weight.detach(), head["weight"])
    merged.save_pretrained(folder / "merged")
    auto = transformers.AutoModelForSequenceClassification
    same(output(auto.from_pretrained(folder / "merged")), adapted)


@client("peft")
def peft_lora_on_every_linear(folder: Path) -> None:
    """`all-linear` finds the projections. Filters are no projections, and stay as they are."""
    from peft import get_peft_model

    for dense in (False, True):
        base = build("M2BertForSequenceClassification", use_monarch_mlp=not dense)
        model = get_peft_model(base, lora(task_type="SEQ_CLS", target_modules="all-linear"))
        names = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
        assert any("in_proj" in name for name in names), names
        assert not any(".filter." in name for name in names), names
        train(model, **LABELS)


@client("peft")
def peft_lora_embeddings_model(folder: Path) -> None:
    from peft import get_peft_model

    base = build("M2BertForTextEmbedding")
    exact = output(base)
    model = get_peft_model(base, lora(task_type="FEATURE_EXTRACTION"))
    same(output(model), exact)


@client("peft")
def peft_ia3(folder: Path) -> None:
    from peft import IA3Config, get_peft_model

    config = IA3Config(
        task_type="SEQ_CLS", target_modules=["in_proj", "out_proj"], feedforward_modules=[]
    )
    model = get_peft_model(build("M2BertForSequenceClassification"), config)
    before = output(model)
    train(model, **LABELS)
    differs(output(model), before)


@client("peft")
def peft_prompt_tuning(folder: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, num_layers=2, token_dim=32,
        num_attention_heads=4,
    )  # fmt: skip
    model = get_peft_model(build("M2BertForSequenceClassification"), config)
    before = output(model)
    train(model, lr=0.1, **LABELS)
    differs(output(model), before)


def check_add_adapter() -> None:
    """Raise `Absent` if this transformers waits for a PEFT that is not there."""
    from transformers.integrations import peft

    if Version(version("peft")) < Version(peft.MIN_PEFT_VERSION):
        raise Absent(f"transformers needs PEFT {peft.MIN_PEFT_VERSION} for this")


@client("peft")
def transformers_add_adapter(folder: Path) -> None:
    check_add_adapter()
    model = build("M2BertForSequenceClassification")
    exact = output(model)
    model.add_adapter(lora(init_lora_weights=False))
    adapted = output(model)
    differs(adapted, exact)
    model.disable_adapters()
    same(output(model), exact)
    model.enable_adapters()
    same(output(model), adapted)
    model.save_pretrained(folder)


# Quantisation


def quantised(kind: str, filter_fn: Any = None) -> None:
    from torchao import quantization

    config = {
        "weight": ("Int8WeightOnlyConfig", "int8_weight_only"),
        "dynamic": ("Int8DynamicActivationInt8WeightConfig", "int8_dynamic_activation_int8_weight"),
    }[kind]
    make = next(getattr(quantization, n) for n in config if hasattr(quantization, n))
    model = build("M2BertForSequenceClassification", use_monarch_mlp=False)
    exact = output(model)
    weight = model.model.layers[0].mixer.in_proj.weight
    quantization.quantize_(model, make(), filter_fn)
    assert model.model.layers[0].mixer.in_proj.weight is not weight
    found = output(model)
    differs(found, exact, 1e-6)
    alike(found, exact)


@client("torchao")
def torchao_int8_weights(folder: Path) -> None:
    quantised("weight")


@client("torchao")
def torchao_int8_dynamic(folder: Path) -> None:
    quantised("dynamic")


@client()
def torch_int8_dynamic(folder: Path) -> None:
    model = build("M2BertForSequenceClassification")
    exact = output(model)
    quantised_model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    alike(output(quantised_model), exact)


# Offload


@client("accelerate")
def accelerate_cpu_offload(folder: Path) -> None:
    from accelerate import cpu_offload

    model = build("M2BertForSequenceClassification")
    exact = output(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    same(output(model), exact)
    same(output(model), exact)


@client("accelerate")
def accelerate_disk_offload(folder: Path) -> None:
    from accelerate import disk_offload

    model = build("M2BertForSequenceClassification")
    exact = output(model)
    disk_offload(model, folder, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    same(output(model), exact)


@client("accelerate")
def device_map_with_disk(folder: Path) -> None:
    """The embeddings in memory, all else on disk, as device_map puts them."""
    for name in ("M2BertForMaskedLM", "M2BertForTextEmbedding", "M2BertForSequenceClassification"):
        model = build(name, num_hidden_layers=3)
        exact = output(model)
        model.save_pretrained(folder / name)
        parts = {child: "disk" for child, _ in model.named_children() if child != "model"}
        parts |= {"model.embeddings": "cpu", "model.layers": "disk", "model.layers.0": "cpu"}
        parts |= {f"model.layers.{i}": "disk" for i in (1, 2)}
        del parts["model.layers"]
        if name == "M2BertForMaskedLM":  # tied to the embeddings
            parts["decoder"] = "cpu"
        loaded = type(model).from_pretrained(
            folder / name, device_map=parts, offload_folder=folder / f"{name}-offload"
        )
        assert any(p.is_meta for p in loaded.parameters())
        same(output(loaded), exact)


@client("accelerate")
def device_map_auto(folder: Path) -> None:
    """In shards, with and without a limit that sends a part to the disk."""
    model = build("M2BertForSequenceClassification", num_hidden_layers=4)
    exact = output(model)
    model.save_pretrained(folder / "model", max_shard_size="200KB")
    assert len(list((folder / "model").glob("model-*.safetensors"))) > 1
    size = sum(p.nbytes for p in model.parameters())
    for limit in (2 * size, int(0.98 * size)):
        loaded = type(model).from_pretrained(
            folder / "model",
            device_map="auto",
            max_memory={"cpu": limit},
            offload_folder=folder / "offload",
        )
        assert any(p.is_meta for p in loaded.parameters()) == (limit < size)
        same(output(loaded), exact)


# Training


def arguments(folder: Path, **kwargs: Any) -> Any:
    fields = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2,
        "report_to": "none", "use_cpu": True, "save_steps": 2, "logging_steps": 1,
        "disable_tqdm": True,
    }  # fmt: skip
    return transformers.TrainingArguments(**fields | kwargs)


@client("accelerate")
def trainer_masked_lm(folder: Path) -> None:
    """Train with a tokenizer, load the checkpoint and the saved model, and go on."""
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer

    words = tokenizer()
    rows = [words(text) for text in TEXTS * 2]

    def trainer(model: Any, **kwargs: Any) -> Any:
        return Trainer(
            model,
            arguments(folder / "run", **kwargs),
            data_collator=DataCollatorForLanguageModeling(words, mlm_probability=0.5),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=words,
        )

    model = build("M2BertForMaskedLM")
    run = trainer(model)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    run.save_model(str(folder / "saved"))
    trained = output(model)
    for path in (folder / "saved", folder / "run" / "checkpoint-2"):
        same(output(AutoModelForMaskedLM.from_pretrained(path)), trained)
        assert transformers.AutoTokenizer.from_pretrained(path).pad_token == "[PAD]"
    longer = trainer(build("M2BertForMaskedLM"), max_steps=4)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4


@client("accelerate")
def trainer_classifier(folder: Path) -> None:
    """Train a classifier in bf16 with gradient checkpointing, and choose the best checkpoint."""
    from transformers import AutoModelForSequenceClassification, Trainer

    words = tokenizer()
    rows = [words(text) | {"labels": i % 2} for i, text in enumerate(TEXTS * 2)]
    model = build("M2BertForSequenceClassification")
    run = Trainer(
        model,
        arguments(
            folder / "run", bf16=True, gradient_checkpointing=True, eval_strategy="steps",
            eval_steps=2, load_best_model_at_end=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=words,
        data_collator=transformers.DataCollatorWithPadding(words),
    )  # fmt: skip
    run.train()
    assert run.predict(rows).predictions.shape == (8, 2)
    run.save_model(str(folder / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "saved")
    run.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # Trainer wraps it in autocast
    same(output(loaded), output(model))


@client()
def ema_averaged_model(folder: Path) -> None:
    """torch's own average of weights: its outputs are those of a model with these weights."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = build("M2BertForSequenceClassification")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        train(model, steps=1, lr=0.05, **LABELS)
        average.update_parameters(model)
        found = output(average.eval().module)
        fresh = build("M2BertForSequenceClassification")
        fresh.load_state_dict(average.module.state_dict())
        same(found, output(fresh))


@client()
def ema_through_data(folder: Path) -> None:
    """Most EMA libraries write `.data`: swap the average in, evaluate, and swap back."""
    model = build("M2BertForSequenceClassification")
    first = output(model)
    shadow = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, lr=0.05, **LABELS)
    second = output(model)
    differs(second, first)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    for weights, expected in ((shadow, first), (kept, second), (shadow, first)):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(weights[name])
        same(output(model), expected)
    for name, parameter in model.named_parameters():
        parameter.data = kept[name]
    same(output(model), second)


@client()
def parametrised_filter(folder: Path) -> None:
    """A change of a filter's weight that is switched without gradients: outputs follow at once."""

    class Offset(nn.Module):
        on = 0.0

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.on

    model = build("M2BertForSequenceClassification")
    exact = output(model)
    layer = model.model.layers[0].mixer.long_conv.filter.fwd.out
    offset = Offset()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", offset)
    same(output(model), exact)
    offset.on = 1.0
    differs(output(model), exact)
    offset.on = 0.0
    same(output(model), exact)


# sentence-transformers


@client("sentence_transformers")
def sentence_transformers_model(folder: Path) -> None:
    """Encode, train 2 steps, save, load; transformers reads the same from what was saved."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    ours = build("M2BertForTextEmbedding", normalize_embeddings=True)
    exact = output(ours)
    model = SentenceTransformer(str(saved(ours, folder / "start")), device="cpu")
    same(model.encode(TEXTS), exact)
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(folder / "run"), max_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-3, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=2,
        ),
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(model),
    ).train()  # fmt: skip
    trained = torch.from_numpy(model.encode(TEXTS))
    differs(trained, exact)
    model.save(str(folder / "saved"))
    for path in (folder / "saved", folder / "run" / "checkpoint-2"):
        loaded = SentenceTransformer(str(path), device="cpu")
        same(loaded.encode(TEXTS), trained)
    again = transformers.AutoModelForTextEncoding.from_pretrained(folder / "saved")
    same(output(again), trained)


@client("sentence_transformers")
def sentence_transformers_adapter(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    check_add_adapter()
    ours = build("M2BertForTextEmbedding")
    model = SentenceTransformer(str(saved(ours, folder / "start")), device="cpu")
    exact = model.encode(TEXTS)
    model.add_adapter(lora(task_type="FEATURE_EXTRACTION", init_lora_weights=False))
    differs(torch.from_numpy(model.encode(TEXTS)), torch.from_numpy(exact))
    model.disable_adapters()
    same(model.encode(TEXTS), exact)


@client("sentence_transformers")
def cross_encoder(folder: Path) -> None:
    """Score pairs, train 2 steps, save, load; transformers reads the same from what was saved."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    start = saved(build("M2BertForSequenceClassification", num_labels=1), folder / "start")
    model = CrossEncoder(str(start), num_labels=1, device="cpu")
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    first = torch.from_numpy(model.predict(pairs))
    assert first.shape == (4,)
    rows = Dataset.from_dict({"a": TEXTS, "b": TEXTS[::-1], "label": [1.0, 0.0, 1.0, 0.0]})
    CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(
            output_dir=str(folder / "run"), max_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-3, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=2,
        ),
        train_dataset=rows,
        loss=BinaryCrossEntropyLoss(model),
    ).train()  # fmt: skip
    scores = torch.from_numpy(model.predict(pairs))
    differs(scores, first, 1e-5)
    model.save_pretrained(str(folder / "saved"))
    for path in (folder / "saved", folder / "run" / "checkpoint-2"):
        same(CrossEncoder(str(path), device="cpu").predict(pairs), scores)
    classes = transformers.AutoModelForSequenceClassification
    same(output(classes.from_pretrained(folder / "saved")), output(model.model))


@client("mteb")
def mteb_retrieval_in_memory(folder: Path) -> None:
    """A task whose queries are its documents: nDCG is 1."""
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer

    class Tiny(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="TinyRetrieval",
            dataset={"path": "none", "revision": "none"},
            description="Texts that find themselves.",
            type="Retrieval",
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            category="t2t",
        )

        def load_data(self, *_: Any, **__: Any) -> None:
            ids = [str(i) for i in range(len(TEXTS))]
            self.queries = {"test": dict(zip(ids, TEXTS, strict=True))}
            self.corpus = {"test": {i: {"text": t} for i, t in self.queries["test"].items()}}
            self.relevant_docs = {"test": {i: {i: 1} for i in ids}}
            self.data_loaded = True

    path = saved(build("M2BertForTextEmbedding", normalize_embeddings=True), folder)
    model = SentenceTransformer(str(path), device="cpu")
    result = mteb.evaluate(model, Tiny(), cache=None, show_progress_bar=False)
    score = result.task_results[0].get_score()
    assert score == 1, score


# Pipelines


@client()
def pipelines(folder: Path) -> None:
    def make(task: str, name: str, **fields: Any) -> Any:
        path = saved(build(name, **fields), folder / task)
        return transformers.pipeline(task, model=str(path), device="cpu")

    assert len(make("fill-mask", "M2BertForMaskedLM")("He did not [MASK].")) == 5
    classes = make("text-classification", "M2BertForSequenceClassification", num_labels=3)
    assert all(0 < row["score"] < 1 for row in classes(TEXTS, batch_size=2))
    features = make("feature-extraction", "M2BertModel")
    assert len(features(TEXTS[0])[0][0]) == 32


@client()
def pipeline_token_classification(folder: Path) -> None:
    path = saved(build("M2BertForTokenClassification", num_labels=5), folder)
    for strategy in ("none", "simple", "first"):
        tags = transformers.pipeline(
            "token-classification", model=str(path), aggregation_strategy=strategy, device="cpu"
        )
        rows = tags(TEXTS[1])
        assert rows and all(0 <= row["start"] < row["end"] <= len(TEXTS[1]) for row in rows)


@client()
def question_answering(folder: Path) -> None:
    """The pipeline, which transformers 5 no longer has, or the model that Auto loads."""
    path = saved(build("M2BertForQuestionAnswering"), folder)
    if int(transformers.__version__.split(".")[0]) < 5:
        answer = transformers.pipeline("question-answering", model=str(path), device="cpu")
        found = answer(question="What did he say?", context=TEXTS[1])
        assert TEXTS[1][found["start"] : found["end"]] == found["answer"]
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(path)
    where = {"start_positions": torch.tensor([1, 2, 1, 2])}
    train(model, **where, end_positions=torch.tensor([1, 3, 1, 2]))
    assert output(model).shape == batch()["input_ids"].shape


@client()
def multiple_choice(folder: Path) -> None:
    path = saved(build("M2BertForMultipleChoice"), folder)
    model = transformers.AutoModelForMultipleChoice.from_pretrained(path)
    choices = {name: tensor.unflatten(0, (2, 2)) for name, tensor in batch().items()}
    found = model(**choices, labels=torch.tensor([0, 1]))
    assert found.logits.shape == (2, 2) and found.loss.isfinite()


# Other ways to load and to run


@client()
def bf16_and_fp16_weights(folder: Path) -> None:
    """Loaded in half the precision, the filters stay in fp32."""
    model = build("M2BertForTextEmbedding")
    exact = output(model)
    model.save_pretrained(folder)
    for dtype in (torch.bfloat16, torch.float16):
        half = type(model).from_pretrained(folder, torch_dtype=dtype)
        for name, parameter in half.named_parameters():
            kept = ".filter." in name
            assert parameter.dtype == (torch.float32 if kept else dtype), (name, parameter.dtype)
        alike(output(half), exact, 0.999)
        alike(output(copy.deepcopy(model).to(dtype)), exact, 0.999)


@client()
def resized_vocabulary(folder: Path) -> None:
    model = build("M2BertForMaskedLM")
    model.resize_token_embeddings(30525)
    saved(model, folder)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    assert loaded.config.vocab_size == 30525
    same(output(loaded), output(model))


@client()
def trace_and_save(folder: Path) -> None:
    model = build("M2BertForTextEmbedding", return_dict=False)
    model.eval()
    inputs = batch()
    arguments = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        expected = model(*arguments)[0]
        traced = torch.jit.trace(model, arguments, strict=False)
        traced.save(str(folder / "model.ts"))
        same(torch.jit.load(str(folder / "model.ts"))(*arguments)[0], expected)


@client()
def dynamic_export(folder: Path) -> None:
    """One program for any batch and length, saved and loaded."""
    from torch.export import Dim, export, load, save

    for name in ("M2BertForMaskedLM", "M2BertForTextEmbedding"):
        model = build(name, classifier_pooling="mean")
        inputs = dict(batch())
        sizes = {0: Dim("batch", min=1, max=1024), 1: Dim("length", min=2, max=64)}
        with torch.no_grad():
            program = export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes))
            save(program, folder / "model.pt2")
            run = load(folder / "model.pt2").module()
            for rows, length in ((1, 2), (1, 7), (2, 64), (9, 33)):
                ids = torch.randint(5, 1000, (rows, length))
                other = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                other = {key: other.get(key, torch.zeros_like(ids)) for key in inputs}
                same(run(**other)[0], model(**other)[0], atol=1e-4)


@client()
def pickled(folder: Path) -> None:
    model = build("M2BertForTextEmbedding")
    exact = output(model)
    torch.save(model, folder / "model.pt")
    same(output(torch.load(folder / "model.pt", weights_only=False)), exact)


def forget_accelerator() -> None:
    """Without this, a Trainer takes the precision of the one before it."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="the clients to run (all)")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--versions", action="store_true", help="print the packages' versions only")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    say = sys.stdout.write
    for package in PACKAGES:
        try:
            say(f"{package} {version(package)}  ")
        except PackageNotFoundError:
            say(f"{package} none  ")
    say("\n")
    if args.versions:
        return 0
    errors = 0
    for name, (function, needs) in CLIENTS.items():
        if args.names and not name.startswith(tuple(args.names)):
            continue
        result = "none"
        if importlib.util.find_spec(needs) is not None:
            result = "ok"
            try:
                forget_accelerator()
                with tempfile.TemporaryDirectory() as folder:
                    function(Path(folder))
            except Absent as error:
                result = f"none: {error}"
            except Exception as error:
                errors += 1
                text = " ".join(str(error).split())
                result = f"{type(error).__name__}: {text[:300]}"
                if args.traceback:
                    traceback.print_exc()
        say(f"{name:32} {result}\n")
        sys.stdout.flush()
    return errors


if __name__ == "__main__":
    sys.exit(main())
