"""Released checkpoints, as they are in the wild: the reference's own vectors on every route."""

import json
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    PreTrainedTokenizerFast,
    dynamic_module_utils,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from m2_plugin.checkpoints.config import resolve
from m2_plugin.checkpoints.convert import import_checkpoint
from m2_plugin.checkpoints.names import to_reference
from m2_plugin.cli import main
from m2_plugin.models import (
    M2BertForMaskedLM,
    M2BertForSequenceClassification,
    M2BertForTextEmbedding,
)
from tests.checkpoints.test_convert import BASE, composer_file, refused
from tests.models.test_golden import NAMES
from tests.models.test_modeling_m2_bert import ids, small
from tests.utils import load_golden, relative_error, with_prefix

# Those whose second text the reference itself padded to the full length.
PADDED = [name for name in NAMES if name not in ("h64_L128_nblocks2", "short_odd_L33_lmax64")]
FLASH_FFT = {
    "bert.encoder.flashfftconv.f_32_fft": torch.zeros(2, 2, dtype=torch.complex64),
    "bert.encoder.layer.0.attention.filter_fn.flashfftconv.twiddle": torch.zeros(3).half(),
}


def released(tmp_path, name=BASE, fields=(), prefix=""):
    """A folder laid out as the released retrieval models are, of a golden model; its tensors."""
    meta, tensors = load_golden(name)
    weights = with_prefix(tensors, "sd/")
    weights = {n: t for n, t in weights.items() if n.startswith("bert.")}
    weights |= with_prefix(tensors, "sdc/nl3/")
    folder = tmp_path / "released"
    folder.mkdir()
    config = meta["config"] | {"gather_sentence_embeddings": True} | dict(fields)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    torch.save({prefix + n: t for n, t in weights.items()}, folder / "pytorch_model.bin")
    words = {f"w{i}": i for i in range(128)}
    words = {"[PAD]": 0} | {word: i for word, i in words.items() if i}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    inputs = ["input_ids", "attention_mask", "token_type_ids"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", model_input_names=inputs
    ).save_pretrained(folder)
    return folder, weights, tensors


def texts_of(tensors):
    """The golden texts without their padding, all of token type 0, as words of the tokenizer."""
    rows = zip(tensors["in/input_ids"], tensors["in/attention_mask"], strict=True)
    return [" ".join(f"w{i}" for i in row[mask.bool()]) for row, mask in rows]


@pytest.mark.parametrize("name", PADDED)
def test_a_text_alone_has_the_outputs_of_the_reference_s_padding(name, tmp_path):
    """The golden batch has a text of 26 tokens that the reference saw with its padding."""
    meta, tensors = load_golden(name)
    config = tmp_path / "reference.json"
    config.write_text(json.dumps(meta["config"]))
    source = composer_file(tmp_path / "latest-rank0.pt", with_prefix(tensors, "sd/"))
    import_checkpoint(source, tmp_path / "m2", config=config)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "m2").eval()
    inputs = with_prefix(tensors, "in/")
    batch = {k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    length = int(batch["attention_mask"][1].sum())
    assert length < batch["input_ids"].shape[1] == meta["config"]["long_conv_l_max"]
    alone = {k: v[1:, :length] for k, v in batch.items()}
    positions = torch.arange(length)[None]
    embeds = model.model.embeddings.word_embeddings(alone["input_ids"])
    with torch.no_grad():
        found = [
            model(**alone, output_hidden_states=True),
            model(**alone | {"attention_mask": None}, position_ids=positions, return_dict=True),
            model(**alone | {"input_ids": None}, inputs_embeds=embeds),
        ]
    for output in found:
        expected = tensors["out/mlm_logits"][1:, :length]
        assert output.logits.shape == expected.shape
        assert relative_error(output.logits, expected) < 1e-5
    assert {states.shape[1] for states in found[0].hidden_states} == {length}
    with torch.no_grad():
        unpadded = AutoModelForMaskedLM.from_pretrained(tmp_path / "m2", pad_inputs=False).eval()
        error = relative_error(unpadded(**alone).logits, expected)
    sees = meta["config"]["monarch_mixer_sequence_mixing"] and meta["config"]["bidirectional"]
    assert error > 1e-2 if sees else error < 1e-5  # it is the padding that does it


@pytest.fixture
def own_remote_modules(tmp_path, monkeypatch):
    """Give a test a folder of its own for remote code, and forget the modules imported from it."""
    others = dynamic_module_utils.HF_MODULES_CACHE  # where other tests import from
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != others])

    def forget() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
        return {name: sys.modules.pop(name) for name in names}

    forgotten = forget()
    yield
    forget()
    sys.modules.update(forgotten)


