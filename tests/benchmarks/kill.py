"""Kill small quickstart runs by SIGKILL until they end, and compare their weights.

    python tests/benchmarks/kill.py --kills 20 --out tests/benchmarks/results/kills.json

llm-foundry is imported once; each attempt is a fork that runs its `train`. A quarter of the kills
come at any time; the others come soon after training has begun, or while a checkpoint or the
transformers folder is being written. Each run gets up to four kills, fewer if it ends before, and
is then started once more. Its weights, the state of its optimizer, its loss curve and its
transformers folder are compared, bit for bit, with those of an uninterrupted run.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
TOKENIZER = ROOT / "data_prep" / "quickstart" / "tokenizer"
BATCHES, SAVED_EVERY = 24, 6
# What llm-foundry and Composer log then.
TRAINING, RESUMING = "Starting training", "Loading checkpoint from"
# Aimed kills come up to so many seconds after what they wait for: within the training, and within
# the writing of a small file.
LATEST = {"training": 1.0, "checkpoint": 0.012, "export": 0.012}


def config(out: Path, mds: Path, keys: dict[str, Any] | None = None) -> dict[str, Any]:
    """The quickstart's YAML at a smaller size.

    Args:
        out: Everything is written below it.
        mds: Folder with the splits `train` and `val`.
        keys: Other values, by dotted name.
    """
    from omegaconf import OmegaConf

    cfg: Any = OmegaConf.load(ROOT / "yamls" / "pretrain" / "m2-bert-quickstart.yaml")
    model = {"hidden_size": 32, "intermediate_size": 64, "hyena_filter_order": 8}
    values: dict[str, Any] = {
        "variables": {"run_name": "run", "out": str(out), "tokenizer": str(TOKENIZER)},
        "variables.max_seq_len": 32,
        "train_loader.dataset.local": str(mds),
        "eval_loader.dataset.local": str(mds),
        "max_duration": f"{BATCHES}ba",
        "eval_interval": f"{2 * SAVED_EVERY}ba",
        "save_interval": f"{SAVED_EVERY}ba",
        "progress_bar": False,
        "python_log_level": "info",  # tells where a killed run was
    }
    values |= {f"model.config_overrides.{key}": value for key, value in model.items()}
    for key, value in (values | (keys or {})).items():
        OmegaConf.update(cfg, key, value, force_add=True)
    resolved: Any = OmegaConf.to_container(cfg)
    return resolved


def train(cfg: dict[str, Any], log: Path, environment: dict[str, str]) -> None:
    """Run llm-foundry's `train`, in a process of its own; its output goes to a file."""
    import torch
    from llmfoundry.command_utils import train
    from omegaconf import OmegaConf

    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ |= environment
    train(OmegaConf.create(cfg))


def start(
    cfg: dict[str, Any], log: Path, rank: int = 0, size: int = 1, port: int = 0
) -> BaseProcess:
    """Start a run, or one rank of it, in a fork of a server that has imported it once."""
    environment = rank_environment(rank, size, port or free_port())
    process = forkserver().Process(target=train, args=(cfg, log, environment))
    process.start()
    return process


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What Composer's launcher sets for one rank of a run on this machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_PORT": port}
    numbers |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    # Composer takes FSDP1 by default; FSDP2 also runs on a CPU.
    return {"MASTER_ADDR": "127.0.0.1", "FSDP_VERSION": "2"} | {
        name: str(number) for name, number in numbers.items()
    }


def forkserver() -> Any:
    from tests import fork_server

    fork_server.preload("tests.preloaded")
    return multiprocessing.get_context("forkserver")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait(process: BaseProcess, seconds: float = 300) -> int:
    """Wait for a run's end.

    Returns:
        Its exit code, negative for a signal.

    Raises:
        TimeoutError: If it has not ended by then; it is killed.
    """
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"process {process.pid} ran for more than {seconds:.0f} s")
    return process.exitcode


