import errno
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2_plugin.foundry.conversion import cli, engine
from m2_plugin.foundry.conversion.corpora import C4_CHARS_PER_SAMPLE, C4_SPLITS
from m2_plugin.foundry.conversion.folder import PartialFolder
from m2_plugin.foundry.conversion.samples import cut_tokens
from m2_plugin.foundry.conversion.shards import encode_array, write_shards
from m2_plugin.foundry.conversion.sources import HubSource, choose_block_bytes
from m2_plugin.foundry.conversion.worker import Part, convert_part
from tests.cluster import wait_for

from .conftest import (
    C4_SAMPLE,
    COMMAND,
    TOKENIZER,
    content,
    convert_c4,
    convert_text,
    finished_shards,
    shards,
    start,
    write_jsonl,
)

CONCAT = ["--concat_tokens", "64", "--tokenizer", str(TOKENIZER)]


def run_text(out: Path, *files: Any, splits: str = "train", flags: Any = ()) -> int:
    """Run convert_text.py in this process; return the exit status."""
    arguments = ["--out_root", out, "--splits", *splits.split(), "--num_workers", "2"]
    return convert_text(*arguments, "--local_files", *files, *flags)


def run_c4(out: Path, *files: Any, splits: str = "train", flags: Any = ()) -> int:
    arguments = ["--out_root", out, "--splits", *splits.split(), "--num_workers", "2"]
    return convert_c4(*arguments, "--local_files", *files, *flags)


def read(folder: Path, column: str = "text") -> list[Any]:
    from streaming import LocalDataset

    return [sample[column] for sample in LocalDataset(str(folder))]


# --- what is written ---


@pytest.mark.usefixtures("small_blocks")
def test_llm_foundrys_dataset_reads_the_documents_in_order(tmp_path, c4_texts):
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    flags = ["--compression", "zstd", "--verify"]
    assert run_c4(tmp_path, C4_SAMPLE, splits="train_small", flags=flags) == 0
    clean_stale_shared_memory()
    data = StreamingDataset(local=str(tmp_path), split="train_small", shuffle=False, batch_size=1)
    assert [sample["text"] for sample in data] == c4_texts
    assert len(list((tmp_path / "train_small").glob("*.mds.zstd"))) > 10


@pytest.mark.parametrize(
    "flags",
    [[], ["--no_wrap"], ["--bos_text", "[MASK]", "--eos_text", "[PAD]"]],
    ids=["wrap", "no-wrap", "bos-eos"],
)
def test_tokens_equal_llm_foundrys(tmp_path, jsonl, c4_texts, flags):
    from llmfoundry.data import ConcatTokensDataset
    from transformers import AutoTokenizer

    assert run_text(tmp_path, jsonl, flags=[*CONCAT, *flags]) == 0
    reference = ConcatTokensDataset(
        [{"text": text} for text in c4_texts[:200]],
        AutoTokenizer.from_pretrained(TOKENIZER),
        max_length=64,
        bos_text="[MASK]" if len(flags) > 1 else "",
        eos_text="[PAD]" if len(flags) > 1 else "",
        no_wrap="--no_wrap" in flags,
    )
    expected = [sample["tokens"] for sample in reference]
    ours = read(tmp_path / "train", "tokens")
    assert len(ours) == len(expected) > 100
    assert all(a.dtype == np.int32 for a in ours)
    assert np.array_equal(ours, expected)


def test_the_table_of_c4_is_llm_foundrys():
    import llmfoundry.command_utils  # noqa: F401

    module = sys.modules["llmfoundry.command_utils.data_prep.convert_dataset_hf"]
    reference = module.CONSTS["allenai/c4"]
    ours = {n: (s.hub_split, s.documents, s.max_samples) for n, s in C4_SPLITS.items()}
    theirs = {
        s.folder_split: (s.hf_split, s.raw_samples, s.truncated_samples)
        for s in reference.splits.values()
    }
    assert ours == theirs
    assert reference.chars_per_sample == C4_CHARS_PER_SAMPLE


