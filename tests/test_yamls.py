"""Every YAML is in llm-foundry's schema, builds its model, and has the published recipe."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from m2_plugin.foundry.preflight import preflight
from tests.utils import GOLDEN, ROOT, TOKENIZER

PRETRAIN = sorted((ROOT / "yamls" / "pretrain").glob("*.yaml"))
WITH_MODEL = [path for path in PRETRAIN if path.stem != "continue"]
RETRIEVAL = sorted((ROOT / "yamls" / "finetune" / "retrieval").glob("*.yaml"))
FINETUNE = sorted((ROOT / "yamls" / "finetune").glob("*.yaml"))
RECIPES = json.loads((GOLDEN / "recipes.json").read_text())["pretrain"]
PUBLISHED = {
    "m2-bert-base",
    "m2-bert-base-110m",
    "m2-bert-large-260m",
    "m2-bert-large-341m",
    "bert-base",
}
# The same model, on longer texts: continued from a folder that `m2-plugin extend` makes.
LONGER = {
    "m2-bert-base-2k": 2048,
    "m2-bert-large-341m-2k": 2048,
    "m2-bert-base-8k": 8192,
    "m2-bert-base-32k": 32768,
}
# The same run on so many GPUs; what may differ.
GPUS = {"m2-bert-large-341m-8gpu": 8, "m2-bert-large-341m-64gpu": 64}
DIFFERS = {"device_train_microbatch_size", "fsdp_config"}
# M2-GPT: MPT with Monarch layers. The published sizes differ in what is listed.
GPT = {"m2-gpt-125m", "m2-gpt-360m"}
GPT_DIFFERS = {"variables", "run_name", "model", "optimizer", "device_train_microbatch_size"}
OF_OUR_OWN = {"continue", "m2-bert-quickstart", "m2-gpt-small"}
# Settings of the reference's optimizer, written to the model's config there; its flags for
# attention, which M2-BERT has none of; and a misspelt field that transformers ignored.
ELSEWHERE = {
    "long_conv_kernel_learning_rate",
    "hyena_lr_pos_emb",
    "hyena_wd",
    "num_attention_heads",
    "attention_probs_dropout_prob",
    "monarch_mixer_sequence_mixing",
    "max_position_embedding",
}


def load(path: Path) -> dict:
    config = OmegaConf.load(path)
    config.variables.tokenizer = str(TOKENIZER)
    if "start" in config.variables:
        config.variables.start = None
        config.model.pretrained = False  # from random weights
    OmegaConf.resolve(config)
    return OmegaConf.to_container(config)


@pytest.mark.parametrize("path", PRETRAIN + FINETUNE, ids=lambda p: p.stem)
def test_is_in_llm_foundrys_schema(path):
    from llmfoundry.command_utils.train import TRAIN_CONFIG_KEYS, TrainConfig, validate_config
    from llmfoundry.utils.config_utils import make_dataclass_and_log_config

    config = OmegaConf.create(load(path))
    config.log_config = False
    _, train_config = make_dataclass_and_log_config(
        config, TrainConfig, TRAIN_CONFIG_KEYS, transforms="all"
    )
    validate_config(train_config)
    assert "code_paths" not in config
    assert train_config.autoresume


EVERY_RUN = {"seed_each_batch", "run_guard", "run_summary", "nan_monitor", "loss_curve"}
EVERY_RUN |= {"lr_monitor", "speed_monitor"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "yamls").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_run_is_guarded_and_says_what_it_does(path):
    config = OmegaConf.load(path)
    config = config.get("job", config)
    if "callbacks" not in config:  # a sweep, which includes recipe.yaml
        assert config.include == "recipe.yaml"
        return
    # The sweep's jobs get eval_results from glue/recipes.py.
    is_fine_tuning = "finetune" in path.parts and path.name != "recipe.yaml"
    wanted = EVERY_RUN | ({"eval_results"} if is_fine_tuning else set())
    assert wanted <= config.callbacks.keys()
    assert "tensorboard_file" in config.loggers and "tensorboard" not in config.loggers


# `continue` has no architecture of its own: it takes that of its start.
@pytest.mark.parametrize("path", WITH_MODEL, ids=lambda p: p.stem)
def test_builds_a_model_and_its_optimizer_groups(path):
    from llmfoundry.utils.builders import (
        build_callback,
        build_composer_model,
        build_optimizer,
        build_scheduler,
        build_tokenizer,
    )

    config = load(path)
    preflight(config)
    tokenizer = build_tokenizer(config["tokenizer"]["name"], config["tokenizer"]["kwargs"])
    model_config = config["model"]
    if "config_overrides" in model_config:
        model_config["config_overrides"]["num_hidden_layers"] = 2
    else:
        model_config["n_layers"] = 2
    model = build_composer_model(model_config.pop("name"), model_config, tokenizer)
    assert model.config.vocab_size == (50264 if path.stem in GPT else 30528)
    optimizer = build_optimizer(model, config["optimizer"].pop("name"), config["optimizer"])
    if path.stem in GPT:  # no weight decay for the filters
        _, filters = optimizer.param_groups
        assert filters["weight_decay"] == 0
        assert len(filters["params"]) == 2 * (2 + 7)  # features, frequencies, an MLP
    else:
        assert len(optimizer.param_groups) == 1
    build_scheduler(config["scheduler"].pop("name"), config["scheduler"])
    for name, kwargs in config["callbacks"].items():
        build_callback(name, kwargs, train_config=config)


def test_intended_parameter_groups_match_what_they_mean():
    """Check the YAML's commented groups: a wrong pattern would select nothing, without an error."""
    from llmfoundry.utils.builders import build_composer_model, build_optimizer

    text = (ROOT / "yamls" / "pretrain" / "m2-bert-base.yaml").read_text()
    lines = [line for line in text.splitlines() if "param_groups:" in line or "param_str" in line]
    groups = OmegaConf.to_container(
        OmegaConf.create("\n".join(line.replace("# ", "", 1) for line in lines))
    )
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = build_composer_model("m2_bert_mlm", {"config_overrides": fields}, None)
    optimizer = build_optimizer(
        model, "fused_decoupled_adamw", {"lr": 8e-4, "weight_decay": 1e-5} | groups
    )
    rest, features, filters = optimizer.param_groups
    assert (features["lr"], features["weight_decay"]) == (1e-5, 0.0)
    assert (filters["lr"], filters["weight_decay"]) == (1e-3, 1e-4)
    assert len(features["params"]) == 2 * 2  # layers × convolutions
    assert len(filters["params"]) == 2 * 2 * (1 + 2 * (3 * 2 + 1))  # frequencies, two MLPs
    total = len(list(model.parameters()))
    assert len(rest["params"]) + len(features["params"]) + len(filters["params"]) == total


