"""Conversion on a Dask cluster of two workers."""

import gzip
import signal

import pytest

from tests.cluster import wait_for

from .conftest import (
    TOKENIZER,
    content,
    convert_text,
    finished_shards,
    shards,
    start,
    write_jsonl,
)

TOKENS = ["--concat_tokens", "64", "--tokenizer", str(TOKENIZER)]


def arguments(out, source, *flags):
    return ["--out_root", str(out), "--splits", "train", "--local_files", str(source), *flags]


@pytest.mark.usefixtures("small_blocks")
def test_the_same_bytes_as_on_this_machine(tmp_path, cluster, jsonl):
    file, _ = cluster
    packed = jsonl.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    for i, (source, flags) in enumerate([(jsonl, []), (jsonl, TOKENS), (packed, TOKENS)]):
        here, there = tmp_path / f"here{i}", tmp_path / f"there{i}"
        assert convert_text(*arguments(here, source, *flags), "--num_workers", "2") == 0
        assert convert_text(*arguments(there, source, *flags), "--cluster", file) == 0
        assert content(here) == content(there)


@pytest.mark.usefixtures("small_blocks")
def test_a_bad_line_is_named(tmp_path, cluster, jsonl, said):
    file, _ = cluster
    with jsonl.open("a") as lines:
        lines.write("{\n")
    out = tmp_path / "out"
    assert convert_text(*arguments(out, jsonl), "--cluster", file) == 1
    assert f"{jsonl}:201: not JSON" in said.text and "Traceback" not in said.text


@pytest.mark.usefixtures("small_blocks")
def test_a_worker_is_killed(tmp_path, cluster, c4_texts):
    """Dask gives its task to the other worker, which repeats nothing that was whole."""
    file, workers = cluster
    source = write_jsonl(tmp_path / "input" / "many.jsonl", c4_texts * 3)
    assert convert_text(*arguments(tmp_path / "unbroken", source, *TOKENS)) == 0
    out = tmp_path / "out"
    process = start(*arguments(out, source, *TOKENS, "--cluster", str(file)))
    wait_for(lambda: len(list(out.glob(".train.partial/records-*/0*.json"))) >= 3)
    workers[0].send_signal(signal.SIGKILL)
    finished = finished_shards(out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(finished) >= 3
    assert content(out) == content(tmp_path / "unbroken")
    assert finished.items() <= shards(out / "train").items()
