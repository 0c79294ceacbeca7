"""Inputs and outputs at a URL: a server on this machine has the interface of S3."""

import gzip
import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m2_plugin.data.formats import filesystem
from m2_plugin.foundry.conversion.sources import input_files
from tests.cluster import wait_for
from tests.utils import write_rows

from .conftest import TOKENIZER, content, start

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

CONCAT = ["--concat_tokens", "64", "--tokenizer", TOKENIZER]
FOLDER, URL = "folder/train/", "s3://bucket/folder"


class Storage:
    """What the server has, the files that it was sent, and for how long it holds one back."""

    def __init__(self, client: Any):
        self.client = client
        self.sent: list[str] = []
        self.delay = 0.0

    def slowly(self, app: Any) -> Any:
        def call(environ: dict[str, Any], start_response: Any) -> Any:
            if environ["REQUEST_METHOD"] == "PUT":
                time.sleep(self.delay)
                self.sent.append(environ["PATH_INFO"].rpartition("/")[2])
            return app(environ, start_response)

        return call

    def write(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=name, Body=data)

    def names(self, folder: str = FOLDER) -> set[str]:
        found = self.client.list_objects_v2(Bucket="bucket", Prefix=folder)
        return {about["Key"].removeprefix(folder) for about in found.get("Contents", [])}

    def content(self, folder: str = FOLDER) -> dict[str, bytes]:
        def read(name: str) -> bytes:
            return self.client.get_object(Bucket="bucket", Key=folder + name)["Body"].read()

        return {name: read(name) for name in self.names(folder)}


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    urllib.request.urlopen(f"{address}/moto-api/reset", data=b"")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    storage = Storage(boto3.client("s3", region_name="us-east-1"))
    storage.client.create_bucket(Bucket="bucket")
    server._server.app = storage.slowly(server._server.app)
    yield storage
    server.stop()


def convert(*arguments: Any) -> tuple[int, str]:
    """Run convert_text.py in a process of its own, so that its workers find the server."""
    process = start("--splits", "train", *arguments)
    _, errors = process.communicate()
    assert "Traceback" not in errors
    return process.returncode, errors


def converted(*arguments: Any) -> str:
    code, errors = convert(*arguments)
    assert code == 0, errors
    return errors


@pytest.mark.parametrize("flags", [[], CONCAT], ids=["text", "tokens"])
def test_the_same_bytes_as_on_a_disk(tmp_path, jsonl, storage, flags):
    source = ["--local_files", jsonl, *flags]
    converted("--out_root", tmp_path / "disk", *source)
    remote = ["--out_root", URL, "--local", tmp_path / "local", *source]
    said = converted(*remote, "--verify")
    assert f"{URL}/train: " in said and "are as written" in said
    assert storage.content() == content(tmp_path / "disk" / "train")
    assert content(tmp_path / "local") == content(tmp_path / "disk")
    assert storage.sent[0] == "conversion.manifest" and storage.sent[-1] == "index.json"
    storage.sent.clear()
    assert f"{URL}/train is finished" in converted(*remote) and not storage.sent


def test_llm_foundrys_dataset_reads_it(tmp_path, jsonl, c4_texts, storage):
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    converted("--out_root", URL, "--local", tmp_path / "local", "--local_files", jsonl)
    clean_stale_shared_memory()
    data = StreamingDataset(
        remote=URL, local=str(tmp_path / "cache"), split="train", shuffle=False, batch_size=1
    )
    assert [sample["text"] for sample in data] == c4_texts[:200]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_inputs(tmp_path, jsonl, c4_texts, storage, suffix):
    import pyarrow.parquet

    source = jsonl.with_suffix(f".{suffix}")
    if suffix == "parquet":
        table = pyarrow.table({"text": c4_texts[:200]})
        pyarrow.parquet.write_table(table, source, row_group_size=20)
    elif suffix == "jsonl.gz":
        source.write_bytes(gzip.compress(jsonl.read_bytes()))
    storage.write(f"in/{source.name}", source.read_bytes())
    flags = ["--num_workers", 2, *(CONCAT if suffix == "jsonl" else ())]
    converted("--out_root", tmp_path / "disk", "--local_files", source, *flags)
    converted("--out_root", tmp_path / "s3", "--local_files", f"s3://bucket/in/*.{suffix}", *flags)
    assert content(tmp_path / "s3") == content(tmp_path / "disk")
    assert len(content(tmp_path / "s3")) > 5


