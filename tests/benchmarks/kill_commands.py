"""Kill commands by SIGKILL at random times, run them again, and compare what they write.

    python tests/benchmarks/kill_commands.py --kills 20 --out FILE.json

The commands are `import`, `export`, `extend`, `average`, `embed`, `predict` and `train-report`, all
with small inputs. Each attempt is a fork of a process that has imported their code. After a kill
what they write must be absent or complete; after the next run it must be what an unbroken run
writes, byte for byte, with no hidden file beside it.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
TEXTS = 3000
DATED = "report.html"  # it has the time at which it was made
GROWS = "report"  # a folder whose files are whole one by one


def inputs(work: Path) -> dict[str, list[str]]:
    """Make small inputs; return the arguments of each command, up to the value of --out."""
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
    return {
        "folder": ["import", str(work / "reference.pt"), "--out"],
        "checkpoint.pt": ["export", masked_folder, "--out"],
        "longer": ["extend", masked_folder, "--max-seq-len", length, "--out"],
        "mean": ["average", masked_folder, str(work / "reference.pt"), "--out"],
        "vectors.npy": ["embed", str(texts), "--model", str(work / "embedder"), "--out"],
        "answers.csv": ["predict", str(texts), "--model", str(work / "classifier"), "--out"],
        GROWS: ["train-report", str(work / "run"), "--out"],
    }


def attempt(arguments: list[str], seconds: float | None = None) -> int:
    """Run a command in a fork, and kill it after some time; return its exit code."""
    process = os.fork()
    if process == 0:
        from m2_plugin.cli import main

        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = main(arguments)
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(path: Path) -> dict[str, bytes]:
    """Return the files of a folder, or a file itself."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path.parent).as_posix(): file.read_bytes() for file in files}


def half_written(found: dict[str, bytes], unbroken: dict[str, bytes], grows: bool) -> list[str]:
    """Name what is neither absent nor as in the unbroken run."""
    odd = [name for name, data in found.items() if unbroken.get(name) != data]
    odd = [name for name in odd if not name.endswith(DATED)]
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
    first = work / f"unbroken-{name}" / name
    first.parent.mkdir()
    began = time.monotonic()
    assert attempt([*arguments, str(first)]) == 0, arguments
    seconds, unbroken = time.monotonic() - began, content(first)
    for i in range(kills):
        out = work / f"killed-{name}-{i}" / name
        out.parent.mkdir()
        tally["kills"] += 1
        killed = attempt([*arguments, str(out)], rng.uniform(0, seconds)) == -signal.SIGKILL
        tally["before the end"] += killed
        tally["left something hidden"] += bool(list(out.parent.glob(".*")))
        grows = name == GROWS
        tally["half written"] += bool(half_written(content(out), unbroken, grows))
        if grows or not out.exists():
            assert attempt([*arguments, str(out)]) == 0, arguments
        tally["different"] += bool(half_written(content(out), unbroken, False))
        tally["hidden after the rerun"] += bool(list(out.parent.glob(".*")))
    return dict(tally)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the tally")
    args = parser.parse_args()

    from m2_plugin.files import write_json

    rng, found = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in inputs(Path(folder)).items():
            found[arguments[0]] = check(Path(folder), name, arguments, args.kills, rng)
            print(arguments[0], found[arguments[0]], flush=True)
    if args.out is not None:
        write_json(args.out, {"commands": found, "date": time.strftime("%Y-%m-%d")})
    return int(any(wrong(tally) for tally in found.values()))


def wrong(tally: dict[str, int]) -> int:
    return sum(tally[key] for key in ("half written", "different", "hidden after the rerun"))


if __name__ == "__main__":
    sys.exit(main())
