"""The callback `model_card`: a README.md in each transformers folder that a run writes."""

import copy
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist_and_time
from llmfoundry.callbacks.hf_checkpointer import HuggingFaceCheckpointer
from llmfoundry.interfaces import CallbackWithConfig
from llmfoundry.utils.config_utils import to_dict_container

from m2_plugin.checkpoints.card import new_card, shown_name, table
from m2_plugin.checkpoints.folder import CARD
from m2_plugin.files import write_atomically
from m2_plugin.foundry.eval_results import PACKAGES
from m2_plugin.foundry.evaluated import evaluated, inner_model

__all__ = ["ModelCardWriter"]

# Keys of a dataset that a card tells, beside the names of its streams.
DATA_KEYS = ("task", "max_seq_len", "mlm_probability", "shuffle")
SOURCES = ("hf_name", "remote", "local", "path", "data_files", "folder")


class ModelCardWriter(CallbackWithConfig):
    """Write a card into each folder that `hf_checkpointer` saves; `model_card` in a YAML.

    The card has the model's sizes, the data, the recipe, the metrics of the last evaluation, and
    code that loads the folder. It tells no path but its last part, and of the settings only those
    that are named here. It has a licence only if one is given. The last folder's card is written
    again if an evaluation of the final weights follows. The folder of a run that only converts a
    checkpoint (`only_hf_checkpoint`) has none, since nothing is trained.

    Args:
        train_config: The run's settings; llm-foundry passes them.
        name: The model's name; by default the run's.
        license: The licence of the weights, by the hub's identifiers (`apache-2.0`).
        language: The language of the data (`en`), or a list.
        datasets: Names of data sets on the hub, such as `allenai/c4`.
        description: A text in Markdown about the model.

    Raises:
        ValueError: If an argument is not text or, for the two lists, texts.
    """

    def __init__(
        self,
        train_config: dict[str, Any],
        name: str | None = None,
        license: str | None = None,
        language: str | Sequence[str] | None = None,
        datasets: str | Sequence[str] | None = None,
        description: str | None = None,
    ):
        for key, value, many in (
            ("name", name, False),
            ("license", license, False),
            ("language", language, True),
            ("datasets", datasets, True),
            ("description", description, False),
        ):
            parts = list(value) if many and isinstance(value, list | tuple) else [value]
            if value is not None and not all(isinstance(p, str) and p.strip() for p in parts):
                kinds = "a text or a list of texts" if many else "a text"
                raise ValueError(f"model_card.{key} must be {kinds}, got {value!r}.")
        self.settings = to_dict_container(train_config)
        self.name = name
        self.description = description
        self.metadata = {"license": license, "language": language, "datasets": datasets}
        self.metrics: dict[str, dict[str, float | None]] = {}
        self.evaluated_at = 0
        self.fit_ended = False

    def init(self, state: State, logger: Logger) -> None:
        """Keep what the model is, before it is sharded."""
        del logger
        composer_model = inner_model(state)
        model = composer_model.model
        self.config = copy.deepcopy(model.config)
        self.config.architectures = [type(model).__name__]
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.has_tokenizer = composer_model.tokenizer is not None

    def batch_start(self, state: State, logger: Logger) -> None:
        """Write the cards of folders that were saved since the last batch."""
        del logger
        self._write_all(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write the cards of folders that were saved at the end."""
        del logger
        self.fit_ended = True
        self._write_all(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Keep the metrics. All ranks take part, since computing them is a collective operation."""
        del logger
        self.metrics = evaluated(state)
        self.evaluated_at = state.timestamp.batch.value
        if self.fit_ended:
            self._write_all(state)

    def _write_all(self, state: State) -> None:
        if dist.get_global_rank() != 0:
            return
        # Folders are saved after this callback's turn at the end of a batch or an epoch. The end
        # of an epoch sets another time, with the same number of batches.
        times = [t for t in (state.previous_timestamp, state.timestamp) if t is not None]
        for saver in state.callbacks:
            if isinstance(saver, HuggingFaceCheckpointer):
                pattern = str(Path(saver.save_dir_format_str) / saver.huggingface_folder_name_fstr)
                folders = [
                    format_name_with_dist_and_time(pattern, state.run_name, time)
                    for time in times
                    if saver.last_checkpoint_batch == time.batch == state.timestamp.batch
                ]
                for folder in dict.fromkeys(folders):
                    self._write(state, saver, folder)

    def _write(self, state: State, saver: HuggingFaceCheckpointer, folder: str) -> None:
        if saver.remote_ud is None:
            if os.path.isfile(os.path.join(folder, "config.json")):
                write_atomically(os.path.join(folder, CARD), self._card(state))
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / CARD
            path.write_text(self._card(state), encoding="utf-8")
            # It keeps a copy of the file.
            saver.remote_ud.upload_file(state, f"{folder}/{CARD}", path, overwrite=True)

    def _card(self, state: State) -> str:
        results = [
            (data, metric, value)
            for data, metrics in self.metrics.items()
            for metric, value in metrics.items()
            if value is not None
        ]
        start = (self.settings.get("model") or {}).get("pretrained_model_name_or_path")
        start = None if start is None else shown_name(start)
        sections = [
            ("Description", self.description or ""),
            ("Training data", _data(self.settings)),
            ("Training", _recipe(self.settings, state, start)),
            ("Results", _results(results, self.evaluated_at)),
        ]
        return new_card(
            self.name or state.run_name,
            self.config,
            self.parameters,
            [(title, text) for title, text in sections if text],
            has_tokenizer=self.has_tokenizer,
            results=results,
            base_model=start if start and "/" in start else None,
            **self.metadata,
        )


def _data(settings: Mapping[str, Any]) -> str:
    """Describe the training loader: the names of its sources, and how texts are read."""
    loader = settings.get("train_loader") or {}
    dataset = loader.get("dataset") or {}
    streams = dataset.get("streams") or {"": dataset}
    names = [_source(name, stream) for name, stream in streams.items()]
    known = {key: dataset.get(key) for key in DATA_KEYS}
    rows = {"Loader": loader.get("name"), "Sources": ", ".join(n for n in names if n), **known}
    return table(rows) if loader else ""


def _source(name: str, stream: Mapping[str, Any]) -> str:
    """Name a stream: its key, the last part of its path, and its share."""
    place = next((stream[key] for key in SOURCES if isinstance(stream.get(key), str)), None)
    parts = [name, None if place is None else shown_name(place), stream.get("split")]
    text = " ".join(str(part) for part in parts if part)
    shares = [f"{key} {stream[key]}" for key in ("proportion", "repeat") if stream.get(key)]
    return text + (f" ({', '.join(shares)})" if shares else "")


def _recipe(settings: Mapping[str, Any], state: State, start: str | None) -> str:
    time = state.timestamp
    rows: dict[str, Any] = {
        "Started from": start and f"`{start}`",
        "Batches": time.batch.value,
        "Samples": time.sample.value,
        "Tokens": time.token.value or None,
        "Batch size": settings.get("global_train_batch_size"),
        "Optimizer": _call(settings.get("optimizer")),
        "Schedule": _call(settings.get("scheduler")),
        "Masking": _call((settings.get("callbacks") or {}).get("mlm_probability_schedule")),
        **{f"`{key}`": _call(value) for key, value in (settings.get("algorithms") or {}).items()},
        "`max_duration`": settings.get("max_duration"),
        "Precision": state.precision.value,
        "Seed": str(state.rank_zero_seed),
        "Devices": f"{dist.get_world_size()} × {state.device.name}",
        "Versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }
    return table(rows)


def _call(section: Any) -> str | None:
    """Show the name and the keys of a section of the settings: `name (key: value, ...)`."""
    if not isinstance(section, Mapping):
        return None
    keys = ", ".join(f"{k}: {json.dumps(v)}" for k, v in section.items() if k != "name")
    return f"{section.get('name', '')} ({keys})".strip() if keys else section.get("name")


def _results(results: Sequence[tuple[str, str, float]], batch: int) -> str:
    rows = "".join(f"\n| {data} | {metric} | {value:.4g} |" for data, metric, value in results)
    header = f"Of the evaluation after batch {batch:,}:\n\n| data | metric | value |\n"
    return f"{header}| --- | --- | ---: |{rows}" if rows else ""
