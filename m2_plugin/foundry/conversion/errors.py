"""Errors that a user can solve; the scripts print them without a traceback."""

import errno


class ConversionError(ValueError):
    """A conversion or verification that cannot continue; the message says what to do."""


class BadDocumentError(ConversionError):
    """An input document that cannot be read, named by file and line."""


def is_disk_full(error: BaseException) -> bool:
    """Return whether the error means that the disk is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
