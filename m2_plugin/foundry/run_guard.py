"""The callback `run_guard`: a killed run continues when the same command is run again."""

import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, format_name_with_dist, partial_format
from llmfoundry.callbacks.hf_checkpointer import HuggingFaceCheckpointer
from llmfoundry.interfaces import CallbackWithConfig
from torch.distributed.tensor import DTensor

from m2_plugin.files import InUseError, lock
from m2_plugin.foundry.errors import RunError

__all__ = ["RunGuard"]

log = logging.getLogger(__name__)

LOCK = ".run.lock"


class RunGuard(CallbackWithConfig):
    """Reserve `save_folder` for one run, and keep it in a state from which the run can continue.

    Composer writes a checkpoint under its final name and then moves the link to the latest one. If
    a run is killed between the two steps, the next start fails: Composer finds a checkpoint that is
    newer than the one of the link.

    - At the start the folder is locked. The system drops the lock when the process ends.
    - With `autoresume`, unfinished checkpoints are removed at the start, and the link is set to the
      newest whole one. Checkpoints of a killed run count for `save_num_checkpoints_to_keep`.
    - A run that has reached its `max_duration` ends without an error.
    - A run whose loader gives no batch ends with an error.
    - Transformers folders are written before the checkpoint of the same batch, so that they are
      whole if the checkpoint is.
    - If a weight is not finite, the run ends with an error instead of saving a checkpoint.

    A remote `save_folder` is neither locked nor tidied. If the file system has no locks, a warning
    says so and nothing is removed. A run on another machine is noticed only if the file system's
    locks cover both machines.

    Args:
        train_config: The run's settings; llm-foundry passes them.

    Raises:
        RunError: At the start, if another run uses the folder, if the checkpoint to load is not
            whole, if either this checkpoint or the run is sharded and the other is not, or if the
            training loader gives no batch.
        RuntimeError: Before a checkpoint, if a weight is not finite.
    """

    def __init__(self, train_config: dict[str, Any]):
        self.saves = create_interval_scheduler(train_config.get("save_interval", "1000ba"))
        self.export_only = bool(train_config.get("only_hf_checkpoint"))
        self.autoresume = bool(train_config.get("autoresume"))
        self.load_path = train_config.get("load_path")
        self.resumes = False
        self.lock: IO[str] | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Lock and tidy the folder before Composer looks for a checkpoint there."""
        del logger
        found: list[Any] = [None, False]
        if dist.get_global_rank() == 0:
            try:
                found = [self._begin(state), self.resumes]
            except InUseError as error:
                found[0] = str(error)
            except (OSError, KeyError) as error:  # a full disk, an unknown placeholder
                found[0] = f"save_folder cannot be used: {error!r}"
        dist.broadcast_object_list(found, src=0)  # so that all ranks end together
        refusal, self.resumes = found
        if refusal is not None:
            raise RunError(refusal)

    def _begin(self, state: State) -> str | None:
        """Lock and tidy the folder; return why the run must not start, or None."""
        saver, sharded = _local_saver(state), _sharded(state)
        if saver is not None:
            folder = Path(format_name_with_dist(saver.folder, state.run_name))
            folder.mkdir(parents=True, exist_ok=True)
            what = f"save_folder {str(folder)!r} is in use by another run"
            # Forked workers of the loader live on for some time if the run is killed.
            self.lock = lock(folder / LOCK, what, "set another save_folder", forks=False)
            link = _link(folder, saver, state)
            if not self.autoresume:
                # Composer refuses files of another run, and overwrites folders.
                if sharded and not saver.overwrite and _checkpoints(folder, saver, state):
                    return (
                        f"save_folder {str(folder)!r} has sharded checkpoints of another run: set "
                        "another save_folder, or autoresume: true to continue from them."
                    )
            elif link is not None and link.exists() and link.is_dir() != sharded:
                return _unfit(link.resolve(), "the checkpoint in save_folder,", sharded)
            else:
                newest = _tidy(folder, saver, state, delete=self.lock is not None)
                self.resumes = newest is not None
                if newest is not None and self.load_path:
                    log.warning(
                        "Continuing from %s in save_folder, not from load_path %s. To start from "
                        "load_path, set another save_folder.",
                        newest.name,
                        self.load_path,
                    )
        if self.resumes or not self.load_path:
            return None
        return _unfit(
            Path(format_name_with_dist(self.load_path, state.run_name)), "load_path", sharded
        )

    def after_load(self, state: State, logger: Logger) -> None:
        """End a run that is finished."""
        del logger
        elapsed = state.get_elapsed_duration()
        if elapsed is None or elapsed < 1 or self.export_only:
            return
        if self.load_path and not self.resumes:
            return  # the end of another run: Composer says that nothing is left to train
        log.warning(
            "%s is finished: its checkpoint is at batch %d and max_duration is %s. Set a longer "
            "max_duration to train on.",
            state.run_name,
            state.timestamp.batch.value,
            state.max_duration,
        )
        raise SystemExit(0)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Raise an error if there is no batch; let transformers folders be written first."""
        del logger
        if state.dataloader_len is not None and state.dataloader_len.value == 0:
            samples = len(getattr(state.dataloader, "dataset", ()))
            size = getattr(state.dataloader, "batch_size", None)
            raise RunError(
                f"train_loader gives no batch: an epoch has {samples} samples per rank and a batch "
                f"has {size}. Set train_loader.drop_last to false or a smaller "
                "global_train_batch_size, use fewer ranks, or give more data."
            )
        # llm-foundry sorts them the other way round, since uploads to remote folders take time.
        if _local_saver(state) is not None:
            state.callbacks = sorted(state.callbacks, key=_order)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Check the weights if they are about to be saved."""
        del logger
        if self.saves(state, Event.BATCH_CHECKPOINT):
            _check_finite(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Check the weights if they are about to be saved."""
        del logger
        if self.saves(state, Event.EPOCH_CHECKPOINT):
            _check_finite(state)

    def close(self, state: State, logger: Logger) -> None:
        """Unlock the folder."""
        del state, logger
        if self.lock is not None:
            self.lock.close()


