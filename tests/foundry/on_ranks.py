"""What one rank of several does; `ranks.py` runs these functions.

It trains a small M2-BERT under torch's own FSDP or DDP, since Composer's FSDP needs CUDA. What
Composer does, on the CPU: units by `fsdp_wrap_fn`, storage for meta parameters and
`param_init_fn`, checkpointing by `activation_checkpointing_fn`. And it sums a metric over ranks.
"""

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as tdist
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.utils import dist
from llmfoundry.utils.builders import build_composer_model
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from m2_plugin.foundry.optimizers import DecoupledAdamW
from m2_plugin.foundry.token_classification import EntityF1
from m2_plugin.layers.long_conv import HyenaFilter
from tests.utils import TOKENIZER

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 1000}
SIZES |= {"max_position_embeddings": 32, "long_conv_l_max": 32, "hyena_filter_order": 8}
SIZES |= {"hidden_dropout_prob": 0.0}
STEPS, BATCH = 3, 4
ENTITY_TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def give_storage(inner: Any, module: nn.Module) -> None:
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        return
    module.to_empty(device="cpu", recurse=False)
    if module is inner.get_input_embeddings():
        inner.tie_weights()  # which the line above has broken
    inner.param_init_fn(module)


def shard1(inner: Any, low_precision: bool, hybrid: bool, checkpointing: bool) -> nn.Module:
    """By FSDP1, as Composer's `prepare_fsdp_module`; `low_precision` is its default on a GPU."""
    bf16 = torch.bfloat16
    precision = MixedPrecision(param_dtype=bf16, reduce_dtype=torch.float32, buffer_dtype=bf16)
    mesh = {}
    if hybrid:
        precision.reduce_dtype = bf16
        mesh = {
            "device_mesh": init_device_mesh("cpu", (dist.get_world_size() // 2, 2)),
            "sharding_strategy": ShardingStrategy._HYBRID_SHARD_ZERO2,
        }
    sharded = FullyShardedDataParallel(
        inner,
        **mesh,
        auto_wrap_policy=CustomPolicy(inner.fsdp_wrap_fn),
        mixed_precision=precision if low_precision else None,
        param_init_fn=functools.partial(give_storage, inner),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    if checkpointing:
        wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
        apply_activation_checkpointing(sharded, wrapper, check_fn=inner.activation_checkpointing_fn)
    return sharded


def shard2(model: Any, policy: MixedPrecisionPolicy) -> None:
    """By FSDP2, as Composer's `apply_fully_shard`."""
    units = generate_composer_model_policy(model)._run_policy(model, set(), {"mp_policy": policy})
    for module in reversed(list(model.modules())):  # the inner ones first
        if module in units:
            fully_shard(module, **units[module])
    for module in list(model.model.modules()):
        give_storage(model.model, module)


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: int, low_precision: bool, clip: float = 0
) -> list[float]:
    """Train each rank on its rows of the same batch; return the mean loss of each step."""
    ids = torch.randint(1, 1000, (BATCH, 32), generator=torch.Generator().manual_seed(0))
    rows = ids.chunk(dist.get_world_size())[dist.get_global_rank()]
    found = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        if clip and isinstance(model, FullyShardedDataParallel):
            model.clip_grad_norm_(clip)
        elif clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach() / dist.get_world_size()
        tdist.all_reduce(loss)
        found.append(loss.item())
    return found


def resume(model: Any, low_precision: bool) -> tuple[list[float], list[float]]:
    """Return the losses of an optimizer that continues, and of one that was saved and loaded."""
    found = []
    optimizer = DecoupledAdamW(model.parameters(), lr=3e-3, weight_decay=1e-5)
    train(model, optimizer, 2, low_precision, clip=0.1)
    options = StateDictOptions(full_state_dict=True)
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    for new in (False, True):
        if new:
            optimizer = DecoupledAdamW(model.parameters(), lr=3e-3, weight_decay=1e-5)
            set_state_dict(
                model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1],
                options=options,
            )  # fmt: skip
        found.append(train(model, optimizer, 2, low_precision, clip=0.1))
    return found[0], found[1]


def shard(
    out: str,
    version: int = 0,
    init_device: str = "cpu",
    low_precision: bool = False,
    reduce_only: bool = False,
    hybrid: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
) -> None:
    """Shard and train; write losses, dtypes, the number of units and weights to a folder.

    Args:
        out: The folder.
        version: Of FSDP; 0 does not shard.
        init_device: Of the model, "cpu" or "meta".
        low_precision: Train in bf16 as the trainer does on a GPU: autocast, and FSDP casts.
        reduce_only: Let FSDP2 cast gradients only.
        hybrid: Let FSDP1 shard over pairs of ranks and replicate these, and reduce in bf16.
        checkpointing: Compute the layers' activations again in the backward pass.
        compiled: Compile what is sharded.
    """
    dist.initialize_dist("cpu")
    os.environ["FSDP_VERSION"] = str(version)
    torch.manual_seed(1)
    config = {"config_overrides": SIZES, "init_device": init_device}
    model = build_composer_model("m2_bert_mlm", config, None)
    dtypes: dict[str, set[str]] = {"filter": set(), "projection": set()}
    for module in () if compiled else model.modules():  # a graph would break at these hooks
        kind = "filter" if isinstance(module, HyenaFilter) else "projection"
        if kind == "filter" or type(module) is nn.Linear:
            module.register_forward_hook(
                lambda m, *_, kind=kind: dtypes[kind].update(str(p.dtype) for p in m.parameters())
            )
    result: dict[str, Any] = {}
    inner: Any = model.model
    if version == 1:
        inner = shard1(inner, low_precision, hybrid, checkpointing)
    elif version == 2:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low_precision and not reduce_only else None,
            reduce_dtype=torch.bfloat16 if reduce_only else None,
        )
        shard2(model, policy)
    sharded = [m for m in inner.modules() if isinstance(m, FullyShardedDataParallel | FSDPModule)]
    result["units"] = len(sharded)
    options = StateDictOptions(full_state_dict=True)
    before = copy.deepcopy(get_model_state_dict(inner, options=options))
    try:
        trained = torch.compile(inner, backend="aot_eager") if compiled else inner
        # Gloo sums where FSDP2 asks for the mean over ranks (NCCL does not).
        scale = dist.get_world_size() if version == 2 else 1
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.5 / scale)
        result["losses"] = train(trained, optimizer, STEPS, low_precision)
    except ValueError as error:
        result["error"] = str(error)
    after = copy.deepcopy(get_model_state_dict(inner, options=options))
    if "error" not in result:
        result["resumed"] = resume(inner, low_precision)
    result["dtypes"] = {kind: sorted(found) for kind, found in dtypes.items()}
    if dist.get_global_rank() == 0:
        folder = Path(out)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        torch.save({"before": before, "after": after}, folder / "weights.pt")
    dist.barrier()