def test_a_bad_line_is_named(tmp_path, jsonl, storage):
    lines = jsonl.read_bytes().splitlines(keepends=True)
    storage.write("in/bad.jsonl", b"".join([*lines[:122], b'{"text": 7}\n', *lines[122:]]))
    code, errors = convert("--out_root", tmp_path, "--local_files", "s3://bucket/in")
    assert code == 1
    assert errors.splitlines()[-1].startswith("s3://bucket/in/bad.jsonl:123: 'text' should be")


def test_finds_input_files(storage):
    for name in ("in/a.jsonl", "in/b[1].txt.gz", "in/deep/c.csv", "in/.hidden"):
        storage.write(name, b"x" * len(name))

    def found(*urls: str) -> list[str]:
        filesystem(URL)[0].invalidate_cache()
        return [file.path.removeprefix("s3://bucket/in/") for file in input_files(list(urls))]

    assert found("s3://bucket/in") == ["a.jsonl", "b[1].txt.gz", "deep/c.csv"]
    assert found("s3://bucket/in/b[1].txt.gz") == ["b[1].txt.gz"]
    assert found("s3://bucket/in/*.jsonl", "s3://bucket/in/a.jsonl") == ["a.jsonl"]
    before = input_files(["s3://bucket/in/a.jsonl"])
    storage.write("in/a.jsonl", b"y" * len("in/a.jsonl"))
    filesystem(URL)[0].invalidate_cache()
    after = input_files(["s3://bucket/in/a.jsonl"])
    assert before[0].size == after[0].size and before[0].version != after[0].version
    with pytest.raises(ValueError, match="'s3://bucket/in/.*.zip' does not exist or matches no"):
        input_files(["s3://bucket/in/*.zip"])


@pytest.mark.parametrize("flags", [[], CONCAT], ids=["text", "tokens"])
def test_killed_while_it_sends(tmp_path, jsonl, storage, flags):
    arguments = ["--out_root", URL, "--local", tmp_path / "local", "--local_files", jsonl, *flags]
    storage.delay = 0.3
    process = start("--splits", "train", *arguments, "--num_workers", 1)
    wait_for(lambda: len(storage.names()) >= 4)
    process.kill()
    process.wait()
    there = storage.names() - {"conversion.manifest"}
    unbroken = content(tmp_path / "local" / "train")
    assert len(there) < len(unbroken) - 2 and "index.json" not in there
    time.sleep(2 * storage.delay)  # the worker sees its parent's end, and its last file is there
    storage.delay = 0
    storage.sent.clear()
    converted(*arguments)
    assert storage.content() == unbroken
    assert not there & set(storage.sent) and storage.sent[-1] == "index.json"
    assert not list((tmp_path / "local").glob(".*"))


def test_other_splits_stay(tmp_path, jsonl, storage):
    arguments = ["--out_root", URL, "--local", tmp_path / "local", "--local_files", jsonl]
    converted(*arguments, "--max_chars_per_doc", 50)
    before = storage.content()
    code, errors = convert(*arguments)
    assert code == 1
    assert f"{URL}/train has a split with other settings" in errors and "--overwrite" in errors
    assert storage.content() == before
    converted(*arguments, "--overwrite")
    assert storage.content() == content(tmp_path / "local" / "train") != before

    storage.write("folder/thesis/thesis.tex", b"precious")
    labelled = ["--splits", "thesis", "--local_files", f"thesis={jsonl}"]
    code, errors = convert(*arguments, *labelled)
    assert code == 1 and f"{URL}/thesis exists, is not empty, and was not written by" in errors
    assert storage.content("folder/thesis/") == {"thesis.tex": b"precious"}


