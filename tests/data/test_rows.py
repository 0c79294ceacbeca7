"""Every reader gives the texts that the file has: as many, the same, each with its place."""

import bz2
import gzip
import json
import lzma
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from m2_plugin.data import formats
from m2_plugin.data.formats import DataError
from m2_plugin.data.rows import class_names, read_row_groups, read_rows

# What a reader may change: types, empty texts, white space, quotes, separators, line ends.
TEXTS = [
    "",
    "None",
    "007",
    "true",
    " spaces ",
    'He said "no", twice',
    "a;b\tc",
    "one\ntwo\r\nthree",
    "10%\r100%",
    "NUL \0 here",
    "line\u2028para\u2029nel\x85ff\x0c",
    "\ufeffmark",
    "海 🙂",
    "x" * 200_000,
]
LINES = [text for text in TEXTS if "\n" not in text]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def texts(path, **how):
    """The texts of a file that is whole."""
    rows = list(read_rows(str(path), **how))
    assert not [row for row in rows if row.problem]
    return [row.values["text"] for row in rows]


def problems(path, **how):
    """The place and fault of each broken row, and the texts of the others."""
    rows = list(read_rows(str(path), **how))
    name = str(path)
    broken = [(row.place.removeprefix(name), row.problem) for row in rows if row.problem]
    return broken, [row.values["text"] for row in rows if not row.problem]


def csv_of(rows, separator=",", end="\n"):
    cells = ['"' + text.replace('"', '""') + '"' for text in rows]
    lines = [f"id{separator}text", *(f"{i}{separator}{c}" for i, c in enumerate(cells))]
    return "".join(line + end for line in lines)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "json"])
def test_texts_are_kept(tmp_path, kind, compression):
    written = {
        "txt": lambda: "".join(f"{text}\n" for text in LINES),
        "csv": lambda: csv_of(TEXTS),
        "tsv": lambda: "id\ttext\n" + "".join(f"1\t{t}\n" for t in LINES if "\t" not in t),
        "jsonl": lambda: "".join(json.dumps({"text": text, "x": [1]}) + "\n" for text in TEXTS),
        "json": lambda: json.dumps([{"x": None, "text": t} for t in TEXTS], indent=2),
    }[kind]()
    expected = {"txt": LINES, "tsv": [t for t in LINES if "\t" not in t]}.get(kind, TEXTS)
    path = tmp_path / f"a.{kind}{compression}"
    path.write_bytes(COMPRESS[compression](written.encode()))
    assert texts(path) == expected


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow", "saved", "splits"])
def test_columns_are_kept(tmp_path, kind):
    table = pyarrow.table({"text": TEXTS, "n": range(len(TEXTS))})
    path, split = tmp_path / f"a.{kind}", None
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=5)
    elif kind == "saved":
        datasets.Dataset(table).save_to_disk(str(path), num_shards=3)
    elif kind == "splits":
        split = "dev"
        datasets.DatasetDict(dev=datasets.Dataset(table)).save_to_disk(str(path))
        with pytest.raises(DataError, match=r"holds several splits; it has \['dev'\]"):
            texts(path)
        with pytest.raises(DataError, match=r"has no split 'test'; it has \['dev'\]"):
            texts(path, split="test")
    else:
        new = pyarrow.ipc.new_stream if kind == "stream.arrow" else pyarrow.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    assert texts(path, split=split) == texts(path, split=split, columns=["text"]) == TEXTS
    rows = list(read_rows(str(path), split))
    assert rows[3].values == {"text": "true", "n": 3} and rows[3].place.endswith(", row 3")


@pytest.mark.parametrize(("separator", "end"), [(",", "\r\n"), (";", "\n"), ("\t", "\n")])
def test_csv_of_other_programs(tmp_path, separator, end):
    """A byte order mark, CRLF, and the separator that the header has."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + csv_of(TEXTS, separator, end).encode())
    assert texts(path) == TEXTS
    path.write_text(f'"text, {separator}"{separator}text\na,b{separator}c\n'.replace("a,b", "a"))
    assert texts(path) == ["c"]


def test_a_return_in_a_bare_field(tmp_path):
    """As pandas writes it: without quotes."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\r\n1,10%\r100%\r\n2,b\r\n")
    assert texts(path) == ["10%\r100%", "b"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_arrays_in_pieces(tmp_path, monkeypatch, indent, chunk):
    """Wherever a piece of the file ends: in a number, an escape, or a pair of surrogates."""
    monkeypatch.setattr(formats, "READ_BYTES", chunk)
    rows = [{"text": t, "n": [-1.5e3, 12, True, None, {"a": []}]} for t in TEXTS[:-1]]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent))
    assert [row.values for row in read_rows(str(path))] == rows
    path.write_text("\n".join(json.dumps(row, indent=1) for row in rows))  # as jq writes
    assert [row.values for row in read_rows(str(path))] == rows
    places = [row.place for row in read_rows(str(path))]
    lines = path.read_text().split("\n")
    starts = [f"{path}:{i}" for i, line in enumerate(lines, 1) if line == "{"]
    assert places == starts