def contrast(
    out: str, kind: str = "plain", mini_batch_size: int | None = None, checkpointing: bool = False
) -> None:
    """Train the contrastive model on each rank's queries; write losses and weights to a folder.

    Args:
        out: The folder.
        kind: "plain", "ddp", "fsdp1" or "fsdp2".
        mini_batch_size: Texts that are encoded at a time.
        checkpointing: With FSDP, compute the layers' activations again too.
    """
    dist.initialize_dist("cpu")
    ranks, rank = dist.get_world_size(), dist.get_global_rank()
    os.environ["FSDP_VERSION"] = "2" if kind == "fsdp2" else "1"
    torch.manual_seed(1)
    config = {
        "pretrained": False,
        "config_overrides": {**SIZES, "vocab_size": 30528, "mask_padding": True},
        "contrastive_config": {"temperature": 0.05, "gather_in_batch_negatives": ranks > 1},
        "mini_batch_size": mini_batch_size,
    }
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model: Any = build_composer_model("m2_bert_contrastive", config, tokenizer)
    outer = DistributedDataParallel(model) if kind == "ddp" else model
    if kind == "fsdp1":
        model.model = shard1(model.model, False, False, checkpointing)
    elif kind == "fsdp2":
        if checkpointing:
            check = model.model.activation_checkpointing_fn
            apply_activation_checkpointing(model, checkpoint_wrapper, check_fn=check)
        shard2(model, MixedPrecisionPolicy())
    # Gloo sums where FSDP2 asks for the mean over ranks (NCCL does not).
    lr = 0.1 / (ranks if kind == "fsdp2" else 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    ids = torch.randint(1, 1000, (8, 3, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(STEPS):
        rows = ids.chunk(ranks)[rank]
        batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        loss = model.loss(outer(batch), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = get_model_state_dict(model.model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        folder = Path(out)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"losses": losses}))
        torch.save(weights, folder / "weights.pt")
    dist.barrier()


def entity_rows() -> torch.Tensor:
    """Return the rows of 20 words of 4 sentences, as `word_rows`; three tags in four are right."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(len(ENTITY_TAGS), (20, 2), generator=draw)
    ids[:, 0] = torch.where(torch.arange(20) % 3 > 0, ids[:, 1], ids[:, 0])
    return torch.cat([torch.tensor([(i // 5, i % 5) for i in range(20)]), ids], 1)


def entity_f1(out: str) -> None:
    """Write each rank's entity F1 to a folder: alone with all words, then with its part of them.

    First both of two ranks have words, then one has none.
    """
    dist.initialize_dist("cpu")
    rank = dist.get_global_rank()
    alone = EntityF1(ENTITY_TAGS)
    alone.sync_on_compute = False
    alone.update(entity_rows())
    values = [alone.compute().item()]
    for split in (7, 0):  # the words of rank 0, in the middle of a sentence; or none
        metric = EntityF1(ENTITY_TAGS)
        rows = entity_rows()
        own = rows[:split] if rank == 0 else rows[max(split - 2, 0) :]  # two words twice
        if len(own):
            metric.update(own)
        values.append(metric.compute().item())
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{rank}.json").write_text(json.dumps(values))
    dist.barrier()
