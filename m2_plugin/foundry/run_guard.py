"""Callback: a run that is killed at any point goes on when the same command is run again."""

import fcntl
import logging
import os
import re
import shutil
import socket
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

__all__ = ["RunGuard"]

log = logging.getLogger(__name__)

LOCK = ".run.lock"


class RunGuard(CallbackWithConfig):
    """Keeps a run's `save_folder` to one run, and such that a rerun can always go on from it.

    Composer writes a checkpoint under its final name, then moves the link to the latest one. A
    run killed between leaves a file that a rerun takes for a future checkpoint, and refuses.

    - At the start the folder is locked; the system drops the lock when the process ends, however
      it ends.
    - With `autoresume`, checkpoints that were never finished are removed then, and the link to
      the latest one is set to the newest whole one. Those of a killed run count towards
      `save_num_checkpoints_to_keep`.
    - A run that is at its `max_duration` already ends without an error.
    - Transformers folders are written before the checkpoint of the same batch: where that is,
      they are whole.
    - Weights that are not finite are an error instead of a checkpoint.

    A remote `save_folder` is neither locked nor tidied. Where a file system cannot lock, which is a
    warning, nothing is removed; where its locks do not reach other machines, a run there is not
    noticed.

    Args:
        train_config: The run's settings, from the host.

    Raises:
        RuntimeError: At the start, if another run has the folder, or if what is to be loaded is not
            whole, or sharded where the run is not, or the other way round; before a checkpoint, if
            a weight is not finite.
    """

    def __init__(self, train_config: dict[str, Any]):
        self.saves = create_interval_scheduler(train_config.get("save_interval", "1000ba"))
        self.export_only = bool(train_config.get("only_hf_checkpoint"))
        self.autoresume = bool(train_config.get("autoresume"))
        self.load_path = train_config.get("load_path")
        self.resumes = False
        self.lock: IO[str] | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Lock the folder and tidy it, before Composer looks there for a checkpoint."""
        del logger
        found: list[Any] = [None, False]
        if dist.get_global_rank() == 0:
            try:
                found = [self._begin(state), self.resumes]
            except (OSError, KeyError) as error:  # a full disk; an unknown placeholder
                found[0] = f"save_folder cannot be used: {error!r}"
        dist.broadcast_object_list(found, src=0)  # all ranks end, none waits for the others
        refusal, self.resumes = found
        if refusal is not None:
            raise RuntimeError(refusal)

    def _begin(self, state: State) -> str | None:
        """Lock the folder, and tidy it for what the run is to load; why it cannot, if so."""
        saver, sharded = _local_saver(state), _sharded(state)
        if saver is not None:
            folder = Path(format_name_with_dist(saver.folder, state.run_name))
            folder.mkdir(parents=True, exist_ok=True)
            self.lock, refusal = _lock(folder)
            if refusal is not None:
                return refusal
            link = _link(folder, saver, state)
            if not self.autoresume:
                # Composer refuses files of another run, and overwrites folders.
                if sharded and not saver.overwrite and _checkpoints(folder, saver, state):
                    return (
                        f"save_folder {str(folder)!r} has sharded checkpoints of another run: give "
                        "this one a save_folder of its own, or set autoresume to go on from them."
                    )
            elif link is not None and link.exists() and link.is_dir() != sharded:
                return _unfit(link.resolve(), "the checkpoint in save_folder,", sharded)
            else:
                newest = _tidy(folder, saver, state, delete=self.lock is not None)
                self.resumes = newest is not None
                if newest is not None and self.load_path:
                    log.warning(
                        "Going on from %s in save_folder, not from load_path %s: a run that is to "
                        "begin there needs a save_folder of its own.",
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
            return  # another run's end: the host says that there would be no training
        log.warning(
            "%s is finished: its checkpoint is at batch %d, max_duration is %s. Nothing is left "
            "to do; a longer max_duration trains on.",
            state.run_name,
            state.timestamp.batch.value,
            state.max_duration,
        )
        raise SystemExit(0)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse to train on no batch; let transformers folders be written before checkpoints."""
        del logger
        if state.dataloader_len is not None and state.dataloader_len.value == 0:
            raise RuntimeError(
                "train_loader gives no batch: an epoch has fewer samples per rank than a batch. "
                "Set train_loader.drop_last to false, a smaller global_train_batch_size, or give "
                "more data."
            )
        # The host sorts them the other way round, for remote folders, whose uploads take time.
        if _local_saver(state) is not None:
            state.callbacks = sorted(state.callbacks, key=_order)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Check the weights, if they are about to be saved."""
        del logger
        if self.saves(state, Event.BATCH_CHECKPOINT):
            _check_finite(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Check the weights, if they are about to be saved."""
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


