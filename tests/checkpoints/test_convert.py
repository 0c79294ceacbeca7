"""Checkpoints in and out: the reference's files, hub folders, Composer's checkpoints; refusals."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForTextEncoding, AutoTokenizer

from m2_plugin.checkpoints.convert import export_checkpoint, import_checkpoint
from m2_plugin.checkpoints.names import to_reference, translate
from m2_plugin.cli import main
from m2_plugin.models import (
    M2BertConfig,
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
    M2BertForTextEmbedding,
)
from tests.models.test_golden import NAMES
from tests.models.test_modeling_m2_bert import ids, small
from tests.utils import TOKENIZER, load_golden, relative_error, with_prefix

BASE = "base_bidir_resid_glu_monarch"


def composer_file(path, weights) -> str:
    torch.save({"state": {"model": {f"model.{k}": v for k, v in weights.items()}}, "rng": []}, path)
    return str(path)


def golden_file(tmp_path, name=BASE):
    """The golden model as a Composer checkpoint and its config; its weights, inputs, outputs."""
    meta, tensors = load_golden(name)
    config = tmp_path / "reference.json"
    config.write_text(json.dumps(meta["config"]))
    weights = with_prefix(tensors, "sd/")
    return composer_file(tmp_path / "latest-rank0.pt", weights), config, weights, tensors


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", NAMES)
def test_import_and_export_of_the_reference(name, tmp_path):
    """The logits of the reference, and every tensor of the file again, buffers included."""
    source, config, weights, tensors = golden_file(tmp_path, name)
    report = import_checkpoint(source, tmp_path / "m2", config=config)
    assert report.found.model_class is M2BertForMaskedLM
    assert len(report.found.mapped) + len(report.found.derived) == len(weights)
    assert not report.found.unknown and not report.missing
    # One of the golden batches is shorter than the model's length, and was not padded.
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "m2", pad_inputs=False).eval()
    inputs = with_prefix(tensors, "in/")
    batch = {k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        logits = model(**batch).logits
    assert relative_error(logits, tensors["out/mlm_logits"]) < 1e-5

    export_checkpoint(tmp_path / "m2", tmp_path / "back.pt")
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    assert_same(content["state"]["model"], {f"model.{k}": v for k, v in weights.items()})
    again = import_checkpoint(tmp_path / "back.pt", tmp_path / "again")
    assert again.found.config.to_dict() == report.found.config.to_dict()
    assert not again.found.assumed
    assert_same(
        load_file(tmp_path / "again" / "model.safetensors"),
        load_file(tmp_path / "m2" / "model.safetensors"),
    )


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_hub_layout_of_the_retrieval_models(kind, tmp_path):
    """Encoder and pooler under the reference's names, no head, no tied duplicates."""
    model = M2BertForTextEmbedding(small(classifier_pooling="mean", pad_inputs=True)).eval()
    weights = {k: v.contiguous() for k, v in to_reference(model.state_dict()).items()}
    folder = tmp_path / "hub"
    folder.mkdir()
    fields = {"model_type": "bert", "pool_all": True, "hidden_size": 16, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": ["BertModel"]}))
    if kind == "bin":
        torch.save({f"module.{k}": v for k, v in weights.items()}, folder / "pytorch_model.bin")
    else:
        weights = {k: v for k, v in weights.items() if ".freq" not in k or "filter.1." in k}
        save_file(weights, folder / "model.safetensors")
    report = import_checkpoint(folder, tmp_path / "m2")
    assert report.found.model_class is M2BertForTextEmbedding
    assert report.found.config.classifier_pooling == "mean"
    loaded = AutoModelForTextEncoding.from_pretrained(tmp_path / "m2").eval()
    batch = {"input_ids": ids(), "attention_mask": torch.ones(2, 20).tril(17)}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).pooler_output, model(**batch).pooler_output)
        hidden = AutoModel.from_pretrained(tmp_path / "m2").eval()(**batch).last_hidden_state
        assert torch.equal(hidden, model(**batch).last_hidden_state)


