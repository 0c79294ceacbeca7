"""Errors that a user can solve; the scripts print them without a traceback."""

from m2_plugin.data.formats import DataError


class ConversionError(DataError):
    """A conversion or verification that cannot continue; the message says what to do."""


class BadDocumentError(ConversionError):
    """An input document that cannot be read, named by file and line."""
