"""Errors that a user can act on; the scripts print them without a traceback."""

import errno


class ConversionError(ValueError):
    """A conversion or a verification that cannot go on, with what to do about it."""


class BadDocumentError(ConversionError):
    """An input document that cannot be read, named by file and line."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that no more can be written to the disk."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