@pytest.mark.usefixtures("own_remote_modules")
@pytest.mark.parametrize("pooling", ["first", "all"])
def test_every_route_gives_the_vectors_of_the_reference(pooling, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    source, _, tensors = released(tmp_path, fields={"pool_all": pooling == "all"})
    folder, hub, onnx = (tmp_path / name for name in ("m2", "hub", "model.onnx"))
    assert main(["import", str(source), "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "pad_inputs true: the model pads every text to 32 tokens itself" in said
    assert "2 dropped, left over from training (gather_sentence_embeddings: true): " in said
    for command in (["--hub", hub], ["--onnx", onnx]):
        assert main(["export", str(folder), *map(str, command)]) == 0
    texts = texts_of(tensors)
    # The golden batch has token types of 1, which a tokenizer gives none of; so by hand, from what
    # test_golden.py compares.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    full = tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt")
    plain = M2BertForTextEmbedding.from_pretrained(folder, pad_inputs=False).eval()
    assert not plain.config.pad_inputs
    with torch.no_grad():
        expected = plain(**full).sentence_embedding.numpy()
    found = {"sentences": SentenceTransformer(str(folder), device="cpu").encode(texts)}

    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(texts))
    assert main(["embed", str(file), "--model", str(folder), "--out", str(out)]) == 0
    found["embed"] = np.load(out)

    remote = get_class_from_dynamic_module("modeling_m2_bert.M2BertForTextEmbedding", str(hub))
    assert not remote.__module__.startswith("m2_plugin")
    together = tokenizer(texts, padding=True, return_tensors="pt")
    runtime = pytest.importorskip("onnxruntime").InferenceSession(str(onnx))
    for name, batches in (
        ("batched", [together]),
        ("alone", [tokenizer([text], return_tensors="pt") for text in texts]),
    ):
        for kind, model in (
            ("auto", AutoModelForTextEncoding.from_pretrained(folder)),
            ("hub", remote.from_pretrained(hub)),
        ):
            with torch.no_grad():
                rows = [model.eval()(**batch).sentence_embedding for batch in batches]
            found[f"{kind} {name}"] = torch.cat(rows).numpy()
        rows = [
            runtime.run(["sentence_embedding"], {k: v.numpy() for k, v in batch.items()})[0]
            for batch in batches
        ]
        found[f"onnx {name}"] = np.concatenate(rows)
    longer = {k: np.ones((1, 33), np.int64) for k in together}
    errors = pytest.importorskip("onnxruntime").capi.onnxruntime_pybind11_state
    with pytest.raises((errors.RuntimeException, errors.InvalidArgument, errors.Fail)):
        runtime.run(["sentence_embedding"], longer)
    for name, vectors in found.items():
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5, err_msg=name)

    extract = pipeline("feature-extraction", model=str(folder))
    with torch.no_grad():
        hidden = plain.model(**full).last_hidden_state
    for text, row, mask in zip(texts, hidden, full["attention_mask"], strict=True):
        features = torch.tensor(extract(text)[0])
        torch.testing.assert_close(features, row[mask.bool()], rtol=0, atol=1e-5)

    # And with the golden types, the reference's own vectors.
    model = AutoModelForTextEncoding.from_pretrained(folder).eval()
    inputs = with_prefix(tensors, "in/")
    for i, golden in enumerate(tensors[f"out/pooled_{pooling}_nl3"]):
        length = int(inputs["attention_mask"][i].sum())
        row = {k: inputs[k][i : i + 1, :length] for k in together}
        with torch.no_grad():
            assert relative_error(model(**row).pooler_output[0], golden) < 1e-5


def test_padding_inside_with_mask_padding_is_harmless():
    """Padding is kept out of the convolutions then: nothing is padded, and nothing changes."""
    masked = M2BertForMaskedLM(small(mask_padding=True)).eval()
    both = M2BertForMaskedLM(small(mask_padding=True, pad_inputs=True)).eval()
    both.load_state_dict(masked.state_dict())
    assert both.config.padded_length is None
    x = ids()
    with torch.no_grad():
        assert torch.equal(both(x).logits, masked(x).logits)
    both.config.mask_padding = False
    assert both.config.padded_length == 24


def test_losses_and_gradients_are_those_of_padded_texts():
    fields = {"hidden_dropout_prob": 0.0, "initializer_range": 0.2}
    model = M2BertForMaskedLM(small(pad_inputs=True, **fields))
    x = ids(2, 20)
    labels = x.masked_fill(torch.arange(20) % 3 != 0, -100)
    results = []
    for pad in (True, False):
        model.config.pad_inputs = pad
        if not pad:  # by hand
            x = torch.nn.functional.pad(x, (0, 4))
            labels = torch.nn.functional.pad(labels, (0, 4), value=-100)
        loss = model(x, labels=labels, masked_logits_only=pad).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="at most 24"):
        model(ids(1, 25))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.bin", lambda weights: {f"module.{k}": v for k, v in weights.items()}),
        ("compiled.ckpt", lambda weights: {f"_orig_mod.{k}": v for k, v in weights.items()}),
        ("lightning.ckpt", lambda weights: {"epoch": 1, "state_dict": weights}),
        (
            "own.pth",
            lambda weights: {"model_state_dict": {f"module.{k}": v for k, v in weights.items()}},
        ),
        ("composer.pt", lambda weights: {"state": {"model": weights}}),
    ],
)
def test_buffers_of_flash_fft_conv_are_dropped_and_reported(name, content, tmp_path, capsys):
    _, weights, _ = released(tmp_path)
    source = tmp_path / name
    torch.save(content(weights | FLASH_FFT), source)
    assert main(["import", str(source), "--out", str(tmp_path / "m2")]) == 0
    said = capsys.readouterr().out
    assert f"2 dropped, a buffer of FlashFFTConv: {', '.join(FLASH_FFT)}\n" in said
    assert AutoConfig.from_pretrained(tmp_path / "m2").pad_inputs


