"""`m2-plugin average`: the mean of weights, exactly; other models' checkpoints are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from m2_plugin.checkpoints.average import mean
from m2_plugin.checkpoints.folder import TOKENIZER_FILES
from m2_plugin.cli import main
from m2_plugin.models import M2BertForMaskedLM, M2BertForSequenceClassification
from tests.models.test_modeling_m2_bert import ids, small
from tests.utils import TOKENIZER, relative_error


def model(seed, cls=M2BertForMaskedLM, **fields):
    torch.manual_seed(seed)
    return cls(small(vocab_size=30522, **fields)).eval()


def folder(tmp_path, name, seed, tokenizer=True, **fields):
    path = tmp_path / name
    model(seed, **fields).save_pretrained(path)
    if tokenizer:
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(path)
    return str(path)


def composer_file(tmp_path, name, seed):
    """What Composer saves, as far as we read it."""
    saved = model(seed)
    content = {"content": saved.config.to_dict()}
    state = {
        "model": {f"model.{key}": tensor for key, tensor in saved.state_dict().items()},
        "integrations": {"huggingface": {"model": {"config": content}}},
    }
    torch.save({"state": state}, tmp_path / name)
    return str(tmp_path / name)


def average(sources, out, *options):
    return main(["average", *map(str, sources), "--out", str(out), *options])


def files(path):
    return {p.name: p.read_bytes() for p in Path(path).iterdir() if p.name != "README.md"}


def test_the_average_of_equal_checkpoints_is_each(tmp_path):
    source = folder(tmp_path, "a", 0)
    assert main(["import", source, "--out", str(tmp_path / "one")]) == 0
    assert average([source] * 3, tmp_path / "three") == 0
    assert average([source] * 3, tmp_path / "skewed", "--weights", "0.3", "0.1", "0.7") == 0
    assert files(tmp_path / "one") == files(tmp_path / "three") == files(tmp_path / "skewed")
    assert average([source] * 3, tmp_path / "again" / "three") == 0  # the same bytes, card included
    card = (tmp_path / "three" / "README.md").read_bytes()
    assert card == (tmp_path / "again" / "three" / "README.md").read_bytes()


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.0], [0.25, 0.25, 0.5]])
def test_folders_and_composer_s_checkpoints(weights, tmp_path, capsys):
    sources = [
        folder(tmp_path, "a", 0, tokenizer=False),
        folder(tmp_path, "b", 1),
        composer_file(tmp_path, "c.pt", 2),
    ]
    options = [] if weights is None else ["--weights", *map(str, weights)]
    assert average(sources, tmp_path / "mean", *options) == 0
    said = capsys.readouterr().out.splitlines()
    shares = [w / sum(weights or [3]) for w in weights or [1, 1, 1]]
    assert said[0] == f"{100 * shares[0]:5.1f}% {sources[0]}" and said[-1] == str(tmp_path / "mean")
    found = load_file(tmp_path / "mean" / "model.safetensors")
    states = [model(seed).state_dict() for seed in range(3)]
    assert "decoder.weight" not in found  # tied
    for name, tensor in found.items():
        exact = sum(s * state[name].double() for s, state in zip(shares, states, strict=True))
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-7, atol=1e-12)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "mean").eval()
    assert loaded.decoder.weight is loaded.model.embeddings.word_embeddings.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "mean")("A ship.")["input_ids"][0] == 101
    with torch.no_grad():
        assert loaded(ids()).logits.isfinite().all()


def test_an_average_of_averages():
    """The mean is linear, and as exact as the dtype allows."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = [torch.randn(50).to(dtype) for _ in range(4)]
        halves = [mean(tensors[:2], [1, 1]), mean(tensors[2:], [1, 1])]
        exact = torch.stack([t.double() for t in tensors]).mean(0)
        limit = 2 * torch.finfo(dtype).eps
        assert relative_error(mean(tensors, [1] * 4), exact) < limit
        assert relative_error(mean(halves, [1, 1]), exact) < limit
        assert mean(tensors, [0, 0, 1, 0]).equal(tensors[2])


def refused(sources, tmp_path, capsys, *options):
    assert average(sources, tmp_path / "out", *options) == 1
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    return said.err


def test_other_models_are_refused(tmp_path, capsys):
    a = folder(tmp_path, "a", 0)
    wide = folder(tmp_path, "wide", 1, intermediate_size=96)
    assert "wide' is another model than" in (said := refused([a, wide], tmp_path, capsys))
    assert "its intermediate_size is 96, not 32" in said
    masks = folder(tmp_path, "masks", 1, mask_padding=True)
    assert "its mask_padding is True, not False" in refused([a, masks], tmp_path, capsys)
    other = str(tmp_path / "classifier")
    model(0, M2BertForSequenceClassification).save_pretrained(other)
    assert "its architectures is ['M2BertForSequence" in refused([a, other], tmp_path, capsys)
    half = str(tmp_path / "half")
    model(0).bfloat16().save_pretrained(half)
    assert "is bfloat16 in '" in refused([a, half], tmp_path, capsys)


def test_other_tokenizers_are_refused(tmp_path, capsys):
    a, b = folder(tmp_path, "a", 0), folder(tmp_path, "b", 1)
    for name in TOKENIZER_FILES:
        path = Path(b) / name
        if path.is_file():
            path.write_text(path.read_text().replace('"ship"', '"sloop\'s"'))
    said = refused([a, b], tmp_path, capsys)
    assert "b' has another tokenizer than" in said and "its id of" in said


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, [], "an average needs two checkpoints or more, and there is 1"),
        (2, ["--weights", "1"], "there are 1 weights for 2 checkpoints"),
        (2, ["--weights", "1", "nan"], "weights must be numbers of at least 0, not nan"),
        (2, ["--weights", "0", "0"], "one weight or more must be above 0"),
    ],
)
def test_weights_that_are_no_shares(count, options, message, tmp_path, capsys):
    assert message in refused([tmp_path / "none"] * count, tmp_path, capsys, *options)


def test_what_cannot_be_read_and_what_exists(tmp_path, capsys):
    a = folder(tmp_path, "a", 0)
    assert "there is no file" in refused([a, tmp_path / "none.pt"], tmp_path, capsys)
    assert average([a, a], a) == 1
    assert "exists already" in capsys.readouterr().err


def test_the_card_names_the_checkpoints_and_keeps_a_common_licence(tmp_path):
    a, b = folder(tmp_path, "a", 0), folder(tmp_path, "b", 1)
    for path, metrics in ((a, 0.1), (b, 0.2)):
        front = f"license: mit\nlanguage: en\nlast_loss: {metrics}"
        (Path(path) / "README.md").write_text(f"---\n{front}\n---\n\nA model.\n")
    assert average([a, b], tmp_path / "both") == 0
    card = (tmp_path / "both" / "README.md").read_text()
    assert "license: mit\n" in card and "- `a`, 50.0%\n- `b`, 50.0%" in card
    assert "last_loss" not in card and "A model." not in card and str(tmp_path) not in card
    (Path(b) / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    assert average([a, b], tmp_path / "disagree") == 0
    card = (tmp_path / "disagree" / "README.md").read_text()
    assert "license" not in card.partition("\n---\n")[0] and "language: en" in card
    assert json.loads((tmp_path / "both" / "config.json").read_text())["model_type"] == "m2_bert"
