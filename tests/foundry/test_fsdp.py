"""A training run on 1, 2 and 4 processes, sharded or not, has the same losses and checkpoints.

The runs use FSDP2, which llm-foundry runs on CPU ranks. FSDP1, and what llm-foundry does on GPUs
only, are tested with torch's own FSDP and the settings that the model gives to llm-foundry. On one
process llm-foundry ignores fsdp_config: there, torch first converts a sharded checkpoint to a file.
"""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.utils import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1600)]  # four processes train on few cores

PRETRAIN = ROOT / "yamls" / "pretrain"
BATCHES, SAVED = 4, 2
SIZES = {"hidden_size": 32, "intermediate_size": 64, "hyena_filter_order": 8}
SIZES |= {"max_position_embeddings": 32, "long_conv_l_max": 32, "vocab_size": 65}
BERT = {f"model.config_overrides.{key}": value for key, value in SIZES.items()}
GPT = {"model.d_model": 32, "model.n_layers": 2, "model.attn_config.filter_order": 8}
FULL, SHARDED = {"state_dict_type": "full"}, {"state_dict_type": "sharded"}
# Name: processes, fsdp_config, and what else differs.
RUNS: dict[str, tuple[int, dict[str, Any] | None, dict[str, Any]]] = {
    "one": (1, None, {}),
    "ddp2": (2, None, {}),
    "sharded2": (2, SHARDED, {}),
    "full2": (2, FULL, {"model.init_device": "mixed"}),
    "sharded4": (
        4,
        SHARDED | {"activation_checkpointing": True},
        {"device_train_microbatch_size": 2},
    ),
    # Inductor compiles the same graphs; a test of the models alone trains through it.
    "compiled_ddp2": (2, None, {"compile_config": {"backend": "aot_eager"}}),
    "compiled2": (2, SHARDED, {"compile_config": {"backend": "aot_eager"}}),
}
# Name: whose checkpoint it starts from, processes, fsdp_config.
LOADED: dict[str, tuple[str, int, dict[str, Any] | None]] = {
    "full2_in_one": ("full2", 1, None),
    "sharded4_in_two": ("sharded4", 2, SHARDED),
    "one_in_ddp2": ("one", 2, None),
    "one_in_four": ("one", 4, FULL),
    "sharded2_in_four": ("sharded2", 4, SHARDED),
    "sharded4_in_one": ("sharded4", 1, None),
}


# M2-GPT: processes, fsdp_config, and what else differs.
GPT_RUNS: dict[str, tuple[int, dict[str, Any] | None, dict[str, Any]]] = {
    "gpt_one": (1, None, {"callbacks.hf_checkpointer": {"save_interval": "1dur"}}),
    "gpt_sharded2": (
        2,
        SHARDED | {"activation_checkpointing": True},
        {"model.init_device": "mixed"},
    ),
}
# By torch's FSDP: processes, and the arguments of `on_ranks.shard`.
SHARDINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "plain_bf16": (1, {"low_precision": True}),
    "fsdp1": (2, {"version": 1}),
    "fsdp1_meta": (2, {"version": 1, "init_device": "meta", "checkpointing": True}),
    "fsdp1_compiled": (2, {"version": 1, "compiled": True, "checkpointing": True}),
    "fsdp1_bf16": (2, {"version": 1, "low_precision": True}),
    # As the YAML for 64 GPUs.
    "fsdp1_hybrid": (4, {"version": 1, "low_precision": True, "hybrid": True}),
    "fsdp2_meta": (2, {"version": 2, "init_device": "meta"}),
    "fsdp2_bf16": (2, {"version": 2, "low_precision": True}),
    "fsdp2_bf16_reduce": (2, {"version": 2, "low_precision": True, "reduce_only": True}),
}
# The contrastive model: processes, and the arguments of `on_ranks.contrast`.
CONTRASTS: dict[str, tuple[int, dict[str, Any]]] = {
    "contrast_plain": (1, {}),
    "contrast_ddp": (2, {"kind": "ddp"}),
    "contrast_ddp_cached": (2, {"kind": "ddp", "mini_batch_size": 5}),
    "contrast_fsdp1_cached": (2, {"kind": "fsdp1", "mini_batch_size": 5, "checkpointing": True}),
    "contrast_fsdp2_cached": (2, {"kind": "fsdp2", "mini_batch_size": 5}),
    "contrast_fsdp2_checkpointed": (
        2,
        {"kind": "fsdp2", "mini_batch_size": 12, "checkpointing": True},
    ),
}
# A metric: processes, and the arguments of `on_ranks.entity_f1`.
METRICS: dict[str, tuple[int, dict[str, Any]]] = {"entities": (2, {})}