def test_blank_lines(tmp_path):
    """They are texts in a text file, and nothing elsewhere; a last line needs no end."""
    for name, content, expected in [
        ("a.txt", "a\n\n \nb", ["a", "", " ", "b"]),
        ("b.txt", "", []),
        ("a.jsonl", '\n{"text": "a"}\n \n{"text": "b"}', ["a", "b"]),
        ("a.csv", "\n\ntext,n\n\na,1\n\nb,2", ["a", "b"]),
        ("a.tsv", "text\tn\n\na\t1\n\nb\t2", ["a", "b"]),
        ("a.json", "[]", []),
        ("b.json", "", []),
    ]:
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name) == expected, name


@pytest.mark.parametrize(
    ("name", "content", "broken", "others"),
    [
        ("a.txt", b"a\ncaf\xe9\nb\n", [(":2", "not UTF-8")], ["a", "b"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n[1]\n{"text": "b"}\n',
         [(":2", "not JSON"), (":3", "not a JSON object, but list [1]")], ["a", "b"]),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", [(":2", "not JSON")], ["a"]),
        ("a.csv", b"id,text\n1,a,\n2,b\n", [(":2", "3 columns where there should be 2")], ["b"]),
        ("a.csv", b'text,n\n"x\ny",1\n"q"r,2\nb,3\n', [(":4", "not CSV")], ["x\ny", "b"]),
        ("a.csv", b'text,n\na,1\n"b,2\nc,3\n', [(":3", "not CSV: unexpected end")], ["a"]),
        ("a.csv", b"text,n\na,1\ncaf\xe9,2\nb,3\n", [(":3", "not UTF-8")], ["a", "b"]),
        ("a.tsv", b"text\tn\na\n\xe9\t1\nb\t2\n",
         [(":2", "1 columns where there should be 2"), (":3", "not UTF-8")], ["b"]),
        ("a.json", b'[{"text": "a"},\n 7,\n {"text": "b"}]',
         [(":2", "not a JSON object, but int 7")], ["a", "b"]),
        ("a.json", b'[{"text": "a"},\n {"text" "b"},\n {"text": "c"}]',
         [(":2", "not JSON (Expecting ':' delimiter); the rest of the file is not")], ["a"]),
        ("a.json", b'[{"text": "a"}\n {"text": "b"}]', [(":2", "without a ','")], ["a"]),
        ("a.json", b'[{"text": "a"},\n', [(":2", "not JSON")], ["a"]),
        ("a.json", b'[{"text": "caf\xe9"}]', [(":1", "not UTF-8")], []),
    ],
)  # fmt: skip
def test_broken_rows_have_their_place(tmp_path, name, content, broken, others):
    path = tmp_path / name
    path.write_bytes(content)
    found, rest = problems(path)
    assert rest == others and [place for place, _ in found] == [place for place, _ in broken]
    for (_, problem), (_, expected) in zip(found, broken, strict=True):
        assert expected in problem


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "json"])
@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
def test_a_cut_file_is_noticed(tmp_path, kind, compression):
    """What comes before the cut is there, and one row says that more is missing."""
    rows = [f"text {i} {os.urandom(40).hex()}" for i in range(20_000)]
    content = {
        "txt": "\n".join(rows),
        "csv": csv_of(rows),
        "jsonl": "\n".join(json.dumps({"text": row}) for row in rows),
        "json": json.dumps([{"text": row} for row in rows]),
    }[kind]
    path = tmp_path / f"a.{kind}{compression}"
    data = COMPRESS[compression](content.encode())
    path.write_bytes(data[: len(data) * 2 // 3])
    found, rest = problems(path)
    assert len(found) == 1 and "cannot be read any further" in found[0][1]
    assert rest == rows[: len(rest)] and (len(rest) > 1000 or compression == ".bz2")


def test_zstd_of_several_frames_and_long_windows(tmp_path):
    path = tmp_path / "a.txt.zst"
    skippable = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip"
    raw = b"c\n"  # a frame made by hand, with the window of `zstd --long=31`
    head = bytes.fromhex("28b52ffd") + bytes([0, (31 - 10) << 3])
    long = head + (len(raw) << 3 | 1).to_bytes(3, "little") + raw
    frames = zstandard.compress(b"a\n") + skippable + zstandard.compress(b"b\n") + long
    path.write_bytes(frames)
    assert texts(path) == ["a", "b", "c"]
    path.write_bytes(frames[:-1])
    assert problems(path)[1] == ["a", "b"]


def test_not_utf8_in_arrow(tmp_path):
    bad = pyarrow.array([b"a", b"caf\xe9", b"c"]).cast(pyarrow.string(), safe=False)
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_file(path, pyarrow.schema({"text": pyarrow.string()})) as writer:
        writer.write_batch(pyarrow.record_batch({"text": bad}))
    other = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), other, row_group_size=1)
    for file in (path, other):
        found, rest = problems(file)
        assert found[0][0] == ", row 1" and "utf-8" in found[0][1] and rest == ["a", "c"]
    groups = list(read_row_groups(str(other), 1, 3, "text"))
    assert [row.place.removeprefix(str(other)) for row in groups] == [", row 1", ", row 2"]
    assert "utf-8" in groups[0].problem and groups[1].values == {"text": "c"}


