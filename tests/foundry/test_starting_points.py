"""What a fine-tune starts from: Composer's checkpoints, the M2 reference's, folders; and errors."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from composer import Trainer
from llmfoundry.utils.builders import build_composer_model, build_dataloader
from safetensors.torch import save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoTokenizer,
)

from m2_plugin.checkpoints.convert import import_checkpoint
from m2_plugin.checkpoints.names import from_reference, to_reference
from m2_plugin.cli import main
from m2_plugin.foundry.starting_points import build_from_keys
from m2_plugin.models import M2BertForTextEmbedding
from tests.foundry.test_models import TINY, build, mlm_batch
from tests.models.test_golden import NAMES
from tests.models.test_modeling_m2_bert import small
from tests.utils import TOKENIZER, load_golden, max_error, relative_error, with_prefix

GLUE = Path(__file__).parent / "data" / "glue"
families = pytest.mark.parametrize("family", list(TINY))


def trainer(model, tmp_path=None, train=None, evaluate=None, **kwargs):
    return Trainer(
        model=model,
        train_dataloader=train,
        eval_dataloader=evaluate,
        optimizers=torch.optim.AdamW(model.parameters(), lr=2e-3),
        max_duration=kwargs.pop("max_duration", "1ep"),
        device="cpu",
        precision="fp32",
        progress_bar=False,
        seed=0,
        **kwargs,
    )


def save(model, folder) -> str:
    """A Composer checkpoint with all that the trainer puts in."""
    path = str(folder / "checkpoint.pt")
    run = trainer(model)
    run.save_checkpoint(path)
    run.close()
    return path


def assert_same(names, one, other):
    assert names
    for name in names:
        assert torch.equal(one.get_parameter(name), other.get_parameter(name)), name


def backbone(model):
    prefix = f"{model.base_model_prefix}."
    return [n for n, _ in model.named_parameters() if n.startswith(prefix) and "pooler" not in n]


@families
def test_composer_checkpoint(family, tmp_path, tokenizer, caplog):
    """Into the same model all of it; into a classifier the encoder, with the config it had."""
    mlm = build(family, "mlm", overrides={"hidden_dropout_prob": 0.25})
    path = save(mlm, tmp_path)
    again = build(family, "mlm", tokenizer, pretrained_model_name_or_path=path)
    assert_same([n for n, _ in mlm.model.named_parameters()], mlm.model, again.model)
    assert again.config.hidden_dropout_prob == 0.25
    assert "Newly initialised" not in caplog.text
    with torch.no_grad():
        batch = mlm_batch()
        assert torch.equal(mlm.eval()(batch)["logits"], again.eval()(batch)["logits"])

    kwargs = {"pretrained_model_name_or_path": path, "num_labels": 3}
    three = build(family, "classification", tokenizer, {"hidden_dropout_prob": 0.0}, **kwargs)
    assert_same(backbone(three.model), mlm.model, three.model)
    assert three.config.hidden_dropout_prob == 0.0
    assert three.model.classifier.out_features == 3
    assert "classifier.weight" in caplog.text


def test_import_of_a_trainers_checkpoint(tmp_path, tokenizer, capsys):
    """The folder computes what the trained model does, and has its tokenizer."""
    mlm = build("m2_bert", "mlm", tokenizer, {"mask_padding": True, "layer_norm_eps": 1e-6})
    folder = tmp_path / "m2"
    assert main(["import", save(mlm, tmp_path), "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "0 unused, 0 missing" in said and "by default" not in said and "no tokenizer" not in said
    loaded, ids = AutoModelForMaskedLM.from_pretrained(folder).eval(), mlm_batch()["input_ids"]
    assert_same([name for name, _ in loaded.named_parameters()], loaded, mlm.model)
    with torch.no_grad():
        assert max_error(loaded(ids).logits, mlm.model.eval()(ids).logits) < 1e-5
    found = AutoTokenizer.from_pretrained(folder)
    assert found.get_vocab() == tokenizer.get_vocab()
    assert found("Some words")["input_ids"] == tokenizer("Some words")["input_ids"]


@families
@pytest.mark.parametrize("kind", ["composer", "folder", "safetensors"])
def test_mnli_fine_tune(family, kind, tmp_path):
    """RTE, MRPC and STS-B start from it: encoder and pooler kept, classifier dropped."""
    mnli = build(family, "classification", num_labels=3)
    if kind == "composer":
        path = save(mnli, tmp_path)
    elif kind == "folder":
        mnli.model.save_pretrained(tmp_path)
        path = str(tmp_path)
    else:  # bare weights: the config comes from M2-BERT's shapes; a BERT's cannot
        path = str(tmp_path / "model.safetensors")
        save_file(mnli.model.state_dict(), path)
        if family == "bert":
            with pytest.raises(ValueError, match="holds no config"):
                build(family, "classification", pretrained_model_name_or_path=path)
            return
    stsb = build(family, "classification", num_labels=1, pretrained_model_name_or_path=path)
    pooler = [n for n, _ in stsb.model.named_parameters() if "pooler" in n]
    assert len(pooler) == 2
    assert_same([*backbone(stsb.model), *pooler], mnli.model, stsb.model)
    assert stsb.model.classifier.weight.shape == (1, 32)
    same = build(family, "classification", num_labels=3, pretrained_model_name_or_path=path)
    assert torch.equal(same.model.classifier.weight, mnli.model.classifier.weight)


STATED = {
    "all": lambda reference: reference,
    "shapes_only": lambda reference: None,
    "others": lambda reference: (
        reference | {"hyena_w_mod": 1.5, "pool_all": True, "layer_norm_eps": 1e-3}
    ),
}


def reference_file(path, name, stated) -> tuple[dict, dict]:
    """A golden model as a Composer checkpoint, or bare; its tensors, and what config is with it."""
    meta, tensors = load_golden(name)
    weights, config = with_prefix(tensors, "sd/"), STATED[stated](meta["config"])
    if config is None:
        torch.save(weights, path)
    else:
        content = {"_target": "transformers.BertConfig", "model_type": "bert"} | config
        state = {f"model.{key}": value for key, value in weights.items()}
        huggingface = {"model": {"config": {"content": content}}}
        state = {"model": state, "integrations": {"huggingface": huggingface}}
        torch.save({"state": state}, path)
    return tensors, meta["config"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stated", list(STATED))
def test_a_file_is_one_model_by_every_route(name, stated, tmp_path):
    """Imported, or trained from: equal configs and logits, the reference's if its config is there.

    What neither shapes nor a saved config tell, `--config` and `config_overrides` do.
    """
    path = tmp_path / "latest-rank0.pt"
    tensors, reference = reference_file(path, name, stated)
    told = {}
    if stated == "shapes_only":
        keys = ("hyena_w_mod", "use_positional_encodings", "intermediate_size", "layer_norm_eps")
        told = {key: reference[key] for key in (*keys, "num_attention_heads") if key in reference}
        (tmp_path / "told.json").write_text(json.dumps(told))
    import_checkpoint(path, tmp_path / "m2", config=tmp_path / "told.json" if told else None)
    cfg = {"pretrained_model_name_or_path": str(path), "config_overrides": told}
    model = build_composer_model("m2_bert_mlm", cfg, None).model.eval()
    imported = AutoModelForMaskedLM.from_pretrained(tmp_path / "m2").eval()
    written = ("architectures", "torch_dtype", "_name_or_path", "_attn_implementation_autoset")
    one, other = ({k: v for k, v in m.config.to_dict().items() if k not in written}
                  for m in (model, imported))  # fmt: skip
    assert one == other
    if stated == "others":
        assert (one["hyena_w_mod"], one["layer_norm_eps"]) == (1.5, 1e-3)
        assert one["classifier_pooling"] == "mean"
    inputs = with_prefix(tensors, "in/")
    batch = {k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.equal(logits, imported(**batch).logits)
        model.config.pad_inputs = False  # one golden batch is shorter than the model's length
        logits = model(**batch).logits
    if stated != "others":
        assert relative_error(logits, tensors["out/mlm_logits"]) < 1e-5


def compiled(name):
    """A name in a model of which a module was compiled."""
    return name.replace(".layer", "._orig_mod.layer", 1)


@pytest.mark.parametrize("names", ["reference", "own"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
        lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
        lambda w: {"model_state_dict": {compiled(k): v for k, v in w.items()}, "epoch": 3},
        lambda w: {"state_dict": {f"model.module.{k}": v for k, v in w.items()}, "epoch": 3},
        lambda w: {"model": w, "optimizer": {"state": {}, "param_groups": [{"lr": 1.0}]}},
    ],
    ids=["compiled", "parallel", "loop", "lightning", "optimizer"],
)
def test_a_wrapped_model_is_read_by_every_route(wrap, names, tmp_path):
    model = build("m2_bert", "mlm").model
    weights = model.state_dict() if names == "own" else to_reference(model.state_dict())
    torch.save(wrap(weights), tmp_path / "loop.pt")
    import_checkpoint(tmp_path / "loop.pt", tmp_path / "m2")
    imported = AutoModelForMaskedLM.from_pretrained(tmp_path / "m2")
    path = str(tmp_path / "loop.pt")
    started = build("m2_bert", "mlm", pretrained_model_name_or_path=path).model
    for found in (imported, started):
        assert_same([name for name, _ in model.named_parameters()], found, model)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_released_model_as_a_starting_point(kind, tmp_path, caplog):
    """A file or a folder with the reference's names, as import reads it; its code is not run."""
    meta, tensors = load_golden("base_bidir_resid_glu_monarch")
    weights = {n: t for n, t in with_prefix(tensors, "sd/").items() if n.startswith("bert.")}
    weights |= with_prefix(tensors, "sdc/nl3/")
    weights["bert.encoder.flashfftconv.twiddle"] = torch.zeros(2, dtype=torch.complex64)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {f"module.{n}": t for n, t in weights.items()}}, path)
    if kind == "folder":
        path = path.rename(tmp_path / "pytorch_model.bin").parent
        config = meta["config"] | {"model_type": "m2_bert", "gather_sentence_embeddings": True}
        config["auto_map"] = {"AutoConfig": "other.Config", "AutoModel": "other.Model"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "other.py").write_text("raise SystemExit('code of a folder was run')")
    import_checkpoint(path, tmp_path / "m2")
    imported = AutoModelForMaskedLM.from_pretrained(tmp_path / "m2")
    model = build("m2_bert", "mlm", pretrained_model_name_or_path=str(path)).model
    assert "the model pads every text to 32 tokens itself" in caplog.text
    assert_same(backbone(model), model, imported)
    assert model.config.padded_length == 32
    masked = {"mask_padding": True}
    overridden = build("m2_bert", "mlm", None, masked, pretrained_model_name_or_path=str(path))
    assert overridden.model.config.padded_length is None


