"""The callback `run_summary`: a line when a run starts, a block when it ends, and `config.yaml`."""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from composer.core import State, Time
from composer.loggers import ConsoleLogger, Logger, ProgressBarLogger
from composer.utils import dist, format_name_with_dist, format_name_with_dist_and_time
from llmfoundry.interfaces import CallbackWithConfig
from tqdm import tqdm
from transformers import PreTrainedModel

from m2_plugin.files import read_json, write_atomically
from m2_plugin.foundry.callbacks import local_save_folder
from m2_plugin.foundry.evaluated import evaluated

__all__ = ["RunSummary", "count_parameters"]

log = logging.getLogger(__name__)

METRICS = "metrics.json"  # of eval_results
LAST = 20  # batches whose mean loss the block shows
# The end of a model's class: what it learns, and a command that uses the saved folder.
TASKS = {
    "ForMaskedLM": (
        "masked language modelling",
        "composer train.py yamls/finetune/text-classification.yaml variables.start={model} "
        "variables.train=FILE variables.eval=FILE",
    ),
    "ForCausalLM": ("causal language modelling", ""),
    "ForSequenceClassification": (
        "text classification",
        "m2-plugin predict FILE --model {model} --out predictions.csv",
    ),
    "ForTokenClassification": (
        "token classification",
        "m2-plugin predict FILE --model {model} --out predictions.jsonl",
    ),
    "ForQuestionAnswering": (
        "question answering",
        "m2-plugin predict FILE --model {model} --out predictions.jsonl",
    ),
    "ForMultipleChoice": ("multiple choice", ""),
    "ForTextEmbedding": (
        "text embedding",
        "m2-plugin embed FILE --text-column COLUMN --model {model} --out vectors.npy",
    ),
}
UNITS = {"ba": "batch", "ep": "epoch", "sp": "sample", "tok": "token", "sec": "second"}


class RunSummary(CallbackWithConfig):
    """Say what a run trains when it starts, and what it has reached when it ends.

    Rank 0 writes both to stderr, whatever `python_log_level` is. It also writes the run's settings
    to `config.yaml` in a local `save_folder`: `composer train.py .../config.yaml` repeats the run,
    and `m2-plugin train-report` shows the settings.

    The progress bar and the console then do not print Composer's own list of hyperparameters.

    Args:
        train_config: The run's settings; llm-foundry passes them.
    """

    def __init__(self, train_config: dict[str, Any]):
        self.config = train_config
        self.losses: deque[float] = deque(maxlen=LAST)
        self.metrics: dict[str, dict[str, float | None]] = {}
        self.began = 0.0
        self.first_batch = 0
        self.ended = False
        self.block: list[str] = []

    def init(self, state: State, logger: Logger) -> None:
        """Set up the output."""
        del state
        for destination in logger.destinations:
            if isinstance(destination, ProgressBarLogger | ConsoleLogger):
                destination.hparams_already_logged_to_console = True
        log.handlers = [_Handler()]
        log.setLevel(logging.INFO)
        log.propagate = False  # the root's format has a time, a process and a thread

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say what is trained, from what; write the settings."""
        self.began, self.first_batch = time.monotonic(), state.timestamp.batch.value
        parameters = count_parameters(state)
        logger.log_hyperparameters({"n_params": parameters})
        if dist.get_global_rank() != 0:
            return
        log.info(
            "Training %s, %s parameters: %s, %s.",
            _name(state, self.config),
            _rounded(parameters),
            _amount(state, self.config),
            _origin(state, self.config),
        )
        folder = local_save_folder(state)
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
            text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
            write_atomically(os.path.join(folder, "config.yaml"), text)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Keep the loss, which Composer has brought to the CPU."""
        del logger
        loss = state.total_loss_dict.get("loss/train/total")
        if loss is not None:
            self.losses.append(float(loss))

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Keep the metrics. All ranks take part, since `compute` is a collective operation."""
        del logger
        self.metrics = evaluated(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Note that training is over; evaluation and files may follow."""
        del state, logger
        self.ended = True

    def close(self, state: State, logger: Logger) -> None:
        """Compose the block: all files are written now."""
        del logger
        if self.ended and dist.get_global_rank() == 0:
            self.block = self._block(state)

    def post_close(self) -> None:
        """Write the block: the progress bar is closed now."""
        if self.block:
            log.info("%s", "\n".join(self.block))
        self.block = []

    def _block(self, state: State) -> list[str]:
        batches = state.timestamp.batch.value
        took = _duration(time.monotonic() - self.began)
        title = f"{state.run_name} has trained {_count(batches, 'batch')} in {took}"
        if self.first_batch:
            title = (
                f"{state.run_name} has trained batches {self.first_batch + 1:,} to {batches:,} in "
                f"{took}"
            )
        rows = []
        if self.losses:
            mean = sum(self.losses) / len(self.losses)
            rows.append(("training loss", f"{mean:.6g} (last {_count(len(self.losses), 'batch')})"))
        report = self._report(state)
        for label, metrics in self.metrics.items():
            rows.append(("evaluation" if label == "eval" else label, _listed(metrics)))
            if commonest := report.get("commonest_answer", {}).get(label):
                rows.append(("  commonest answer", _listed(commonest)))
            if label in report.get("constant_predictions", ()):
                rows.append(("  note", "the model gives the same answer to all rows"))
        files = self._files(state)
        rows += files.items()
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"{title}.", *(f"  {name:{width}}  {value}" for name, value in rows)]
        folder, model = local_save_folder(state), files.get("model")
        commands = [] if folder is None else [f"m2-plugin train-report {folder}"]
        command = next((c for end, (_, c) in TASKS.items() if _class(state).endswith(end)), "")
        if model is not None and command:
            commands.append(command.format(model=model))
        return lines + [f"Next: {command}" for command in commands]

    def _report(self, state: State) -> dict[str, Any]:
        """Return what `eval_results` wrote in this run's folder; {} if it wrote nothing."""
        folder = local_save_folder(state)
        if folder is None:
            return {}
        report: dict[str, Any] = read_json(f"{folder}/{METRICS}", missing_ok=True) or {}
        return report if report.get("batches") == state.timestamp.batch.value else {}

    def _files(self, state: State) -> dict[str, str]:
        """Return the files and folders that the run has left, by what they are."""
        found: dict[str, str] = {}
        saver = (self.config.get("callbacks") or {}).get("hf_checkpointer")
        if saver is not None:
            name = saver.get("huggingface_folder_name", "ba{batch}")
            path = os.path.join(saver["save_folder"], "huggingface", name)
            found["model"] = format_name_with_dist_and_time(path, state.run_name, state.timestamp)
        folder = local_save_folder(state)
        if folder is not None:
            latest = sorted(Path(folder).glob("latest-*"))  # a link; of a sharded run, a folder
            if latest:
                found["checkpoint"] = str(latest[0])
            for what, name in (("curve", "loss_curve.png"), ("metrics", METRICS)):
                found[what] = os.path.join(folder, name)
        return {what: path for what, path in found.items() if "://" in path or Path(path).exists()}


