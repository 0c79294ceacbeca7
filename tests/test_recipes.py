"""`m2-plugin recipes`: every recipe is listed, and can be copied with all that it needs."""

import re

import pytest
from omegaconf import OmegaConf

from m2_plugin import cli, recipes
from tests.utils import ROOT

YAMLS = {p.relative_to(ROOT / "yamls").with_suffix("").as_posix() for p in ROOT.rglob("*.yaml")
         if (ROOT / "yamls") in p.parents}  # fmt: skip


def test_lists_every_recipe_with_its_first_line():
    listed = recipes.names()
    assert listed.keys() == YAMLS
    assert listed["pretrain/m2-bert-base"] == "M2-BERT-base, 80M parameters"
    assert all(len(about) > 20 and not about.startswith("#") for about in listed.values())


def test_finds_by_name_last_part_folder_and_all():
    base = "pretrain/m2-bert-base"
    assert recipes.find(base) == recipes.find("m2-bert-base") == [base]
    both = ["finetune/retrieval/m2-bert-quickstart", "pretrain/m2-bert-quickstart"]
    assert recipes.find("m2-bert-quickstart") == both
    glue = recipes.find("finetune/glue")
    assert glue and all(name.startswith("finetune/glue/") for name in glue)
    assert set(recipes.find("all")) == YAMLS
    with pytest.raises(ValueError, match="no recipe 'bert-bas'.*m2-plugin recipes"):
        recipes.find("bert-bas")


@pytest.mark.parametrize("name", sorted(YAMLS))
def test_a_copied_recipe_needs_nothing_else(name, tmp_path):
    recipes.copy([name], tmp_path)
    text = (tmp_path / "yamls" / f"{name}.yaml").read_text()
    assert text == (ROOT / "yamls" / f"{name}.yaml").read_text()
    for path in re.findall(r"(?:data_prep|yamls)/[\w./-]*\w|\btrain\.py\b", text):
        assert (tmp_path / path).exists(), path
    config = OmegaConf.load(tmp_path / "yamls" / f"{name}.yaml")
    if "include" in config:
        assert (tmp_path / "yamls" / name).with_name(config.include).is_file()


def test_what_is_copied_says_where_its_data_come_from(tmp_path):
    recipes.copy(["m2-bert-quickstart"], tmp_path)
    folder = tmp_path / "data_prep" / "quickstart"
    assert {p.name for p in folder.iterdir()} >= {"novels.jsonl.gz", "c4-sample.json.gz"}
    assert "licence" in (folder / "README.md").read_text()


def test_never_overwrites_unasked(tmp_path, capsys):
    copy = ["--copy", "pretrain/bert-base", "--out", str(tmp_path)]
    assert recipes.main(copy) == 0
    written = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert tmp_path / "train.py" in written
    assert recipes.copy(["pretrain/bert-base"], tmp_path) == []  # the same content

    mine = tmp_path / "yamls" / "pretrain" / "bert-base.yaml"
    original = mine.read_text()
    mine.write_text("mine")
    (tmp_path / "train.py").unlink()
    capsys.readouterr()
    assert cli.main(["recipes", *copy]) == 1
    assert f"differ from the ones to be copied: {mine}." in capsys.readouterr().err
    assert mine.read_text() == "mine" and not (tmp_path / "train.py").exists()

    assert recipes.main([*copy, "--overwrite"]) == 0
    assert mine.read_text() == original and (tmp_path / "train.py").exists()


def test_an_unknown_recipe_is_an_error(tmp_path, capsys):
    assert cli.main(["recipes", "--copy", "nothing", "--out", str(tmp_path)]) == 1
    assert "no recipe 'nothing'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
