"""Files of unknown origin: the right numbers or one clear line, no code, and no other files."""

import json
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.serialization import MAGIC_NUMBER
from transformers import AutoTokenizer

from m2_plugin.checkpoints.read import read_file
from m2_plugin.cli import main
from m2_plugin.models import M2BertForMaskedLM, M2BertForTextEmbedding, M2BertModel
from tests.checkpoints.test_convert import composer_file, refused
from tests.models.test_modeling_m2_bert import small
from tests.utils import TOKENIZER

NAME = "model.layers.0.mixer.in_proj.weight"


@pytest.fixture
def weights():
    return M2BertForMaskedLM(small()).state_dict()


def rewritten(source, out, compression=zipfile.ZIP_STORED, change=lambda name, data: data):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out


def to_big_endian(name, data):
    if name.endswith("/byteorder"):
        return b"big"
    return np.frombuffer(data, "<f4").byteswap().tobytes() if "/data/" in name else data


@pytest.mark.parametrize("kind", ["compressed", "big-endian"])
def test_an_archive_that_cannot_be_mapped_is_read_right(kind, weights, tmp_path):
    """Mapped as it is, it would give garbage."""
    content = {"state": {"model": weights}, "rng": torch.rand(500_000)}
    torch.save(content, tmp_path / "plain.pt")
    out = tmp_path / "other.pt"
    if kind == "compressed":
        rewritten(tmp_path / "plain.pt", out, zipfile.ZIP_DEFLATED)
    else:
        rewritten(tmp_path / "plain.pt", out, change=to_big_endian)
    found, _ = read_file(str(out))
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


def test_an_older_file_in_another_byte_order_is_refused(weights, tmp_path, capsys):
    path = tmp_path / "older.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    place = content.index(b"little_endian") + len(b"little_endian")
    place = content.index(b"\x88", place)  # how a pickle writes True
    path.write_bytes(content[:place] + b"\x89" + content[place + 1 :])
    message = refused(path, tmp_path, capsys)
    assert f"its bytes are in another order than here ({sys.byteorder}-endian)" in message