@pytest.mark.parametrize("safe", [True, False])
def test_weights_in_several_files(safe, tmp_path):
    model = M2BertForMaskedLM(small())
    folder = tmp_path / "shards"
    model.save_pretrained(folder, max_shard_size="8KB", safe_serialization=safe)
    shards = sorted(folder.glob("*-of-*"))
    assert len(shards) > 2
    main(["import", str(folder), "--out", str(tmp_path / "whole")])
    main(["extend", str(folder), "--out", str(tmp_path / "long"), "--max-seq-len", "128"])
    assert_same(
        AutoModelForMaskedLM.from_pretrained(tmp_path / "whole").state_dict(), model.state_dict()
    )
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "long").config.max_sequence_length == 128
    assert not list((tmp_path / "long").glob("*-of-*"))
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"there is no file .*{shards[1].name}"):
        import_checkpoint(folder, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_composer_checkpoint_of_ours_with_a_tokenizer(tmp_path, capsys):
    model = M2BertForSequenceClassification(small(vocab_size=30522, num_labels=3)).to(
        torch.bfloat16
    )
    source = composer_file(tmp_path / "latest-rank0.pt", model.state_dict())
    out = str(tmp_path / "m2")
    assert main(["import", source, "--out", out, "--tokenizer", str(TOKENIZER), "--verbose"]) == 0
    text = capsys.readouterr().out
    assert "0 derived, 0 unused, 0 missing" in text and "classifier.weight" in text
    assert "hyena_w_mod 1.0" in text
    loaded = M2BertForSequenceClassification.from_pretrained(out, torch_dtype="auto")
    assert_same(loaded.state_dict(), model.state_dict())
    assert AutoTokenizer.from_pretrained(out).model_max_length == 24
    assert main(["export", out, "--out", str(tmp_path / "back.pt")]) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)["state"]["model"]
    assert_same(back, {f"model.{k}": v for k, v in to_reference(model.state_dict()).items()})
    assert main(["import", source, "--out", out]) == 1
    assert "exists already" in capsys.readouterr().err


def refused(source, tmp_path, capsys, *more) -> str:
    """The message; nothing may be left where the folder would be."""
    (tmp_path / "out").mkdir(exist_ok=True)
    assert main(["import", str(source), "--out", str(tmp_path / "out" / "m2"), *more]) == 1
    assert not list((tmp_path / "out").iterdir())
    return capsys.readouterr().err


class Exploit:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_is_refused(tmp_path, capsys):
    target = str(tmp_path / "exploited")
    _, tensors = load_golden(BASE)
    weights = with_prefix(tensors, "sd/")
    for function, args, name in (
        (os.mkdir, (target,), ".mkdir"),
        (subprocess.check_call, (["mkdir", target],), ".check_call"),
        (eval, (f"__import__('os').mkdir({target!r})",), ".eval"),
    ):
        for key in ("rng", "state"):
            content = {"state": {"model": weights}, key: Exploit(function, *args)}
            torch.save(content, tmp_path / "evil.pt")
            message = refused(tmp_path / "evil.pt", tmp_path, capsys)
            assert "evil.pt" in message and "would call " in message and name in message
    assert not os.path.exists(target)


@pytest.mark.parametrize("kind", ["pt", "safetensors", "older.bin"])
def test_a_truncated_file_is_refused(kind, tmp_path, capsys):
    _, tensors = load_golden(BASE)
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file({k: v.clone() for k, v in with_prefix(tensors, "sd/").items()}, path)
    else:
        new = kind == "pt"
        torch.save(with_prefix(tensors, "sd/"), path, _use_new_zipfile_serialization=new)
    path.write_bytes(path.read_bytes()[:-1000])
    message = refused(path, tmp_path, capsys)
    assert str(path) in message and "cannot be read as a checkpoint" in message


def test_a_damaged_file_is_refused(tmp_path, capsys):
    """One whose pickle is whole would be read, with other numbers in it."""
    source, _, weights, _ = golden_file(tmp_path)
    content = bytearray((tmp_path / "latest-rank0.pt").read_bytes())
    number = weights["bert.encoder.layer.1.mlp.wo.weight"].numpy().tobytes()
    place = content.index(number)
    content[place : place + 64] = bytes(64)
    (tmp_path / "latest-rank0.pt").write_bytes(content)
    message = refused(source, tmp_path, capsys)
    assert re.search("cannot be read as a checkpoint: .*/data/.* in it is damaged", message)


