"""The private interfaces of llm-foundry, Composer and Streaming that this package uses.

No documentation promises these names, so another version may drop or rename them:
`pyproject.toml` allows one minor version of each. On an upgrade run
`tests/foundry/test_private.py` first. Each entry says what it is for and what replaces it if it is
gone. `conversion`, which must not import llm-foundry, uses Streaming's modules `compression`,
`hashing` and `format.mds.reader`.
"""

from typing import Any

# Converts a time of a schedule to the unit in which it is compared. If gone: the same for shares
# (`dur`) and epochs, by `state.max_duration` and `state.dataloader_len`.
from composer.optim.scheduler import _convert_time as convert_time

# Computes the hidden size of an FFN. If gone: int(d_model * expansion_ratio).
from llmfoundry.models.layers.ffn import resolve_ffn_hidden_size

# The config of llm-foundry's contrastive model, for its list of keys. If gone: list them here.
from llmfoundry.models.llm_embed.modeling_llm_embed import ContrastiveConfig

# `stacked_param_init_helper` initialises stacked matrices one by one; `summon_dtensor` lets an
# initialisation see whole DTensors under FSDP2. If gone: a loop; a decorator on `full_tensor()`.
from llmfoundry.models.utils.param_init_fns import stacked_param_init_helper, summon_dtensor

# The states of a shard in Streaming's shared memory. If gone: see `release_shard`.
from streaming.base.dataset import _ShardState

# Computes a hash, such as xxh64, by name. If gone: the package xxhash, and hashlib.
from streaming.base.hashing import get_hash
from torch import nn

__all__ = [
    "FSDP_SETTINGS",
    "OVERRIDDEN",
    "READS_TOKENS",
    "ContrastiveConfig",
    "convert_time",
    "get_hash",
    "is_residual",
    "mark_residual",
    "release_shard",
    "resolve_ffn_hidden_size",
    "stacked_param_init_helper",
    "stop_reading",
    "summon_dtensor",
]

# llm-foundry's MPT reads the settings of an FSDP unit from this attribute of a module. If gone:
# replace MPT's `fsdp_wrap_fn`.
FSDP_SETTINGS = "_fsdp_kwargs_dict"

# The method with which llm-foundry's StreamingTextDataset decodes a sample of tokens; `mlm_text.py`
# overrides it. If gone: check the length of the stored tokens in `__getitem__` instead.
READS_TOKENS = "_read_binary_tokenized_sample"

# Methods of llm-foundry's FinetuneEmbeddingModel that `contrastive.py` overrides. If gone: override
# its `loss` and `eval_forward` instead.
OVERRIDDEN = ("_compute_scores", "_update_step_size_if_needed")


def mark_residual(module: nn.Module) -> None:
    """Mark a layer that writes to the residual stream, for `init_config.init_div_is_residual`."""
    module._is_residual = True  # type: ignore[assignment]


def is_residual(module: nn.Module) -> bool:
    """Return whether a layer writes to the residual stream."""
    return bool(getattr(module, "_is_residual", False))


def release_shard(dataset: Any, shard_id: int) -> None:
    """Mark a shard of a `StreamingDataset` as not in preparation.

    Streaming does not do this if a download fails, so that other workers wait for ever. If the
    states are gone, check whether Streaming now does it.
    """
    dataset._shard_states[shard_id] = _ShardState.REMOTE


def stop_reading(dataset: Any) -> None:
    """End the threads of a `StreamingDataset` that read ahead, if they run.

    If the event is gone, check how `StreamingDataset` ends its threads after an error.
    """
    if hasattr(dataset, "_event"):
        dataset._event.set()
