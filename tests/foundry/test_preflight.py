"""What a run meets before anything is built: what must be refused, and what is filled in."""

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from llmfoundry.command_utils.train import TRAIN_CONFIG_KEYS, TrainConfig
from llmfoundry.utils.builders import build_composer_model, build_dataloader, build_tokenizer
from llmfoundry.utils.config_utils import make_dataclass_and_log_config
from omegaconf import OmegaConf
from streaming import MDSWriter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertTokenizerFast

from m2_plugin.foundry import preflight as module
from m2_plugin.foundry.conversion.cli import main_text as convert
from m2_plugin.foundry.preflight import ConfigError, RunTokenizer, preflight
from tests.foundry.test_models import PREFIX, TINY, build
from tests.foundry.test_starting_points import reference_file, save
from tests.utils import ROOT, TOKENIZER

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
families = pytest.mark.parametrize("family", list(TINY))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def no_file_is_remembered():
    module._in_file.cache_clear()


def small_tokenizer(folder: Path, words: int = 95, gap: int = 0) -> str:
    """A `tokenizer.json` alone, of 5 special tokens and words; ids from 50 on are `gap` larger."""
    tokens = [*SPECIAL, *(f"word{i}" for i in range(words))]
    vocabulary = {token: i + gap * (i >= 50) for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def mds(folder: Path, lengths: list[int], **kwargs) -> str:
    """A split `train` of token samples, as llm-foundry's converter writes them."""
    with MDSWriter(out=str(folder / "train"), columns={"tokens": "bytes"}, **kwargs) as writer:
        for length in lengths:
            writer.write({"tokens": np.full(length, 7, dtype=np.int64).tobytes()})
    return str(folder)


def run(name: str = "m2_bert_mlm", tokenizer=str(TOKENIZER), length: int = 32, **keys) -> dict:
    """A training config; `keys` may be dotted."""
    family = "m2_bert" if name.startswith("m2") else "bert"
    overrides = {} if keys.get("model.pretrained_model_name_or_path") else TINY[family]
    dataset = {"local": "./no", "split": "train", "max_seq_len": length, "mlm_probability": 0.3}
    config = OmegaConf.create(
        {
            "variables": {"tokenizer": tokenizer, "max_seq_len": length},
            "precision": "fp32",
            "model": {"name": name, "config_overrides": overrides},
            "tokenizer": {"name": tokenizer, "kwargs": {"model_max_length": length}},
            "train_loader": {"name": "mlm_text", "dataset": dataset},
            "global_train_batch_size": 8,
            "device_train_microbatch_size": 8,
        }
    )
    for key, value in keys.items():
        OmegaConf.update(config, key, value, force_add=True)
    return OmegaConf.to_container(config)


def fine_tune(start, tokenizer=None, name="m2_bert_classification", **keys) -> dict:
    started = {} if start is None else {"model.pretrained_model_name_or_path": str(start)}
    keys = started | {"variables.start": start and str(start)} | keys
    config = run(name, tokenizer and str(tokenizer), **keys)
    config["train_loader"] = {"name": "glue", "dataset": {"task": "cola", "max_seq_len": 32}}
    return config


def built_tokenizer(config: dict):
    """What llm-foundry builds after the preflight."""
    return build_tokenizer(config["tokenizer"]["name"], config["tokenizer"]["kwargs"])


def refused(config: dict, match: str) -> str:
    with pytest.raises(ConfigError, match=match) as error:
        preflight(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A pretrained M2-BERT with a tokenizer of its own, as a run leaves it."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = RunTokenizer(small_tokenizer(folder / "tokenizer"))
    model = build("m2_bert", "mlm", tokenizer)
    model.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save(model, folder)
    return folder


# --- the machine ---------------------------------------------------------------------------------


def test_a_gpu_run_gets_what_a_cpu_has(caplog):
    config = run(precision="amp_bf16", device_train_microbatch_size="auto")
    out = preflight(config)
    assert (out["precision"], out["device_train_microbatch_size"]) == ("fp32", 8)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    caplog.clear()
    preflight(run())
    assert not caplog.records


def test_a_gpu_run_stays_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = preflight(run(precision="amp_bf16", device_train_microbatch_size="auto"))
    assert (config["precision"], config["device_train_microbatch_size"]) == ("amp_bf16", "auto")


def test_the_batch_of_a_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = preflight(run(device_train_microbatch_size="auto"))
    assert config["device_train_microbatch_size"] == 2


def test_other_runs_pass_unchanged():
    model = {"name": "mpt_causal_lm", "attn_config": {"attn_type": "multihead_attention"}}
    other = {
        "model": model,
        "tokenizer": {"name": "no/such", "kwargs": {}},
        "train_loader": {"name": "text", "dataset": {"local": "./no", "max_seq_len": 8}},
        "eval_loaders": [{"label": "a", "name": "text"}],
        "precision": "amp_bf16",
    }
    assert preflight(copy.deepcopy(other)) == other | {"precision": "fp32"}
    assert preflight({}) == {"precision": "fp32"}


def test_llm_foundry_applies_it():
    config = run(precision="amp_bf16", optimizer={}, scheduler={}, max_duration="1ba")
    config |= {"max_seq_len": 32, "device_eval_batch_size": 8}
    logged, train_config = make_dataclass_and_log_config(
        OmegaConf.create(config), TrainConfig, TRAIN_CONFIG_KEYS, transforms="all"
    )
    assert train_config.precision == logged["precision"] == "fp32"
    assert train_config.tokenizer["name"] == "m2_plugin"
    assert train_config.device_train_batch_size == 8


def test_every_model_of_ours_is_known():
    from importlib.metadata import entry_points

    models = entry_points(group="llmfoundry_models")
    assert set(module.MODELS) == {e.name for e in models if e.value.startswith("m2_plugin.")}


# --- the tokenizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "checkpoint.pt", "load_path"])
def test_fine_tuning_uses_the_tokenizer_of_its_start(kind, start):
    """Without a network: from a folder, or from what Composer saves beside the weights."""
    if kind == "load_path":
        path = str(start / "checkpoint.pt")
        config = fine_tune(None, load_path=path)
    else:
        config = fine_tune(start if kind == "folder" else start / kind)
    tokenizer = built_tokenizer(preflight(config))
    assert tokenizer.get_vocab() == RunTokenizer(str(start / "tokenizer")).get_vocab()
    assert tokenizer.model_max_length == 32
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[CLS]", "[SEP]")


@pytest.mark.parametrize("kind", ["folder", "checkpoint.pt"])
@pytest.mark.parametrize("other", [str(TOKENIZER), "smaller"])
def test_another_vocabulary_than_the_starts_is_refused(kind, other, start, tmp_path):
    """Also a smaller one, whose ids all fit."""
    if other == "smaller":
        other = small_tokenizer(tmp_path / "other", words=40)
        data = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
        vocabulary = data["model"]["vocab"]
        vocabulary["word1"], vocabulary["word2"] = vocabulary["word2"], vocabulary["word1"]
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(data))
    path = start if kind == "folder" else start / kind
    said = refused(fine_tune(path, other), "has another vocabulary")
    assert f"set variables.tokenizer={path}" in said and "variables.start" in said


def test_a_start_with_more_or_fewer_tokens_of_the_same_ids(start, tmp_path):
    preflight(fine_tune(start, small_tokenizer(tmp_path / "fewer", words=90)))
    preflight(fine_tune(start, small_tokenizer(tmp_path / "more", words=97)))
    more = small_tokenizer(tmp_path / "too_many", words=110)
    refused(fine_tune(start, more), "vocab_size 104 is smaller than the tokenizer's 115 entries")
    config = fine_tune(start, more, **{"model.allow_embedding_resizing": True})
    preflight(config)


def test_a_reference_checkpoint_has_berts_vocabulary(tmp_path, monkeypatch, caplog):
    """Weights of the M2 release say nothing of their tokenizer; it was always the same."""
    path = tmp_path / "released.pt"
    reference_file(path, "base_bidir_resid_glu_monarch", "shapes_only")
    refused(fine_tune(path), "holds no tokenizer. Set variables.tokenizer=FOLDER")  # another size
    rows = torch.load(path)["bert.embeddings.word_embeddings.weight"].shape[0]
    monkeypatch.setattr(module, "BERT_VOCAB_SIZES", (rows,))
    module._in_file.cache_clear()
    tokenizer = module._check_tokenizer({"tokenizer": {"name": str(path)}}, None)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(TOKENIZER).get_vocab()
    assert "released.pt holds no tokenizer: using the vocabulary of bert-base-un" in caplog.text


def test_bare_weights_of_ours_need_a_tokenizer(start, tmp_path):
    weights = AutoModelForMaskedLM.from_pretrained(start).state_dict()
    torch.save(weights, tmp_path / "bare.bin")
    refused(fine_tune(tmp_path / "bare.bin"), "bare.bin' holds no tokenizer. Set variables.token")
    config = fine_tune(tmp_path / "bare.bin", start / "tokenizer")
    assert len(built_tokenizer(preflight(config))) == 100


def test_a_folder_without_a_tokenizer(start, tmp_path):
    AutoModelForMaskedLM.from_pretrained(start).save_pretrained(tmp_path)
    refused(fine_tune(tmp_path), "the folder has no tokenizer.json.* Set variables.tokenizer=FOLD")


@pytest.mark.parametrize("kwargs", [{}, {"bos_token": "[CLS]", "eos_token": "[SEP]"}])
def test_begin_and_end_tokens_are_the_tokenizers_own(kwargs, tmp_path):
    BertTokenizerFast(str(TOKENIZER / "vocab.txt")).save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.eos_token is None  # llm-foundry requires one
    tokenizer = RunTokenizer(str(tmp_path), model_max_length=64, **kwargs)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[CLS]", "[SEP]")
    assert tokenizer.get_vocab() == plain.get_vocab()
    assert tokenizer("Some words") == plain("Some words")
    assert type(tokenizer) is type(plain) and tokenizer.model_max_length == 64


def test_a_token_outside_the_vocabulary_is_not_added(tmp_path):
    """`eos_token: '[SEP]'` was in every YAML; a tokenizer without it got a token more."""
    keys = {"tokenizer.kwargs.eos_token": "</s>"}
    refused(run(**keys), "tokenizer.kwargs.eos_token '</s>' is not in the vocabulary")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    refused(run(tokenizer=str(tmp_path)), "no eos_token and no sep_token: set tokenizer.kwargs.eos")
    config = run(tokenizer=str(tmp_path), **{"tokenizer.kwargs.eos_token": "b"})
    assert built_tokenizer(preflight(config)).eos_token_id == 1


def test_a_folder_with_tokenizer_json_alone_trains(tmp_path, mds_of_words):
    folder = small_tokenizer(tmp_path / "tokenizer")
    config = preflight(run(tokenizer=folder, **{"train_loader.dataset.local": mds_of_words}))
    tokenizer = built_tokenizer(config)
    loader = {**config["train_loader"], "num_workers": 0, "drop_last": True}
    batch = next(iter(build_dataloader(loader, tokenizer, 4).dataloader))
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).sum() in (0, 4)
    assert batch["labels"].max() > 4  # words, no special tokens