@pytest.mark.usefixtures("small_blocks")
def test_a_cut_split_keeps_the_first_samples(tmp_path, c4_texts):
    assert run_c4(tmp_path, C4_SAMPLE, splits="val_xxsmall") == 0
    assert read(tmp_path / "val_xxsmall") == c4_texts[:100]
    tokens = tmp_path / "tokens"
    assert run_c4(tokens, C4_SAMPLE, splits="val_xxsmall", flags=CONCAT) == 0
    assert run_c4(tokens, C4_SAMPLE, splits="train", flags=CONCAT) == 0
    cut, whole = read(tokens / "val_xxsmall", "tokens"), read(tokens / "train", "tokens")
    assert np.array_equal(cut, whole[:100])


def test_held_out_documents_are_in_one_split_only(tmp_path, c4_texts):
    flags = ["--val_fraction", "0.2"]
    assert run_c4(tmp_path, C4_SAMPLE, splits="train_small val", flags=flags) == 0
    train, val = read(tmp_path / "train_small"), read(tmp_path / "val")
    assert sorted(train + val) == sorted(c4_texts)
    assert not set(train) & set(val)
    assert 150 < len(val) < 250


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "xz"])
def test_each_block_is_cut_by_itself(tmp_path, jsonl, c4_texts, compressed, said):
    """Each block drops what is left after its last sample; nothing else is lost or repeated."""
    from transformers import AutoTokenizer

    source = jsonl
    if compressed:
        source = jsonl.with_suffix(".jsonl.xz")
        source.write_bytes(lzma.compress(jsonl.read_bytes()))
    assert run_text(tmp_path / "out", source, flags=CONCAT) == 0
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokens = np.concatenate([tokenizer(text)["input_ids"] for text in c4_texts[:200]])
    samples = read(tmp_path / "out" / "train", "tokens")
    manifest = json.loads((tmp_path / "out" / "train" / "conversion.manifest").read_text())
    blocks = len(manifest["shards"])
    at = gaps = 0
    for sample in samples:
        gap = next(g for g in range(64) if np.array_equal(tokens[at + g : at + g + 64], sample))
        gaps += gap > 0
        at += gap + 64
    assert 0 < gaps < blocks
    assert len(tokens) - at < 64
    assert manifest["tokens"] == len(tokens)
    assert manifest["dropped"] == len(tokens) - 64 * len(samples) < 64 * blocks
    share = 100 * manifest["dropped"] / len(tokens)
    assert f"{share:.4f}% of the tokens filled no sample" in said.text


def test_a_block_has_64_samples_or_more():
    assert choose_block_bytes(None) == 48 << 20
    assert choose_block_bytes(59_000_000, 128) == 2 << 20
    assert choose_block_bytes(10_000_000_000, 8192) == 48 << 20
    for length in (128, 8192, 32768, 1 << 20):
        assert choose_block_bytes(1_000_000, length) >= 64 * length * 4


def test_cut_tokens():
    assert cut_tokens([12, 3], length=5, no_wrap=False) == [0, 5, 10]
    assert cut_tokens([12, 3, 4], length=5, no_wrap=True) == [0, 12]
    assert cut_tokens([4], length=5, no_wrap=True) == cut_tokens([], 5, False) == []


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_shards_are_those_of_streamings_writer(tmp_path, compression):
    from streaming import MDSWriter

    rng = random.Random(0)
    columns = {"b": "str", "a": "ndarray:int32"}
    lengths = [1, 255, 256, 65_535, 65_536, *(rng.randrange(1, 5000) for _ in range(200))]
    rows = [
        {"a": np.arange(n, dtype=np.int32) - 7, "b": rng.choice(["", "é\n", "text"]) * (n % 9)}
        for n in lengths
    ]
    with MDSWriter(
        columns=columns, out=str(tmp_path / "theirs"), compression=compression,
        hashes=["xxh64"], size_limit=100_000,
    ) as writer:  # fmt: skip
        for row in rows:
            writer.write(row)
    (tmp_path / "ours").mkdir()
    samples = ([encode_array(row["a"]), row["b"].encode()] for row in rows)
    entries = write_shards(samples, columns, compression, tmp_path / "ours", size_limit=100_000)
    assert entries == writer.shards and len(entries) > 10
    theirs = content(tmp_path / "theirs")
    del theirs["index.json"]
    assert content(tmp_path / "ours") == theirs


