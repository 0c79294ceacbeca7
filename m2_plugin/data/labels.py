"""The names of classes: from a YAML, or from the data that has them; and a model's answers in them.

Classification of texts and of tokens take the key `label_names` in the same forms.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2_plugin.data.rows import class_names, read_rows
from m2_plugin.suggest import check_keys

__all__ = [
    "answer_columns",
    "answers",
    "in_data",
    "label_names",
    "names_of_config",
    "plain",
    "spelling",
]

MAX_NAMES = 1000  # more different labels are numbers, ids or texts, but no classes
FEW_ROWS = 20  # so many rows may each have a label of their own

# Reads the labels in a column of a file: (path, column, split) → (place, label), with a list of
# labels for a row of tokens.
Cells = Callable[[str, str, str | None], Iterable[tuple[str, Any]]]


def spelling(label: Any) -> str:
    """Return a label as text; JSON's true is `true`."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def in_data(value: Any) -> Mapping[str, Any] | None:
    """Return the mapping of a `label_names` that stands for the names in some data, or None.

    A YAML has it in a list, so that a list of names on the command line can replace it: OmegaConf
    does not replace a mapping by a list.
    """
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, Mapping) else None


def label_names(value: Any, key: str, cells: Cells | None = None) -> list[str] | None:
    """Return the names of the classes in the order of their ids.

    Args:
        value: The value of `label_names`: a list of names; null, if labels are ids or numbers; or
            `{path, column, split}`, alone or in a list, for the labels that occur in a column of a
            file or of a list of files. The classes that `datasets` stored in the files keep their
            order. Other labels are sorted: integers as numbers, words as texts.
        key: The key in errors: `dataset.label_names`.
        cells: Reads the labels of a file that `read_rows` does not read.

    Raises:
        ValueError: If YAML read a name as a boolean or a number, a name occurs twice, the data
            cannot be read, or its labels look like numbers to predict, free texts, or two spellings
            of one name.
    """
    if value is None:
        return None
    if (source := in_data(value)) is not None:
        return _names_in(source, key, cells or _cells)
    if isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a list of names, got {value!r}.")
    for name in value:
        if not isinstance(name, (str, int)) or isinstance(name, bool):
            raise ValueError(
                f"{key}: {name!r} is not a text: YAML reads yes, no, on and off as booleans and "
                '2.50 as a number. Put names in quotes, e.g. ["no", "yes"], or let them be read '
                "from the data: [{path: FILE, column: COLUMN}]."
            )
    texts = [str(name) for name in value]
    if len(set(texts)) < len(texts):
        raise ValueError(f"{key} must have each name once, got {texts}.")
    return texts


def _names_in(source: Mapping[str, Any], key: str, cells: Cells) -> list[str]:
    check_keys(source, {"path", "column", "split"}, key)
    path, column, split = (source.get(name) for name in ("path", "column", "split"))
    if not path or not column:
        raise ValueError(f"{key}: name the path of the data and the column of the labels.")
    files = [path] if isinstance(path, str) else list(path)
    stored = [class_names(file, split).get(column) if cells is _cells else None for file in files]
    if len(set(stored)) > 1:
        raise ValueError(f"{key}: {files} do not have the same classes in {column!r}: list them.")
    if stored[0]:
        return list(stored[0])
    found: set[str] = set()
    rows = 0
    for _, cell in chain.from_iterable(cells(file, column, split) for file in files):
        labels = cell if isinstance(cell, (list, tuple)) else [cell]
        # A row without a label is an error of the loader, which names its line.
        names = [spelling(label) for label in labels if label not in (None, "")]
        found.update(names)
        rows += bool(names)
        if len(found) > MAX_NAMES:
            break
    return _sorted(sorted(found), rows, f"{key}: column {column!r} of {', '.join(files)}")


def _cells(path: str, column: str, split: str | None) -> Iterator[tuple[str, Any]]:
    found: dict[str, None] = {}
    for row in read_rows(path, split, columns=[column]):
        found |= dict.fromkeys(row.values)
        yield row.place, row.values.get(column)
    if found and column not in found:
        raise ValueError(
            f"{path} has no column {column!r}. Its columns: {', '.join(map(repr, found))}."
        )


def _sorted(names: list[str], rows: int, where: str) -> list[str]:
    """Sort the labels that occur in so many rows, unless they cannot be classes."""
    hint = "For numbers to predict set regression to true; else check the column."
    if len(names) > MAX_NAMES:
        raise ValueError(f"{where} has more than {MAX_NAMES} different labels. {hint}")
    if rows > FEW_ROWS and 2 * len(names) > rows:
        raise ValueError(f"{where} has {len(names)} different labels in {rows} rows. {hint}")
    if len(names) < 2:
        found = f"only the label {names[0]!r}" if names else "no labels"
        raise ValueError(f"{where} has {found}: a classifier needs two or more.")
    numbers = {name: _as_number(name) for name in names}
    known = {name: number for name, number in numbers.items() if number is not None}
    are_numbers = len(known) == len(names)
    if are_numbers and (broken := [n for n, number in known.items() if not number.is_integer()]):
        raise ValueError(f"{where} has numbers such as {broken[0]}. {hint}")
    alike: dict[Any, str] = {}
    for name in names:
        other = alike.setdefault(known[name] if are_numbers else name.strip().casefold(), name)
        if other != name:
            raise ValueError(
                f"{where} has both {other!r} and {name!r}: make them one, or list label_names."
            )
    return sorted(names, key=known.__getitem__) if are_numbers else names


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# A model's answers


def names_of_config(config: Any) -> list[str] | None:
    """Return the names of a model's classes, or None if nobody gave them names.

    Args:
        config: The config of a transformers classifier.
    """
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    unnamed = names == [f"LABEL_{i}" for i in range(len(names))]
    return None if unnamed else names


def answer_columns(names: Sequence[str], regression: bool) -> list[str]:
    """Return the names of the columns in the rows of `answers`."""
    return ["score"] if regression else ["prediction", *(f"probability_{name}" for name in names)]


def answers(
    logits: NDArray[np.float32], names: Sequence[str], regression: bool
) -> list[dict[str, Any]]:
    """Express logits as the most probable class and the probability of each.

    Args:
        logits: (N, C), or (N, 1) of a regression.
        names: The C names of the classes.
        regression: Whether the model predicts a number.

    Returns:
        For each row `score`; or `prediction`, a name, and for each class `probability_NAME`. The
        numbers have the digits that a float32 has.
    """
    columns = answer_columns(names, regression)
    if regression:
        return [{columns[0]: plain(row[0])} for row in logits]
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return [
        dict(zip(columns, [names[int(best)], *map(plain, row)], strict=True))
        for best, row in zip(logits.argmax(axis=1), shares, strict=True)
    ]


def plain(value: Any) -> float:
    """Return the float with the fewest digits that is this float32."""
    return float(str(np.float32(value)))