@pytest.fixture
def mds_of_words(tmp_path) -> str:
    with MDSWriter(out=str(tmp_path / "mds" / "train"), columns={"text": "str"}) as writer:
        for i in range(8):
            writer.write({"text": " ".join(f"word{(i + j) % 90}" for j in range(40))})
    return str(tmp_path / "mds")


def test_a_hub_that_is_not_reached_is_one_line():
    said = refused(run(tokenizer="no-such-owner/no-such-tokenizer"), "cannot be reached")
    assert "Set variables.tokenizer=FOLDER" in said and len(said) < 300
    said = refused(fine_tune("no-such-owner/no-such-model"), "no-such-model")
    assert len(said) < 500


def test_a_missing_tokenizer():
    refused(run(tokenizer=None), "variables.tokenizer is missing: give a folder")
    refused(run(tokenizer="./no/such"), "'./no/such' .*there is no such folder")


def test_fine_tuning_without_a_start_is_refused():
    for name in ("m2_bert_classification", "hf_bert_classification", "m2_bert_contrastive"):
        refused(fine_tune(None, TOKENIZER, name), r"variables.start is missing.*pretrained=false")
        preflight(fine_tune(None, TOKENIZER, name, **{"model.pretrained": False}))
    refused(fine_tune(None, **{"model.pretrained": False}), "variables.tokenizer is missing")