@pytest.mark.parametrize("content", [b"hello", b"", pickle.dumps({"a": 1}, protocol=4)])
def test_what_is_no_checkpoint_is_refused(content, tmp_path, capsys):
    (tmp_path / "text.pt").write_bytes(content)
    message = refused(tmp_path / "text.pt", tmp_path, capsys)
    assert message.endswith("cannot be read as a checkpoint: torch.save did not write it\n")
    for saved, found in (({}, "[]"), ({"epoch": 1}, "['epoch']"), (torch.ones(2), "Tensor")):
        torch.save(saved, tmp_path / "text.pt")
        message = refused(tmp_path / "text.pt", tmp_path, capsys)
        assert f"text.pt' must hold the state dict of a model, but holds {found}" in message


def test_a_tokenizer_in_a_checkpoint_comes_along_as_data(tmp_path, capsys):
    """As older versions of Composer name its files as well; none is written elsewhere."""
    _, config, weights, _ = golden_file(tmp_path)
    words = (TOKENIZER / "vocab.txt").read_text().split("\n")[:104]
    fields = {"tokenizer_class": "BertTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}}
    files = {
        "vocab": {"file_extension": ".txt", "content": words},
        "../x.json": {"file_extension": ".json", "content": {}},
        "x.py": {"file_extension": ".py", "content": "raise SystemExit"},
    }
    path, out = tmp_path / "with.pt", tmp_path / "m2"
    for saved, code in (({"tokenizer_class": "NoSuchTokenizer"}, 1), (fields, 0)):
        files["tokenizer_config.json"] = {"file_extension": ".json", "content": saved}
        state = {"model": weights, "integrations": {"huggingface": {"tokenizer": files}}}
        torch.save({"state": state}, path)
        assert main(["import", str(path), "--out", str(out), "--config", str(config)]) == code
    assert f"the tokenizer '{path}' cannot be loaded: " in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("[MASK]") == 103
    assert not list(tmp_path.rglob("x.*"))


def test_every_missing_tensor_is_named(tmp_path, capsys):
    source, config, weights, _ = golden_file(tmp_path)
    report = import_checkpoint(source, tmp_path / "m2", config=config)
    own = load_file(tmp_path / "m2" / "model.safetensors")
    three = M2BertForSequenceClassification(small(num_labels=3)).state_dict()
    ours = [name for name in own if "layers.1." not in name]
    for tensors, names in (
        (weights, report.found.mapped),
        (own, ours),
        (three, ["classifier.weight", "classifier.bias"]),
    ):
        for name in names:
            part = {k: v for k, v in tensors.items() if k != name}
            message = refused(composer_file(tmp_path / "part.pt", part), tmp_path, capsys)
            last = name.partition(".")[2]
            assert name in message or f"there is no {last}" in message, name


def test_what_may_be_missing_or_unused_is_named(tmp_path, capsys):
    source, config, weights, _ = golden_file(tmp_path)
    part = {k: v for k, v in weights.items() if "transform.dense" not in k}
    part["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    path = composer_file(tmp_path / "part.pt", part)
    message = refused(path, tmp_path, capsys)
    assert "--allow-missing 'cls.predictions.transform.dense.weight'" in message
    options = ["--allow-missing", "cls.predictions.transform.dense.*"]
    assert "--allow-unused 'bert.pooler.dense.weight'" in refused(path, tmp_path, capsys, *options)
    options += ["--allow-unused", "bert.pooler.*"]
    assert main(["import", path, "--out", str(tmp_path / "m2"), *options]) == 0
    text = capsys.readouterr().out
    assert "bert.pooler.dense.weight: unused" in text
    assert "cls.predictions.transform.dense.bias: missing" in text
    _, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "m2", output_loading_info=True)
    assert set(info["missing_keys"]) == {"head.dense.weight", "head.dense.bias"}


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.1.attention.in_linear.weight",
        "bert.encoder.layer.1.attention.filter_fn2.implicit_filter.2.bias",
        "bert.encoder.layer.0.mlp.wo.bias",
        "bert.embeddings.LayerNorm.weight",
        "cls.predictions.decoder.bias",
    ],
)
def test_a_wrong_shape_is_named(name, tmp_path, capsys):
    _, _, weights, _ = golden_file(tmp_path)
    weights[name] = weights[name][:-1].clone()
    path = composer_file(tmp_path / "wrong.pt", weights)
    message = refused(path, tmp_path, capsys)
    assert f"{name} has the shape {tuple(weights[name].shape)}, but" in message


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.encoder.layer.0.attention.short_filter.weight",
        "bert.encoder.layer.0.attention.filter_fn.pos_emb.z",
        "bert.encoder.layer.1.attention.filter_fn.implicit_filter.1.freq",
        "bert.encoder.layer.0.mlp.gated_layers.weight",
        "bert.encoder.layer.0.mlp.wo.weight",
    ],
)
def test_a_wrong_number_of_dimensions_is_named(name, tmp_path, capsys):
    """In the reference's names and in ours, flattened and without any."""
    source, config, weights, _ = golden_file(tmp_path)
    import_checkpoint(source, tmp_path / "m2", config=config)
    own = load_file(tmp_path / "m2" / "model.safetensors")
    for names, wrong in ((weights, name), (own, translate({name: weights[name]}).mapped[name])):
        one_dimension = names[wrong].ndim == 1
        for tensor in (
            names[wrong][None] if one_dimension else names[wrong].flatten(),
            torch.ones(()),
        ):
            path = composer_file(tmp_path / "wrong.pt", names | {wrong: tensor})
            message = refused(path, tmp_path, capsys)
            shape = tuple(tensor.shape)
            assert f"{wrong} has the shape {shape}, but in an M2-BERT it has" in message