@pytest.mark.parametrize("kind", ["bf16 weights", "all bf16", "bf16 buffers", "bf16 decoder"])
def test_mixed_dtypes(kind, tmp_path):
    """A derived tensor is compared in the coarser of the two dtypes, and others are refused."""
    _, tensors = load_golden(BASE)
    weights = with_prefix(tensors, "sd/")
    buffers = [n for n in weights if n.endswith((".deltas", ".t"))]
    decoder = "cls.predictions.decoder.weight"
    chosen = {
        "bf16 weights": [n for n in weights if n not in buffers],
        "all bf16": list(weights),
        "bf16 buffers": buffers,
        "bf16 decoder": [decoder],
    }[kind]
    floats = [n for n in chosen if weights[n].is_floating_point()]
    mixed = weights | {n: weights[n].bfloat16() for n in floats}
    found = resolve(mixed)
    assert set(found.derived) >= {*buffers, decoder} and not found.unknown
    assert found.config.tie_word_embeddings
    with pytest.raises(ValueError, match=f"{buffers[0]} has other values"):
        resolve(mixed | {buffers[0]: mixed[buffers[0]] * 1.05})


def test_a_derived_tensor_that_differs_can_be_let_through_by_name(tmp_path, capsys):
    _, weights, _ = released(tmp_path)
    name = next(n for n in weights if n.endswith("modulation.deltas"))
    weights[name] = weights[name] * 1.05
    weights["bert.embeddings.position_ids"] = torch.arange(512)[None]
    source = tmp_path / "other.bin"
    torch.save(weights, source)
    message = refused(source, tmp_path, capsys)
    assert f"--allow-different '{name}'" in message or "--allow-different 'bert.emb" in message
    options = ["--allow-different", "*.deltas"]
    assert "position_ids has the shape (1, 512), but" in refused(source, tmp_path, capsys, *options)
    options.append("bert.embeddings.position_ids")
    assert main(["import", str(source), "--out", str(tmp_path / "m2"), *options]) == 0
    said = capsys.readouterr().out
    assert f"  {name}: not what M2-BERT computes, as allowed\n" in said
    assert "  bert.embeddings.position_ids: not what M2-BERT computes, as allowed\n" in said