def test_microbatches_must_not_cut_a_cached_loss():
    keys = {"model.pretrained": False, "model.mini_batch_size": 2}
    for found in (4, "auto"):
        config = fine_tune(
            None, TOKENIZER, "m2_bert_contrastive", device_train_microbatch_size=found, **keys
        )
        if found == "auto":  # without a GPU it becomes the whole batch
            assert preflight(config)["device_train_microbatch_size"] == 8
        else:
            refused(config, "model.mini_batch_size is 2.*set device_train_microbatch_size=8")
    keys |= {"model.loss": "orthogonal_projection", "device_train_microbatch_size": 4}
    preflight(fine_tune(None, TOKENIZER, "m2_bert_contrastive", **keys))


# --- the vocabulary ------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("gap", [0, 20])
def test_a_new_model_has_the_tokenizers_vocabulary(family, gap, tmp_path):
    """Rounded up to 8, and by the largest id: a tokenizer may leave ids out."""
    folder = small_tokenizer(tmp_path / "tokenizer", words=93, gap=gap)
    config = preflight(run(f"{PREFIX[family]}_mlm", folder))
    tokenizer = built_tokenizer(config)
    assert len(tokenizer) == 98 and max(tokenizer.get_vocab().values()) == 97 + gap
    model = build_composer_model(config["model"].pop("name"), config["model"], tokenizer)
    assert model.config.vocab_size == 104 if gap == 0 else 120
    ids = torch.tensor([list(tokenizer.get_vocab().values())[-30:]])
    model.eval()({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_a_vocabulary_that_does_not_fit(tmp_path, caplog):
    folder = small_tokenizer(tmp_path / "tokenizer", words=91, gap=40)
    key = "model.config_overrides.vocab_size"
    refused(run(tokenizer=folder, **{key: 128}), f"smaller than the tokenizer's 136 .*set {key}")
    preflight(run(tokenizer=folder, **{key: 144}))
    assert not caplog.records
    preflight(run(tokenizer=folder, **{key: 30528}))
    assert f"{key} is 30528, but the tokenizer {folder!r} needs only 136" in caplog.text


def test_m2_gpt_gets_the_tokenizers_vocabulary(tmp_path, caplog):
    config = run(tokenizer=small_tokenizer(tmp_path / "tokenizer", words=93))
    config["model"] = {"name": "mpt_causal_lm", "attn_config": {"attn_type": "monarch_mixer"}}
    config["train_loader"]["name"] = "text"
    assert preflight(copy.deepcopy(config))["model"]["vocab_size"] == 104
    config["model"]["vocab_size"] = 96
    refused(copy.deepcopy(config), "set model.vocab_size to 98 or more")
    config["model"]["vocab_size"] = 30528
    assert preflight(config)["model"]["vocab_size"] == 30528
    assert "model.vocab_size is 30528" in caplog.text


@families
@pytest.mark.parametrize("gap", [0, 20])
def test_resized_embeddings_leave_a_folder_that_loads(family, gap, tmp_path):
    small = RunTokenizer(small_tokenizer(tmp_path / "small", words=90))
    mlm = build(family, "mlm", small)
    mlm.model.save_pretrained(tmp_path / "start")
    more = RunTokenizer(small_tokenizer(tmp_path / "more", words=120, gap=gap))
    path = {"pretrained_model_name_or_path": str(tmp_path / "start")}
    with pytest.raises(ValueError, match="vocab_size 96 is smaller than the tokenizer's"):
        build(family, "mlm", more, **path)
    resized = build(family, "mlm", more, allow_embedding_resizing=True, **path)
    size = 128 if gap == 0 else 152
    assert resized.config.vocab_size == size
    resized.model.save_pretrained(tmp_path / "out")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([list(more.get_vocab().values())[-30:]])
    with torch.no_grad():
        logits = again(input_ids=ids).logits
        assert logits.shape == (1, 30, size)
        assert torch.equal(logits, resized.model.eval()(input_ids=ids).logits)
    old = mlm.model.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight[:95], old[:95])
    started = {"pretrained_model_name_or_path": str(tmp_path / "out")}
    assert build(family, "classification", more, **started).config.vocab_size == size


# --- lengths -------------------------------------------------------------------------------------

LOCAL = "train_loader.dataset.local"


@pytest.mark.parametrize("manifest", [True, False])
def test_samples_of_another_length(manifest, tmp_path):
    """By the manifest of our converters, or by the first samples of llm-foundry's."""
    if manifest:
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": "some words " * 50}) + "\n" for _ in range(4)))
        command = ["--out_root", str(tmp_path), "--splits", "train", "--num_workers", "1"]
        command += ["--local_files", f"train={text}", "--concat_tokens", "64"]
        assert convert([*command, "--tokenizer", str(TOKENIZER)]) == 0
        local = str(tmp_path)
    else:
        local = mds(tmp_path, [64] * 6)
    said = refused(run(**{LOCAL: local}), "train_loader.dataset.max_seq_len is 32.* 64 tokens")
    assert "set variables.max_seq_len=64" in said and "--concat_tokens 32" in said
    lengths = {f"model.config_overrides.{f}": 128 for f in module._limits(M2())}
    said = refused(run(length=128, **lengths, **{LOCAL: local}), "have only 64 tokens")
    assert "set variables.max_seq_len=64" in said and "never be trained" in said
    preflight(run(length=64, **dict.fromkeys(lengths, 64), **{LOCAL: local}))


def M2():
    from m2_plugin.models import M2BertConfig

    return M2BertConfig()


def test_mixed_lengths_and_texts_are_fine(tmp_path, mds_of_words):
    short, whole = mds(tmp_path / "short", [16] * 4), mds(tmp_path / "whole", [32] * 4)
    ragged = mds(tmp_path / "ragged", [5, 9, 20])
    for streams in ([short, whole], [short, mds_of_words], [ragged], [mds_of_words]):
        found = {str(i): {"local": local, "split": "train"} for i, local in enumerate(streams)}
        config = run(**{"train_loader.dataset.streams": found})
        del config["train_loader"]["dataset"]["local"], config["train_loader"]["dataset"]["split"]
        preflight(copy.deepcopy(config))
        if streams == [short, whole]:
            del config["train_loader"]["dataset"]["streams"]["1"]
            refused(config, "have only 16 tokens")
    # Evaluation on shorter samples trains nothing less.
    config = run()
    config["eval_loader"] = copy.deepcopy(config["train_loader"])
    config["eval_loader"]["dataset"]["local"] = short
    preflight(config)
    config["eval_loader"]["dataset"]["local"] = mds(tmp_path / "long", [40] * 2)
    refused(config, "eval_loader.dataset.max_seq_len is 32")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (64, "a sample has 64 tokens, but dataset.max_seq_len is 32"),
        (16, "samples have only 16 tokens, but dataset.max_seq_len is 32"),
    ],
)
def test_samples_that_are_downloaded_are_checked_as_they_are_read(length, message, tmp_path):
    config = run()
    remote = mds(tmp_path / "remote", [length] * 8)
    places = {"remote": remote, "local": str(tmp_path / "cache")}
    config["train_loader"]["dataset"] |= places | {"shuffle": True}
    config = preflight(config)  # nothing is known yet
    loader = {**config["train_loader"], "num_workers": 0, "drop_last": True}
    batches = iter(build_dataloader(loader, built_tokenizer(config), 4).dataloader)
    with pytest.raises(RuntimeError, match=message):
        next(batches)