def as_published(config):
    """Name the optimizer of the reference, whose updates are the same as of ours."""
    assert config["optimizer"]["name"] == "fused_decoupled_adamw"
    config["optimizer"]["name"] = "decoupled_adamw"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_is_the_published_recipe(name):
    config, recipe = load(ROOT / "yamls" / "pretrain" / f"{name}.yaml"), RECIPES[name]
    as_published(config)
    for key in (
        "scheduler",
        "optimizer",
        "algorithms",
        "max_duration",
        "eval_interval",
        "global_train_batch_size",
        "seed",
        "precision",
        "max_seq_len",
    ):
        assert config.get(key) == recipe[key], key
    # What a GPU takes at once changes the speed, not the model.
    assert config["device_train_microbatch_size"] % recipe["device_train_microbatch_size"] == 0
    assert config["global_train_batch_size"] % config["device_train_microbatch_size"] == 0
    assert config["train_loader"]["dataset"]["mlm_probability"] == recipe["mlm_probability"]
    assert config["eval_loader"]["dataset"]["mlm_probability"] == recipe["eval_mlm_probability"]

    from m2_plugin.models import M2BertConfig

    ours = config["model"]["config_overrides"]
    for key, value in recipe["model_config"].items():
        if key in ELSEWHERE and name != "bert-base":
            continue
        key = "max_position_embeddings" if key == "max_position_embedding" else key
        value = config["max_seq_len"] if value == "${max_seq_len}" else value
        assert ours[key] == value, key
    if name != "bert-base":
        assert {"hidden_size", "intermediate_size"} <= set(ours)
        M2BertConfig(**ours)


def test_what_is_started_has_the_tokenizer_of_its_start():
    """And no YAML names begin and end tokens: a tokenizer without them would get them."""
    for path in (ROOT / "yamls").rglob("*.yaml"):
        text = path.read_text()
        assert "eos_token" not in text and "bos_token" not in text
        variables = OmegaConf.load(path).get("variables", {})
        if "start" in variables or path.stem == "recipe":
            line = next(line for line in text.splitlines() if line.startswith("  tokenizer:"))
            assert line.split()[1] == "${variables.start}", path


