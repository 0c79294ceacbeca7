"""Fetch a checkpoint by its name or URL on the hub."""

import os
import re
from urllib.parse import unquote

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import EntryNotFoundError

from m2_plugin.checkpoints.folder import TOKENIZER_FILES, WEIGHTS
from m2_plugin.checkpoints.read import SHARD_INDEX, is_checkpoint_file, shard_names

__all__ = ["fetch"]

NAME = re.compile(r"[\w.-]+/[\w.-]+")
# After the address of the hub: owner/name, and perhaps a revision, and perhaps a file in it.
PAGE = re.compile(
    r"([\w.-]+/[\w.-]+)(?:/(?:tree|resolve|blob)/([^/?#]+)(?:/([^?#]+))?)?/?(?:[?#].*)?"
)


def fetch(source: str) -> str:
    """Return the local path of a checkpoint.

    `huggingface_hub` fetches files of the hub and keeps them in its cache. If it is offline
    (`HF_HUB_OFFLINE=1`), the cache must have them. Only weights, `config.json` and the tokenizer's
    files are fetched, no code.

    Args:
        source: A file or folder; a name on the hub (`owner/name`); or the URL of a repository
            there or of a file in one. A path that exists is that path.

    Returns:
        `source` itself; or a file or folder in the cache.

    Raises:
        ValueError: If it is another URL, or cannot be fetched.
    """
    if os.path.exists(source):
        return source
    revision = file = None
    if re.match(r"\w+://", source):
        match = PAGE.fullmatch(source.removeprefix(f"{constants.ENDPOINT}/"))
        if match is None:
            raise ValueError(
                f"{source!r} is not on {constants.ENDPOINT}: download it, and give the path of the "
                f"file"
            )
        name, revision, file = match.groups()
    elif NAME.fullmatch(source) and not is_checkpoint_file(source):
        name = source
    else:
        return source  # a path that does not exist: reading it raises the error
    if file is not None:
        return _download(name, unquote(file), revision)
    return _fetch_folder(name, revision)


def _fetch_folder(name: str, revision: str | None) -> str:
    """Fetch the first weights in `WEIGHTS` that a repository has, their config and tokenizer."""
    for weights in WEIGHTS:
        path = _download_if_there(name, weights, revision)
        if path is not None:
            break
    else:
        # Again, for the error that tells why, for example that there is no network.
        _download(name, WEIGHTS[0], revision)
        raise ValueError(f"{name!r} on the hub has none of {', '.join(WEIGHTS)}")
    folder = os.path.dirname(path)
    revision = os.path.basename(folder)  # the commit: all files are from the same one
    if weights.endswith(SHARD_INDEX):
        for shard in shard_names(path):
            _download(name, shard, revision)
    for file in ("config.json", *TOKENIZER_FILES):
        _download_if_there(name, file, revision)
    return folder


def _download_if_there(name: str, file: str, revision: str | None) -> str | None:
    try:
        return hf_hub_download(name, file, revision=revision)
    except EntryNotFoundError:  # or not in the cache, if there is no network
        return None
    except (OSError, ValueError) as error:
        raise _refusal(name, file, error) from error


def _download(name: str, file: str, revision: str | None) -> str:
    try:
        return hf_hub_download(name, file, revision=revision)
    except (OSError, ValueError) as error:
        raise _refusal(name, file, error) from error


def _refusal(name: str, file: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"{name!r} is not a path, and {file} of it cannot be fetched from the hub: {reason}"
    )