def test_tokens_of_another_tokenizer(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "word1 word2 " * 50}) + "\n")
    command = ["--out_root", str(tmp_path), "--splits", "train", "--num_workers", "1"]
    command += ["--local_files", f"train={text}", "--concat_tokens", "32", "--eos_text", "[SEP]"]
    ours = small_tokenizer(tmp_path / "ours")
    assert convert([*command, "--tokenizer", ours]) == 0
    preflight(run(tokenizer=ours, **{LOCAL: str(tmp_path)}))
    said = refused(run(**{LOCAL: str(tmp_path)}), "vocabulary is another than that of")
    assert repr(ours) in said and "variables.tokenizer" in said
    path = tmp_path / "train" / "conversion.manifest"  # of an earlier version
    manifest = json.loads(path.read_text())
    del manifest["vocabulary"]
    path.write_text(json.dumps(manifest))
    preflight(run(**{LOCAL: str(tmp_path)}))


@pytest.mark.parametrize("field", ["max_position_embeddings", "long_conv_l_max"])
@pytest.mark.parametrize("value", [16, 64])
def test_a_new_model_of_another_length_than_the_loader(field, value):
    said = refused(
        run(**{f"model.config_overrides.{field}": value}),
        rf"model.config_overrides.{field} of the new model is {value}.*max_seq_len is 32",
    )
    assert "train_loader.dataset.max_seq_len" in said