def test_code_of_a_folder_is_neither_run_nor_offered(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = {"model_type": "another", "auto_map": {"AutoConfig": "other.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "other.py").write_text("raise SystemExit('code of a folder was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        build("m2_bert", "mlm", pretrained_model_name_or_path=str(tmp_path))


def without(weights, part):
    return {name: tensor for name, tensor in weights.items() if part not in name}


@pytest.mark.parametrize("names", ["reference", "own"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "position_embeddings"), "there is no embeddings.position_embedd"),
        (lambda w: without(w, "word_embeddings"), "there is no embeddings.word_embeddings"),
        (lambda w: w | {next(n for n in w if n.endswith("pos_emb.t")): torch.zeros(1, 32, 1)},
         "pos_emb.t has other values than those that M2-BERT computes"),
        (lambda w: w | {next(n for n in w if "in_" in n): torch.zeros(3, 3)}, r"shape \(3, 3\),"),
    ],
    ids=["positions", "words", "buffer", "shape"],
)  # fmt: skip
def test_a_file_is_refused_alike_by_every_route(names, change, message, tmp_path):
    path = str(tmp_path / "broken.pt")
    weights = with_prefix(load_golden("base_bidir_resid_glu_monarch")[1], "sd/")
    if names == "own":
        weights = from_reference(weights)
        if message.startswith("pos_emb.t"):
            return  # ours has no such buffer
    torch.save(change(weights), path)
    said = []
    for read in (
        lambda: import_checkpoint(path, tmp_path / "m2"),
        lambda: build("m2_bert", "mlm", pretrained_model_name_or_path=path),
    ):
        with pytest.raises(ValueError, match=message) as error:
            read()
        said.append(str(error.value))
    assert said[0] == said[1]
    if "position_embeddings" in message:
        told = {"use_positional_encodings": False}
        model = build("m2_bert", "mlm", overrides=told, pretrained_model_name_or_path=path)
        assert model.config.use_positional_encodings is False


@families
def test_load_path(family, tmp_path, caplog):
    """llm-foundry's own way: weights only, a head for other classes."""
    mnli = build(family, "classification", num_labels=3)
    path = save(mnli, tmp_path)
    two = build(family, "classification", num_labels=2)
    fresh = copy.deepcopy(two.model.classifier.weight)
    keys = {"load_path": path, "load_weights_only": True, "load_strict_model_weights": False}
    trainer(two, **keys).close()
    pooler = [n for n, _ in two.model.named_parameters() if "pooler" in n]
    assert_same([*backbone(two.model), *pooler], mnli.model, two.model)
    assert torch.equal(two.model.classifier.weight, fresh)
    assert "Newly initialised (not in load_path): classifier.bias, classifier.weight" in caplog.text

    wide = build(family, "classification", overrides={"hidden_size": 64})
    message = r"\(30528, 32\) in the checkpoint and \(30528, 64\) in the model\. .*hidden_size"
    with pytest.raises(ValueError, match=message):
        trainer(wide, **keys)
    other = "bert" if family == "m2_bert" else "m2_bert"
    with pytest.raises(ValueError, match="'load_path' lacks weights of the encoder"):
        trainer(build(other, "classification"), **keys)
    # An encoder that was pretrained without a pooler starts as well.
    (tmp_path / "mlm").mkdir()
    mlm = build(family, "mlm")
    keys["load_path"] = save(mlm, tmp_path / "mlm")
    trainer(two, **keys).close()
    assert_same(backbone(two.model), mlm.model, two.model)


@families
@pytest.mark.parametrize("kind", ["composer", "folder"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 64}, r"word_embeddings.weight has the shape \(30528, 32\) in the "
                              r"checkpoint and \(30528, 64\) in the model. .* hidden_size of 32: "
                              r"change or remove hidden_size in config_over"),
        ({"vocab_size": 31000}, r" \(30528, 32\) .* and \(31000, 32\) in the .* vocab_size of"),
        ({"vocab_size": 512}, r"vocab_size 512 is smaller than the tokenizer's 30522 entries"),
        ({"max_position_embeddings": 16}, r"position_embeddings.* max_position_embeddings of 32"),
        ({"intermediate_size": 128}, r"change or remove intermediate_size in config_overrides"),
        ({"num_hidden_layers": 3}, r"lacks weights of the encoder: .* num_hidden_layers in con"),
        ({"num_hidden_layers": 1}, r"has weights of an encoder that the model lacks: .* num_hidd"),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict)
    else "",
)  # fmt: skip
def test_checkpoint_that_does_not_fit(family, kind, overrides, message, tokenizer, tmp_path):
    mlm = build(family, "mlm")
    if kind == "folder":
        mlm.model.save_pretrained(tmp_path)
        path = str(tmp_path)
    else:
        path = save(mlm, tmp_path)
    with pytest.raises(ValueError, match=message):
        build(family, "classification", tokenizer, overrides, pretrained_model_name_or_path=path)