def test_what_another_input_left_is_removed(tmp_path, jsonl, c4_texts, storage):
    """A file of the same name and size does not show that the input changed."""
    arguments = ["--out_root", URL, "--local", tmp_path / "local", "--local_files", jsonl]
    converted(*arguments)
    storage.client.delete_object(Bucket="bucket", Key=f"{FOLDER}index.json")
    storage.write(f"{FOLDER}shard.00000-00999.00000.mds", b"left")
    first = min(name for name in storage.names() if name.startswith("shard."))
    storage.write(FOLDER + first, bytes(len(storage.content()[first])))
    converted(*arguments)
    assert storage.content() == content(tmp_path / "local" / "train")


def test_verify_names_the_url(tmp_path, jsonl, storage):
    arguments = ["--out_root", URL, "--local", tmp_path / "local", "--local_files", jsonl]
    converted(*arguments)
    first, second = sorted(name for name in storage.names() if name.startswith("shard."))[:2]
    storage.write(FOLDER + first, b"short")
    storage.client.delete_object(Bucket="bucket", Key=FOLDER + second)
    code, errors = convert("--out_root", URL, "--verify_only")
    line = errors.splitlines()[-1]
    assert code == 1 and line.startswith(f"{URL}/train is damaged: ")
    assert f"{URL}/train/{first}: 5 bytes, the index says" in line
    assert f"there is no file '{URL}/train/{second}'" in line
    code, errors = convert("--out_root", "s3://bucket/nowhere", "--verify_only")
    assert code == 1
    assert errors.splitlines()[-1].startswith(
        "there is no file 's3://bucket/nowhere/train/index.json'"
    )


def test_wrong_arguments(tmp_path, jsonl, storage):
    files, local = ["--local_files", jsonl], ["--local", tmp_path / "local"]
    for arguments, message in (
        (["--out_root", URL, *files], f"--out_root {URL} needs --local FOLDER"),
        (["--out_root", tmp_path, *local, *files], "--local is only used if --out_root is a URL"),
        (["--out_root", "s3://none/x", *local, *files], "'s3://none/x/train' (The specified bucke"),
        (["--out_root", "nine://x", *local, *files], "nine://x/train: Protocol not known: nine"),
        (["--out_root", tmp_path, "--local_files", "s3://bucket/no"], "'s3://bucket/no' does not"),
    ):
        code, errors = convert(*arguments)
        assert code == 1 and message in errors.splitlines()[-1]
    assert not (tmp_path / "local").exists() and not (tmp_path / "train").exists()


def test_a_server_that_does_not_answer_is_named(tmp_path, jsonl, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for arguments, url in (
        (["--out_root", URL, "--local", tmp_path, "--local_files", jsonl], f"{URL}/train"),
        (["--out_root", tmp_path, "--local_files", "s3://bucket/in"], "s3://bucket/in"),
    ):
        code, errors = convert(*arguments)
        assert code == 1
        assert errors.splitlines()[-1].startswith(f"{url}: EndpointConnectionError: Could not conn")


def test_a_missing_package_is_named():
    code = "import sys; sys.modules['s3fs'] = None\n"
    code += f"from m2_plugin.data.formats import filesystem; filesystem({URL!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = f"{URL}: Install s3fs to access S3: pip install 'm2-plugin[s3]'\n"
    assert done.stderr.endswith(last)


def test_pairs(tmp_path, storage):
    rows = [{"query": f"Is it {i}?", "passage": f"It is {i}."} for i in range(5)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    storage.write("in/pairs.jsonl", (tmp_path / "pairs.jsonl").read_bytes())
    script = Path(__file__).parents[2] / "data_prep" / "convert_pairs.py"

    def run(*arguments: Any) -> None:
        command = [sys.executable, script, "--local_files", *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ)

    run(f"train={tmp_path / 'pairs.jsonl'}", "--out_root", tmp_path / "disk")
    remote = ["train=s3://bucket/in/pairs.jsonl", "--out_root", URL, "--local", tmp_path / "local"]
    run(*remote)
    assert storage.content() == content(tmp_path / "disk" / "train")
    storage.client.delete_object(Bucket="bucket", Key=f"{FOLDER}index.json")  # killed before it
    storage.sent.clear()
    run(*remote)
    assert storage.sent == ["index.json"]
    run(*remote)
    assert storage.sent == ["index.json"]