def test_a_new_bert_may_be_longer():
    """The paper's baseline has 512 positions, and is trained on 128 tokens."""
    preflight(run("hf_bert_mlm", **{"model.config_overrides.max_position_embeddings": 64}))
    short = {"model.config_overrides.max_position_embeddings": 16}
    refused(run("hf_bert_mlm", **short), "max_position_embeddings of the new model is 16")


@pytest.mark.parametrize("kind", ["folder", "checkpoint.pt"])
def test_a_start_of_another_length_than_the_loader(kind, start, caplog):
    path = start if kind == "folder" else start / kind
    longer = fine_tune(path)
    longer["train_loader"]["dataset"]["max_seq_len"] = 48
    said = refused(longer, "takes texts of 32 tokens .*max_seq_len is 48")
    assert "variables.max_seq_len=32" in said and "m2-plugin extend" in said
    shorter = fine_tune(path)
    shorter["train_loader"]["dataset"]["max_seq_len"] = 16
    preflight(shorter)
    assert not caplog.records  # texts of a task may be short
    pretrained = {"model.pretrained_model_name_or_path": str(path)}
    preflight(run(tokenizer=str(start), length=16, **pretrained))
    assert "are not trained" in caplog.text


def test_overrides_do_not_make_a_start_longer(start):
    config = fine_tune(start, **{"model.config_overrides.max_position_embeddings": 64})
    config["model"]["config_overrides"]["long_conv_l_max"] = 64
    config["train_loader"]["dataset"]["max_seq_len"] = 64
    refused(config, "takes texts of 32 tokens")


