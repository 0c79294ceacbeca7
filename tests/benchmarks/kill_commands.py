"""Kill commands by SIGKILL at random times, run them again, and compare what they write.

    python tests/benchmarks/kill_commands.py --kills 20 --out FILE.json
    python tests/benchmarks/kill_commands.py --only convert-text convert-pairs --kills 15

The commands are `import`, `export`, `extend`, `average`, `embed`, `predict` and `train-report`, all
with small inputs; `embed` and `predict` run in several processes. Each attempt is a fork of a
server that has imported their code, and the kill ends all its processes. After a kill what they
write must be absent or complete; after the next run it must be what an unbroken run writes, byte
for byte, with no hidden file beside it. The converters (kill_conversions.py) and the GLUE sweep
(kill_sweep.py) are processes of their own.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
TEXTS = 3000
DATED = "report.html"  # it has the time at which it was made
GROWS = "report"  # a folder whose files are whole one by one


def inputs(work: Path, workers: int = 2) -> dict[str, list[str]]:
    """Make small inputs; return the arguments of each command, up to the value of --out.

    Args:
        work: The folder for the inputs.
        workers: The processes of `embed` and `predict`; one is the command's own process.
    """
    import torch
    from transformers import AutoTokenizer

    from m2_plugin.checkpoints.convert import export_checkpoint
    from m2_plugin.models import (
        M2BertConfig,
        M2BertForMaskedLM,
        M2BertForSequenceClassification,
        M2BertForTextEmbedding,
    )

    torch.manual_seed(0)
    masked = M2BertForMaskedLM(M2BertConfig(**SIZES))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data_prep" / "quickstart" / "tokenizer")
    embedder = M2BertForTextEmbedding(M2BertConfig(**SIZES, mask_padding=True))
    classifier = M2BertForSequenceClassification(M2BertConfig(**SIZES, mask_padding=True))
    for name, model in (("masked", masked), ("embedder", embedder), ("classifier", classifier)):
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    export_checkpoint(work / "masked", work / "reference.pt")
    texts = work / "texts.txt"
    texts.write_text("".join(f"text {i} of many\n" for i in range(TEXTS)))
    (work / "run").mkdir()
    rows = "".join(f"{batch},train,{9 - batch / 100}\n" for batch in range(1, 200))
    (work / "run" / "loss_curve.csv").write_text(f"batch,curve,loss\n{rows}")
    masked_folder, length = str(work / "masked"), "256"
    run = ["--num-workers", str(workers), "--out"]
    return {
        "folder": ["import", str(work / "reference.pt"), "--out"],
        "checkpoint.pt": ["export", masked_folder, "--out"],
        "longer": ["extend", masked_folder, "--max-seq-len", length, "--out"],
        "mean": ["average", masked_folder, str(work / "reference.pt"), "--out"],
        "vectors.npy": ["embed", str(texts), "--model", str(work / "embedder"), *run],
        "answers.csv": ["predict", str(texts), "--model", str(work / "classifier"), *run],
        GROWS: ["train-report", str(work / "run"), "--out"],
    }


def attempt(arguments: list[str], seconds: float | None = None) -> int:
    """Run a command in a process of its own, and kill it after some time; return its exit code.

    A server forks it. A fork of this process would share tqdm's lock, which is a semaphore, and
    one that is killed while it holds the lock would stop all later ones.
    """
    from tests import fork_server

    names = ["checkpoints.convert", "checkpoints.average", "checkpoints.extend", "models", "embed"]
    fork_server.preload(*(f"m2_plugin.{name}" for name in [*names, "predict", "train_report.draw"]))
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(arguments,))
    process.start()
    assert process.pid is not None
    if seconds is not None:
        time.sleep(seconds)
        with suppress(ProcessLookupError):  # it did not even begin
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run(arguments: list[str]) -> None:
    """Be a command: a group of processes whose workers have a server of their own."""
    from m2_plugin import cli

    os.setpgid(0, 0)
    forkserver._forkserver.__init__()  # type: ignore[attr-defined]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.exit(cli.main(arguments))


def content(path: Path) -> dict[str, bytes]:
    """Return the files of a folder, or a file itself."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path.parent).as_posix(): file.read_bytes() for file in files}


