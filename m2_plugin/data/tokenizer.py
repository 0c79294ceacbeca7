"""Load a tokenizer, for every command except training, where llm-foundry loads it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2_plugin.data.formats import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]

FILES = ("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(name: str | Path, **kwargs: Any) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a folder or the hub.

    A folder may hold only `tokenizer.json`, as the library tokenizers saves it. Code in a folder
    is not run, unless `trust_remote_code` is true.

    Args:
        name: A folder, or a name on the hub.
        kwargs: More arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        DataError: If no tokenizer can be loaded; the message is one line, with the reason.
    """
    from transformers import AutoTokenizer

    kwargs = {"trust_remote_code": False} | kwargs
    folder = Path(name)
    has_json, has_config = ((folder / file).is_file() for file in FILES)
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except Exception as error:
        if has_json and not has_config:
            return _from_json(folder / FILES[0], kwargs)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if folder.is_dir() and not has_json:
            reason = f"the folder has no {' and no '.join(FILES)}"
        raise DataError(f"{str(name)!r} has no tokenizer that can be loaded ({reason})") from error


def _from_json(file: Path, kwargs: dict[str, Any]) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    del kwargs["trust_remote_code"]
    try:
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **kwargs)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise DataError(f"{str(file)!r} is not a tokenizer ({error})") from error