def test_a_wrong_field_or_file_is_one_line(tmp_path):
    refused(run(**{"model.config_overrides.hidden_sise": 3}), "has no field 'hidden_sise'")
    refused(fine_tune(tmp_path / "gone"), "there is no folder")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    refused(fine_tune(tmp_path / "cut.pt"), "cut.pt' cannot be read")


# --- the launcher --------------------------------------------------------------------------------


def launch(*words: str, ranks: int = 1) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    composer = str(Path(sys.executable).parent / "composer")
    command = [composer, "-n", str(ranks), "train.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_gpu_recipe_fine_tunes_on_a_cpu_with_the_starts_tokenizer(start, tmp_path):
    rows = "".join(f"word{i} word{i + 1},{i % 2}\n" for i in range(32))
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)
    files = [f"variables.{name}={tmp_path}/rows.csv" for name in ("train", "eval")]
    more = ["variables.max_seq_len=32", f"variables.out={tmp_path}/out", "max_duration=2ba"]
    more += ["global_train_batch_size=8", "device_train_microbatch_size=auto"]
    words = ["yamls/finetune/text-classification.yaml", f"variables.start={start}", *files, *more]
    done = launch(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "There is no GPU: training in fp32 instead of amp_bf16." in done.stderr
    final = tmp_path / "out" / "huggingface" / "final"
    found = AutoTokenizer.from_pretrained(final).get_vocab()
    assert found == AutoTokenizer.from_pretrained(start).get_vocab()

    words += [f"variables.tokenizer={TOKENIZER}", f"variables.out={tmp_path}/other"]
    done = launch(*words, ranks=2)  # only one of them says it
    assert done.returncode == 1 and not (tmp_path / "other").exists()
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "has another vocabulary" in line]
    assert len(lines) == 1 and lines[0].startswith("variables.tokenizer: the tokenizer")