def test_max_chars(tmp_path, jsonl, c4_texts):
    assert run_text(tmp_path, jsonl, flags=["--max_chars_per_doc", "50"]) == 0
    assert read(tmp_path / "train") == [text[:50] for text in c4_texts[:200]]


# --- inputs ---


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", ["jsonl", "json.gz", "jsonl.bz2", "jsonl.zst", "parquet"])
def test_kinds_of_file(tmp_path, jsonl, c4_texts, suffix):
    import bz2

    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"docs.{suffix}"
    if suffix == "parquet":
        table = pyarrow.table({"id": list(range(200)), "body": c4_texts[:200]})
        pyarrow.parquet.write_table(table, path, row_group_size=30)
    else:
        compress = {"gz": gzip.compress, "bz2": bz2.compress}.get(suffix.split(".")[-1], bytes)
        if suffix.endswith("zst"):
            compress = lambda data: pyarrow.compress(data, "zstd", asbytes=True)  # noqa: E731
        path.write_bytes(compress(jsonl.read_bytes().replace(b'{"text"', b'{"body"')))
    assert run_text(tmp_path / "out", path, flags=["--text_column", "body"]) == 0
    assert read(tmp_path / "out" / "train") == c4_texts[:200]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv", "json", "json.xz", "arrow", "saved"])
def test_files_that_are_read_from_the_beginning(tmp_path, c4_texts, suffix):
    """Each worker reads them and converts its share; the output does not depend on that."""
    texts = [text.replace("\n", " ").replace("\t", " ") for text in c4_texts[:200]]
    path = tmp_path / f"docs [1].{suffix}"
    kind = suffix.split(".")[0]
    if kind in ("csv", "tsv"):
        rows = [text if kind == "tsv" else '"' + text.replace('"', '""') + '"' for text in texts]
        separator = "\t" if kind == "tsv" else ";"
        lines = [f"id{separator}text", *(f"7{separator}{row}" for row in rows)]
        data = "".join(line + "\r\n" for line in lines).encode()
    else:
        data = json.dumps([{"n": 1, "text": text} for text in texts], indent=2).encode()
    if kind in ("arrow", "saved"):
        import datasets

        folder = path if kind == "saved" else tmp_path / "folder"
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder), num_shards=1)
        if kind == "arrow":
            os.rename(next(folder.glob("*.arrow")), path)
    else:
        compress = {"gz": gzip.compress, "xz": lzma.compress}.get(suffix.split(".")[-1], bytes)
        path.write_bytes(compress(data))
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert run_text(out, path, flags=["--num_workers", workers, "--verify"]) == 0
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert read(tmp_path / "1" / "train") == texts
    assert len(list((tmp_path / "1" / "train").glob("*.mds"))) > 5


def test_bad_rows_are_counted(tmp_path, said):
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n1,a,\n2,b\rc\n3,caf\xe9\n4,d\n")
    assert run_text(tmp_path / "out", path) == 1
    assert f"{path}:2: 3 columns where there should be 2" in said.text
    said.clear()
    assert run_text(tmp_path / "out", path, flags=["--on_error", "skip"]) == 0
    assert "skipped 2 bad documents" in said.text and f"{path}:4: not UTF-8" in said.text
    assert read(tmp_path / "out" / "train") == ["b\rc", "d"]