def test_every_published_recipe_has_its_yaml():
    assert {p.stem for p in PRETRAIN} == PUBLISHED | {*LONGER, *GPUS, *GPT, *OF_OUR_OWN}


@pytest.mark.parametrize("name", GPUS)
def test_many_gpus_run_the_same_recipe(name):
    from composer.distributed.mosaic_parallelism import SHARDING_MAP
    from composer.utils.parallelism import FSDPConfig

    config = load(ROOT / "yamls" / "pretrain" / f"{name}.yaml")
    recipe = load(ROOT / "yamls" / "pretrain" / f"{name.rpartition('-')[0]}.yaml")
    assert {key for key in config | recipe if config.get(key) != recipe.get(key)} <= DIFFERS
    assert GPUS[name] * config["device_train_microbatch_size"] == config["global_train_batch_size"]
    fsdp = config.get("fsdp_config", {})
    assert fsdp.keys() <= {field.name for field in dataclasses.fields(FSDPConfig)}
    assert fsdp.get("sharding_strategy", "FULL_SHARD") in SHARDING_MAP


def test_m2_gpt_has_one_recipe_in_two_sizes():
    """The recipe is that of the Pile in HazyResearch/safari (configs/experiment/pile)."""
    small, large = (load(ROOT / "yamls" / "pretrain" / f"{name}.yaml") for name in sorted(GPT))
    assert {key for key in small | large if small.get(key) != large.get(key)} <= GPT_DIFFERS
    for config, lr in ((small, 6e-4), (large, 3e-4)):
        assert (config["optimizer"]["lr"], config["optimizer"]["weight_decay"]) == (lr, 0.1)
        model = config["model"]
        filters = {"filter_order": 64, "filter_emb_dim": 33, "filter_w": 14, "max_seq_len": 2048}
        assert filters.items() <= model["attn_config"].items()
        assert model["max_seq_len"] == config["max_seq_len"] == 2048
    assert small["scheduler"] == {
        "name": "cosine_with_warmup",
        "t_warmup": "0.01dur",
        "alpha_f": 0.1,
    }
    assert (small["global_train_batch_size"], small["max_duration"]) == (256, "30000ba")
    large["model"] |= {key: small["model"][key] for key in ("d_model", "n_heads", "n_layers")}
    large["model"]["ffn_config"]["ffn_hidden_size"] = 8192
    assert large["model"] == small["model"]


@pytest.mark.parametrize("name", LONGER)
def test_long_context_keeps_the_published_mixture(name):
    config = load(ROOT / "yamls" / "pretrain" / f"{name}.yaml")
    recipe = RECIPES["m2-bert-large-341m-2k"]
    as_published(config)
    for key in ("scheduler", "optimizer", "algorithms", "seed", "precision"):
        assert config[key] == recipe[key], key
    tokens = config["global_train_batch_size"] * config["max_seq_len"]
    assert tokens == recipe["global_train_batch_size"] * recipe["max_seq_len"]
    train, evaluation = (config[f"{which}_loader"]["dataset"] for which in ("train", "eval"))
    assert train["mlm_probability"] == recipe["mlm_probability"]
    assert evaluation["mlm_probability"] == recipe["eval_mlm_probability"]
    assert [stream["proportion"] for stream in train["streams"].values()] == [0.5, 0.5]
    assert all(stream["split"] == "val" for stream in evaluation["streams"].values())
    overrides = config["model"]["config_overrides"]
    if "large" in name:
        published = RECIPES[name.removesuffix("-2k")]["model_config"]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            assert overrides[key] == published[key], key
    length = LONGER[name]
    assert overrides["long_conv_l_max"] == overrides["max_position_embeddings"] == length
    assert config["tokenizer"]["kwargs"]["model_max_length"] == length


@pytest.mark.parametrize("path", WITH_MODEL, ids=lambda p: p.stem)
def test_readme_states_the_parameter_count(path):
    from transformers import AutoConfig, AutoModelForMaskedLM

    import m2_plugin.models  # noqa: F401  (registers the model type)

    model = load(path)["model"]
    if model["name"] == "mpt_causal_lm":
        from llmfoundry.utils.builders import build_composer_model

        name = model.pop("name")
        fields = {"vocab_size": 30528} | model | {"init_device": "meta"}
        built = build_composer_model(name, fields, None)
    else:
        fields = {"vocab_size": 30528} | model["config_overrides"]
        with torch.device("meta"):
            config = AutoConfig.for_model(model.get("model_type", "m2_bert"), **fields)
            built = AutoModelForMaskedLM.from_config(config)
        built.tie_weights()
    count = sum(p.numel() for p in built.parameters())
    rows = (ROOT / "yamls" / "README.md").read_text().splitlines()
    row = next(r for r in rows if f"`{path.name}` |" in r)
    assert row.endswith(f"| {count:,} |")