def wait_for(process: BaseProcess, moment: Callable[[], bool]) -> bool:
    """Wait for a moment of a run; False if it ended before."""
    deadline = time.monotonic() + 300
    while not moment():
        if process.exitcode is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"process {process.pid}: the moment never came")
        time.sleep(0.0002)
    return True


def kill_when(process: BaseProcess, moment: Callable[[], bool], delay: float = 0.0) -> bool:
    """Send SIGKILL to a run at a moment; False if it ended before."""
    if not wait_for(process, moment):
        return False
    time.sleep(delay)
    process.kill()
    return wait(process) == -signal.SIGKILL


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in run.glob("ep*-ba*-rank0.pt")}


def resumes_from(run: Path) -> int:
    """The batch of the newest whole checkpoint, 0 if there is none."""
    from m2_plugin.foundry.run_guard import _is_whole

    return max((batch_of(name) for name in checkpoints(run) if _is_whole(run / name)), default=0)


def batch_of(name: str) -> int:
    return int(name.split("ba")[1].split("-")[0])


def new_checkpoint(run: Path) -> Callable[[], bool]:
    """True once a checkpoint is being written that was not there."""
    before = checkpoints(run)
    return lambda: bool(checkpoints(run) - before)


def training_begun(log: Path) -> Callable[[], bool]:
    """True once an attempt has begun to train."""
    before = log.read_text().count(TRAINING) if log.exists() else 0
    return lambda: log.exists() and log.read_text().count(TRAINING) > before


def export_begun(run: Path) -> Callable[[], bool]:
    """True once the transformers folder is being written."""
    file = run / "huggingface" / "final" / "config.json"
    before = file.stat().st_mtime_ns if file.exists() else None
    return lambda: file.exists() and file.stat().st_mtime_ns != before


def phase(run: Path, log: str, began: float) -> str:
    """What a killed attempt was doing, by what it left.

    Args:
        run: The run's folder.
        log: What the attempt wrote.
        began: When it began, as `time.time()`: older files are an earlier attempt's.
    """
    from m2_plugin.foundry.run_guard import _is_whole

    def written(name: str) -> bool:
        return (run / name).exists() and (run / name).stat().st_mtime >= began

    names = checkpoints(run)
    if any(written(name) and not _is_whole(run / name) for name in names):
        return "checkpoint half written"
    latest = run / "latest-rank0.pt"
    newest = max(names, key=batch_of, default="none")
    if written(newest) and (not latest.exists() or os.readlink(latest) != newest):
        return "checkpoint written, link not moved"
    if f"-ba{BATCHES}-" in newest:
        return "after the last checkpoint"
    if written("huggingface/final/config.json"):
        return "transformers folder being written"
    return "training" if TRAINING in log else "start"


