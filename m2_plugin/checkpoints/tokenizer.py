"""Load the tokenizer in a checkpoint file or in a model's folder, as data: no code is run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from m2_plugin.checkpoints.folder import TOKENIZER_FILES, copy_tokenizer
from m2_plugin.data.tokenizer import HubError, load_tokenizer

__all__ = ["folder_has_tokenizer", "holds_tokenizer", "load_data_tokenizer"]

VOCABULARIES = ("tokenizer.json", "vocab.txt")  # a tokenizer needs one of them


def holds_tokenizer(files: Mapping[str, Any]) -> bool:
    """Tell whether files that Composer saved beside the weights make a tokenizer."""
    return any(name in files for name in VOCABULARIES)


def folder_has_tokenizer(folder: str) -> bool:
    """Tell whether a folder holds a tokenizer."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in VOCABULARIES)


def load_data_tokenizer(
    name: str, files: Mapping[str, Any], **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `files` make, or if there are none the one called `name`.

    Only data is read from files and folders, whatever they name: no code, and no other files.

    Args:
        name: A folder or a name on the hub; the source of `files`, for error messages.
        files: The content of a tokenizer's files by name, as in `read.Saved`.
        kwargs: More arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    try:
        with TemporaryDirectory() as made, TemporaryDirectory() as scratch:
            for file in TOKENIZER_FILES:
                if file in files:
                    content = files[file]
                    text = json.dumps(content) if file.endswith(".json") else "\n".join(content)
                    (Path(made) / file).write_text(text, encoding="utf-8")
            where = Path(made) if files else Path(name)
            if where.is_dir():
                copy_tokenizer(where, Path(scratch))
            tokenizer = load_tokenizer(scratch if where.is_dir() else name, **kwargs)
    except HubError:
        raise
    except Exception as error:  # the files may hold anything, so any error can occur
        cause = error.__cause__ or error  # without the name of the scratch folder
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise ValueError(f"the tokenizer {name!r} cannot be loaded: {reason}") from error
    tokenizer.name_or_path = name
    return tokenizer