def _lock(folder: Path) -> tuple[IO[str] | None, str | None]:
    """Lock a folder for this process.

    Returns:
        The file that holds the lock until it is closed, or None where there are no locks; and why
        the folder is refused, if so.
    """
    file = open(folder / LOCK, "a+")  # noqa: SIM115 (open as long as the run)
    try:
        # Not flock: workers would inherit it and hold it after the death of their parent.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read() or "unknown"
        file.close()
        return None, (
            f"save_folder {str(folder)!r} is in use by another run: {holder}. Wait for its end, "
            "or give this one a save_folder of its own."
        )
    except OSError as error:
        log.warning("%r cannot be locked (%s): start no second run there.", str(folder), error)
        file.close()
        return None, None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file, None


def _unfit(path: Path, key: str, sharded: bool) -> str | None:
    """Why a run cannot load a checkpoint; the host says it without its name, or its remedy."""
    what = f"{key} {str(path)!r}"
    if path.is_dir() and not sharded:
        return (
            f"{what} is a sharded checkpoint, and this run's are files. Load it on two processes "
            "or more with fsdp_config.state_dict_type sharded, or make a file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE"
        )
    if path.is_file() and sharded:
        return (
            f"{what} is a file, and this run's checkpoints are sharded: set "
            "fsdp_config.state_dict_type to full."
        )
    if path.suffix == ".pt" and path.is_file() and not _is_whole(path):
        return (
            f"{what} is no whole checkpoint: it is cut short, or another kind of file. Give one "
            "that a run has finished writing."
        )
    return None


def _tidy(folder: Path, saver: CheckpointSaver, state: State, delete: bool = True) -> Path | None:
    """Remove unfinished checkpoints, set the link to the newest one, tell the saver of the rest.

    Args:
        folder: Where they are.
        saver: Is to count them.
        state: Of the run.
        delete: Whether no other run can be writing there.

    Returns:
        The newest.
    """
    sharded = _sharded(state)
    found = _checkpoints(folder, saver, state)
    unfinished = [path for path in found if not _is_whole(path)]
    found = [path for path in found if path not in unfinished]
    if delete:
        for path in folder.glob("huggingface/*/.tmp??????"):  # safetensors' files, not yet renamed
            path.unlink()
        for path in unfinished:
            log.warning("Removing %s: it was not finished when its run was killed.", path)
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
    """The link to the latest checkpoint, there or not; None if the run has none."""
    if saver.latest_filename is None:
        return None
    return folder / format_name_with_dist(str(saver.latest_filename.filename), state.run_name)


def _checkpoints(folder: Path, saver: CheckpointSaver, state: State) -> list[Path]:
    """The checkpoints in a folder, whole or not, oldest first."""
    name = Path(str(saver.filename.filename))
    if _sharded(state):
        name = name.parent / state.fsdp_config.sharded_ckpt_prefix_dir
    elif name.suffix != ".pt":  # whether an archive of another kind is whole, we cannot tell
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
    """Whether checkpoints will be; the state itself knows it only once the model is."""
    return state.fsdp_config is not None and state.fsdp_config.state_dict_type == "sharded"


def _is_whole(checkpoint: Path) -> bool:
    """Whether what is written last is there: a zip's directory, a sharded checkpoint's metadata."""
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
            f"The weights are not finite after batch {state.timestamp.batch.value} (the first: "
            f"{found[0]}). They are not saved: the last checkpoint is from before. Start again "
            "with a smaller learning rate."
        )
