"""Sweep files: the published recipe per task, and the training job of one task and seed.

A sweep file (`yamls/finetune/glue/sweep-*.yaml`) has a model, shared settings of all jobs and a few
hyper-parameters per task. `job_config` builds from it the YAML that `composer train.py` runs for
one task and seed. This module does not import llm-foundry, which would slow down the sweep's start.
"""

import copy
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from m2_plugin.constants import POOLINGS
from m2_plugin.glue import tasks as glue_tasks
from m2_plugin.suggest import check_keys

__all__ = ["Recipe", "Sweep", "job_config", "load_sweep", "to_yaml", "write_yamls"]

OPTIMIZERS = ("decoupled_adamw", "torch_adamw")
MNLI = "mnli"
MODEL_FOLDER = "huggingface/final"  # where hf_checkpointer writes a job's model
# Keys that come from the task or the seed, so that `job` may not set them.
PER_TASK = {
    "callbacks.eval_results",
    "callbacks.hf_checkpointer",
    "callbacks.model_card",
    "device_train_microbatch_size",
    "eval_interval",
    "global_train_batch_size",
    "max_duration",
    "max_seq_len",
    "optimizer.lr",
    "optimizer.name",
    "optimizer.weight_decay",
    "run_name",
    "seed",
}
# Keys for a single run only: a killed job of a sweep starts again from its beginning.
SINGLE_RUN: dict[str, Any] = {
    "save_folder": "${variables.out}",
    "save_interval": "1ep",
    "save_num_checkpoints_to_keep": 1,
    "autoresume": True,
}
CALLBACKS: dict[str, Any] = {
    "eval_results": {"folder": "${variables.out}"},
    "model_card": {},
    "hf_checkpointer": {
        "save_folder": "${variables.out}",
        "save_interval": "1dur",
        "huggingface_folder_name": "final",
    },
}


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one task.

    Attributes:
        optimizer: "decoupled_adamw" or "torch_adamw", as in llm-foundry's registry.
        lr: The peak learning rate.
        weight_decay: The decay per step (decoupled), or its factor on the learning rate (torch).
        max_duration: The duration in Composer's units, such as "3ep".
        batch_size: The rows of a global training batch.
        max_seq_len: The tokens to cut or pad to.
        eval_interval: The interval in Composer's units, such as "500ba".
        pooling: What the classifier reads, "cls" or "mean"; None leaves it to the model.
        seeds: The seeds, one job each.
        precision: A precision that replaces the job's.
        start: "mnli" to start from the fine-tuned model of MNLI.
    """

    optimizer: str
    lr: float
    weight_decay: float
    max_duration: str
    batch_size: int
    max_seq_len: int
    eval_interval: str
    pooling: str | None
    seeds: tuple[int, ...]
    precision: str | None = None
    start: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file, merged with its included file and with overrides.

    Attributes:
        name: The first part of the runs' names.
        tasks: The recipes by task name, in the order of the file.
        model: The `model` section of the jobs.
        job: The shared settings in llm-foundry's schema.
        variables: The values of `${variables.*}`.
        start: The checkpoint to fine-tune, whose architecture the model has; None needs
            `model.pretrained: false`.
        mnli_checkpoint: A checkpoint to use instead of this sweep's MNLI model.
        predict: Whether to predict the test splits too.
        keep_models: Whether to keep every job's model.
        paper_average: The paper's score of this model in percent, or None.
    """

    name: str
    tasks: dict[str, Recipe]
    model: dict[str, Any]
    job: dict[str, Any]
    variables: dict[str, Any]
    start: str | None = None
    mnli_checkpoint: str | None = None
    predict: bool = True
    keep_models: bool = False
    paper_average: float | None = None