def config(
    out: Path,
    mds: Path,
    tokenizer: Path,
    fsdp: dict[str, Any] | None,
    keys: dict[str, Any],
    model: str = "m2-bert-quickstart",
) -> Any:
    cfg = OmegaConf.load(PRETRAIN / f"{model}.yaml")
    values = {
        "variables": {"run_name": out.name, "out": str(out), "tokenizer": str(tokenizer)},
        "variables.max_seq_len": 32,
        "save_folder": str(out / "run"),
        "train_loader.dataset.local": str(mds),
        "eval_loader.dataset.local": str(mds),
        "device_train_microbatch_size": 4,
        "max_duration": f"{BATCHES}ba",
        "eval_interval": f"{BATCHES}ba",
        "save_num_checkpoints_to_keep": -1,
        "autoresume": False,
        "progress_bar": False,
        # Gloo sums where FSDP2 asks for the mean over ranks (NCCL does not). Gradients that are
        # always clipped have the same length in either case.
        "algorithms.gradient_clipping.clipping_threshold": 1e-3,
        "optimizer.lr": 3e-3,  # few words and batches: the loss shall fall visibly
    }
    cfg.callbacks.loss_curve = {}
    cfg.callbacks.pop("hf_checkpointer", None)
    cfg.pop("loggers", None)  # without a save_folder, TensorBoard writes to the current folder
    for key, value in (values | (GPT if "gpt" in model else BERT) | keys).items():
        OmegaConf.update(cfg, key, value, force_add=True)
    if "hf_checkpointer" in cfg.callbacks:
        cfg.callbacks.hf_checkpointer.save_folder = str(out)
    if fsdp is not None:
        cfg.fsdp_config = fsdp
    return OmegaConf.to_container(cfg)


def checkpoint(folder: Path, batch: int, sharded: bool) -> Path:
    return folder / "run" / (f"ep0-ba{batch}" if sharded else f"ep0-ba{batch}-rank0.pt")


