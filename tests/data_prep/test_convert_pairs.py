"""convert_pairs.py, and the pairs that the quickstart makes from its sample of C4 and novels."""

import gzip
import json
import runpy

import pytest
from streaming import LocalDataset

from m2_plugin.foundry.conversion import pairs
from m2_plugin.foundry.conversion.folder import PartialFolder
from tests.utils import write_rows

from .conftest import QUICKSTART, content, convert_pairs, finished_shards, shards

ROWS = [
    {"query": f"Is it {i}?", "passage": f"It is {i}, naïve.", "negatives": [f"No {i}", "Nö"]}
    for i in range(5)
]


def convert(out, *files, flags=()):
    return convert_pairs("--out_root", out, *flags, "--local_files", *files)


def test_writes_what_the_hosts_dataloader_reads(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:3])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n\n" for row in ROWS[3:])
    plain = [{"text_a": row["query"], "text_b": row["passage"]} for row in ROWS]
    write_rows(tmp_path / "plain.jsonl", plain)
    both = [f"train={tmp_path / name}" for name in ("a.jsonl", "b.jsonl.gz")]
    assert convert(tmp_path / "mds", *both) == 0
    found = list(LocalDataset(str(tmp_path / "mds" / "train")))
    assert [row["query_text"] for row in found] == [row["query"] for row in ROWS]
    assert [row["positive_passage"] for row in found] == [row["passage"] for row in ROWS]
    assert [json.loads(row["negative_passages"]) for row in found] == [
        row["negatives"] for row in ROWS
    ]

    flags = ["--query_column", "text_a", "--passage_column", "text_b", "--compression", "zstd"]
    assert convert(tmp_path / "mds", f"val={tmp_path / 'plain.jsonl'}", flags=flags) == 0
    index = json.loads((tmp_path / "mds" / "val" / "index.json").read_text())
    assert index["shards"][0]["compression"] == "zstd"
    assert index["shards"][0]["samples"] == len(ROWS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], {"query": "q"}], "bad.jsonl:2: no column 'passage' (--passage_column)"),
        ([ROWS[0], ROWS[1] | {"passage": 3}], "bad.jsonl:2: 'passage' should be a text"),
        ([ROWS[0], ROWS[1] | {"query": " "}], "bad.jsonl:2: ' ' is an empty text"),
        ([ROWS[0], ROWS[1] | {"negatives": ["n"]}], "bad.jsonl:2: 1 negatives, but the rows"),
        ([ROWS[0], ROWS[1] | {"negatives": "n"}], "bad.jsonl:2: 'negatives' is str, not a list"),
        ([ROWS[0], ["q", "p"]], "bad.jsonl:2: not a JSON object"),
        ([], "train: the input has no samples (0 documents)"),
    ],
)
def test_names_a_bad_line_and_leaves_nothing(tmp_path, said, rows, message):
    write_rows(tmp_path / "bad.jsonl", rows)
    out = tmp_path / "mds"
    assert convert(out, f"train={tmp_path / 'bad.jsonl'}") == 1
    assert message in said.text
    assert not out.exists() or not list(out.iterdir())


def test_other_kinds_of_file(tmp_path, said):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    assert convert(tmp_path / "mds", f"train={tmp_path / 'a.json'}") == 0
    found = list(LocalDataset(str(tmp_path / "mds" / "train")))
    assert [row["positive_passage"] for row in found] == [row["passage"] for row in ROWS]
    (tmp_path / "b.csv").write_text("query;passage\nq, 1;p\n")
    assert convert(tmp_path / "mds", f"val={tmp_path / 'b.csv'}") == 0
    found = list(LocalDataset(str(tmp_path / "mds" / "val")))
    assert found[0]["query_text"] == "q, 1" and found[0]["negative_passages"] == "[]"
    write_rows(tmp_path / "c.jsonl", [ROWS[0], ROWS[1] | {"query": "half \ud83d"}])
    assert convert(tmp_path / "mds", f"test={tmp_path / 'c.jsonl'}") == 1
    assert "c.jsonl:2: 'query' holds half of a surrogate pair" in said.text
    (tmp_path / "d.txt").write_text("q\n")
    assert convert(tmp_path / "mds", f"test={tmp_path / 'd.txt'}") == 1
    assert "d.txt: a text file has no columns for pairs" in said.text


