"""`m2-plugin export --push`, with an API that records what it is asked. No network."""

from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from m2_plugin.checkpoints import push
from m2_plugin.cli import main
from m2_plugin.models import M2BertForMaskedLM
from tests.models.test_modeling_m2_bert import small


class FakeApi:
    """Of `huggingface_hub`; each call in `failures` raises its error."""

    calls: list = []
    failures: dict = {}
    private = True

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name in self.failures:
                raise self.failures[name]
            if name == "create_repo":
                return f"https://example.org/{args[0]}"
            return SimpleNamespace(private=self.private)

        return call


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "failures", {})
    monkeypatch.setattr(push, "HfApi", FakeApi)
    return FakeApi


@pytest.fixture
def folder(tmp_path):
    M2BertForMaskedLM(small()).save_pretrained(tmp_path / "mine")
    return str(tmp_path / "mine")


def export(folder, out, *options):
    return main(["export", folder, "--hub", str(out), *options])


def test_nothing_is_pushed_unless_asked(api, folder, tmp_path):
    assert export(folder, tmp_path / "hub") == 0
    assert not api.calls


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_is_uploaded(private, api, folder, tmp_path, capsys):
    out = tmp_path / "hub"
    assert export(folder, out, "--push", "me/mine", *(["--private"] if private else [])) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [str(out), "https://example.org/me/mine"]
    calls = {name: (args, kwargs) for name, args, kwargs in api.calls}
    created = {"private": True if private else None, "exist_ok": True}
    assert calls["create_repo"] == (("me/mine",), created)
    uploaded = calls["upload_folder"][1]
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/mine", str(out))
    assert [name for name, *_ in api.calls][0] == "whoami"
    assert 'from_pretrained("me/mine", trust_remote_code=True)' in (out / "README.md").read_text()


def refused(capsys):
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("me/mi ne", None, "--push 'me/mi ne' is no name of a repository"),
        ("mine", None, "--push 'mine' must be USER/NAME"),
        (
            "me/mine",
            errors.LocalTokenNotFoundError("Token is required"),
            "needs a login: run `huggingface-cli login`, or set HF_TOKEN",
        ),
        ("me/mine", OSError("no\nroute"), "the hub does not let us in, or cannot be reached"),
    ],
)
def test_nothing_is_written_without_access(name, error, message, api, folder, tmp_path, capsys):
    if error is not None:
        api.failures["whoami"] = error
    assert export(folder, tmp_path / "hub", "--push", name) == 1
    assert message in refused(capsys)
    assert not (tmp_path / "hub").exists()


def test_a_failed_upload_leaves_the_folder_and_says_how_to_go_on(api, folder, tmp_path, capsys):
    api.failures["upload_folder"] = ConnectionError("reset\nby peer")
    out = tmp_path / "hub"
    assert export(folder, out, "--push", "me/mine") == 1
    said = refused(capsys)
    assert f"`huggingface-cli upload me/mine {out}` tries again" in said and "reset by peer" in said
    assert (out / "model.safetensors").is_file()


def test_a_private_model_goes_into_no_public_repository(api, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FakeApi, "private", False)
    assert export(folder, tmp_path / "hub", "--push", "me/mine", "--private") == 1
    assert "'me/mine' exists there and is public" in refused(capsys)
    assert "upload_folder" not in [name for name, *_ in api.calls]


@pytest.mark.parametrize(
    "options", [["--out", "a.pt", "--push", "a/b"], ["--hub", "a", "--private"]]
)
def test_options_that_do_not_fit(options, folder, capsys):
    with pytest.raises(SystemExit):
        main(["export", folder, *options])
    assert "needs --" in capsys.readouterr().err