def test_a_lone_number_of_blocks_is_not_taken_for_right(tmp_path, capsys):
    _, _, weights, _ = golden_file(tmp_path)
    name = "bert.encoder.layer.0.mlp.wo.weight"
    weights[name] = weights[name][:-1].clone()
    message = refused(composer_file(tmp_path / "wrong.pt", weights), tmp_path, capsys)
    assert f"{name} has the shape (3, 8, 32), but the other tensors make a model" in message
    assert "where it has (4, 8, 32)" in message


def test_a_buffer_that_differs_is_named(tmp_path, capsys):
    _, _, weights, _ = golden_file(tmp_path)
    name = "bert.encoder.layer.1.attention.filter_fn.modulation.deltas"
    weights[name] = weights[name] * 1.01
    path = composer_file(tmp_path / "other.pt", weights)
    assert f"{name} has other values than those that" in refused(path, tmp_path, capsys)
    _, _, weights, _ = golden_file(tmp_path)
    weights["bert.embeddings.position_ids"] = weights["bert.embeddings.position_ids"][:, :-1]
    path = composer_file(tmp_path / "other.pt", weights)
    message = refused(path, tmp_path, capsys)
    assert "position_ids has the shape (1, 31), but the other tensors make a model" in message
    assert "where it has (1, 32)" in message
    _, _, weights, _ = golden_file(tmp_path)
    for buffer, value in (
        ("bert.embeddings.token_type_ids", torch.ones(1, 32, dtype=torch.long)),
        (name.replace("layer.1", "layer.7"), weights[name]),
    ):
        path = composer_file(tmp_path / "other.pt", weights | {buffer: value})
        assert buffer in refused(path, tmp_path, capsys)


def test_a_buffer_that_an_export_will_not_give_back_is_reported(tmp_path, capsys):
    _, config, weights, _ = golden_file(tmp_path)
    name = "bert.encoder.layer.1.attention.filter_fn.modulation.deltas"
    other = torch.nextafter(weights[name], torch.tensor(0.0))
    path = composer_file(tmp_path / "other.pt", weights | {name: other})
    assert main(["import", path, "--out", str(tmp_path / "m2"), "--config", str(config)]) == 0
    assert "1 derived differ in their last bits from the values that M2-BERT computes and " in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("names", ["reference", "own"])