@pytest.mark.parametrize("pooler", [True, False])
def test_use_cls_token_is_the_raw_first_hidden_state(pooler, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    source, weights, tensors = released(tmp_path, fields={"use_cls_token": True})
    if not pooler:
        encoder = {n: t for n, t in weights.items() if "encoder" in n or "embeddings" in n}
        torch.save(encoder, source / "pytorch_model.bin")
    folder, hub, onnx = (tmp_path / name for name in ("m2", "hub", "model.onnx"))
    assert main(["import", str(source), "--out", str(folder)]) == 0
    if pooler:
        assert "2 dropped, embeddings are raw hidden states" in capsys.readouterr().out
    model = AutoModelForTextEncoding.from_pretrained(folder).eval()
    assert type(model) is M2BertForTextEmbedding and not model.config.embedding_pooler
    inputs = with_prefix(tensors, "in/")
    batch = {k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        found = model(**batch).sentence_embedding
    assert relative_error(found, tensors["out/hidden"][:, 0]) < 1e-5

    texts, file, out = texts_of(tensors), tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(texts))
    assert main(["embed", str(file), "--model", str(folder), "--out", str(out)]) == 0
    sentences = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(np.load(out), sentences.encode(texts), rtol=0, atol=1e-5)
    sentences.save(str(tmp_path / "saved"))
    again = tmp_path / "again.npy"
    command = ["embed", str(file), "--model", str(tmp_path / "saved"), "--out", str(again)]
    assert main(command) == 0
    np.testing.assert_allclose(np.load(again), np.load(out), rtol=0, atol=1e-6)
    assert main(["export", str(folder), "--onnx", str(onnx)]) == 0
    assert main(["export", str(folder), "--hub", str(hub)]) == 0
    assert main(["export", str(folder), "--out", str(tmp_path / "back.pt")]) == 0
    report = import_checkpoint(tmp_path / "back.pt", tmp_path / "back")
    assert report.found.model_class is M2BertForTextEmbedding
    assert not report.found.config.embedding_pooler


def test_use_cls_token_says_nothing_of_other_heads_and_not_two_things(tmp_path, capsys):
    """The reference's class has it true by default, so that any model's config may hold it."""
    _, tensors = load_golden(BASE)
    weights, meta = with_prefix(tensors, "sd/"), load_golden(BASE)[0]
    saved = meta["config"] | {"use_cls_token": True}
    assert resolve(weights, saved).config.embedding_pooler
    body = {n: t for n, t in weights.items() if n.startswith("bert.")}
    classifier = resolve(body | with_prefix(tensors, "sdc/nl3/"), saved)
    assert classifier.model_class is M2BertForSequenceClassification and not classifier.dropped
    assert classifier.config.embedding_pooler and classifier.config.num_labels == 3
    assert "pooler.dense.weight" in classifier.weights
    with pytest.raises(ValueError, match="use_cls_token and pool_all are both true"):
        resolve(body, saved | {"pool_all": True})


def test_a_config_of_ours_decides_about_padding():
    weights = to_reference(M2BertForMaskedLM(small()).state_dict())
    assert resolve(weights).config.pad_inputs
    assert not resolve(weights, small().to_dict()).config.pad_inputs
    assert not resolve(weights, {"pad_inputs": False}).config.pad_inputs
    assert resolve(weights, {"pool_all": False}).config.pad_inputs
    assert not resolve(M2BertForMaskedLM(small()).state_dict()).config.pad_inputs
    masked = resolve(weights, overrides={"mask_padding": True}).config
    assert masked.mask_padding and masked.padded_length is None


def test_a_hub_folder_that_has_our_model_type_and_the_reference_s_fields(tmp_path, capsys):
    source, _, tensors = released(tmp_path)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "m2_bert"}))
    for auto in (AutoConfig, AutoModel):  # its weights have other names: they would be random
        with pytest.raises(ValueError, match="`m2-plugin import`"):
            auto.from_pretrained(source)
    assert main(["import", str(source), "--out", str(tmp_path / "m2")]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "m2").pad_inputs
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(texts_of(tensors)))
    longer = tmp_path / "longer"
    assert main(["extend", str(source), "--max-seq-len", "64", "--out", str(longer)]) == 0
    assert type(AutoModelForTextEncoding.from_pretrained(longer)) is M2BertForTextEmbedding
    for folder in (source, tmp_path / "m2"):  # embed goes the same way
        out = tmp_path / f"{folder.name}.npy"
        assert main(["embed", str(file), "--model", str(folder), "--out", str(out)]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "released.npy"), np.load(out), rtol=0, atol=1e-6)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, with one repository, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "cache" / "models--someone--m2-bert-retrieval", "0123abcd" * 5
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    source, *_ = released(tmp_path)
    for i, file in enumerate(sorted(source.iterdir())):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    return snapshot


@pytest.mark.parametrize("page", [None, "", "/tree/main", "/resolve/main/pytorch_model.bin"])
def test_names_and_urls_of_the_hub(page, cache, tmp_path, capsys):
    name = "someone/m2-bert-retrieval"
    source = name if page is None else f"{constants.ENDPOINT}/{name}{page}"
    assert main(["import", source, "--out", str(tmp_path / "m2")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{source}: M2BertFor")
    config = AutoConfig.from_pretrained(tmp_path / "m2")
    assert config.pad_inputs and config.hidden_size == 32
    whole_folder = not (page or "").endswith(".bin")
    assert (tmp_path / "m2" / "tokenizer.json").exists() == whole_folder
    assert ("no tokenizer" in said) != whole_folder


def test_a_repository_without_a_config(cache, tmp_path, capsys):
    (cache / "config.json").unlink()
    assert main(["import", "someone/m2-bert-retrieval", "--out", str(tmp_path / "m2")]) == 0
    assert "weights and config do not give these" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/another", "'someone/another' is not a path, and model.safetensors of it cannot"),
        ("https://example.org/m2-bert-128.pt", "is not on .*: download it, and give the path"),
        ("someone/m2-bert-128.pt", "there is no file 'someone/m2-bert-128.pt'"),
    ],
)
def test_what_cannot_be_fetched_is_named(source, message, cache, tmp_path, capsys):
    assert re.search(message, refused(source, tmp_path, capsys))
