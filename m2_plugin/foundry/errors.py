"""Errors of a run that cannot start, for its user: one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ConfigError", "RunError", "one_line"]


class RunError(ValueError):
    """Settings, data or a folder with which a run cannot start; the message is one line.

    `train.py` writes the message alone.
    """


class ConfigError(RunError):
    """Settings that contradict each other, or that no run can use; the message names the keys."""


@contextmanager
def one_line(kind: type[RunError] = RunError) -> Iterator[None]:
    """Turn errors about settings and data into a `RunError`. It decorates what YAMLs name.

    Args:
        kind: The class of the errors.

    Raises:
        RunError: In place of a `ValueError` or an `OSError`, with its message.
    """
    try:
        yield
    except RunError:
        raise
    except (ValueError, OSError) as error:
        raise kind(" ".join(str(error).split())) from error
