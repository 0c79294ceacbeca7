"""Find a checkpoint by its name on the hub or its URL there, and bring its files here."""

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

    Files of the hub come through `huggingface_hub`: from its cache, or into it. If it is offline
    (`HF_HUB_OFFLINE=1`), the cache must have them. Only weights, `config.json` and files of the
    tokenizer are fetched, no code.

    Args:
        source: A file or folder; a name on the hub (`owner/name`); or the URL of a repository, or
            of a file in one, on the hub. What exists as a path is that path.

    Returns:
        `source` itself; or a file or folder in the cache.

    Raises:
        ValueError: If it is the URL of something else, or cannot be fetched.
    """
    if os.path.exists(source):
        return source
    revision = file = None
    if re.match(r"\w+://", source):
        match = PAGE.fullmatch(source.removeprefix(f"{constants.ENDPOINT}/"))
        if match is None:
            raise ValueError(
                f"{source!r} is no repository on {constants.ENDPOINT} and no file in one: download "
                f"it, and give the path of the file"
            )
        name, revision, file = match.groups()
    elif NAME.fullmatch(source) and not is_checkpoint_file(source):
        name = source
    else:
        return source  # a path of a file that is not there, which the reader will say
    if file is not None:
        return _download(name, unquote(file), revision)
    return _fetch_folder(name, revision)


def _fetch_folder(name: str, revision: str | None) -> str:
    """Bring the first kind of weights that a repository has, and what belongs to them."""
    for weights in WEIGHTS:
        path = _download_if_there(name, weights, revision)
        if path is not None:
            break
    else:
        # Once more for the reason, which may be that there is no network.
        _download(name, WEIGHTS[0], revision)
        raise ValueError(f"{name!r} on the hub has none of {', '.join(WEIGHTS)}")
    folder = os.path.dirname(path)
    revision = os.path.basename(folder)  # of the cache's snapshots, so that all are of one commit
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
        f"{name!r} is no file or folder here, and {file} of it cannot be fetched from the hub: "
        f"{reason}"
    )
