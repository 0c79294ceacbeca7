"""Extend a trained model to longer sequences: more position embeddings, and longer filters.

Dimension key: L old length, H new length, E positional features of the filters.
"""

import math
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from m2_plugin.checkpoints.card import add_section, shown_name
from m2_plugin.checkpoints.folder import byte_count, copy_beside_model, load_folder, save_folder
from m2_plugin.files import read_json, whole, write_json
from m2_plugin.models.configuration_m2_bert import M2BertConfig

__all__ = ["METHODS", "extend", "extend_folder"]

POSITIONS = "model.embeddings.position_embeddings.weight"


def continued_features(z: Tensor, period: int, length: int) -> Tensor:
    """Append the features of more positions, on the time scale of the original length.

    Args:
        z: (L, E), the trained features of the first positions.
        period: The model's original `long_conv_l_max`: t is 1 at its last position.
        length: H.

    Returns:
        (H, E) in the dtype of z: z, then `[t, Re e^{-ifw}, Im e^{-ifw}]` as in
        `positional_features`.
    """
    t = torch.arange(len(z), length)[:, None]
    bands = (z.shape[1] - 1) // 2
    phase = 2 * math.pi * t / period * torch.linspace(1e-4, bands - 1, bands)[None]
    new = torch.cat([t / (period - 1), torch.cos(phase), -torch.sin(phase)], dim=1)
    return torch.cat([z, new.to(z.dtype)])


def tiled(rows: Tensor, length: int) -> Tensor:
    """Repeat rows (L, ·) from the first on, to (H, ·)."""
    return rows.repeat(-(-length // len(rows)), 1)[:length]


def _by_tiling(
    config: M2BertConfig, length: int
) -> tuple[M2BertConfig, Callable[[Tensor], Tensor]]:
    config.long_conv_l_max = length
    return config, lambda z: tiled(z, length)


def _by_continuing(
    config: M2BertConfig, length: int
) -> tuple[M2BertConfig, Callable[[Tensor], Tensor]]:
    lengths = [*(config.hyena_extended_from or []), config.long_conv_l_max]
    config.hyena_extended_from = lengths
    config.long_conv_l_max = length
    return config, lambda z: continued_features(z, lengths[0], length)


METHODS = {"continue": _by_continuing, "tile": _by_tiling}


def extend(
    config: M2BertConfig, weights: dict[str, Tensor], length: int, method: str = "continue"
) -> tuple[M2BertConfig, dict[str, Tensor]]:
    """Extend a model to longer sequences. Position embeddings repeat from the first one on.

    `continue` keeps all taps of the filters and appends taps for the new lags. The new taps are
    small, but large enough for training. Sequences of the old length have the same outputs as
    before. `tile` repeats the filters' positional features, as the reference does. That also
    stretches the decay of the filters, so that all taps change. (The reference also leaves the
    first L features zero; here they are kept.)

    Args:
        config: The model's config; it is not changed.
        weights: The weights under our names; those of the encoder begin with `model.`.
        length: H, the new maximum in tokens.
        method: One of `METHODS`.

    Returns:
        The new config and weights.

    Raises:
        ValueError: If the model already takes this length, or the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    limit = config.max_sequence_length
    if limit is None or length <= limit:
        raise ValueError(
            f"max_seq_len must be more than the model's present maximum, {limit or 'no limit'}, "
            f"not {length}"
        )
    new, config = dict(weights), deepcopy(config)
    if POSITIONS in new and config.max_position_embeddings < length:
        new[POSITIONS] = tiled(new[POSITIONS], length)
        config.max_position_embeddings = length
    if config.sequence_mixer == "monarch_mixer" and config.long_conv_l_max < length:
        config, longer = METHODS[method](config, length)
        for name in new:
            if re.fullmatch(r"model\.layers\.\d+\.mixer\.\w+\.filter\.pos_emb", name):
                new[name] = longer(new[name])
    return M2BertConfig.from_dict(config.to_dict()), new


def extend_folder(
    folder: str | Path, out: str | Path, length: int, method: str = "continue"
) -> M2BertConfig:
    """Copy a transformers folder, with the model extended to longer sequences.

    Args:
        folder: A transformers folder with an M2-BERT.
        out: The folder to write. It appears when it is complete.
        length: The new maximum in tokens.
        method: One of `METHODS`.

    Returns:
        The new config.

    Raises:
        ValueError: As in `extend`, or if the folder has no complete M2-BERT, or if `out` exists.
    """
    config, weights = extend(*load_folder(folder), length, method)
    with whole(Path(out), byte_count(weights)) as temporary:
        temporary.mkdir()
        copy_beside_model(Path(folder), temporary)
        save_folder(temporary, config, weights)
        path = temporary / "tokenizer_config.json"
        if path.is_file():
            write_json(path, read_json(path) | {"model_max_length": length})
        add_section(
            temporary,
            "Extension",
            f"Extended by m2_plugin to {length:,} tokens from `{shown_name(folder)}` (method "
            f"`{method}`), and not trained since. Measurements above are of the model before.",
            name=Path(out).name,
            config=config,
            parameters=sum(tensor.numel() for tensor in weights.values()),
        )
    return config