TOP_KEYS = {field.name for field in dataclasses.fields(Sweep)} - {"paper_average"}
TOP_KEYS |= {"default_seed", "paper"}
RECIPE_KEYS = {field.name for field in dataclasses.fields(Recipe)}


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file.

    Args:
        path: The file. Its `include`, relative to it, is read first.
        overrides: Texts `key=value`, such as `tasks.cola.lr=3.0e-5`, applied last.

    Raises:
        ValueError: If a file is missing or is not YAML, or if a key or value is wrong; the message
            names it.
    """
    merged = OmegaConf.merge(_load_files(Path(path)), _from_dotlist(overrides))
    assert isinstance(merged, DictConfig)
    raw: Any = OmegaConf.to_container(merged)
    where = str(path)
    check_keys(raw, TOP_KEYS, where)
    for section in ("tasks", "model", "job", "variables"):
        if not isinstance(raw.get(section), dict) or not raw[section]:
            raise ValueError(f"{where}: `{section}` must be a section with keys.")
    if "name" not in raw["model"]:
        raise ValueError(f"{where}: `model` needs `name`, such as m2_bert_classification.")
    for dotted in sorted(PER_TASK):
        if _lookup(raw["job"], dotted) is not None:
            raise ValueError(f"{where}: job.{dotted} is set per task; set tasks.<task> instead.")
    paper = raw.get("paper") or {}
    check_keys(paper, {"average"}, f"{where}: paper")
    default_seed = raw.get("default_seed", 19)
    tasks = {
        name: _recipe(name, settings, default_seed, where)
        for name, settings in raw["tasks"].items()
    }
    for key in ("predict", "keep_models"):
        if not isinstance(raw.get(key, False), bool):
            raise ValueError(f"{where}: {key} must be true or false, got {raw[key]!r}.")
    return Sweep(
        name=_expect(raw, "name", str, where),
        tasks=tasks,
        model=raw["model"],
        job=raw["job"],
        variables=raw["variables"],
        start=raw.get("start"),
        mnli_checkpoint=raw.get("mnli_checkpoint"),
        predict=raw.get("predict", True),
        keep_models=raw.get("keep_models", False),
        paper_average=paper.get("average"),
    )


def _load_files(path: Path, including: tuple[Path, ...] = ()) -> DictConfig:
    if not path.is_file():
        by = f", included by {including[-1]}" if including else ""
        raise ValueError(f"There is no sweep file {str(path)!r}{by}.")
    if path in including:
        raise ValueError(f"{path} includes itself.")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} is not a mapping of keys to values.")
    include = config.pop("include", None)
    if include is None:
        return config
    merged = OmegaConf.merge(_load_files(path.parent / include, (*including, path)), config)
    assert isinstance(merged, DictConfig)
    return merged


def _from_dotlist(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r} is not key=value, such as tasks.cola.lr=3.0e-5.")
    return OmegaConf.from_dotlist(list(overrides))


def _lookup(section: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        section = section.get(key) if isinstance(section, dict) else None
    return section


def _expect(section: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = section.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        names = {str: "text", int: "a whole number", float: "a number"}
        raise ValueError(f"{where}: {key} must be {names[kind]}, got {value!r}.")
    return value


def _recipe(name: str, settings: Any, default_seed: int, file: str) -> Recipe:
    task = glue_tasks.task(name)
    where = f"{file}: tasks.{name}"
    if not task.score_metrics:
        raise ValueError(f"{where}: {task.folder} does not count in the score; remove it.")
    if not isinstance(settings, dict):
        raise ValueError(f"{where} must be a section with keys, got {settings!r}.")
    check_keys(settings, RECIPE_KEYS, where)
    seeds = settings.get("seeds")
    seeds = [default_seed] if seeds is None else seeds
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise ValueError(f"{where}: seeds must be a list of whole numbers, got {seeds!r}.")
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"{where}: a seed occurs twice in {seeds!r}.")
    recipe = Recipe(
        optimizer=_expect(settings, "optimizer", str, where),
        lr=_expect(settings, "lr", float, where),
        weight_decay=_expect(settings, "weight_decay", float, where),
        max_duration=_expect(settings, "max_duration", str, where),
        batch_size=_expect(settings, "batch_size", int, where),
        max_seq_len=_expect(settings, "max_seq_len", int, where),
        eval_interval=_expect(settings, "eval_interval", str, where),
        pooling=settings.get("pooling"),
        seeds=tuple(seeds),
        precision=settings.get("precision"),
        start=settings.get("start"),
    )
    for key, accepted in (
        ("optimizer", OPTIMIZERS),
        ("pooling", (None, *POOLINGS)),
        ("start", (None, MNLI)),
    ):
        if getattr(recipe, key) not in accepted:
            choices = ", ".join("null" if choice is None else choice for choice in accepted)
            raise ValueError(
                f"{where}: {key} must be one of {choices}; got {getattr(recipe, key)!r}."
            )
    if name == MNLI and recipe.start:
        raise ValueError(f"{where}: MNLI cannot start from MNLI.")
    for key in ("lr", "batch_size", "max_seq_len"):
        if getattr(recipe, key) <= 0:
            raise ValueError(f"{where}: {key} must be above 0, got {getattr(recipe, key)!r}.")
    return recipe


def job_config(
    sweep: Sweep,
    task_name: str,
    seed: int | None = None,
    *,
    run_name: str | None = None,
    out: str | None = None,
    start: str | None = None,
) -> dict[str, Any]:
    """Build the YAML of one task for `composer train.py`.

    Args:
        sweep: The sweep.
        task_name: One of its tasks.
        seed: One of the task's seeds; by default the first.
        run_name: The name of the run; by default `NAME-TASK`.
        out: The folder for all results; by default `./runs/RUN_NAME`.
        start: The checkpoint to start from; by default the sweep's. For a task that starts from
            MNLI, by default the model that the single run of MNLI writes.

    Raises:
        ValueError: If the task is not in the sweep.
    """
    if task_name not in sweep.tasks:
        glue_tasks.task(task_name)
        raise ValueError(f"{sweep.name} has no task {task_name!r}: {', '.join(sweep.tasks)}.")
    task, recipe = glue_tasks.task(task_name), sweep.tasks[task_name]
    run_name = run_name or f"{sweep.name}-{task_name}"
    job = copy.deepcopy(sweep.job)
    optimizer, callbacks = job.pop("optimizer", {}), job.pop("callbacks", {})
    precision = job.pop("precision", "amp_bf16")
    return {
        "variables": {
            "run_name": run_name,
            "out": out or f"./runs/{run_name}",
            "start": _start(sweep, recipe) if start is None else start,
            **sweep.variables,
            "max_seq_len": recipe.max_seq_len,
        },
        "run_name": "${variables.run_name}",
        "seed": recipe.seeds[0] if seed is None else seed,
        "precision": recipe.precision or precision,
        "max_seq_len": "${variables.max_seq_len}",
        "model": _model(sweep.model, task, recipe),
        "tokenizer": _tokenizer(job.pop("tokenizer", {})),
        **_loaders(job.pop("train_loader"), job.pop("eval_loader"), task),
        "optimizer": {
            "name": recipe.optimizer,
            "lr": recipe.lr,
            "weight_decay": recipe.weight_decay,
            **optimizer,
        },
        "scheduler": job.pop("scheduler"),
        "max_duration": recipe.max_duration,
        "eval_interval": recipe.eval_interval,
        "global_train_batch_size": recipe.batch_size,
        "device_train_microbatch_size": recipe.batch_size,
        **job,
        **copy.deepcopy(SINGLE_RUN),
        "progress_bar": True,
        "log_to_console": False,
        "callbacks": {**callbacks, **copy.deepcopy(CALLBACKS)},
    }


def _start(sweep: Sweep, recipe: Recipe) -> str | None:
    if not recipe.start:
        return sweep.start
    return sweep.mnli_checkpoint or f"./runs/{sweep.name}-{MNLI}/{MODEL_FOLDER}"


def _tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    kwargs = {"model_max_length": "${variables.max_seq_len}", **tokenizer.get("kwargs", {})}
    return {**tokenizer, "kwargs": kwargs}


def _loaders(train: dict[str, Any], evaluation: Any, task: glue_tasks.Task) -> dict[str, Any]:
    return {
        "train_loader": _loader(
            train,
            task.name,
            task.train_split or "train",
            shuffle_seed="${seed}",
            max_samples="${variables.max_train_samples}",
        ),
        "eval_loader": [
            {"label": task.eval_label(split), **_loader(evaluation, task.name, split)}
            for split in task.eval_splits
        ],
    }


def _model(model: dict[str, Any], task: glue_tasks.Task, recipe: Recipe) -> dict[str, Any]:
    model = copy.deepcopy(model)
    if recipe.start:
        model.pop("pretrained", None)  # false is for random weights in place of the sweep's start
    overrides = model.pop("config_overrides", None) or {}
    if recipe.pooling is not None:
        overrides["classifier_pooling"] = recipe.pooling
    if recipe.start:
        model.pop("pretrained", None)  # what comes from MNLI is trained
    config = {
        "name": model.pop("name"),
        "pretrained_model_name_or_path": "${variables.start}",
        "num_labels": task.num_labels,
        "metrics": list(task.metrics),
        # For the curve of the loss.
        "additional_eval_metrics": ["mse" if task.is_regression else "cross_entropy"],
        **model,
    }
    return config | ({"config_overrides": overrides} if overrides else {})


def _loader(loader: dict[str, Any], task: str, split: str, **keys: Any) -> dict[str, Any]:
    loader = copy.deepcopy(loader)
    dataset = {
        "task": task,
        "split": split,
        "path": "${variables.glue_path}",
        "max_seq_len": "${variables.max_seq_len}",
        **loader.pop("dataset", {}),
        **keys,
    }
    return {"name": loader.pop("name"), "dataset": dataset, **loader}


def predict_loader(sweep: Sweep, task_name: str, split: str, label: str) -> dict[str, Any]:
    """Return a loader like those of the evaluation, for a split without labels.

    A broken row is an error: leaving it out would shift the rows after it.
    """
    loader = _loader(sweep.job["eval_loader"], task_name, split, on_error="raise")
    return {"label": label, **loader}


# --- text ----------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """A dumper with lists of scalars on one line, and `null` spelt out."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        del indentless  # list items are indented more than their key
        return super().increase_indent(flow, False)


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    flow = all(not isinstance(item, dict | list) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


def _represent_none(dumper: yaml.SafeDumper, data: None) -> yaml.Node:
    del data
    return dumper.represent_scalar("tag:yaml.org,2002:null", "null")


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(type(None), _represent_none)


def to_yaml(config: Mapping[str, Any]) -> str:
    """Return a config as YAML, with empty lines around larger sections."""
    parts: list[str] = []
    for key, value in config.items():
        text = yaml.dump({key: value}, Dumper=_Dumper, sort_keys=False, width=100)
        nested = isinstance(value, dict) or "\n  " in text
        if nested and parts and not parts[-1].endswith("\n\n"):
            parts.append("\n")
        parts.append(text + ("\n" if nested else ""))
    return "".join(parts).rstrip("\n") + "\n"


def render_task_yaml(sweep: Sweep, task_name: str, source: str) -> str:
    """Return the single-task YAML; its heading says how to run it and how to regenerate it."""
    paragraphs = [
        *_how_to_run(sweep, task_name),
        *_notes(sweep, task_name),
        "This file is generated from the sweep file. To change it, change the sweep file and run:",
        f"    m2-plugin glue --config {source} --write-yamls yamls/finetune/glue",
    ]
    lines = [line for paragraph in paragraphs for line in ("", *_wrap(paragraph))]
    heading = "".join(f"# {line}".rstrip() + "\n" for line in lines[1:])
    return heading + "\n" + to_yaml(job_config(sweep, task_name))


def _how_to_run(sweep: Sweep, task_name: str) -> list[str]:
    folder = glue_tasks.task(task_name).folder
    title = f"{folder} with {sweep.name}, by the published recipe (arXiv 2310.12109)"
    command = f"    composer -n 1 train.py yamls/finetune/glue/{sweep.name}-"
    checkpoint = "variables.start=FOLDER"
    if sweep.tasks[task_name].start:
        return [
            title,
            "As published, it starts from the encoder and pooler of the fine-tuned MNLI model:",
            f"{command}{MNLI}.yaml {checkpoint}\n{command}{task_name}.yaml",
            "`variables.start=FOLDER` starts from another model: a transformers folder, or a .pt "
            "file of Composer or of the M2 release. The architecture is that of this checkpoint.",
        ]
    return [
        title,
        f"{command}{task_name}.yaml {checkpoint}",
        "FOLDER is a transformers folder, or a .pt file of Composer or of the M2 release; its "
        "tokenizer and its architecture are used. `model.pretrained=false` takes the architecture "
        "only, and starts from random weights.",
    ]


def _notes(sweep: Sweep, task_name: str) -> list[str]:
    recipe = sweep.tasks[task_name]
    paragraphs = []
    notes = [
        "The data is the hub's `glue`; for official TSV files set `variables.glue_path=FOLDER`."
    ]
    if len(recipe.seeds) > 1:
        seeds = ", ".join(str(seed) for seed in recipe.seeds)
        notes.append(f"The published seeds are {seeds}: choose one with `seed=...`.")
    paragraphs.append(" ".join(notes))
    if recipe.pooling is not None:
        note = (
            "The reference never shuffled the training data for its published numbers; this recipe "
            "shuffles it."
        )
        if recipe.pooling == "mean" and task_name != "qnli":
            note += (
                " The reference also kept QNLI's mean pooling for the tasks after QNLI, so "
                "`classifier_pooling` is mean here."
            )
        paragraphs.append(note)
    return paragraphs


def _wrap(paragraph: str) -> list[str]:
    if paragraph.startswith("    "):
        return paragraph.split("\n")
    return textwrap.wrap(paragraph, width=96, break_on_hyphens=False, break_long_words=False)


def write_yamls(sweep: Sweep, source: str, folder: str | Path) -> list[Path]:
    """Write the single-task YAMLs of a sweep.

    Args:
        sweep: The sweep.
        source: The name of the sweep's file in the headings.
        folder: The folder of the files `NAME-TASK.yaml`; created if missing.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in sweep.tasks:
        path = folder / f"{sweep.name}-{name}.yaml"
        path.write_text(render_task_yaml(sweep, name, source), encoding="utf-8")
        written.append(path)
    return written