def half_written(found: dict[str, bytes], unbroken: dict[str, bytes], grows: bool) -> list[str]:
    """Name what is neither absent nor as in the unbroken run."""
    odd = [name for name, data in found.items() if unbroken.get(name) != data]
    odd = [name for name in odd if not name.endswith(DATED)]
    if grows:  # its files have their temporary folders in it
        odd = [name for name in odd if "/." not in name]
    return odd if grows or not found else odd + sorted(unbroken.keys() - found.keys())


def check(work: Path, name: str, arguments: list[str], kills: int, rng: random.Random) -> Any:
    """Kill a command some times, and say what went wrong.

    Args:
        work: The folder to work in.
        name: What the command writes; a folder for it is made for each kill.
        arguments: The command, up to the value of --out.
        kills: The number of kills.
        rng: It says when.

    Returns:
        A tally: kills, how many came before the end, and what was half written, different or left.
    """
    tally: Counter[str] = Counter()
    seconds, unbroken = math.inf, dict[str, bytes]()
    for i in range(2):  # the first one may take longer, and no kill would come before the end
        whole = work / f"unbroken-{name}-{i}" / name
        whole.parent.mkdir()
        began = time.monotonic()
        assert attempt([*arguments, str(whole)]) == 0, arguments
        seconds, unbroken = min(seconds, time.monotonic() - began), content(whole)
    for i in range(kills):
        out = work / f"killed-{name}-{i}" / name
        out.parent.mkdir()
        tally["kills"] += 1
        killed = attempt([*arguments, str(out)], rng.uniform(0, seconds)) == -signal.SIGKILL
        tally["before the end"] += killed
        if not killed:  # the machine was slower before: aim earlier
            seconds /= 2
        tally["left something hidden"] += bool(list(out.parent.glob(".*")))
        grows = name == GROWS
        tally["half written"] += bool(half_written(content(out), unbroken, grows))
        complete = out.exists() and not grows
        if not complete or list(out.parent.glob(".*")):
            assert attempt([*arguments, str(out)]) == int(complete), arguments
        tally["different"] += bool(half_written(content(out), unbroken, False))
        tally["hidden after the rerun"] += bool(list(out.parent.glob(".*")))
    return dict(tally)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command, in each way")
    parser.add_argument("--only", nargs="+", metavar="COMMAND", help="these commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="a JSON file for the tally; it keeps that of others"
    )
    args = parser.parse_args()

    from m2_plugin.files import write_json
    from tests.benchmarks.kill_conversions import WAYS, check_conversion, conversions
    from tests.benchmarks.kill_sweep import check_sweep

    rng, found = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checks: dict[str, Callable[[], Any]] = {
            f"{name}, {way}": partial(check_conversion, work, name, arguments, way, args.kills, rng)
            for name, arguments in conversions(work).items()
            for way in WAYS
        }
        if not args.only or not all(name.startswith("convert-") for name in args.only):
            for name, arguments in inputs(work).items():
                checks[arguments[0]] = partial(check, work, name, arguments, args.kills, rng)
        checks["glue"] = partial(check_sweep, work, args.kills, rng)
        for name, function in checks.items():
            if not args.only or name.replace(",", " ").split()[0] in args.only:
                found[name] = function()
                print(name, found[name], flush=True)
                if args.out is not None:
                    before = json.loads(args.out.read_text()) if args.out.exists() else {}
                    commands = before.get("commands", {}) | {name: found[name]}
                    write_json(args.out, {"commands": commands, "date": time.strftime("%Y-%m-%d")})
    return int(any(wrong(tally) for tally in found.values()))


def wrong(tally: dict[str, int]) -> int:
    names = ["half written", "different", "hidden after the rerun"]
    names += ["orphans", "repeated", "traceback"]
    return sum(tally.get(name, 0) for name in names)


if __name__ == "__main__":
    sys.exit(main())