def test_missing_positions_are_no_other_model(names, tmp_path, capsys):
    """Without them the rest is a whole model that has none: only a config can tell."""
    if names == "own":
        weights = M2BertForMaskedLM(small()).state_dict()
    else:
        _, _, weights, _ = golden_file(tmp_path)
        del weights["bert.embeddings.position_ids"]
    del weights[next(name for name in weights if "position_embeddings" in name)]
    path, config = composer_file(tmp_path / "part.pt", weights), tmp_path / "config.json"
    options = [[], ["--allow-missing", "*"]]
    config.write_text('{"use_positional_encodings": true}')
    for more in [*options, [*options[1], "--config", str(config)]]:
        message = refused(path, tmp_path, capsys, *more)
        assert "there is no embeddings.position_embeddings.weight" in message
        assert "use_positional_encodings: false" in message
    config.write_text('{"use_positional_encodings": false}')
    out = tmp_path / "m2"
    assert main(["import", path, "--out", str(out), "--config", str(config)]) == 0
    assert M2BertConfig.from_pretrained(out).use_positional_encodings is False


def test_another_architecture_or_config_is_refused(tmp_path, capsys):
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        ModernBertConfig,
        ModernBertForMaskedLM,
    )

    fields = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    ids = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    modern = ModernBertForMaskedLM(ModernBertConfig(intermediate_size=32, **fields, **ids))
    for model, name in ((gpt2, "transformer.wte.weight"), (modern, "tok_embeddings.weight")):
        path = composer_file(tmp_path / "other.pt", model.state_dict())
        message = refused(path, tmp_path, capsys)
        assert "is no M2-BERT: it has weights with other names, " in message and name in message
    bert = BertForMaskedLM(BertConfig(intermediate_size=32, **fields))
    message = refused(composer_file(tmp_path / "bert.pt", bert.state_dict()), tmp_path, capsys)
    assert "is no M2-BERT" in message and "attention.self.query.weight" in message
    bert.save_pretrained(tmp_path / "bert")
    assert "is no M2-BERT" in refused(tmp_path / "bert", tmp_path, capsys)

    source, config, weights, _ = golden_file(tmp_path)
    config.write_text(json.dumps({"hidden_size": 48}))
    message = refused(source, tmp_path, capsys, "--config", str(config))
    assert f"hidden_size is 48 in {config}, but the weights show 32" in message
    assert "there is no file" in refused(tmp_path / "no.pt", tmp_path, capsys)
    (tmp_path / "empty").mkdir()
    assert "has none of model.safetensors" in refused(tmp_path / "empty", tmp_path, capsys)
    for tokenizer in (tmp_path / "empty", tmp_path / "no/where/at/all"):
        message = refused(source, tmp_path, capsys, "--tokenizer", str(tokenizer))
        assert f"the tokenizer '{tokenizer}' cannot be loaded: " in message
        assert message.count("\n") == 1

    masked = M2BertForMaskedLM(M2BertConfig(**small().to_dict() | {"mask_padding": True}))
    masked.save_pretrained(tmp_path / "masked")
    assert main(["export", str(tmp_path / "masked"), "--out", str(tmp_path / "m.pt")]) == 1
    assert "mask_padding" in capsys.readouterr().err
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.parametrize("damage", ["missing", "shape", "truncated"])
@pytest.mark.parametrize("command", ["onnx", "hub", "out", "extend"])
def test_a_folder_that_is_not_whole_goes_no_further(command, damage, tmp_path, capsys):
    """transformers would load it, with random values for what is not there."""
    folder, out = tmp_path / "folder", tmp_path / "made"
    M2BertForMaskedLM(small()).save_pretrained(folder)
    path = folder / "model.safetensors"
    weights, name = load_file(path), "model.layers.0.mlp.up_proj.weight"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
        message = f"'{path}' cannot be read as a checkpoint"
    elif damage == "shape":
        weights[name] = weights[name][:-1].clone()
        message = f"'{folder}': {name} has the shape (3, 16, 4), but the other tensors make"
    else:
        del weights[name], weights["head.dense.weight"]
        message = f"'{folder}' is not complete: its weights lack {name}, head.dense.weight"
    if damage != "truncated":
        save_file(weights, path, metadata={"format": "pt"})
    arguments = ["export", str(folder), f"--{command}", str(out)]
    if command == "extend":
        arguments = ["extend", str(folder), "--max-seq-len", "48", "--out", str(out)]
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pad_vocab_size_multiple", 0, "pad_vocab_size_multiple must be a positive integer, not 0"),
        ("hyena_w_mod", "a", "hyena_w_mod must be a number, not 'a'"),
        ("pool_all", "yes", "pool_all must be true or false, not 'yes'"),
        ("attention_pooling", True, "attention_pooling is True, but only False is supported"),
        ("sequence_token_planting", True, "sequence_token_planting is True, but only False is"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(field, value, message, tmp_path, capsys):
    source, config, _, _ = golden_file(tmp_path)
    config.write_text(json.dumps({field: value}))
    found = refused(source, tmp_path, capsys, "--config", str(config))
    assert message in found and str(config) in found


def test_keys_that_are_no_fields_are_named(tmp_path, capsys):
    source, config, _, _ = golden_file(tmp_path)
    fields = {"hyena_wmod": 2, "use_cls_token": True, "hidden_act": "gelu", "architectures": ["X"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    assert main(["import", source, "--out", str(tmp_path / "m2"), "--config", str(config)]) == 0
    said = capsys.readouterr().out
    assert "ignored keys of the config, which no M2-BERT has: hyena_wmod\n" in said
    assert "the source has no tokenizer: give one with --tokenizer\n" in said


MEASURE = """
import resource, sys, time
from m2_plugin.checkpoints.convert import import_checkpoint

before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
import_checkpoint(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start)
"""


def test_time_and_memory_of_the_published_80m(tmp_path):
    """At most twice the file on top of the libraries, whose peak the kernel counts in KiB."""
    weights = to_reference(M2BertForMaskedLM(M2BertConfig()).state_dict())
    source = composer_file(tmp_path / "80M.pt", weights)
    command = [sys.executable, "-c", MEASURE, source, str(tmp_path / "m2")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    memory, seconds = map(float, run.stdout.split())
    assert memory * 1024 < 2 * os.path.getsize(source)
    assert seconds < 60


def test_a_tokenizer_of_one_file_is_saved_beside(tmp_path):
    """As the library tokenizers saves one: tokenizer.json, without a tokenizer_config.json."""
    source, config, _, _ = golden_file(tmp_path)
    words = Tokenizer(WordLevel({"[UNK]": 0, "he": 1}, unk_token="[UNK]"))
    (tmp_path / "only").mkdir()
    words.save(str(tmp_path / "only" / "tokenizer.json"))
    import_checkpoint(source, tmp_path / "m2", config=config, tokenizer=str(tmp_path / "only"))
    assert AutoTokenizer.from_pretrained(tmp_path / "m2")("he")["input_ids"] == [1]


def test_another_vocabulary_than_the_sources_is_refused(tmp_path):
    """And what has the same ids, and some more, is not."""
    source, config, _, _ = golden_file(tmp_path)
    known = {"[UNK]": 0, "he": 1}
    found = {"own": known, "other": {"[UNK]": 1, "he": 0}, "more": known | {"she": 2}}
    for name, vocabulary in found.items():
        (tmp_path / name).mkdir()
        words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
        words.save(str(tmp_path / name / "tokenizer.json"))
    import_checkpoint(source, tmp_path / "m2", config=config, tokenizer=str(tmp_path / "own"))
    with pytest.raises(ValueError, match="another vocabulary than the one in .*m2'"):
        import_checkpoint(tmp_path / "m2", tmp_path / "no", tokenizer=str(tmp_path / "other"))
    assert not (tmp_path / "no").exists()
    import_checkpoint(tmp_path / "m2", tmp_path / "yes", tokenizer=str(tmp_path / "more"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "yes")) == 3
