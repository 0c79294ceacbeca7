"""`model_card`: a card in each folder that `hf_checkpointer` saves, true and without secrets."""

import copy
import re
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.core import Callback
from huggingface_hub import ModelCard
from llmfoundry.utils.builders import build_callback, build_composer_model, build_dataloader
from omegaconf import OmegaConf
from transformers import AutoModelForMaskedLM

from tests.checkpoints.test_card import run as run_code
from tests.checkpoints.test_card import snippets

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
SECRET = "AKIA-secret"


def settings(mds, name):
    """What llm-foundry passes: all of a YAML, resolved."""
    dataset = {
        "streams": {
            "books": {"local": str(mds), "split": "train", "proportion": 0.5},
            "web": {"remote": f"s3://user:{SECRET}@bucket/private/web-data", "proportion": 0.5},
        },
        "max_seq_len": 32,
        "mlm_probability": 0.3,
    }
    return OmegaConf.create(
        {
            "model": {"name": name, "config_overrides": TINY, "use_auth_token": SECRET},
            "train_loader": {"name": "mlm_text", "dataset": dataset},
            "optimizer": {"name": "torch_adamw", "lr": 1e-3, "betas": [0.9, 0.98]},
            "scheduler": {"name": "warmup_stable_decay", "t_warmup": "2ba", "t_decay": "0.2dur"},
            "algorithms": {"gradient_clipping": {"clipping_threshold": 1.0}},
            "global_train_batch_size": 24,
            "max_duration": "10ba",
            "callbacks": {"mlm_probability_schedule": {"start": 0.3, "end": 0.15}},
            "loggers": {"wandb": {"key": SECRET}},
        }
    )


class Remote(Callback):
    """In place of Composer's uploader."""

    def __init__(self):
        self.files = {}
        self.remote_backend = self

    def get_uri(self, name):
        return f"s3://bucket/{name}"

    def upload_file(self, state, remote_file_name, file_path, overwrite):
        self.files[remote_file_name] = Path(file_path).read_bytes()


def train(mds, tokenizer, out, folder="ba{batch}", name="m2_bert_mlm", remote=None, **keys):
    shared = {"local": str(mds), "max_seq_len": 32}
    plain = {"name": "mlm_text", "drop_last": True, "num_workers": 0, "pin_memory": False}
    data, val = (
        build_dataloader({**plain, "dataset": {**shared, **extra}}, tokenizer, 24)
        for extra in (
            {"split": "train", "shuffle": True, "mlm_probability": 0.3},
            {"split": "val", "shuffle": False, "mlm_probability": 0.15},
        )
    )
    torch.manual_seed(0)
    overrides = copy.deepcopy(TINY)
    if name == "m2_bert_mlm":
        overrides = {**overrides, "long_conv_l_max": 32, "hyena_filter_order": 8}
    model = build_composer_model(name, {"config_overrides": overrides}, tokenizer)
    saver = build_callback(
        "hf_checkpointer",
        {"save_folder": str(out), "save_interval": "4ba", "huggingface_folder_name": folder},
    )
    saver.remote_ud = remote
    card = build_callback("model_card", keys, settings(mds, name))
    trainer = Trainer(
        model=model,
        train_dataloader=data,
        eval_dataloader=val,
        eval_interval="6ba",
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        max_duration="10ba",  # of 8 in an epoch
        callbacks=[card, saver],
        run_name="tiny",
        device="cpu",
        seed=3,
        progress_bar=False,
        log_to_console=False,
    )
    trainer.fit()
    trainer.close()
    return trainer


def test_every_folder_has_a_card_with_the_last_metrics(mds, tokenizer, tmp_path):
    out = tmp_path / "private-place"
    keys = {"license": "mit", "language": ["en"], "datasets": "me/data", "description": "Of mine."}
    trainer = train(mds, tokenizer, out, **keys)
    folders = {path.name: path for path in (out / "huggingface").iterdir()}
    assert folders.keys() == {"ba4", "ba8", "ba10"}
    cards = {name: ModelCard.load(path / "README.md") for name, path in folders.items()}
    assert [cards[name].data.eval_results is None for name in ("ba4", "ba8", "ba10")] == [
        *(True, False, False)
    ]
    assert "evaluation after batch 6:" in cards["ba8"].text
    card = cards["ba10"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    metrics = trainer.state.eval_metrics["eval"]
    assert results.keys() == {"cross_entropy", "masked_accuracy"}
    loss = float(metrics["LanguageCrossEntropy"].compute())
    assert results["cross_entropy"] == pytest.approx(loss, rel=1e-6)
    assert "evaluation after batch 10:" in card.text
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["datasets"]) == ("mit", ["en"], "me/data")
    assert data["pipeline_tag"] == "fill-mask" and "base_model" not in data
    for row in (
        f"| Parameters | {sum(p.numel() for p in trainer.state.model.parameters()):,} |",
        "| Batches | 10 |",
        "| Samples | 240 |",
        "| Batch size | 24 |",
        "| Optimizer | torch_adamw (lr: 0.001, betas: [0.9, 0.98]) |",
        '| Schedule | warmup_stable_decay (t_warmup: "2ba", t_decay: "0.2dur") |',
        "| mlm_probability | 0.3 |",
        "| Masking | (start: 0.3, end: 0.15) |",
        "| Precision | fp32 |",
        "| Seed | 3 |",
    ):
        assert row in card.text, row
    assert re.search(
        r"\| Sources \| books \S+ train \(proportion 0.5\), web web-data \(", card.text
    )
    text = str(card)
    for unsaid in (SECRET, "private", str(tmp_path), str(mds.parent), "bucket"):
        assert unsaid not in text
    assert type(AutoModelForMaskedLM.from_pretrained(folders["ba10"])).__name__ in text
    run_code(snippets(text), folders["ba10"])


def test_other_models_and_an_unknown_licence(mds, tokenizer, tmp_path):
    train(mds, tokenizer, tmp_path, folder="final", name="hf_bert_mlm")
    card = (tmp_path / "huggingface/final/README.md").read_text()
    assert "BertForMaskedLM" in card and "m2_plugin" not in card and "license" not in card
    assert ModelCard(card).data.tags == ["bert"] and "# tiny\n" in card


def test_names_with_epochs(mds, tokenizer, tmp_path):
    """A folder of the last batch of an epoch has the name of the time before the epoch's end."""
    train(mds, tokenizer, tmp_path, folder="{run_name}-ep{epoch}-ba{batch}")
    folders = list((tmp_path / "huggingface").iterdir())
    assert {p.name for p in folders} == {"tiny-ep0-ba4", "tiny-ep0-ba8", "tiny-ep1-ba10"}
    assert all((folder / "README.md").is_file() for folder in folders)


def test_a_remote_folder(mds, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remote = Remote()
    train(mds, tokenizer, "runs", folder="final", remote=remote)
    assert {"runs/huggingface/final/README.md", "runs/huggingface/final/config.json"} <= set(
        remote.files
    )
    assert b"evaluation after batch 10" in remote.files["runs/huggingface/final/README.md"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("keys", [{"license": 3}, {"datasets": ["a", 1]}, {"name": " "}])
def test_bad_arguments(keys):
    with pytest.raises(ValueError, match=rf"model_card\.{next(iter(keys))} must be a text"):
        build_callback("model_card", keys, train_config={})