class _Handler(logging.Handler):
    """Write a record to stderr, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _inner(state: State) -> Any:
    """Return the transformers model in Composer's, even if DDP or FSDP wraps them."""
    outer = getattr(state.model, "module", state.model)
    inner = getattr(outer, "model", outer)
    return getattr(inner, "module", inner)


def _class(state: State) -> str:
    return type(_inner(state)).__name__


def _name(state: State, config: dict[str, Any]) -> str:
    """Return the type of the model, and what it learns."""
    inner = getattr(_inner(state), "config", None)
    kind = getattr(inner, "model_type", None) or config["model"]["name"]
    if getattr(inner, "problem_type", None) == "regression":
        return f"{kind} (regression)"
    task = next((task for end, (task, _) in TASKS.items() if _class(state).endswith(end)), None)
    return f"{kind} ({task})" if task else str(kind)


def count_parameters(state: State) -> int:
    """Count the parameters; sharded ones have other sizes, so count those of a model like it."""
    inner = _inner(state)
    if state.fsdp_config is not None and isinstance(inner, PreTrainedModel):
        with torch.device("meta"):
            inner = type(inner)(inner.config)
        inner.tie_weights()
    return sum(parameter.numel() for parameter in inner.parameters())


def _rounded(number: int) -> str:
    """Return a number of two digits or more, with a unit: 4.3 M, 341 M, 12,345."""
    if number < 10**6:
        return f"{number:,}"
    millions = number / 10**6
    return f"{millions:.1f} M" if millions < 100 else f"{millions:,.0f} M"


def _count(number: int, unit: str) -> str:
    plural = "es" if unit == "batch" else "s"
    return f"{number:,} {unit}{'' if number == 1 else plural}"


def _listed(metrics: Mapping[str, float | None]) -> str:
    return ", ".join(
        f"{name} {'not finite' if value is None else f'{value:.6g}'}"
        for name, value in metrics.items()
    )


def _amount(state: State, config: dict[str, Any]) -> str:
    """Return how long the run trains, and on what batches."""
    assert state.max_duration is not None
    total: Time = state.max_duration
    unit = UNITS.get(total.unit.value, total.unit.value)
    text = _count(total.value, unit)
    if unit == "epoch" and state.dataloader_len is not None:
        text += f" of {_count(state.dataloader_len.value, 'batch')}"
    elif unit != "batch":
        text += " in batches"
    rows, length = config.get("global_train_batch_size"), config.get("max_seq_len")
    if rows and length:
        fixed = _class(state).endswith(("ForMaskedLM", "ForCausalLM"))
        text += f" of {rows:,} × {'' if fixed else 'at most '}{length:,} tokens"
    return text


def _origin(state: State, config: dict[str, Any]) -> str:
    """Return what the weights come from."""
    batch, folder = state.timestamp.batch.value, local_save_folder(state)
    if batch:
        where = "a checkpoint" if folder is None else folder
        return f"continuing after batch {batch:,} from {where}"
    model = config["model"]
    start = model.get("pretrained_model_name_or_path")
    if config.get("load_path"):
        start = format_name_with_dist(config["load_path"], state.run_name)
    elif model.get("pretrained") is False:
        start = None
    return f"from {start}" if start else "from scratch"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