def test_an_archive_with_two_files_of_one_name_is_refused(weights, tmp_path, capsys):
    path = tmp_path / "twice.pt"
    torch.save(weights, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("twice/data/0", b"")
    assert "two files of one name" in refused(path, tmp_path, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int8), "is int8 there, and weights must be one of float32, bfloat16"),
        (lambda t: t.to(torch.complex64), "is complex64 there"),
        (lambda t: t.bool(), "is bool there"),
        (lambda t: torch.where(t == t.max(), torch.nan, t), "has NaN or infinite values"),
        (lambda t: torch.where(t == t.max(), -torch.inf, t), "has NaN or infinite values"),
        (lambda t: t[:, :1].expand(t.shape), r"is (48, 16) there, but stores fewer values"),
        (lambda t: t.to_sparse(), "must be a dense tensor with values"),
        (lambda t: t.to("meta"), "must be a dense tensor with values"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "must be a dense tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_weights_that_are_no_numbers_are_refused(change, message, weights, tmp_path, capsys):
    """A tensor saved from a view would keep its storage: so that the few values are stored."""
    tensor = change(weights[NAME].clone())
    if tensor.layout == torch.strided and 0 in tensor.stride():
        tensor = tensor[:, :1].clone().expand(tensor.shape)
    path = tmp_path / "odd.pt"
    torch.save({"state": {"model": weights | {NAME: tensor}}}, path)
    found = refused(path, tmp_path, capsys)
    assert NAME in found and message in found
    assert found.count("\n") == 1


def test_a_layer_that_is_not_there_is_named(weights, tmp_path, capsys):
    """Not taken for the number of layers, which would have no end."""
    far = weights | {NAME.replace("layers.0", "layers.999999999"): weights[NAME]}
    message = refused(composer_file(tmp_path / "far.pt", far), tmp_path, capsys)
    assert "there is a layer 999999999, but no layer 2" in message


def test_two_tensors_of_one_name_are_refused(weights, tmp_path, capsys):
    both = weights | {f"_orig_mod.{NAME}": weights[NAME] + 1}
    torch.save(both, tmp_path / "both.pt")
    assert f"two tensors {NAME}" in refused(tmp_path / "both.pt", tmp_path, capsys)


ODD_STATES = [
    {"integrations": [1]},
    {"integrations": {"huggingface": "x"}},
    {"integrations": {"huggingface": {"tokenizer": ["a"], "model": 3}}},
    {"integrations": {"huggingface": {"tokenizer": {"vocab": "x", 5: {"file_extension": 7}}}}},
    {"integrations": {"huggingface": {"model": {"config": {"content": [1]}}}}},
]


@pytest.mark.parametrize("state", ODD_STATES)
def test_odd_things_beside_the_weights_are_passed_over(state, weights, tmp_path):
    torch.save({"state": {"model": weights, **state}}, tmp_path / "odd.pt")
    assert main(["import", str(tmp_path / "odd.pt"), "--out", str(tmp_path / "m2")]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "m2_bert", "torch_dtype": "no"}, "cannot be read as a config"),
        ({"model_type": "m2_bert", "hidden_size": "16"}, "hidden_size must be"),
        ({"model_type": "m2_bert", "sequence_mixer": [1]}, "sequence_mixer"),
        ({"model_type": [1], "pad_token_id": None}, "pad_token_id"),
        ({"model_type": "m2_bert", "architectures": 5}, "architectures must be a list of names"),
        ([1], "JSON object"),
        ("[" * 200_000, "cannot be read as JSON"),
        ("\xff\xfe", "cannot be read as JSON"),
    ],
)
def test_odd_configs_are_codein_a_line(content, message, weights, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(
        {k: v.clone() for k, v in weights.items() if k != "decoder.weight"},
        folder / "model.safetensors",
    )
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text, encoding="latin-1")
    found = refused(folder, tmp_path, capsys)
    assert message in found and found.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": None}, "must be a JSON object with a weight_map"),
        ([1], "index.json' must hold a JSON object"),
        ("[" * 200_000, "index.json' cannot be read as JSON"),
        ({"weight_map": {"a": 5}}, "names 5, but must name files in its own folder"),
        ({"weight_map": {"a": "../x.safetensors"}}, "names '../x.safetensors', but must"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd', but must"),
        ({"weight_map": {"a": "a.safetensors"}}, "cannot be read as a checkpoint"),
        ({"weight_map": {}}, "must hold the state dict of a model"),
    ],
)
def test_odd_indices_of_weights_are_codein_a_line(content, message, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small().to_dict()))
    (folder / "a.safetensors").write_bytes(b"\xff" * 64)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)
    found = refused(folder, tmp_path, capsys)
    assert message in found and found.count("\n") == 1


@pytest.mark.parametrize(
    "header",
    [b"", b"[1]", b'{"a": 5}', b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}'],
)
def test_odd_safetensors_are_codein_a_line(header, tmp_path, capsys):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x00" * 4)
    found = refused(path, tmp_path, capsys)
    assert "cannot be read as a checkpoint" in found and found.count("\n") == 1


