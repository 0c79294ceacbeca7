"""Training as `composer train.py` runs it: tokens per second, memory and MFU on one GPU.

    python tests/benchmarks/bench_training.py
    python tests/benchmarks/bench_training.py --device cpu --seconds 5   # to try this script

Runs yamls/pretrain/m2-bert-base.yaml and bert-base.yaml through llm-foundry's `train_from_yaml`,
one after the other, each for `--seconds` after its first batches: with the recipes' loader, model,
optimizer and precision, on the quickstart's novels. What differs is said in `recipe`: no
evaluation, no files, no loggers, and smaller batches. Needs llm-foundry; the plugin's entry points
must be installed, too. Writes tests/benchmarks/results/training_<device>.json after each model.

MFU is the share of the device's dense bf16 rate that the model's operations take, by its
`flops_per_batch` (m2_plugin/foundry/flops.py): three times the forward pass, and what is computed
again does not count.
"""

import argparse
import datetime
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Callback, State
from composer.loggers import Logger
from llmfoundry import registry
from llmfoundry.command_utils import train_from_yaml
from omegaconf import DictConfig, OmegaConf
from report import RESULTS, ROOT

QUICKSTART = ROOT / "data_prep" / "quickstart"
RECIPES = {"m2_bert": "m2-bert-base.yaml", "bert": "bert-base.yaml"}
UNUSED = ("loggers", "save_folder", "save_interval", "save_num_checkpoints_to_keep", "autoresume")
UNUSED += ("eval_loader", "eval_interval", "device_eval_batch_size", "callbacks")
WARMUP_BATCHES = 3  # in which kernels are compiled, and memory is allocated
CLOCK = "bench_clock"
SMALL = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2}  # on a CPU


class Clock(Callback):
    """Measures batches after the first ones, and stops the run after so many seconds."""

    found: dict[str, Any] = {}  # of the last run

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.start = 0.0
        self.first: tuple[int, int] | None = None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Count the batch; the device is waited for at the two ends only."""
        del logger
        batches, samples = state.timestamp.batch.value, state.timestamp.sample.value
        if batches < WARMUP_BATCHES:
            return
        if self.first is None:
            synchronise()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.start, self.first = time.perf_counter(), (batches, samples)
            return
        if time.perf_counter() - self.start < self.seconds:
            return
        synchronise()
        took = time.perf_counter() - self.start
        batches, samples = batches - self.first[0], samples - self.first[1]
        length = state.batch["input_ids"].shape[1]
        rows = samples / batches
        operations = rows / len(state.batch["input_ids"]) * state.model.flops_per_batch(state.batch)
        peak = get_gpu_flops_available(state)
        Clock.found = {
            "batches": batches,
            "batch": round(rows),
            "length": length,
            "parameters": sum(p.numel() for p in state.model.parameters()),
            "seconds": took,
            "tokens_per_s": samples * length / took,
            "operations_per_s": operations * batches / took,
            "mfu": operations * batches / took / peak if peak else None,
            "peak_operations_per_s": peak or None,
            "loss": float(state.total_loss_dict.get("loss/train/total", state.loss)),
        }
        if torch.cuda.is_available():
            Clock.found["peak_bytes"] = torch.cuda.max_memory_allocated()
        state.stop_training()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def convert(folder: Path) -> None:
    """Write the quickstart's novels as tokens, in MDS."""
    command = [sys.executable, str(ROOT / "data_prep" / "convert_text.py"), "--splits", "train"]
    command += ["--out_root", str(folder), "--concat_tokens", "128"]
    command += ["--local_files", str(QUICKSTART / "novels.jsonl.gz")]
    command += ["--tokenizer", str(QUICKSTART / "tokenizer")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the conversion failed: {done.stderr[-2000:]}")


def recipe(name: str, data: Path, args: argparse.Namespace) -> DictConfig:
    """Return the YAML with what a short run needs: our data, fewer samples, nothing written."""
    config = OmegaConf.load(ROOT / "yamls" / "pretrain" / RECIPES[name])
    assert isinstance(config, DictConfig)
    for key in UNUSED:
        config.pop(key, None)
    config.variables.data = str(data)
    config.variables.tokenizer = str(QUICKSTART / "tokenizer")
    # One epoch of many samples: at the end of each, the loader's processes would start anew.
    config.train_loader.dataset.epoch_size = 1 << 22
    config.max_duration = "1ep"
    config.global_train_batch_size = args.batch
    config.device_train_microbatch_size = args.microbatch
    config.progress_bar = False
    config.train_loader.num_workers = args.workers
    config.callbacks = {
        "seed_each_batch": {},
        "speed_monitor": {"window_size": 10},
        CLOCK: {"seconds": args.seconds},
    }
    if args.device == "cpu":
        config.precision = "fp32"
        config.model.config_overrides.update(SMALL)
        config.train_loader.pin_memory = False
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each model")
    parser.add_argument("--batch", type=int, help="sequences in a step (2048; on a CPU 8)")
    parser.add_argument("--microbatch", type=int, help="(512; on a CPU 4)")
    parser.add_argument("--workers", type=int, help="of the loader (8; on a CPU 0)")
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    cpu = args.device == "cpu"
    args.batch = args.batch or (8 if cpu else 2048)
    args.microbatch = args.microbatch or (4 if cpu else 512)
    args.workers = (0 if cpu else 8) if args.workers is None else args.workers
    registry.callbacks.register(CLOCK, func=Clock)
    report: dict[str, Any] = {
        "benchmark": "training",
        "date": datetime.date.today().isoformat(),
        "device": "cpu" if cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "batch": args.batch,
        "microbatch": args.microbatch,
        "models": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"training_{args.device}.json"
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "mds"
        convert(data)
        for name in args.models:
            config = recipe(name, data, args)
            report["precision"] = config.precision
            report["optimizer"] = config.optimizer.name
            written = Path(scratch) / f"{name}.yaml"
            OmegaConf.save(config, written)
            Clock.found = {}
            try:
                train_from_yaml(str(written), [])
                report["models"][name] = Clock.found or {"error": "it ended before the clock"}
            except Exception as problem:  # the other model is measured all the same
                report["models"][name] = {"error": f"{type(problem).__name__}: {problem}"}
            gc.collect()
            if not cpu:
                torch.cuda.empty_cache()
            print(name, json.dumps(report["models"][name]), flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