def test_returns_and_marks_inside_a_text_stay(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa\rb\r\n\ufeffc\r\r\n\r\nd".encode())
    expected = {
        "file": ["a\rb\n\ufeffc\r\n\nd"],
        "line": ["a\rb", "\ufeffc\r", "d"],
        "paragraph": ["a\rb\n\ufeffc\r", "d"],
    }
    for mode, texts in expected.items():
        assert run_text(tmp_path / mode, path, flags=["--txt_documents", mode]) == 0
        assert read(tmp_path / mode / "train") == texts


def test_which_files_a_path_means(tmp_path):
    """An existing file or folder is not a pattern; a pattern may be below such a folder."""
    for name in ("a[1].txt", "a1.txt", "b[1]/c1.txt", "b1/c1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for i, (path, expected) in enumerate([
        ("a[1].txt", ["a[1].txt"]),
        ("a[12].txt", ["a1.txt"]),
        ("b[1]", ["b[1]/c1.txt"]),
        ("b[1]/*.txt", ["b[1]/c1.txt"]),
        ("b*/c[0-9].txt", ["b1/c1.txt", "b[1]/c1.txt"]),
    ]):  # fmt: skip
        assert run_text(tmp_path / str(i), tmp_path / path) == 0
        assert read(tmp_path / str(i) / "train") == expected


def test_a_folder_is_not_read_in_place_of_the_hub(tmp_path, monkeypatch, said):
    (tmp_path / "imdb").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", "imdb", "--splits", "train", "--out_root", str(tmp_path / "out")]
    assert convert_text(*arguments) == 1
    assert "--dataset imdb: there is a folder of this name here" in said.text


@pytest.mark.usefixtures("small_blocks")
def test_text_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes("\ufeffone\r\nzwei — 2\r\n\r\n\r\nthree\r\n".encode())
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(b"four\nfive\n\n \n\nsix"))
    expected = {
        "file": ["one\nzwei — 2\n\n\nthree\n", "four\nfive\n\n \n\nsix"],
        "line": ["one", "zwei — 2", "three", "four", "five", "six"],
        "paragraph": ["one\nzwei — 2", "three", "four\nfive", "six"],
    }
    for mode, texts in expected.items():
        out = tmp_path / mode
        assert run_text(out, tmp_path / "in", flags=["--txt_documents", mode]) == 0
        assert read(out / "train") == texts


def test_native_c4_names_go_to_their_splits(tmp_path, c4_texts):
    for i, kind in enumerate(("train", "validation")):
        plain = write_jsonl(tmp_path / "docs.jsonl", c4_texts[i * 10 : i * 10 + 10])
        name = f"c4-{kind}.00000-of-00001.json.gz"
        (tmp_path / "en").mkdir(exist_ok=True)
        (tmp_path / "en" / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert run_c4(tmp_path / "out", tmp_path / "en", splits="train_small val") == 0
    assert read(tmp_path / "out" / "train_small") == c4_texts[:10]
    assert read(tmp_path / "out" / "val") == c4_texts[10:20]


def test_labelled_files(tmp_path, c4_texts):
    a = write_jsonl(tmp_path / "a.jsonl", c4_texts[:5])
    b = write_jsonl(tmp_path / "b.jsonl", c4_texts[5:8])
    assert run_text(tmp_path / "out", f"train={a}", f"mine={b}", splits="train mine") == 0
    assert read(tmp_path / "out" / "train") == c4_texts[:5]
    assert read(tmp_path / "out" / "mine") == c4_texts[5:8]


@pytest.mark.usefixtures("small_blocks")
def test_streamed_data_set_in_shards(tmp_path, c4_texts, monkeypatch):
    """Files replace the hub; `datasets` streams them in the same way."""
    files = [
        str(write_jsonl(tmp_path / f"{i}.jsonl", c4_texts[i * 40 : i * 40 + 40])) for i in range(3)
    ]
    load = {"path": "json", "data_files": files, "split": "train"}
    source = HubSource(tuple(load.items()))
    monkeypatch.setattr(cli, "_hub_source", lambda *_: source)
    for workers in ("1", "2"):
        arguments = ["--out_root", str(tmp_path / workers), "--splits", "train"]
        arguments += ["--dataset", "some/name", "--num_workers", workers]
        assert convert_text(*arguments) == 0
    assert read(tmp_path / "1" / "train") == c4_texts[:120]
    assert content(tmp_path / "1") == content(tmp_path / "2")


# --- the same on every run ---


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("flags", [[], CONCAT], ids=["text", "tokens"])
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
def test_the_number_of_workers_changes_nothing(tmp_path, jsonl, flags, compressed):
    source = jsonl
    if compressed:
        source = jsonl.with_suffix(".jsonl.gz")
        source.write_bytes(gzip.compress(jsonl.read_bytes()))
    for workers in (1, 2, 5):
        out = tmp_path / str(workers)
        assert run_text(out, source, flags=[*flags, "--num_workers", workers]) == 0
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "5")
    assert len(content(tmp_path / "1")) > 6