@pytest.fixture(scope="module")
def runs(mds, small_tokenizer, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fsdp")
    data = mds, small_tokenizer
    jobs = []
    loaded = {source for source, _, _ in LOADED.values()}
    for model, wanted in (("m2-gpt-small", GPT_RUNS), ("m2-bert-quickstart", RUNS)):
        for name, (size, fsdp, keys) in wanted.items():
            keys = keys | {"save_interval": f"{SAVED if name in loaded else BATCHES}ba"}
            job = {"world_size": size, "config": config(root / name, *data, fsdp, keys, model)}
            jobs.append(job)
    functions = {"shard": SHARDINGS, "contrast": CONTRASTS, "entity_f1": METRICS}
    for function, wanted in functions.items():
        for name, (size, keys) in wanted.items():
            arguments = keys | {"out": str(root / name)}
            jobs.append({"world_size": size, "function": function, "arguments": arguments})
    late = []
    for name, (source, size, fsdp) in LOADED.items():
        path = checkpoint(root / source, SAVED, source.startswith("sharded"))
        job = {"world_size": size}
        if path.suffix != ".pt" and fsdp is None:
            job["to_file"] = [str(path), str(path := path.with_suffix(".pt"))]
        curve = {"folder": str(root / name / "run")}
        keys = {"load_path": str(path), "save_folder": None, "callbacks.loss_curve": curve}
        late.append(job | {"config": config(root / name, *data, fsdp, keys)})
    # Successive jobs of one size share their processes.
    jobs = [job for part in (jobs, late) for job in sorted(part, key=lambda j: j["world_size"])]
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.foundry.ranks", root / "jobs.json"],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    names = [*GPT_RUNS, *RUNS, *SHARDINGS, *CONTRASTS, *METRICS, *LOADED]
    return {name: root / name for name in names}


def curve(out: Path) -> dict[tuple[int, str], float]:
    with open(out / "run" / "loss_curve.csv") as file:
        return {
            (int(row["batch"]), row["curve"]): float(row["loss"]) for row in csv.DictReader(file)
        }


def test_the_same_losses_however_many_and_sharded_or_not(runs):
    one = curve(runs["one"])
    assert len(one) == BATCHES + 1 and one[BATCHES, "train"] < one[1, "train"] - 0.02
    for name in RUNS:
        assert curve(runs[name]) == pytest.approx(one, rel=2e-6), name


def test_m2_gpt_is_sharded_and_saved_for_transformers(runs):
    """Losses equal those on one process; the folder has the trained weights, and generates."""
    one = curve(runs["gpt_one"])
    assert len(one) == BATCHES + 1 and one[BATCHES, "train"] < one[1, "train"] - 0.02
    assert curve(runs["gpt_sharded2"]) == pytest.approx(one, rel=2e-6)

    folder = runs["gpt_one"] / "huggingface" / f"ba{BATCHES}"
    # The folder has files of llm-foundry, which import llm-foundry and thereby the plugin.
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    file = checkpoint(runs["gpt_one"], BATCHES, sharded=False)
    trained = torch.load(file, weights_only=False)["state"]["model"]
    saved = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in trained.items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer("call me", return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**text, max_new_tokens=3, use_cache=False)
    assert tokens.shape[1] == text["input_ids"].shape[1] + 3


def test_checkpoints_load_into_each_other(runs):
    """After batch 2, another number of processes continues with the losses of the unbroken run."""
    one = curve(runs["one"])
    for name in LOADED:
        found = curve(runs[name])
        assert found.keys() == one.keys(), name
        assert found == pytest.approx(one, rel=2e-6), name


def test_what_is_saved_is_sharded_or_whole(runs):
    def model(name: str) -> dict[str, torch.Tensor]:
        file = checkpoint(runs[name], BATCHES, sharded=False)
        return torch.load(file, weights_only=False)["state"]["model"]

    one, full = model("one"), model("full2")
    assert one.keys() == full.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(full[name], tensor, rtol=0, atol=2e-6, msg=name)
    for name, size in (("sharded2", 2), ("sharded4", 4)):
        folder = checkpoint(runs[name], BATCHES, sharded=True)
        tensors = FileSystemReader(folder).read_metadata().state_dict_metadata
        for weight, tensor in one.items():
            parts = tensors[f"state.model.{weight}"].chunks
            largest = math.ceil(tensor.shape[0] / size)
            assert max(part.sizes[0] for part in parts) == largest, weight
            assert sum(math.prod(part.sizes) for part in parts) == tensor.numel(), weight


def test_units_of_torchs_fsdp_train_as_the_whole_model(runs):
    found = {name: json.loads((runs[name] / "result.json").read_text()) for name in SHARDINGS}
    weights = {name: torch.load(runs[name] / "weights.pt") for name in SHARDINGS}
    plain = found["plain"]["losses"]
    assert plain[1] < plain[0] - 0.1
    for name in ("fsdp1", "fsdp1_meta", "fsdp1_compiled", "fsdp2_meta"):
        assert found[name]["losses"] == pytest.approx(plain, rel=2e-6), name
        assert found[name]["units"] == 1 + 2 + 2 * 2, name  # the root, layers, their filters
        for key, value in weights["plain"]["before"].items():
            # Also on the meta device, where each rank fills what FSDP has given it.
            assert torch.equal(weights[name]["before"][key], value), (name, key)
        for key, value in weights["plain"]["after"].items():
            torch.testing.assert_close(weights[name]["after"][key], value, rtol=1e-4, atol=1e-5)

    for name, result in found.items():
        if "error" not in result:  # a clipped step later, with what was saved of the optimizer
            straight, resumed = result["resumed"]
            assert straight[1] < straight[0] and resumed == pytest.approx(straight, rel=1e-6), name

    for name in ("fsdp1_bf16", "fsdp1_hybrid", "fsdp2_bf16_reduce"):
        assert found[name]["losses"] == pytest.approx(found["plain_bf16"]["losses"], rel=1e-3)
        assert found[name]["dtypes"]["filter"] == ["torch.float32"], name
    for name in ("fsdp1_bf16", "fsdp1_hybrid"):
        assert found[name]["dtypes"]["projection"] == ["torch.bfloat16"], name
    # Composer's FSDP2 has one precision for all units.
    assert "rounds the long convolutions' filters" in found["fsdp2_bf16"]["error"]


def test_contrastive_ranks_share_their_negatives(runs):
    """Gathered, in mini-batches and sharded, the steps are those of one process's batch."""
    found = {name: json.loads((runs[name] / "result.json").read_text()) for name in CONTRASTS}
    weights = {name: torch.load(runs[name] / "weights.pt") for name in CONTRASTS}
    plain = found["contrast_plain"]["losses"]
    assert plain[-1] < plain[0] - 0.05
    for name in CONTRASTS:
        assert found[name]["losses"] == pytest.approx(plain, rel=1e-5), name
        assert weights[name].keys() == weights["contrast_plain"].keys()
        for key, value in weights["contrast_plain"].items():
            torch.testing.assert_close(weights[name][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_entity_f1_is_that_of_all_ranks_words(runs):
    """Also if a sentence lies on two ranks, a word on both, or one rank has none."""
    found = [json.loads((runs["entities"] / f"{rank}.json").read_text()) for rank in range(2)]
    alone = found[0][0]
    assert 0 < alone < 1
    assert found == [[alone] * 3] * 2
