"""Kill conversions by SIGKILL, and run them again; see kill_commands.py.

Each has two workers. A kill at a random time hits the whole group of
processes, or one worker alone. Aimed kills hit the group while a finished split gets its name, or
while it is sent to a server with the interface of S3 (moto's); what is there with an index must be
complete.
"""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from glob import glob
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.kill_commands import ROOT, content, half_written

# The inputs are small, and cut into as many blocks as large ones.
CONVERT = """
import sys
from m2_plugin.cli import run
from m2_plugin.foundry.conversion import cli, pairs
cli.choose_block_bytes = pairs.choose_block_bytes = lambda *_: 20_000
sys.exit(run(sys.argv.pop(1)))
"""
WAYS = ("group", "worker", "naming", "sending")
BUCKET = "bucket"


def conversions(work: Path) -> dict[str, list[str]]:
    """Make small inputs; return the arguments of each conversion, without its output."""
    texts = [f"{i}: {'many words ' * (i % 50)}" for i in range(8000)]
    source, pairs = work / "texts.jsonl", work / "pairs.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = ({"query": f"{text}?", "passage": text} for text in texts)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    two = ["--num_workers", "2", "--local_files"]
    text = ["--splits", "train", *two, str(source)]
    tokenizer = str(ROOT / "data_prep" / "quickstart" / "tokenizer")
    return {
        "convert-text": ["convert-text", *text],
        "convert-text tokens": [
            *("convert-text", *text, "--concat_tokens", "64", "--tokenizer", tokenizer)
        ],
        "convert-pairs": ["convert-pairs", *two, f"train={pairs}"],
    }


@contextmanager
def bucket() -> Iterator[Any]:
    """Yield a client of a server with the interface of S3, which the commands find."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    yield client
    server.stop()


def sent(client: Any, folder: str) -> dict[str, bytes]:
    """Return the files below a folder of the bucket."""
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{folder}/").get("Contents", [])
    names = [about["Key"] for about in found]
    return {
        name.removeprefix(f"{folder}/"): client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        for name in names
    }


def begin(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a conversion, as the leader of a group of processes."""
    command = [sys.executable, "-c", CONVERT, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the workers: the children of the server of processes, which is a child."""
    try:
        children = psutil.Process(process.pid).children()
        return [worker for child in children for worker in child.children()]
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen[str], moment: Callable[[], bool], way: str) -> str | None:
    """Kill a conversion, or one of its workers, at a moment; return what it wrote to stderr.

    Returns:
        None if it had ended before.
    """
    while not moment():
        if process.poll() is not None:
            process.communicate()
            return None
        time.sleep(0.0005)
    try:
        if way == "worker":
            random.choice(workers(process)).kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, psutil.NoSuchProcess, IndexError):
        process.communicate()
        return None
    return process.communicate()[1]


def moment_of(way: str, local: Path, client: Any, folder: str, delay: float) -> Callable[[], bool]:
    """Return a function that tells whether a kill is due."""
    started, due = time.monotonic(), []

    def aimed() -> bool:
        if way == "naming":
            # pathlib's own glob raises an error if a folder is renamed meanwhile.
            return bool(glob(f"{local}/.train.partial/shards-*/conversion.manifest"))
        listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{folder}/")
        return int(listed.get("KeyCount", 0)) > 1  # more than its first manifest

    def moment() -> bool:
        if way in ("group", "worker"):
            return time.monotonic() >= started + delay
        if not due and aimed():
            due.append(time.monotonic() + delay)
        return bool(due) and time.monotonic() >= due[0]

    return moment


def check_conversion(
    work: Path, name: str, arguments: list[str], way: str, kills: int, rng: random.Random
) -> Any:
    """Kill a conversion some times in one way; return the tally, as `check`."""
    tally: Counter[str] = Counter()
    work = work / f"{name}-{way}".replace(" ", "-")
    began, process = time.monotonic(), begin([*arguments, "--out_root", str(work / "unbroken")])
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    seconds, unbroken = time.monotonic() - began, content(work / "unbroken" / "train")
    latest = {"naming": 0.02, "sending": 0.3}.get(way, seconds)
    with bucket() if way == "sending" else nullcontext() as client:
        for i in range(kills):
            out, folder = work / str(i), f"{work.name}/{i}"
            command = [*arguments, "--out_root", str(out)]
            if way == "sending":
                command = [*arguments, "--out_root", f"s3://{BUCKET}/{folder}", "--local", str(out)]
            process, delay = begin(command), rng.uniform(0, latest)
            errors = kill(process, moment_of(way, out, client, folder, delay), way)
            tally["kills"] += 1
            tally["before the end"] += errors is not None and process.returncode != 0
            tally["traceback"] += "Traceback" in (errors or "")
            found = content(out / "train") if (out / "train").exists() else {}
            tally["half written"] += bool(half_written(found, unbroken, False))
            there = sent(client, folder) if way == "sending" else {}
            if "train/index.json" in there:
                tally["half written"] += bool(half_written(there, unbroken, False))
            again = begin(command)
            _, errors = again.communicate()
            assert again.returncode == 0, errors
            tally["different"] += content(out / "train") != unbroken
            if way == "sending":
                tally["different"] += sent(client, folder) != unbroken
            tally["hidden after the rerun"] += bool(list(out.glob(".*")))
    return dict(tally)
