"""Errors about unknown names that propose the closest known one. Standard library only."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["check_keys", "did_you_mean"]


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known name, or nothing if none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_keys(section: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Check that a section of a YAML has known keys only.

    Args:
        section: The section.
        known: The keys that it may have.
        where: The section's name in the message: the key that leads to it, or its file.

    Raises:
        ValueError: If a key is unknown; names the key, the section and the known keys.
    """
    known = sorted(known)
    for key in section:
        if key not in known:
            raise ValueError(
                f"Unknown key {key!r} in {where}.{did_you_mean(key, known)} "
                f"Known keys: {', '.join(known)}."
            )
