"""Load a tokenizer, and describe its vocabulary."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2_plugin.data.formats import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "HubError",
    "load_tokenizer",
    "shorten",
    "vocabularies_fit",
    "vocabulary_digest",
    "vocabulary_size",
]

FILES = ("tokenizer.json", "tokenizer_config.json")
HUB_TIMEOUT_S = 5.0
# `tokenizer.json` does not say which of its tokens these are.
BERT_TOKENS = {
    f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")
}

# For `shorten`: characters for each token, of a first guess, and of a text that may stay whole.
FIRST_CHARS, WHOLE_CHARS = 8, 32
LAST_WORDS = 32  # at the end of a part, which the rest of the text may change
PIECE_CHARS = 1 << 20  # that are tokenised at once, to count tokens


class HubError(DataError):
    """The hub cannot be reached, and what was asked for is not in its cache."""


def load_tokenizer(name: str | Path, **kwargs: Any) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a folder or the hub; one in the hub's cache needs no network.

    A folder may hold only `tokenizer.json`, as the library tokenizers saves it, or not name a
    class; tokens with BERT's names, such as [CLS], then have BERT's roles. Code in a folder is not
    run, unless `trust_remote_code` is true.

    Args:
        name: A folder, or a name on the hub.
        kwargs: More arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        HubError: If the hub does not answer within seconds.
        DataError: If no tokenizer can be loaded; the message is one line, with the reason.
    """
    from transformers import AutoTokenizer

    kwargs = {"trust_remote_code": False} | kwargs
    folder = Path(name)
    on_hub = not folder.exists() and not str(name).startswith((".", "/", "~"))
    if on_hub:
        try:
            return AutoTokenizer.from_pretrained(name, **kwargs | {"local_files_only": True})
        except Exception:  # not in the cache, or not whole there
            _reach(str(name), kwargs.get("cache_dir"))
    has_json, has_config = ((folder / file).is_file() for file in FILES)
    if has_json and not _names_class(folder):
        return _from_json(folder, kwargs)
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except Exception as error:
        if has_json and not has_config:  # a model type that transformers does not know
            return _from_json(folder, kwargs)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if folder.is_dir() and not has_json:
            reason = f"the folder has no {' and no '.join(FILES)}"
        elif not folder.exists() and not on_hub:
            reason = "there is no such folder"
        raise DataError(f"{str(name)!r} has no tokenizer that can be loaded ({reason})") from error


def _names_class(folder: Path) -> bool:
    """Tell whether a folder's files say which class of tokenizer it is.

    Without it, transformers would guess from the folder's path: in /tmp/tmpt3x9k2ab it finds `mpt`.
    """
    for file in (FILES[1], "config.json"):
        try:
            saved = json.loads((folder / file).read_text("utf-8"))
            if any(saved.get(key) for key in ("tokenizer_class", "auto_map", "model_type")):
                return True
        except OSError:  # there is no such file
            continue
        except (ValueError, AttributeError):  # transformers says what is wrong with it
            return True
    return False


def _reach(name: str, cache: str | None) -> None:
    """Ask the hub for the first file of a tokenizer, once: transformers would ask for each.

    Raises:
        HubError: If the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        hf_hub_download(name, FILES[1], cache_dir=cache, etag_timeout=HUB_TIMEOUT_S)
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"the tokenizer {name!r} cannot be reached: there is no such folder, it is not in the "
            "hub's cache, and the hub does not answer"
        ) from error
    except Exception:  # the hub answers; transformers says what is wrong
        return


def _from_json(folder: Path, kwargs: dict[str, Any]) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **kwargs)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise DataError(f"{str(folder / FILES[0])!r} is not a tokenizer ({error})") from error
    vocabulary = tokenizer.get_vocab()
    for key, token in BERT_TOKENS.items():
        if key not in tokenizer.special_tokens_map and token in vocabulary:
            setattr(tokenizer, key, token)
    return tokenizer


def shorten(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], tokens: int | None
) -> tuple[str, ...]:
    """Cut giant texts, so that it takes little memory and time to tokenise and truncate them.

    The tokens are those of the whole texts. A tokenizer would tokenise these whole, and keep what
    it cuts off: of a pair, each part of one text with each part of the other.

    Args:
        tokenizer: The tokenizer; texts for one in Python, or one that truncates on the left, stay
            whole.
        texts: A text; or a pair, which is truncated by `longest_first`.
        tokens: The number of tokens that they are truncated to; None if they are not.

    Returns:
        The texts, or their beginnings.
    """
    if tokens is None or not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return tuple(texts)
    if max(map(len, texts)) <= WHOLE_CHARS * tokens:
        return tuple(texts)
    parts = [_beginning(tokenizer, text, tokens) for text in texts]
    if len(parts) == 2:
        _keep_order(tokenizer, texts, parts)
    return tuple(parts)


def _beginning(tokenizer: "PreTrainedTokenizerBase", text: str, tokens: int) -> str:
    """Return a beginning of a text that has its first tokens."""
    size = FIRST_CHARS * tokens
    while size < len(text):
        words = [w for w in _encode(tokenizer, text[:size]).word_ids(0) if w is not None]
        if sum(word <= words[-1] - LAST_WORDS for word in words) >= tokens:
            break
        size *= 2
    return text[:size]


def _keep_order(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], parts: list[str]
) -> None:
    """Lengthen a part, so that the text with more tokens has the part with more tokens, too.

    If both are truncated to half of an odd number, the longer one gets one more.
    """
    cut = [len(part) < len(text) for part, text in zip(parts, texts, strict=True)]
    if not any(cut):
        return
    if all(cut):
        first_is_longer = _count(tokenizer, texts[0]) > _count(tokenizer, texts[1])
    else:
        first_is_longer = cut[0]
    i = 0 if first_is_longer else 1
    while len(parts[i]) < len(texts[i]) and first_is_longer != (
        _count(tokenizer, parts[0]) > _count(tokenizer, parts[1])
    ):
        parts[i] = texts[i][: 2 * len(parts[i])]


def _count(tokenizer: "PreTrainedTokenizerBase", text: str) -> int:
    """Count the tokens of a text, in pieces."""
    count = start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text) and (space := text.rfind(" ", start + 1, end)) > 0:
            end = space
        count += len(_encode(tokenizer, text[start:end])["input_ids"][0])
        start = end
    return count


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> Any:
    return tokenizer([text], add_special_tokens=False, verbose=False)


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the rows of an embedding that has all ids: one more than the largest id.

    `len(tokenizer)` counts the tokens: it is smaller if ids are left out.
    """
    return max(tokenizer.get_vocab().values()) + 1


def vocabularies_fit(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> bool:
    """Tell whether two tokenizers give the same ids; one may have more tokens than the other."""
    ours, theirs = one.get_vocab().items(), other.get_vocab().items()
    return ours <= theirs or theirs <= ours


def vocabulary_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a hash of the tokens and their ids, without special and added tokens.

    So naming one more special token leaves the digest as it is.
    """
    added = tokenizer.get_added_vocab()
    vocabulary = {token: id_ for token, id_ in tokenizer.get_vocab().items() if token not in added}
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()
