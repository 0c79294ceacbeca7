"""The sweep files have the published recipe, and give jobs that llm-foundry accepts."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from m2_plugin.cli import main
from m2_plugin.glue.recipes import job_config, load_sweep, render_task_yaml
from m2_plugin.glue.tasks import TASKS, task
from tests.utils import GOLDEN, ROOT, TOKENIZER

FOLDER = ROOT / "yamls" / "finetune" / "glue"
PUBLISHED = json.loads((GOLDEN / "recipes.json").read_text())
SIZES = sorted(PUBLISHED["glue"])
DEFAULTS = {name.lower(): values for name, values in PUBLISHED["glue_job_defaults"].items()}
CASES = [(size, name) for size in SIZES for name in PUBLISHED["glue"][size]["tasks"]]
CASE_IDS = [f"{size}-{name}" for size, name in CASES]
METRICS = {
    "MulticlassAccuracy": "accuracy",
    "BinaryF1Score": "f1",
    "MatthewsCorrCoef": "matthews",
    "SpearmanCorrCoef": "spearman",
}
FROM_MNLI = {"rte", "mrpc", "stsb"}


def sweep_file(size: str) -> Path:
    return FOLDER / f"sweep-{size}.yaml"


def job(size: str, name: str, *overrides: str, **kwargs) -> dict:
    """The job of a task with its references resolved, as a run would see it."""
    config = OmegaConf.create(job_config(load_sweep(sweep_file(size), overrides), name, **kwargs))
    OmegaConf.resolve(config)
    return OmegaConf.to_container(config)


def published(size: str, name: str, key: str) -> str:
    """A value as text: the task's own, or the job's default."""
    value = PUBLISHED["glue"][size]["tasks"][name].get(key, DEFAULTS[name].get(key))
    return str(value).strip("'")


def test_every_published_size_and_task_has_a_recipe():
    assert {p.stem.removeprefix("sweep-") for p in FOLDER.glob("sweep-*.yaml")} == set(SIZES)
    for size in SIZES:
        tasks = load_sweep(sweep_file(size)).tasks
        assert set(tasks) == set(PUBLISHED["glue"][size]["tasks"])
        assert set(tasks) == {name for name, task in TASKS.items() if task.score_metrics}


@pytest.mark.parametrize(("size", "name"), CASES, ids=CASE_IDS)
def test_is_the_published_recipe(size, name):
    sweep, config = load_sweep(sweep_file(size)), job(size, name)
    optimizer = config["optimizer"]
    # The reference takes torch's AdamW for any name but this one.
    decoupled = published(size, name, "optim_name") == "DecoupledAdamW"
    assert optimizer["name"] == ("decoupled_adamw" if decoupled else "torch_adamw")
    assert optimizer["lr"] == float(published(size, name, "lr"))
    assert optimizer["weight_decay"] == float(published(size, name, "wd"))
    assert optimizer["betas"] == [float(beta) for beta in DEFAULTS[name]["betas"][0].split(",")]
    assert optimizer["eps"] == float(DEFAULTS[name]["eps"][0])
    assert set(optimizer) == {"name", "lr", "weight_decay", "betas", "eps"}

    assert config["max_duration"] == published(size, name, "max_duration")
    assert config["global_train_batch_size"] == int(published(size, name, "batch_size"))
    assert config["eval_interval"] == published(size, name, "eval_interval")
    assert config["scheduler"] == PUBLISHED["glue"][size]["scheduler"]
    assert "algorithms" not in config  # gradients are not clipped

    length = int(published(size, name, "max_sequence_length"))
    assert config["max_seq_len"] == config["tokenizer"]["kwargs"]["model_max_length"] == length
    for loader in (config["train_loader"], *config["eval_loader"]):
        assert loader["dataset"]["max_seq_len"] == length
        assert loader["dataset"]["padding"] == "max_length"

    # Composer's name today for what one of the files calls bf16.
    precision = PUBLISHED["glue"][size]["precision"].replace("amp_", "")
    assert config["precision"] == ("fp32" if name == "stsb" else f"amp_{precision}")
    seeds = PUBLISHED["glue"][size]["tasks"][name]["seeds"]
    assert list(sweep.tasks[name].seeds) == (seeds or [PUBLISHED["glue"][size]["default_seed"]])
    assert config["seed"] == sweep.tasks[name].seeds[0]
    metrics = [METRICS[m.strip("' ")] for m in DEFAULTS[name]["metrics"][-1].split(",")]
    assert list(task(name).score_metrics) == metrics
    assert set(metrics) <= set(config["model"]["metrics"])
    assert (sweep.tasks[name].start == "mnli") == (name in FROM_MNLI)


@pytest.mark.parametrize("size", SIZES)
def test_pooling_is_what_was_in_effect(size):
    """The reference keeps `pool_all` for all tasks after the one that sets it."""
    pool_all = False
    for name, settings in PUBLISHED["glue"][size]["tasks"].items():
        pool_all = settings.get("pool_all", pool_all)
        overrides = job(size, name)["model"].get("config_overrides", {})
        if size == "bert-base":
            assert not pool_all and "classifier_pooling" not in overrides
        else:
            assert overrides["classifier_pooling"] == ("mean" if pool_all else "cls"), name


@pytest.mark.parametrize("size", SIZES)
def test_the_architecture_is_the_checkpoints(size):
    """A recipe sets only what it changes: a published model is that of the pretraining."""
    model = job(size, "cola", "start=x")["model"]
    assert model["pretrained_model_name_or_path"] == "x"
    assert model.get("config_overrides", {}).keys() <= {"classifier_pooling"}
    of_bert = PUBLISHED["glue"][size]["model_config"] is None
    assert model["name"] == ("hf_bert_classification" if of_bert else "m2_bert_classification")


def test_random_weights_are_asked_for_and_not_for_what_comes_from_mnli():
    assert job("m2-bert-base", "cola", "model.pretrained=false")["model"]["pretrained"] is False
    assert "pretrained" not in job("m2-bert-base", "rte", "model.pretrained=false")["model"]


@pytest.mark.parametrize(("size", "average"), [
    ("m2-bert-base", 79.9), ("m2-bert-base-110m", 80.9), ("m2-bert-large-260m", 82.2),
    ("m2-bert-large-341m", 82.8), ("bert-base", 79.6),
])  # fmt: skip
def test_the_papers_average_stands_beside(size, average):
    assert load_sweep(sweep_file(size)).paper_average == average


def test_training_data_is_shuffled_by_the_runs_seed():
    config = job("m2-bert-base", "cola", seed=717)
    dataset = config["train_loader"]["dataset"]
    assert dataset["shuffle"] is True and dataset["shuffle_seed"] == config["seed"] == 717
    assert config["eval_loader"][0]["dataset"]["shuffle"] is False


@pytest.mark.parametrize("name", [n for s, n in CASES if s == "m2-bert-base"])
def test_the_committed_yaml_is_the_generated_one(name):
    path = sweep_file("m2-bert-base")
    source = str(path.relative_to(ROOT))
    committed = (FOLDER / f"m2-bert-base-{name}.yaml").read_text()
    assert committed == render_task_yaml(load_sweep(path), name, source), (
        f"run m2-plugin glue --config {source} --write-yamls yamls/finetune/glue"
    )
    read = OmegaConf.create(committed)
    assert OmegaConf.to_container(read) == job_config(load_sweep(path), name)
    assert max(map(len, committed.splitlines())) <= 110


def test_a_task_from_mnli_starts_where_the_mnli_yaml_leaves_its_model():
    mnli = job("m2-bert-base", "mnli")
    checkpointer = mnli["callbacks"]["hf_checkpointer"]
    left = f"{checkpointer['save_folder']}/huggingface/{checkpointer['huggingface_folder_name']}"
    for name in FROM_MNLI:
        assert job("m2-bert-base", name)["model"]["pretrained_model_name_or_path"] == left
    given = job("m2-bert-base", "rte", "mnli_checkpoint=mnli.pt")
    assert given["model"]["pretrained_model_name_or_path"] == "mnli.pt"
    assert job("m2-bert-base", "cola", "start=x")["model"]["pretrained_model_name_or_path"] == "x"


# --- llm-foundry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_job_is_in_llm_foundrys_schema(size):
    from llmfoundry import registry
    from llmfoundry.command_utils.train import TRAIN_CONFIG_KEYS, TrainConfig, validate_config
    from llmfoundry.registry import dataloaders, models, optimizers, schedulers
    from llmfoundry.utils.config_utils import make_dataclass_and_log_config

    callbacks = {*registry.callbacks.get_all(), *registry.callbacks_with_config.get_all()}
    for name in load_sweep(sweep_file(size)).tasks:
        config = OmegaConf.create(job(size, name, f"variables.tokenizer={TOKENIZER}"))
        config.model |= {"pretrained_model_name_or_path": None, "pretrained": False}
        _, train_config = make_dataclass_and_log_config(
            config, TrainConfig, TRAIN_CONFIG_KEYS, transforms="all"
        )
        validate_config(train_config)
        assert train_config.model["name"] in models
        assert train_config.optimizer["name"] in optimizers
        assert train_config.scheduler["name"] in schedulers
        assert set(train_config.callbacks) <= callbacks
        assert set(train_config.loggers) <= set(registry.loggers.get_all())
        for loader in (train_config.train_loader, *train_config.eval_loaders):
            assert loader["name"] in dataloaders
        assert train_config.device_train_batch_size == train_config.global_train_batch_size


@pytest.mark.parametrize("size", SIZES)
def test_job_builds_its_model_and_optimizer(size):
    from llmfoundry.utils.builders import build_composer_model, build_optimizer, build_tokenizer

    config = job(size, "stsb", f"variables.tokenizer={TOKENIZER}")
    tokenizer = build_tokenizer(config["tokenizer"]["name"], config["tokenizer"]["kwargs"])
    model_config = config["model"]
    model_config["pretrained_model_name_or_path"] = None
    model_config.setdefault("config_overrides", {})["num_hidden_layers"] = 1
    model = build_composer_model(model_config.pop("name"), model_config, tokenizer)
    assert model.config.num_labels == 1
    assert set(model.get_metrics(is_train=False)) >= {"SpearmanCorrCoef", "PearsonCorrCoef"}
    kind = {"torch_adamw": "AdamW", "decoupled_adamw": "DecoupledAdamW"}
    optimizer_config = config["optimizer"]
    expected = kind[optimizer_config["name"]]
    optimizer = build_optimizer(model, optimizer_config.pop("name"), optimizer_config)
    assert type(optimizer).__name__ == expected and len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["weight_decay"] == optimizer_config["weight_decay"]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.cola.learning_rate=1", r"Unknown key 'learning_rate' in .*tasks\.cola"),
        ("tasks.cola.weigth_decay=1", "Did you mean 'weight_decay'"),
        ("tasks.colla.lr=1", "no GLUE task 'colla'. Did you mean 'cola'"),
        ("tasks.wnli.lr=1", "WNLI does not count"),
        ("tasks.cola.lr=fast", r"tasks\.cola: lr must be a number, got 'fast'"),
        ("tasks.cola.lr=0", "lr must be above 0"),
        ("tasks.cola.batch_size=3.5", "batch_size must be a whole number, got 3.5"),
        ("tasks.cola.seeds=[1,a]", "seeds must be a list of whole numbers"),
        ("tasks.cola.seeds=[1,1]", "a seed occurs twice"),
        ("tasks.cola.optimizer=adam", "optimizer must be one of decoupled_adamw, torch_adamw"),
        ("tasks.cola.pooling=max", "pooling must be one of null, cls, mean; got 'max'"),
        ("tasks.mnli.start=mnli", "MNLI cannot start from MNLI"),
        ("job.max_duration=1ep", r"job\.max_duration is set per task"),
        ("predikt=true", "Unknown key 'predikt' in .* Did you mean 'predict'"),
        ("predict=maybe", "predict must be true or false"),
        ("nonsense", "'nonsense' is not key=value"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_sweep(sweep_file("m2-bert-base"), [override])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no sweep file .*none\.yaml"):
        load_sweep(tmp_path / "none.yaml")
    path = tmp_path / "sweep.yaml"
    path.write_text("include: other.yaml\n")
    with pytest.raises(ValueError, match=r"no sweep file .*other\.yaml.*included by .*sweep\.yaml"):
        load_sweep(path)
    path.write_text("include: sweep.yaml\n")
    with pytest.raises(ValueError, match="includes itself"):
        load_sweep(path)
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"sweep\.yaml is not YAML"):
        load_sweep(path)
    path.write_text("name: x\n")
    with pytest.raises(ValueError, match="`tasks` must be a section"):
        load_sweep(path)


def test_a_sweep_from_random_weights_still_fine_tunes_its_mnli_model(capsys):
    """Without a start, training from random weights must be asked for."""
    config = str(sweep_file("m2-bert-base"))
    assert main(["glue", "--config", config]) == 1
    assert "--start is missing" in capsys.readouterr().err
    assert job("m2-bert-base", "cola", "model.pretrained=false")["model"]["pretrained"] is False
    assert "pretrained" not in job("m2-bert-base", "rte", "model.pretrained=false")["model"]
