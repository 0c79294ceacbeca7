"""Longer contexts: what a model computed before, it computes still; errors name what is wrong."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from m2_plugin.checkpoints.convert import export_checkpoint, import_checkpoint
from m2_plugin.checkpoints.extend import extend
from m2_plugin.cli import main
from m2_plugin.models import M2BertConfig, M2BertForMaskedLM
from tests.models.test_modeling_m2_bert import ids, small
from tests.utils import TOKENIZER, relative_error


def trained(**kwargs) -> M2BertForMaskedLM:
    """A small model whose positional features have moved from their initial values."""
    model = M2BertForMaskedLM(small(bidirectional=True, **kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pos_emb"):
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def extended(model, length, method="continue") -> M2BertForMaskedLM:
    config, weights = extend(model.config, model.state_dict(), length, method)
    longer = M2BertForMaskedLM(config).eval()
    longer.load_state_dict(weights)
    return longer


def taps(model, length):
    """Of every convolution, from lag −(L − 1) to L − 1."""
    return [c.taps(length) for m in model.model.layers for c in (m.mixer.long_conv,)] + [
        m.mixer.residual_conv.taps(length) for m in model.model.layers
    ]


@pytest.mark.parametrize("mask_padding", [False, True])
def test_continuing_changes_nothing_up_to_the_old_length(mask_padding):
    model = trained(mask_padding=mask_padding)
    longer = extended(model, 96)
    longest = extended(longer, 400)
    assert longest.config.hyena_extended_from == [24, 96]
    assert longest.config.max_sequence_length == 400
    with torch.no_grad():
        for before, after, length in ((model, longer, 24), (longer, longest, 96)):
            x = ids(length=length)
            mask = (torch.arange(length) < length - 5).expand(2, -1)
            found, expected = (m(x, attention_mask=mask).logits for m in (after, before))
            assert relative_error(found, expected) < 1e-5
            for found, expected in zip(taps(after, length), taps(before, length), strict=True):
                assert relative_error(found, expected) < 1e-5
        assert longest(ids(length=400)).logits.isfinite().all()
        # The window goes on where it was, and is not yet gone at the end.
        filter = longest.model.layers[0].mixer.long_conv.filter
        window = filter.decay(400, torch.float32, torch.device("cpu"))
        assert (window[1:] < window[:-1]).all()
        assert (window[1:, 0] > 0.8 * window[:-1, 0]).all()
        assert window[-1, 0] == pytest.approx(0.01 ** (2 / 1.5), rel=1e-3)


def test_tiling_repeats_features_and_positions():
    model = trained()
    longer = extended(model, 60, "tile")
    assert longer.config.hyena_extended_from is None
    for name, tensor in model.state_dict().items():
        found = longer.state_dict()[name]
        if name.endswith(("pos_emb", "position_embeddings.weight")):
            assert torch.equal(found, torch.cat([tensor, tensor, tensor[:12]])), name
        else:
            assert torch.equal(found, tensor), name
    first, before = (m.model.layers[0].mixer.long_conv.filter(24)[0] for m in (longer, model))
    assert relative_error(first, before) > 0.1  # the decay is stretched


@pytest.mark.parametrize("length", [2048, 8192, 32768])
def test_command(length, tmp_path, capsys):
    model = trained(vocab_size=30522, num_hidden_layers=1)
    folder, out = tmp_path / "short", tmp_path / "long"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER, model_max_length=24).save_pretrained(folder)
    assert main(["extend", str(folder), "--max-seq-len", str(length), "--out", str(out)]) == 0
    assert f"up to {length} tokens" in capsys.readouterr().out
    loaded = AutoModelForMaskedLM.from_pretrained(out).eval()
    assert AutoTokenizer.from_pretrained(out).model_max_length == length
    with torch.no_grad():
        x = ids()
        assert relative_error(loaded(x).logits, model(x).logits) < 1e-5
        hidden = loaded.model(ids(batch=1, length=length)).last_hidden_state
    assert hidden.isfinite().all()
    assert main(["export", str(out), "--out", str(tmp_path / "long.pt")]) == 1
    assert "hyena_extended_from" in capsys.readouterr().err


def test_a_tiled_model_goes_back_to_the_reference(tmp_path):
    trained().save_pretrained(tmp_path / "short")
    arguments = ["--max-seq-len", "72", "--out", str(tmp_path / "long"), "--method", "tile"]
    assert main(["extend", str(tmp_path / "short"), *arguments]) == 0
    export_checkpoint(tmp_path / "long", tmp_path / "long.pt")
    report = import_checkpoint(tmp_path / "long.pt", tmp_path / "again")
    assert report.found.config.long_conv_l_max == report.found.config.max_position_embeddings == 72


def test_errors(tmp_path, capsys):
    model = trained()
    model.save_pretrained(tmp_path / "short")
    for length in ("24", "8"):
        arguments = ["--max-seq-len", length, "--out", str(tmp_path / "long")]
        assert main(["extend", str(tmp_path / "short"), *arguments]) == 1
        assert f"must be more than the model's present maximum, 24, not {length}" in (
            capsys.readouterr().err
        )
    assert not (tmp_path / "long").exists()
    with pytest.raises(ValueError, match="one of continue, tile, not 'stretch'"):
        extend(model.config, model.state_dict(), 48, "stretch")
    for lengths in ([24, 12], [128], [1]):
        with pytest.raises(ValueError, match="hyena_extended_from must be ascending lengths"):
            M2BertConfig(hyena_extended_from=lengths)