@pytest.fixture
def many(tmp_path: Path, c4_texts: list[str]) -> Path:
    """1,000 documents, in 40 small blocks."""
    return write_jsonl(tmp_path / "input" / "many.jsonl", c4_texts)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_killed_and_run_again(tmp_path, many, suffix):
    source = many.with_suffix(f".{suffix}")
    data = many.read_bytes()
    source.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    assert run_text(tmp_path / "unbroken", source, flags=CONCAT) == 0
    out = tmp_path / "out"
    flags = ["--out_root", out, "--splits", "train", "--num_workers", 2, *CONCAT]
    process = start("--local_files", source, *flags)
    wait_for(lambda: len(list(out.glob(".train.partial/records-*/0*.json"))) >= 3)
    process.kill()
    process.wait()
    finished = finished_shards(out)
    assert len(finished) >= 3 and not (out / "train").exists()
    assert run_text(out, source, flags=[*CONCAT, "--num_workers", 1]) == 0
    assert content(out) == content(tmp_path / "unbroken")
    assert finished.items() <= shards(out / "train").items()


STEPS = """
import os, shutil, signal
step = int(sys.argv.pop(1))
def counted(function):
    def call(*arguments, **keywords):
        global step
        step -= 1
        if step < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call
os.replace, shutil.rmtree = counted(os.replace), counted(shutil.rmtree)
"""


def test_killed_at_every_step(tmp_path, c4_texts):
    """Each lasting change is a rename or a removal: kill the main process before each of them."""
    source = write_jsonl(tmp_path / "docs.jsonl", c4_texts[:50])
    arguments = ["--local_files", source, "--splits", "train", "--num_workers", "1"]
    first, rest = COMMAND.split("sys.exit")
    code = f"{first}{STEPS}sys.exit{rest}"
    expected = None
    for step in range(20):
        out = tmp_path / str(step)
        process = start(step, "--out_root", out, *arguments, code=code)
        process.communicate()
        killed = process.returncode == -signal.SIGKILL
        assert killed or process.returncode == 0
        ended = start(100, "--out_root", out, *arguments, code=code)
        _, errors = ended.communicate()
        assert ended.returncode == 0, errors
        expected = expected or content(out)
        assert content(out) == expected
        if not killed:
            break
    assert 4 < step < 19


@pytest.mark.usefixtures("small_blocks")
def test_one_conversion_of_a_split_at_a_time(tmp_path, jsonl):
    arguments = ["--out_root", tmp_path, "--splits", "train", "--local_files", jsonl]
    with PartialFolder(tmp_path / "train").locked():
        second = start(*arguments)
        line = second.stderr.readline()
    _, errors = second.communicate()
    assert "in use by another conversion" in line and "waiting" in line
    assert second.returncode == 0, errors
    assert not (tmp_path / ".train.partial").exists()