def test_refuses_before_writing(tmp_path, said):
    good = write_rows(tmp_path / "good.jsonl", ROWS)
    write_rows(tmp_path / "other.jsonl", [{"query": "q", "passage": "p"}])
    out = tmp_path / "mds"
    assert convert(out, good) == 1
    assert "names no split: give train=" in said.text
    assert convert(out, f"train={good}", f"train={tmp_path / 'other.jsonl'}") == 1
    assert "[0, 2] negatives" in said.text
    assert not out.exists() or not list(out.iterdir())
    assert convert(out, f"val={good}") == 0
    before = (out / "val" / "index.json").read_bytes()
    both = [f"train={good}", f"val={good}"]
    assert convert(out, *both, flags=["--query_column", "text"]) == 1
    assert f"{out / 'val'} has a split with other settings (other pairs)" in said.text
    assert not (out / "train").exists() and (out / "val" / "index.json").read_bytes() == before
    assert convert(out, *both) == 0  # val is finished
    assert (out / "train" / "index.json").read_bytes() == before
    (out / "thesis").mkdir()
    (out / "thesis" / "thesis.tex").write_text("precious")
    assert convert(out, f"thesis={good}") == 1
    assert "thesis exists, is not empty, and was not written by this program" in said.text
    flags = ["--query_column", "passage", "--overwrite"]
    assert convert(out, *both, flags=flags) == 0
    assert (out / "val" / "index.json").read_bytes() != before


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    """What was whole is not converted again, and the workers change nothing."""
    source = f"train={write_rows(tmp_path / 'many.jsonl', ROWS * 200)}"
    monkeypatch.setattr(pairs, "choose_block_bytes", lambda *_: 10_000)
    assert convert(tmp_path / "unbroken", source, flags=["--num_workers", "1", "--verify"]) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(PartialFolder, "finish", None)
        with pytest.raises(TypeError):
            convert(out, source, flags=["--num_workers", "2"])
    finished = finished_shards(out)
    assert len(finished) > 5 and not (out / "train").exists()
    assert convert(out, source) == 0
    assert content(out / "train") == content(tmp_path / "unbroken" / "train")
    assert finished.items() <= shards(out / "train").items()
    assert len(LocalDataset(str(out / "train"))) == 1000


def test_a_truncated_file_is_named(tmp_path, said):
    whole = gzip.compress("".join(f"{json.dumps(row)}\n" for row in ROWS * 50).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert convert(tmp_path / "mds", f"train={tmp_path / 'cut.jsonl.gz'}") == 1
    assert "cut.jsonl.gz" in said.text


def test_pairs_are_neighbours_and_splits_share_no_page():
    splits = runpy.run_path(str(QUICKSTART / "pairs.py"))["pairs"]()
    texts: dict[str, str] = {}
    for name, key in (("c4-sample.json.gz", "url"), ("novels.jsonl.gz", "source")):
        with gzip.open(QUICKSTART / name, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                part = " ".join(row["text"].split())
                texts[row[key]] = f"{texts.get(row[key], '')}\n{part}"
    assert {split: len(found) for split, found in splits.items()} == {
        "train": 10969, "val": 62, "test": 131,
    }  # fmt: skip
    sources = {split: {pair["source"] for pair in found} for split, found in splits.items()}
    assert len(set.union(*sources.values())) == sum(len(found) for found in sources.values())
    for split, found in splits.items():
        for pair in found:
            neighbours = f"{pair['query']} {pair['passage']}"
            assert " ".join(neighbours.split()) in texts[pair["source"]]
            assert min(len(pair["query"]), len(pair["passage"])) >= 300
        if split != "train":  # one right answer, and what is looked for is no query
            assert len(sources[split]) == len(found)
            assert not {pair["query"] for pair in found} & {pair["passage"] for pair in found}