def _local_saver(state: State) -> CheckpointSaver | None:
    for callback in state.callbacks:
        if isinstance(callback, CheckpointSaver) and callback.remote_uploader is None:
            return callback
    return None


def _order(callback: Any) -> int:
    if isinstance(callback, CheckpointSaver):
        return 2
    return int(isinstance(callback, HuggingFaceCheckpointer))


def _unfit(path: Path, key: str, sharded: bool) -> str | None:
    """Return why a run cannot load a checkpoint, or None. Composer does not name the file."""
    what = f"{key} {str(path)!r}"
    if path.is_dir() and not sharded:
        return (
            f"{what} is a sharded checkpoint, but the checkpoints of this run are files. Load it "
            "on two or more processes with fsdp_config.state_dict_type: sharded, or convert it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        )
    if path.is_file() and sharded:
        return (
            f"{what} is a file, but the checkpoints of this run are sharded: set "
            "fsdp_config.state_dict_type: full."
        )
    if path.suffix == ".pt" and path.is_file() and not _is_whole(path):
        return (
            f"{what} is not a whole checkpoint: it is cut short or another kind of file. Give a "
            "checkpoint that a run has finished writing."
        )
    return None


def _tidy(folder: Path, saver: CheckpointSaver, state: State, delete: bool = True) -> Path | None:
    """Remove unfinished checkpoints, set the link to the newest, and tell the saver about all.

    Args:
        folder: The folder of the checkpoints.
        saver: The callback that saves checkpoints and removes old ones.
        state: The state of the run.
        delete: Whether files may be removed, because no other run can be writing them.

    Returns:
        The newest whole checkpoint, or None.
    """
    sharded = _sharded(state)
    found = _checkpoints(folder, saver, state)
    unfinished = [path for path in found if not _is_whole(path)]
    found = [path for path in found if path not in unfinished]
    if delete:
        for path in folder.glob("huggingface/*/.tmp??????"):  # safetensors' temporary files
            path.unlink()
        for path in unfinished:
            log.warning("Removing the unfinished checkpoint %s of a killed run.", path)
            shutil.rmtree(path) if sharded else path.unlink()
    if not found:
        return None
    saver.saved_checkpoints = [str(path / "shards" if sharded else path) for path in found]
    link = _link(folder, saver, state)
    if link is None or (link.exists() and not link.is_symlink()):
        return found[-1]
    target = os.path.relpath(found[-1], link.parent)
    if link.is_symlink() and os.readlink(link) == target:
        return found[-1]
    log.warning("Setting %s to the newest checkpoint, %s.", link, target)
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    return found[-1]


def _link(folder: Path, saver: CheckpointSaver, state: State) -> Path | None:
    """Return the link to the latest checkpoint, which may not exist; None if the run uses none."""
    if saver.latest_filename is None:
        return None
    return folder / format_name_with_dist(str(saver.latest_filename.filename), state.run_name)


def _checkpoints(folder: Path, saver: CheckpointSaver, state: State) -> list[Path]:
    """Return the checkpoints in a folder, whole or not, oldest first."""
    name = Path(str(saver.filename.filename))
    if _sharded(state):
        name = name.parent / state.fsdp_config.sharded_ckpt_prefix_dir
    elif name.suffix != ".pt":  # we cannot tell whether another kind of archive is whole
        return []
    name = Path(partial_format(str(name), run_name=state.run_name))
    pattern = re.compile(re.sub(r"\\{\w+\\}", r"(\\d+)", re.escape(name.name)))
    matches = [
        (pattern.fullmatch(path.name), path)
        for path in folder.joinpath(name.parent).glob("*")
        if not path.is_symlink()
    ]
    numbered = [([int(n) for n in match.groups()], path) for match, path in matches if match]
    return [path for _, path in sorted(numbered)]


def _sharded(state: State) -> bool:
    """Return whether checkpoints will be sharded; the state's property needs a sharded model."""
    return state.fsdp_config is not None and state.fsdp_config.state_dict_type == "sharded"


def _is_whole(checkpoint: Path) -> bool:
    """Return whether the part written last exists: a zip's directory, or the shards' metadata."""
    if checkpoint.is_dir():
        return (checkpoint / ".metadata").exists()
    return zipfile.is_zipfile(checkpoint)


def _check_finite(state: State) -> None:
    bad = None
    for name, weight in state.model.named_parameters():
        values = weight.to_local() if isinstance(weight, DTensor) else weight
        if not torch.isfinite(values).all():
            bad = name
            break
    found = [name for name in dist.all_gather_object(bad) if name]
    if found:
        raise RuntimeError(
            f"Weights are not finite after batch {state.timestamp.batch.value}, first in "
            f"{found[0]}. They are not saved; the last checkpoint is older. Start again with a "
            "smaller learning rate."
        )