def test_run_again_when_finished(tmp_path, jsonl, said):
    assert run_text(tmp_path, jsonl) == 0
    before = (tmp_path / "train" / "index.json").stat()
    assert run_text(tmp_path, jsonl) == 0
    assert "nothing to do" in said.text
    assert (tmp_path / "train" / "index.json").stat() == before
    assert run_text(tmp_path, jsonl, flags=["--max_chars_per_doc", "9"]) == 1
    assert "max_chars_per_doc: None before, 9 now" in said.text and "--overwrite" in said.text
    assert run_text(tmp_path, jsonl, flags=["--max_chars_per_doc", "9", "--overwrite"]) == 0
    assert len(read(tmp_path / "train")[0]) == 9


@pytest.mark.usefixtures("small_blocks")
def test_other_settings_do_not_mix(tmp_path, jsonl, said, monkeypatch):
    partial = tmp_path / ".train.partial"
    monkeypatch.setattr(engine, "convert_part", until_the_disk_is_full)
    assert run_text(tmp_path, jsonl, flags=CONCAT) == 1
    monkeypatch.undo()
    monkeypatch.setattr(cli, "choose_block_bytes", lambda *_: 50_000)
    said.clear()
    assert run_text(tmp_path, jsonl) == 1
    assert str(partial) in said.text and "other settings" in said.text
    os.utime(jsonl)
    assert run_text(tmp_path, jsonl, flags=CONCAT) == 1
    assert "other inputs" in said.text
    assert not (tmp_path / "train").exists()
    assert run_text(tmp_path, jsonl, flags=["--overwrite"]) == 0


# --- what goes wrong ---