@pytest.mark.parametrize("name", ["a [1].txt", "a*.txt", "a?.txt", "file:{x}.txt", "a::b.csv"])
def test_a_name_is_no_pattern_and_no_url(tmp_path, name):
    for other in ("a 1.txt", "a1.txt", "ab.txt", "b.csv"):
        (tmp_path / other).write_text("text\nother\n")
    (tmp_path / name).write_text("text\nthis one\n")
    assert texts(tmp_path / name)[-1] == "this one"
    assert len(list(read_rows(str(tmp_path / name)))) == (1 if name.endswith("csv") else 2)


def test_a_url_needs_its_scheme(tmp_path, monkeypatch):
    import fsspec

    with fsspec.filesystem("memory").open("/folder/a[1]*.csv.gz", "wb") as file:
        file.write(gzip.compress(b"text,n\nfar,1\n"))
    assert texts("memory://folder/a[1]*.csv.gz") == ["far"]
    with pytest.raises(DataError, match="there is no file 'memory://folder/b.csv'"):
        texts("memory://folder/b.csv")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory:" / "folder").mkdir(parents=True)
    (tmp_path / "memory:" / "folder" / "a.csv").write_text("text,n\nnear,1\n")
    assert texts("memory://folder/a.csv") == ["near"]


def test_another_content_of_the_same_time(tmp_path):
    for kind, content in [("txt", "{}\n"), ("csv", "text,n\n{},1\n"), ("json", '{{"text": "{}"}}')]:
        path = tmp_path / f"a.{kind}"
        for word in ("old", "new"):
            path.write_text(content.format(word))
            os.utime(path, (1, 1))
            assert texts(path) == [word]


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not at all")
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 not at all")
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    (tmp_path / "folder.csv").mkdir()
    for name, message in [
        ("a.doc", r"a.doc: unknown kind of file; the endings known are .txt .* saved"),
        ("a.parquet.gz", "a.parquet.gz: unknown kind of file"),
        ("none.CSV.GZ", "there is no file '.*none.CSV.GZ'"),
        ("folder.csv", "folder.csv' is a folder"),
        ("a.parquet", "a.parquet: not a whole Parquet file"),
        ("a.arrow", "a.arrow: not a whole Arrow file"),
        ("a.csv", "a.csv: two columns are called 'text'"),
    ]:
        with pytest.raises(DataError, match=message):
            texts(tmp_path / name)


def test_class_names(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])}
    )
    data = datasets.Dataset.from_dict({"text": ["x"], "label": [1]}, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(tmp_path / "a.parquet")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in (tmp_path / "saved", tmp_path / "a.parquet", arrow):
        assert class_names(str(path)) == {"label": ("b", "a")}
    assert class_names("a.csv") == {}


def test_a_tsv_without_a_header(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('1\t"Open\n2\tb\n')
    assert texts(path, header=["n", "text"]) == ['"Open', "b"]
    path.write_text("text\tother\na\tb\n")
    assert texts(path, header=["n", "text"]) == ["a"]