def test_what_asks_for_too_much_memory_is_refused(tmp_path, capsys):
    plain, small_file = tmp_path / "plain.pt", tmp_path / "small.pt"
    torch.save({"weight": torch.zeros(2**21)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(small_file, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert "would unpack to 8 MiB" in refused(small_file, tmp_path, capsys)
    # Pickle in C would make room for 2³¹ − 1 objects.
    older = pickle.dumps(MAGIC_NUMBER, protocol=2)
    (tmp_path / "memo.pt").write_bytes(older + b"\x80\x02}r\xff\xff\xff\x7f.")
    assert "cannot be read as a checkpoint" in refused(tmp_path / "memo.pt", tmp_path, capsys)


CODE = "from transformers import BertTokenizerFast\nraise SystemExit('code of a folder was run')\n"


def untrusted_folder(tmp_path, **saved):
    """A whole folder, with code, a link out of it, and a tokenizer's config with these keys."""
    folder = tmp_path / "untrusted"
    M2BertForTextEmbedding(small(vocab_size=30522, mask_padding=True)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | saved))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "intruder_x.Model", "AutoConfig": "intruder_x.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "intruder_x.py").write_text(CODE)
    (folder / "inner").mkdir()
    (folder / "inner" / "intruder_x.py").write_text(CODE)
    (folder / "data.pkl").write_bytes(pickle.dumps(1))
    (folder / "README.md").write_text("A model.")
    return folder


def made_by(command, folder, tmp_path):
    out = tmp_path / command
    arguments = {
        "import": ["import", str(folder), "--out", str(out)],
        "extend": ["extend", str(folder), "--max-seq-len", "48", "--out", str(out)],
        "hub": ["export", str(folder), "--hub", str(out)],
    }
    return main(arguments[command]), out


@pytest.mark.parametrize("command", ["import", "extend", "hub"])
def test_code_and_pointers_of_a_folder_go_no_further(command, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("TOP-SECRET\n")
    pointers = {
        "auto_map": {"AutoTokenizer": [None, "intruder_x.Tokenizer"]},
        "vocab_file": str(secret),
        "tokenizer_file": str(secret),
        "init_inputs": [str(secret)],
    }
    code, out = made_by(command, untrusted_folder(tmp_path, **pointers), tmp_path)
    assert code == 0
    texts = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert not [name for name in texts if "intruder_x" in name or name.endswith(".pkl")]
    for name, text in texts.items():
        assert b"TOP-SECRET" not in text and b"intruder_x" not in text, name
        assert str(secret).encode() not in text, name
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert (
        tokenizer("A ship.")["input_ids"]
        == AutoTokenizer.from_pretrained(TOKENIZER)("A ship.")["input_ids"]
    )
    assert texts["README.md"].startswith(b"A model.\n\n## ")


@pytest.mark.parametrize("command", ["import", "extend", "hub"])
def test_a_link_out_of_a_folder_is_refused(command, tmp_path, capsys):
    folder = untrusted_folder(tmp_path)
    secret = tmp_path / "secret.txt"
    secret.write_text("TOP-SECRET\n")
    (folder / "vocab.txt").unlink(missing_ok=True)
    (folder / "vocab.txt").symlink_to(secret)
    code, out = made_by(command, folder, tmp_path)
    assert code == 1 and not out.exists()
    message = capsys.readouterr().err
    assert f"vocab.txt' is a link out of its folder, to '{secret}'" in message


def test_links_of_the_hub_s_cache_are_followed(tmp_path):
    folder = untrusted_folder(tmp_path)
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(p for p in folder.iterdir() if p.is_file())):
        shutil.move(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    for command in ("import", "hub"):
        code, out = made_by(command, snapshot, tmp_path)
        assert code == 0 and not (out / "vocab.txt").is_symlink()
        expected = load_file(snapshot / "model.safetensors")
        for name, tensor in load_file(out / "model.safetensors").items():
            assert torch.equal(tensor, expected[name])


def test_a_tokenizer_in_a_checkpoint_names_no_other_files(weights, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("TOP-SECRET\n")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ship"]
    saved = {"tokenizer_class": "BertTokenizer", "vocab_file": str(secret)}
    files = {
        "vocab.txt": {"file_extension": ".txt", "content": words},
        "tokenizer_config.json": {"file_extension": ".json", "content": saved},
    }
    state = {"model": weights, "integrations": {"huggingface": {"tokenizer": files}}}
    torch.save({"state": state}, tmp_path / "with.pt")
    assert main(["import", str(tmp_path / "with.pt"), "--out", str(tmp_path / "m2")]) == 0
    for file in (tmp_path / "m2").iterdir():
        assert b"TOP-SECRET" not in file.read_bytes(), file
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m2")
    assert tokenizer.convert_tokens_to_ids("ship") == 5


def test_embed_runs_no_code_of_a_folder(tmp_path, capsys, monkeypatch):
    """It does not ask to either. The code would end this test."""
    folder = untrusted_folder(
        tmp_path, auto_map={"AutoTokenizer": [None, "intruder_x.Tokenizer"]}, tokenizer_class="Evil"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "texts.txt").write_text("One.\n")
    command = ["embed", str(tmp_path / "texts.txt"), "--model", str(folder), "--out"]
    code = main([*command, str(tmp_path / "vectors.npy")])  # transformers 5 needs no code for it
    assert not code or "has no tokenizer that can be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (5, "must be a JSON list of modules or fields"),
        ([{"path": ""}], "must be a JSON list of modules"),
        ([{"type": "a.Transformer", "path": "../other"}], "names '../other', which is not in its"),
        ([{"type": "a.Transformer", "path": "/etc"}], "names '/etc', which is not in its folder"),
    ],
)
def test_odd_modules_are_codein_a_line(modules, message, tmp_path, capsys):
    M2BertModel(small()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    capsys.readouterr()
    assert main(["export", str(tmp_path / "model"), "--hub", str(tmp_path / "hub")]) == 1
    found = capsys.readouterr().err
    assert message in found and found.count("\n") == 1