def test_a_folder_of_someone_else_is_left_alone(tmp_path, jsonl, said):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.tex").write_text("precious")
    assert run_text(tmp_path, jsonl) == 1
    assert str(tmp_path / "train") in said.text and "not empty" in said.text
    assert content(tmp_path / "train") == {"thesis.tex": b"precious"}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"body": "other key"}', "no column 'text' (--text_column); the row has 'body'"),
        (b'{"text": 7}', "'text' should be a text, got int 7"),
        (b'["text"]', "not a JSON object"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_lines(tmp_path, jsonl, c4_texts, said, compressed, line, reason):
    lines = jsonl.read_bytes().splitlines()
    lines[122] = line
    path = tmp_path / ("bad.json.gz" if compressed else "bad.json")
    data = b"\n".join(lines)
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert run_text(tmp_path / "out", path) == 1
    assert f"{path}:123: " in said.text and reason in said.text
    assert not (tmp_path / "out" / "train").exists()
    said.clear()
    assert run_text(tmp_path / "out", path, flags=["--on_error", "skip"]) == 0  # goes on
    assert "skipped 1 bad documents" in said.text and f"{path}:123: " in said.text
    assert read(tmp_path / "out" / "train") == c4_texts[:122] + c4_texts[123:200]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_truncated_file(tmp_path, jsonl, c4_texts, said, suffix):
    path = tmp_path / f"cut.json.{suffix}"
    data = {"gz": gzip, "xz": lzma}[suffix].compress(jsonl.read_bytes())
    path.write_bytes(data[: len(data) * 2 // 3])
    assert run_text(tmp_path / "out", path) == 1
    assert f"{path}:" in said.text and "cannot be read any further" in said.text
    said.clear()
    assert run_text(tmp_path / "out", path, flags=["--on_error", "skip"]) == 0
    assert "skipped 1 bad documents" in said.text
    texts = read(tmp_path / "out" / "train")
    assert texts == c4_texts[: len(texts)] and 50 < len(texts) < 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--splits", "trian"], "unknown split trian; known: train, train_small, val, val_small"),
        (["--local_files", "/no/such/file.jsonl"], "'/no/such/file.jsonl' does not exist"),
        (["--concat_tokens", "128"], "--concat_tokens needs a --tokenizer"),
        (["--concat_tokens", "128", "--tokenizer", "/no/such"], "'/no/such' has no tokenizer"),
        (["--tokenizer", "bert-base-uncased"], "only used with --concat_tokens"),
        (["--splits", "train_small", "val"], "--val_fraction 0.01"),
        (["--local_files", "val=SAMPLE"], "no file for the split 'train'"),
        (["--local_files", "PYTHON"], "unknown kind of file"),
        (["--text_column", "content"], "no column 'content'"),
        (["--compression", "lzip"], "--compression lzip: unknown"),
        (["--val_fraction", "1.5"], "between 0 and 1"),
    ],
)
def test_wrong_arguments(tmp_path, said, monkeypatch, flags, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"SAMPLE": str(C4_SAMPLE), "PYTHON": __file__}
    flags = ["=".join(names.get(part, part) for part in flag.split("=")) for flag in flags]
    assert run_c4(tmp_path / "out", C4_SAMPLE, flags=flags) == 1
    assert message in said.text
    assert "Traceback" not in said.text
    assert not (tmp_path / "out" / "train").exists()


def until_the_disk_is_full(part: Part) -> None:
    """Convert a part as a worker does, but only the first five blocks."""
    if part.first >= 5:
        # A listed file that is gone, as another worker leaves one when it renames it.
        (part.blocks.shards / f"gone{part.first}").symlink_to("nothing")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    convert_part(part)


@pytest.mark.usefixtures("small_blocks")
def test_writer_finds_the_disk_full(tmp_path, jsonl, said, monkeypatch):
    assert run_text(tmp_path / "unbroken", jsonl) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "convert_part", until_the_disk_is_full)
        assert run_text(out, jsonl) == 1
    assert f"no space left on the disk of {out / '.train.partial'}" in said.text
    assert not (out / "train").exists()
    assert run_text(out, jsonl) == 0
    assert content(out) == content(tmp_path / "unbroken")


@pytest.mark.usefixtures("small_blocks")
def test_disk_full(tmp_path, jsonl, said):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        (disk / "ballast").write_bytes(bytes(200_000))
        assert run_text(disk / "out", jsonl) == 1
        assert "no space left on the disk of" in said.text and "MB free" in said.text
        assert not (disk / "out" / "train").exists()
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert run_text(disk / "out", jsonl, flags=["--verify"]) == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def until_killed(part: Part) -> None:
    """Convert a part as a worker does; the worker of the sixth block is killed in the middle."""
    if part.first == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    convert_part(part)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("flags", [[], CONCAT], ids=["text", "tokens"])
def test_a_worker_that_dies_is_named(tmp_path, jsonl, said, monkeypatch, flags):
    assert run_text(tmp_path / "unbroken", jsonl, flags=flags) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "convert_part", until_killed)
        assert run_text(out, jsonl, flags=flags) == 1
    assert "a worker process ended unexpectedly" in said.text and "--num-workers" in said.text
    assert "Traceback" not in said.text
    finished = finished_shards(out)
    assert len(finished) >= 3
    assert run_text(out, jsonl, flags=flags) == 0
    assert content(out) == content(tmp_path / "unbroken")
    assert finished.items() <= shards(out / "train").items()


# --- verification ---


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("flags", [[], ["--compression", "zstd", *CONCAT]], ids=["text", "tokens"])
def test_verify_names_what_is_damaged(tmp_path, jsonl, said, flags):
    assert run_text(tmp_path, jsonl, flags=[*flags, "--verify"]) == 0
    assert "are as written" in said.text
    said.clear()
    flipped, cut, gone = sorted((tmp_path / "train").glob("shard.*"))[1:4]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    os.truncate(cut, cut.stat().st_size - 1)
    gone.unlink()
    assert run_text(tmp_path, jsonl, flags=["--verify_only"]) == 1
    assert f"{flipped}: its xxh64" in said.text
    assert f"{cut}: {cut.stat().st_size} bytes, the index says" in said.text
    assert f"{gone}: missing" in said.text
    assert said.text.count("shard.") == 3


