"""The logger `tensorboard_file`: one TensorBoard event file for each start of a run."""

from typing import Any

import numpy as np
import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, format_name_with_dist
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from m2_plugin.foundry.callbacks import local_save_folder

__all__ = ["TensorboardFile"]

NEVER = 365 * 24 * 3600  # seconds: this class flushes by itself


class TensorboardFile(LoggerDestination):
    """Write metrics and hyperparameters to one event file, on rank 0.

    Composer's `tensorboard` begins a new file at each flush (every 100 batches, each evaluation),
    and at each evaluation writes the hyperparameters again, to a folder of their own. The file here
    has the same curves under the same tags. It is written locally; Composer's logger uploads its
    files.

    Args:
        log_dir: The folder; `{run_name}` is replaced. By default the run's `save_folder`, or
            `./{run_name}` if there is none or it is remote.
        flush_interval: The batches between two flushes; an evaluation flushes too.
    """

    def __init__(self, log_dir: str | None = None, flush_interval: int = 100):
        self.log_dir = log_dir
        self.flush_interval = flush_interval
        self.folder = ""
        self.hyperparameters: dict[str, str] = {}
        self.writer: SummaryWriter | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Find the folder; a run that is refused leaves no file there."""
        del logger
        folder = self.log_dir or local_save_folder(state) or "./{run_name}"
        self.folder = format_name_with_dist(folder, state.run_name)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Keep hyperparameters until training starts."""
        self.hyperparameters |= {name: str(value) for name, value in hyperparameters.items()}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write the numbers among some metrics."""
        if dist.get_global_rank() != 0:
            return
        for tag, value in metrics.items():
            if isinstance(value, int | float | np.number | torch.Tensor):
                self._writer().add_scalar(tag, value, step)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Write the hyperparameters."""
        del state, logger
        if dist.get_global_rank() == 0 and self.hyperparameters:
            file = self._writer().file_writer
            assert file is not None
            for summary in hparams(self.hyperparameters, {}):
                file.add_summary(summary)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Flush at intervals."""
        del logger
        if state.timestamp.batch.value % self.flush_interval == 0:
            self._flush()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Flush."""
        del state, logger
        self._flush()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Flush."""
        del state, logger
        self._flush()

    def close(self, state: State, logger: Logger) -> None:
        """Close the file."""
        del state, logger
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _writer(self) -> SummaryWriter:
        if self.writer is None:
            self.writer = SummaryWriter(self.folder, flush_secs=NEVER)
        return self.writer

    def _flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()