def test_filters_that_do_not_fit(tmp_path):
    path = save(build("m2_bert", "mlm"), tmp_path)
    for field, value in {"long_conv_l_max": 64, "hyena_filter_order": 16}.items():
        with pytest.raises(ValueError, match=rf"another {field} of {TINY['m2_bert'][field]}"):
            build("m2_bert", "mlm", overrides={field: value}, pretrained_model_name_or_path=path)


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXPLOIT_FOLDER"],)


def test_bad_files(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("EXPLOIT_FOLDER", str(tmp_path / "exploited"))
    cases = {
        "tensor.pt": (torch.zeros(2), "hold the state dict of a model, but holds Tensor"),
        "other.pt": ({"epoch": 3}, r"hold the state dict of a model, but holds \['epoch'\]"),
        "names.pt": ({"w": torch.zeros(2)}, "holds no config, and its weights are not those of"),
        "exploit.pt": ({"x": Exploit()}, "cannot be read .* would call posix.mkdir"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            build("m2_bert", "mlm", pretrained_model_name_or_path=str(tmp_path / name))
    assert not (tmp_path / "exploited").exists()
    (tmp_path / "text.pt").write_text("no pickle")
    (tmp_path / "huggingface" / "final").mkdir(parents=True)
    for path, message in {
        "text.pt": "cannot be read as a checkpoint",
        "missing.pt": "there is no file",
        "": r"not a transformers folder: .* Did you mean '.*/huggingface/final'\?",
    }.items():
        with pytest.raises(ValueError, match=message):
            build("m2_bert", "mlm", pretrained_model_name_or_path=str(tmp_path / path))
    path = save(build("bert", "mlm"), tmp_path)
    with pytest.raises(ValueError, match=r"is no M2-BERT checkpoint .* use the models hf_bert_mlm"):
        build("m2_bert", "classification", pretrained_model_name_or_path=path)


def glue_loader(tokenizer, split, name="sst2", **dataset):
    dataset = {"task": name, "split": split, "path": str(GLUE), "max_seq_len": 32} | dataset
    return build_dataloader({"name": "glue", "dataset": dataset, "pin_memory": False}, tokenizer, 8)


@families
@pytest.mark.parametrize(("name", "metric"), [("sst2", "accuracy"), ("stsb", "spearman")])
def test_fine_tune_and_reload(family, name, metric, tokenizer, tmp_path):
    """A task is learned, and its folder gives the trainer's metric without the trainer."""
    torch.manual_seed(0)
    regression = name == "stsb"
    model = build(
        family, "classification", tokenizer, num_labels=1 if regression else 2, metrics=[metric]
    )
    dev = glue_loader(tokenizer, "validation", name)
    run = trainer(
        model, train=glue_loader(tokenizer, "train", name), evaluate=dev, max_duration="10ep",
        device_train_microbatch_size=3,
    )  # fmt: skip
    run.fit()
    (found,) = run.state.eval_metrics["eval"].values()
    found = found.compute().item()
    run.close()
    if not regression:
        assert found > 0.9  # its words tell
    model.model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    outputs, labels = [], []
    for batch in glue_loader(tokenizer, "validation", name).dataloader:
        keys = ("input_ids", "attention_mask", "token_type_ids")
        with torch.no_grad():
            outputs.append(again(**{k: batch[k] for k in keys}).logits)
        labels.append(batch["labels"])
    outputs, labels = torch.cat(outputs), torch.cat(labels)
    if regression:
        from scipy.stats import spearmanr

        expected = spearmanr(outputs[:, 0].numpy(), labels.numpy())[0]
    else:
        expected = (outputs.argmax(1) == labels).float().mean().item()
    assert found == pytest.approx(expected, abs=1e-6)
    # A test split has no labels: the model gives its logits all the same.
    batch = next(iter(glue_loader(tokenizer, "test", name).dataloader))
    assert model.eval_forward(batch).shape == ((6,) if regression else (6, 2))


def test_gradient_is_that_of_the_whole_batch(tokenizer):
    """Microbatches of unequal size weigh by their examples, on tokens or not."""
    results = []
    for size, on_tokens in ((8, False), (8, True), (3, False), (3, True)):
        torch.manual_seed(0)
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = build("bert", "classification", overrides=dropout)
        run = Trainer(
            model=model,
            train_dataloader=glue_loader(tokenizer, "train", padding="longest"),
            optimizers=torch.optim.SGD(model.parameters(), lr=1.0),
            max_duration="1ba",
            device="cpu",
            precision="fp32",
            device_train_microbatch_size=size,
            accumulate_train_batch_on_tokens=on_tokens,
            progress_bar=False,
            seed=0,
        )
        run.fit()
        run.close()
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for other in results[1:]:
        for name, whole in results[0].items():
            torch.testing.assert_close(whole, other[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("name", "num_labels", "message"),
    [
        ("mnli", 2, "The data have 3 classes, the model has num_labels 2: set model.num_labels to"),
        ("sst2", 3, "The data have 2 classes, the model has num_labels 3"),
        ("stsb", 2, "The data are a regression, the model has num_labels 2: .* to 1"),
        ("rte", 1, "The data have 2 classes, the model has num_labels 1"),
    ],
)
def test_data_and_model_disagree_on_the_classes(name, num_labels, message, tokenizer):
    model = build("bert", "classification", num_labels=num_labels)
    batch = next(iter(glue_loader(tokenizer, "train", name).dataloader))
    with pytest.raises(ValueError, match=message):
        model(batch)
    with pytest.raises(ValueError, match=message):
        model.eval_forward(batch)


def test_a_contrastive_model_starts_from_what_sentence_transformers_saved(tmp_path, caplog):
    """With the pooler and the pooling that lie beside the encoder."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = M2BertForTextEmbedding(small(vocab_size=30522, classifier_pooling="mean"))
    model.save_pretrained(tmp_path / "ours")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "ours")
    sentence_transformers.SentenceTransformer(str(tmp_path / "ours"), device="cpu").save(
        str(tmp_path / "theirs")
    )
    started = build_from_keys(
        AutoModelForTextEncoding,
        None,
        "m2_bert",
        tokenizer=None,
        path=str(tmp_path / "theirs"),
        pretrained=None,
        config_overrides=None,
        init_device="cpu",
    )
    assert "Newly initialised" not in caplog.text
    assert started.pooler.pooling == "mean"
    assert_same([name for name, _ in model.named_parameters()], started, model)