def test_verify_a_folder_of_llm_foundry(tmp_path, said):
    from streaming import MDSWriter

    with MDSWriter(columns={"text": "str"}, out=str(tmp_path / "train")) as writer:
        for i in range(10):
            writer.write({"text": f"text {i}"})
    arguments = ["--out_root", str(tmp_path), "--splits", "train", "--verify_only"]
    assert convert_text(*arguments) == 0
    assert "no manifest" in said.text
    older = {"settings": {"format_version": 1}, "samples": 10, "shards": {}, "content_digest": ""}
    (tmp_path / "train" / "conversion.manifest").write_text(json.dumps(older))
    assert convert_text(*arguments) == 0
    os.truncate(tmp_path / "train" / "shard.00000.mds", 50)
    assert convert_text(*arguments) == 1
    assert convert_text(*arguments, "--out_root", tmp_path / "nowhere") == 1
    assert "missing" in said.text


class Pickled:
    """What calls a function where it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_verify_does_not_unpickle(tmp_path, said):
    from streaming import MDSWriter

    with MDSWriter(columns={"text": "pkl"}, out=str(tmp_path / "train")) as writer:
        writer.write({"text": Pickled(tmp_path / "run")})
    arguments = ["--out_root", str(tmp_path), "--splits", "train", "--verify_only"]
    assert convert_text(*arguments) == 1
    assert "index.json: column 'text' is pickled (encoding 'pkl')" in said.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "shards",
    [
        5,
        [5],
        [{}],
        [{"raw_data": {"basename": "../../x"}, "samples": 1}],
        [{"raw_data": {"basename": "/etc/passwd"}, "samples": 1}],
        [{"raw_data": {"basename": "x"}, "samples": "1"}],
        [{"raw_data": {"basename": 5}, "samples": 1}],
        [{"raw_data": {"basename": "x"}, "samples": 1, "column_names": ["text"]}],
    ],
)
def test_verify_names_an_index_that_is_none(shards, tmp_path, said):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "index.json").write_text(json.dumps({"shards": shards}))
    arguments = ["--out_root", str(tmp_path), "--splits", "train", "--verify_only"]
    assert convert_text(*arguments) == 1
    assert "index.json: empty, corrupt or not an MDS index" in said.text


# --- the script itself ---


def test_script(tmp_path):
    script = C4_SAMPLE.parents[1] / "convert_c4.py"
    arguments = ["--out_root", str(tmp_path), "--splits", "train_small,val", "--local_files"]
    arguments += [str(C4_SAMPLE), "--val_fraction", "0.05"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "docs/s" in done.stderr and "samples in" in done.stderr
    assert len(read(tmp_path / "train_small") + read(tmp_path / "val")) == 1000


def test_a_worker_that_writes_texts_imports_little():
    code = """
import sys
import m2_plugin.foundry.conversion.worker
assert not {"streaming", "torch", "datasets", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    """The writer of whole files writes in a hidden folder beside the file."""
    from m2_plugin.foundry.conversion.folder import PartialFolder

    folder = PartialFolder(tmp_path / "train")
    with folder.locked():
        blocks = folder.open({"a": 1})
        left = [blocks.records / ".00000-00000.json.tmp-abcd1234", blocks.shards / ".x.mds.1"]
        left[0].mkdir()
        (left[0] / "00000-00000.json").write_text("{")
        left[1].write_text("part")
    with folder.locked():
        folder.open({"a": 1})
    assert not any(path.exists() for path in left)