@pytest.mark.parametrize("path", RETRIEVAL, ids=lambda p: p.stem)
def test_retrieval_trains_the_embedding_that_is_saved(path):
    from llmfoundry.command_utils.train import TRAIN_CONFIG_KEYS, TrainConfig, validate_config
    from llmfoundry.utils.builders import build_composer_model, build_optimizer, build_tokenizer
    from llmfoundry.utils.config_utils import make_dataclass_and_log_config

    raw = load(path)
    config = OmegaConf.create(raw)
    _, train_config = make_dataclass_and_log_config(
        config, TrainConfig, TRAIN_CONFIG_KEYS, transforms="all"
    )
    validate_config(train_config)
    preflight(raw)
    tokenizer = build_tokenizer(raw["tokenizer"]["name"], raw["tokenizer"]["kwargs"])
    model_config = raw["model"]
    overrides = model_config["config_overrides"]
    if "base" in path.stem:
        length = LONGER[path.stem.removesuffix("-retrieval")]
        assert overrides["long_conv_l_max"] == overrides["max_position_embeddings"] == length
    overrides |= {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128}
    model = build_composer_model(model_config.pop("name"), model_config, tokenizer)
    assert model.model.config.normalize_embeddings and model.model.config.mask_padding
    build_optimizer(model, raw["optimizer"].pop("name"), raw["optimizer"])
    for which in ("train_loader", "eval_loader"):
        assert raw[which]["name"] == "contrastive_pairs"
        assert raw[which]["dataset"]["max_seq_len"] <= model.model.config.max_sequence_length


# Of the M2 repository, December 2024: the command in bert/EMBEDDINGS.md, bert/embeddings_train.py
# and bert/yamls/finetune-glue/embedding_training.yaml; and the defaults of sentence-transformers.
PUBLISHED_RETRIEVAL = {
    # --train_batch_size 32 --mini_batch_size 4 --num_epochs 1 --checkpoint_save_steps 1000
    "global_train_batch_size": 32,
    "device_train_microbatch_size": 32,
    "model.mini_batch_size": 4,
    "max_duration": "1ep",
    "save_interval": "1000ba",
    # --learning_rate 5e-6 --loss_choice multiple_negatives_ranking_loss --negatives_per_query 32
    "optimizer.lr": 5e-6,
    "model.loss": "infonce",
    "train_loader.max_hard_negatives": 1,  # of each of the 32 examples of a query
    # embeddings_train.py: use_amp False, random_state, evaluation_steps_ratio, warmup_steps, ...
    "precision": "fp32",
    "seed": 42,
    "eval_interval": "0.1dur",
    "scheduler.t_warmup": "0.1dur",
    "algorithms.gradient_clipping.clipping_threshold": 1.0,
    # embedding_training.yaml: hidden_dropout_prob, pool_all
    "model.config_overrides.hidden_dropout_prob": 0.0,
    "model.config_overrides.classifier_pooling": "cls",
    # sentence-transformers: a scale of 20 for the loss; AdamW and WarmupLinear in fit()
    "model.contrastive_config.temperature": 1 / 20,
    "optimizer.name": "torch_adamw",
    "optimizer.weight_decay": 0.01,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "scheduler.name": "linear_decay_with_warmup",
    "scheduler.alpha_f": 0.0,
}


@pytest.mark.parametrize("path", [p for p in RETRIEVAL if "base" in p.stem], ids=lambda p: p.stem)
def test_retrieval_has_the_published_numbers(path):
    config = OmegaConf.create(load(path))
    assert {key: OmegaConf.select(config, key) for key in PUBLISHED_RETRIEVAL} == (
        PUBLISHED_RETRIEVAL
    )
    assert "--num_negatives 32 --triplets" in path.read_text()


def test_retrieval_has_a_recipe_for_each_length():
    names = {f"{name}-retrieval" for name in LONGER if "base" in name}
    assert {p.stem for p in RETRIEVAL} == names | {"m2-bert-quickstart"}