def result(run: Path) -> dict[str, Any]:
    """What a run leaves: its last checkpoint's state, its curve, its transformers folder."""
    import torch

    file = next(run.glob(f"ep*-ba{BATCHES}-rank0.pt"))
    state = torch.load(file, weights_only=False)["state"]
    folder = run / "huggingface" / "final"
    return {
        "model": state["model"],
        "optimizers": state["optimizers"],
        "curve": (run / "loss_curve.csv").read_text(),
        "folder": {path.name: path.read_bytes() for path in sorted(folder.iterdir())},
        "latest": os.readlink(run / "latest-rank0.pt"),
        "kept": sorted(checkpoints(run)),
    }


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two nested results are not the same, bit for bit."""
    import torch

    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() ^ b.keys(), key=str):
            yield f"{where}.{key}: only in one"
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if not torch.equal(a, b):
            yield where
    elif a != b:
        yield where


def run_with_kills(
    out: Path, mds: Path, aims: list[str], seconds: float, rng: random.Random
) -> tuple[list[str], list[int], list[int]]:
    """Start, kill and start again, once for each aim; then let it end.

    Args:
        out: Folder of the run.
        mds: Its data.
        aims: `time`, or a key of `LATEST`.
        seconds: What an unbroken run takes: random times are below it.
        rng: Says when.

    Returns:
        The phase of each kill, the exit codes of the attempts that ended by themselves, and the
        batch from which each attempt that trained went on; -1 if that was not the newest whole one.
    """
    cfg, log, run = config(out, mds), out / "log.txt", out / "run"
    phases, codes, resumed = [], [], []

    def note(newest: int, text: str) -> None:
        if TRAINING in text:
            resumed.append(newest if (RESUMING in text) == (newest > 0) else -1)

    for aim in aims:
        newest = resumes_from(run)
        if aim == "time":
            moment, delay = after(rng.uniform(0, seconds)), 0.0
        else:
            moments = {"training": training_begun(log), "checkpoint": new_checkpoint(run)}
            moment = moments.get(aim) or export_begun(run)
            delay = rng.uniform(0, LATEST[aim])
        begin, began = log.stat().st_size if log.exists() else 0, time.time()
        process = start(cfg, log)
        killed = kill_when(process, moment, delay)
        note(newest, text := log.read_text()[begin:])
        if not killed:
            codes.append(wait(process))
            break
        phases.append(phase(run, text, began))
    newest, begin = resumes_from(run), log.stat().st_size
    codes.append(wait(start(cfg, log)))
    note(newest, log.read_text()[begin:])
    return phases, codes, resumed


def convert(out: Path) -> None:
    command = [sys.executable, "data_prep/convert_c4.py", "--out_root", str(out)]
    command += ["--splits", "train", "val", "--val_fraction", "0.05", "--concat_tokens", "32"]
    command += ["--local_files", "data_prep/quickstart/c4-sample.json.gz"]
    subprocess.run([*command, "--tokenizer", str(TOKENIZER)], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=4, help="kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the tally")
    args = parser.parse_args()

    from m2_plugin.files import write_json

    rng = random.Random(args.seed)
    work = Path(tempfile.mkdtemp(prefix="kill-"))
    convert(work / "mds")
    (work / "unbroken").mkdir()
    warm = forkserver().Process(target=int)
    warm.start()
    wait(warm)  # imports llm-foundry: no part of a run's time
    began = time.monotonic()
    code = wait(start(config(work / "unbroken", work / "mds"), work / "unbroken" / "log.txt"))
    if code:
        print((work / "unbroken" / "log.txt").read_text()[-5000:])
        return 1
    seconds = time.monotonic() - began
    whole = result(work / "unbroken" / "run")

    phases: Counter[str] = Counter()
    runs: list[dict[str, Any]] = []
    while phases.total() < args.kills:
        out = work / f"run{len(runs)}"
        out.mkdir()
        count = min(args.per_run, args.kills - phases.total())
        aims = [rng.choice(["time", *LATEST]) for _ in range(count)]
        killed, codes, resumed = run_with_kills(out, work / "mds", aims, seconds, rng)
        phases.update(killed)
        unequal = [] if any(codes) else list(differences(result(out / "run"), whole))
        if -1 in resumed:
            unequal.append("an attempt did not go on from the newest whole checkpoint")
        runs.append({"kills": killed, "exit_codes": codes, "resumed": resumed, "unequal": unequal})
        print(
            f"run {len(runs)}: {', '.join(killed)}; went on from {resumed}; exit codes {codes}, "
            f"unequal: {unequal}",
            flush=True,
        )
        if any(codes):
            print((out / "log.txt").read_text()[-5000:])
    equal = sum(not any(run["exit_codes"]) and not run["unequal"] for run in runs)
    for name, count in phases.most_common():
        print(f"{count:4d}  {name}")
    print(f"{phases.total()} kills in {len(runs)} runs; {equal} ended as the unbroken one did.")
    if args.out is not None:
        tally = {"kills": phases.total(), "phases": dict(phases), "runs": runs, "equal": equal}
        tally |= {"seed": args.seed, "date": time.strftime("%Y-%m-%d")}
        tally |= {"batches": BATCHES, "saved_every": SAVED_EVERY, "unbroken_seconds": seconds}
        write_json(args.out, tally)
    if equal == len(runs):
        shutil.rmtree(work)
    return int(equal != len(runs))


if __name__ == "__main__":
    sys.exit(main())
