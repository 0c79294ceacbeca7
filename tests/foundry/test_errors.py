"""What a user can solve is one line: `train.py` writes the message of a `RunError` alone."""

import pytest
from llmfoundry.utils.builders import build_composer_model, build_dataloader
from omegaconf import OmegaConf

from m2_plugin.foundry.errors import ConfigError, RunError, one_line
from m2_plugin.foundry.preflight import LOADERS, MODELS

DATASETS = {
    "mlm_text": {"local": "/nowhere", "split": "train", "max_seq_len": 8, "mlm_probability": 0.3},
    "glue": {"task": "cola", "split": "train", "path": "/nowhere", "max_seq_len": 8},
    "text_classification": {"path": "/nowhere.csv", "text_column": "a\nb", "max_seq_len": 8},
    "token_classification": {"path": "/nowhere.csv", "label_names": ["O"], "max_seq_len": 8},
    "question_answering": {"path": "/nowhere.json", "max_seq_len": 8},
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders(name, tokenizer):
    config = {"name": name, "dataset": DATASETS[name], "drop_last": True, "num_workers": 0}
    with pytest.raises(RunError, match="/nowhere") as error:
        build_dataloader(OmegaConf.to_container(OmegaConf.create(config)), tokenizer, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_models(name, tokenizer):
    with pytest.raises(RunError, match="there is no folder '/nowhere'"):
        build_composer_model(name, {"pretrained_model_name_or_path": "/nowhere"}, tokenizer)


def test_one_line():
    with pytest.raises(ConfigError, match="^a b c$") as error, one_line(ConfigError):
        raise OSError("a\n  b\tc")
    assert isinstance(error.value.__cause__, OSError)
    with pytest.raises(ConfigError, match="own"), one_line():  # keeps its class
        raise ConfigError("own")
    with pytest.raises(KeyError), one_line():  # a bug
        raise KeyError("a")
