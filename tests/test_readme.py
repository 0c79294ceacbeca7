"""Every command and every snippet of every README runs, or is listed with the reason why not.

A new command in a README needs an entry in `COMMANDS`. The commands run in reading order in a copy
of the repository, as a user would run them, but with small models: `more` says how.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from tests.utils import ROOT, TOKENIZER, load_golden, with_prefix

BIN = Path(sys.executable).parent
# In reading order: what a command leaves, the next ones can use.
DOCUMENTS = [ROOT / "README.md"]
DOCUMENTS += [
    path
    for pattern in ("*.md", "yamls/*.md", "data_prep/**/*.md", "m2_plugin/**/*.md", "tests/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path not in DOCUMENTS
]
PLACEHOLDERS = {  # words in capitals, for which a reader puts something of his own
    "CHECKPOINT": "quickstart/run/huggingface/final",
    "FOLDER": "quickstart/run/huggingface/final",
}


@dataclass(frozen=True)
class Run:
    """A command that runs here.

    Args:
        more: Words to append, which make it small.
        makes: A file that it must leave.
        instead: Words to replace, and by what.
    """

    more: str = ""
    makes: str = ""
    instead: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NotRun:
    """A command that cannot run here: why, and the test or script that covers what it does."""

    why: str
    covered_by: str


TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "hyena_filter_order": 4,
}
SMALL = " ".join(f"model.config_overrides.{key}={value}" for key, value in TINY.items())
LOCAL = f"variables.tokenizer={TOKENIZER}"
BATCHES = "max_duration=2ba eval_interval=2ba eval_subset_num_batches=1 save_interval=2ba"
BATCHES += " global_train_batch_size=8 device_train_microbatch_size=8 progress_bar=false"

INSTALLS = NotRun("It installs from a package index.", "tests/package_check.py")
BY_CI = NotRun("It is how these tests are run.", ".ci/run")
ONE_TASK = NotRun(
    "Another test runs one task in the same way.",
    "tests/glue/test_end_to_end.py::test_one_task_by_composer_from_a_pretraining_checkpoint",
)
ADAPT = NotRun(
    "Another test runs it on texts and labels of its own.", "tests/test_adapt.py::test_own_texts"
)
LIKE_README = NotRun(
    "Such a command runs for README.md.",
    "tests/foundry/test_evaluation.py::test_predictions_and_evaluation_agree",
)
SWEEP = NotRun(
    "Another test runs the sweep, and one task of it runs for README.md.",
    "tests/glue/test_end_to_end.py::test_a_killed_sweep_goes_on_and_a_broken_task_is_in_the_table",
)
COMMANDS: dict[str, Run | NotRun] = {
    # README.md
    "python3.11 -m venv .venv && source .venv/bin/activate && pip install .": INSTALLS,
    "uv venv --python 3.11 && uv pip install .": INSTALLS,
    "pip install torch transformers && pip install --no-deps .": NotRun(
        "It installs from a package index; what m2_plugin.models imports is tested.",
        "tests/test_layering.py",
    ),
    "pip wheel --wheel-dir wheels .": INSTALLS,
    "pip install --no-index --find-links wheels m2-plugin": INSTALLS,
    "m2-plugin doctor": Run(),
    "make quickstart": Run("VENV=venv", "quickstart/run/loss_curve.png"),
    "python data_prep/convert_c4.py --out_root ./my-copy-c4 --splits train val": Run(
        f"--local_files data_prep/quickstart/c4-sample.json.gz --val_fraction 0.05 "
        f"--concat_tokens 128 --tokenizer {TOKENIZER}",
        "my-copy-c4/val/index.json",
    ),
    "composer train.py yamls/pretrain/m2-bert-base.yaml": Run(
        f"{SMALL} {LOCAL} {BATCHES}", "runs/m2-bert-base/huggingface/final/model.safetensors"
    ),
    "m2-plugin train-report runs/m2-bert-base": Run(makes="runs/m2-bert-base/report/report.html"),
    "python data_prep/quickstart/pages.py --out quickstart/pages": Run(
        makes="quickstart/pages/new.csv"
    ),
    "composer train.py yamls/finetune/text-classification.yaml "
    "variables.start=quickstart/run/huggingface/final variables.train=quickstart/pages/train.csv "
    "variables.eval=quickstart/pages/dev.csv optimizer.lr=1.0e-3": Run(
        BATCHES, "runs/text-classification/huggingface/final/README.md"
    ),
    "m2-plugin predict quickstart/pages/new.csv --model runs/text-classification/huggingface/final "
    "--out predictions.csv": Run(makes="predictions.csv"),
    "m2-plugin evaluate runs/text-classification/huggingface/final --data "
    "quickstart/pages/dev.csv": Run(),
    "composer train.py yamls/finetune/token-classification.yaml variables.train=train.conll "
    "variables.eval=dev.conll optimizer.lr=1.0e-3": Run(
        BATCHES, "runs/token-classification/huggingface/final/config.json"
    ),
    "m2-plugin predict dev.conll --model runs/token-classification/huggingface/final "
    "--out tagged.jsonl": Run(makes="tagged.jsonl"),
    "composer train.py yamls/finetune/question-answering.yaml variables.train=train.json "
    "variables.eval=dev.json optimizer.lr=1.0e-3": Run(
        BATCHES, "runs/question-answering/huggingface/final/config.json"
    ),
    "m2-plugin predict dev.json --model runs/question-answering/huggingface/final "
    "--out answers.jsonl": Run(makes="answers.jsonl"),
    "bash data_prep/adapt.sh": ADAPT,
    "TEXTS=reports.jsonl TRAIN=train.csv DEV=dev.csv NEW=new.csv OUT=runs/reports "
    "bash data_prep/adapt.sh": ADAPT,
    "m2-plugin glue --config yamls/finetune/glue/sweep-m2-bert-base.yaml --start "
    "runs/m2-bert-base/huggingface/final": Run(
        f"--tasks cola --seeds 19 --jobs 1 variables.glue_path={ROOT}/tests/foundry/data/glue "
        f"tasks.cola.max_duration=1ep",
        "runs/glue-m2-bert-base/cola-seed19/result.json",
    ),
    "python data_prep/quickstart/pairs.py --out quickstart/pairs": Run(
        makes="quickstart/pairs/test.jsonl"
    ),
    "python data_prep/convert_pairs.py --out_root quickstart/retrieval --local_files "
    "train=quickstart/pairs/train.jsonl val=quickstart/pairs/val.jsonl": Run(
        makes="quickstart/retrieval/val/index.json"
    ),
    "composer train.py yamls/finetune/retrieval/m2-bert-quickstart.yaml": Run(
        BATCHES, "quickstart/retrieval/run/huggingface/final/modules.json"
    ),
    "m2-plugin retrieval quickstart/pairs/test.jsonl --model "
    "quickstart/retrieval/run/huggingface/final --out quickstart/retrieval/measured": Run(
        makes="quickstart/retrieval/measured/results.png"
    ),
    "m2-plugin search quickstart/pairs/test.jsonl --text-column passage --model "
    'quickstart/retrieval/run/huggingface/final --query "How do I bake bread?"': Run(
        makes="quickstart/pairs/test.jsonl.index/vectors.npy"
    ),
    "m2-plugin embed quickstart/pairs/test.jsonl --text-column passage --model "
    "quickstart/retrieval/run/huggingface/final --out vectors.npy": Run(makes="vectors.npy"),
    "m2-plugin import m2-bert-128.pt --out m2-bert-80m": Run(makes="m2-bert-80m/model.safetensors"),
    "m2-plugin export quickstart/run/huggingface/final --onnx model.onnx": Run(makes="model.onnx"),
    "m2-plugin export quickstart/run/huggingface/final --hub to-share": Run(
        makes="to-share/config.json"
    ),
    # yamls/README.md
    "composer train.py yamls/pretrain/m2-bert-quickstart.yaml": NotRun(
        "`make quickstart` runs it.",
        "tests/test_end_to_end.py::test_unbroken_run_leaves_everything",
    ),
    "composer train.py yamls/finetune/text-classification.yaml variables.train=train.csv "
    "variables.eval=dev.csv variables.start=quickstart/run/huggingface/final": NotRun(
        "The same YAML runs for README.md.",
        "tests/foundry/test_text_classification.py::test_yaml_for_own_texts",
    ),
    "m2-plugin predict new.csv --model runs/text-classification/huggingface/final --out "
    "predictions.csv": LIKE_README,
    "m2-plugin evaluate runs/text-classification/huggingface/final --data dev.csv": LIKE_README,
    "m2-plugin evaluate quickstart/run/huggingface/final --data quickstart/mds": Run(),
    "python data_prep/mine_negatives.py --pairs train.jsonl --out triplets.jsonl --num_negatives "
    "32 --triplets": Run(
        makes="triplets.jsonl",
        instead={" train.jsonl": " quickstart/pairs/val.jsonl"},
    ),
    "python data_prep/convert_pairs.py --out_root ./my-pairs --local_files train=triplets.jsonl "
    "val=val.jsonl": Run(
        makes="my-pairs/val/index.json",
        instead={"=val": "=quickstart/pairs/val"},
    ),
    "composer train.py yamls/finetune/retrieval/m2-bert-base-2k-retrieval.yaml "
    "variables.start=FOLDER": NotRun(
        "The small recipe of the same kind runs for README.md.",
        "tests/test_yamls.py::test_retrieval_trains_the_embedding_that_is_saved",
    ),
    "composer train.py yamls/pretrain/m2-bert-base.yaml variables.data_remote=s3://bucket/c4 "
    "variables.data=/local/cache save_folder=s3://bucket/runs/m2-bert-base": Run(
        f"{SMALL} {LOCAL} {BATCHES}",
        "from-remote/run/latest-rank0.pt",
        instead={
            "s3://bucket/c4": "./my-copy-c4",
            "/local/cache": "from-remote/cache",
            "s3://bucket/runs/m2-bert-base": "from-remote/run",
        },
    ),
    "m2-plugin train-report runs/m2-bert-base runs/bert-base --x tokens --out compared": Run(
        makes="compared/report.html", instead={"runs/bert-base": "quickstart/run"}
    ),
    "composer train.py yamls/pretrain/m2-gpt-small.yaml": Run(
        f"{BATCHES} model.d_model=16 model.n_layers=1 model.attn_config.filter_order=4",
        "quickstart/m2-gpt/huggingface/final/model.safetensors",
    ),
    "composer train.py yamls/finetune/glue/m2-bert-base-mnli.yaml variables.start=FOLDER": ONE_TASK,
    "m2-plugin glue --config yamls/finetune/glue/sweep-m2-bert-base.yaml --start FOLDER": SWEEP,
    "m2-plugin glue --config yamls/finetune/glue/sweep-m2-bert-base.yaml --start "
    "runs/m2-bert-base/huggingface/final --tasks cola sst2 --seeds 19 tasks.cola.lr=3.0e-5": SWEEP,
    "m2-plugin glue --report-only --out runs/glue-m2-bert-base": Run(
        makes="runs/glue-m2-bert-base/report.png"
    ),
    # data_prep/README.md
    "python data_prep/convert_c4.py --local_files data_prep/quickstart/c4-sample.json.gz "
    "--val_fraction 0.05 --splits train val --out_root ./my-copy-c4": Run(
        makes="c4-documents/val/index.json", instead={"my-copy-c4": "c4-documents"}
    ),
    "python data_prep/convert_text.py --local_files train=corpus.jsonl.xz --splits train "
    "--concat_tokens 2048 --tokenizer google-bert/bert-base-uncased --out_root ./my-corpus": Run(
        makes="my-corpus/train/index.json",
        instead={
            "corpus.jsonl.xz": "data_prep/quickstart/novels.jsonl.gz",
            "google-bert/bert-base-uncased": str(TOKENIZER),
        },
    ),
    "python data_prep/convert_pairs.py --local_files train=pairs.jsonl --out_root ./my-pairs": Run(
        makes="other-pairs/train/index.json",
        instead={"pairs.jsonl": "quickstart/pairs/train.jsonl", "my-pairs": "other-pairs"},
    ),
    "python data_prep/convert_c4.py --local_files 's3://BUCKET/c4/en/c4-train.*.json.gz' "
    "--splits train --out_root s3://BUCKET/c4-mds --local /scratch/c4-mds": NotRun(
        "It needs a bucket; a server of the same interface is tested.",
        "tests/data_prep/test_remote.py",
    ),
    "python data_prep/mine_negatives.py --pairs pairs.jsonl --num_negatives 4 --out "
    "with-negatives.jsonl": Run(
        makes="with-negatives.jsonl", instead={" pairs.jsonl": " quickstart/pairs/val.jsonl"}
    ),
    # m2_plugin/checkpoints/README.md
    "m2-plugin import SOURCE --out FOLDER": Run(
        makes="imported/model.safetensors",
        instead={"SOURCE": "m2-bert-128.pt", "FOLDER": "imported"},
    ),
    "m2-plugin export FOLDER --out latest-rank0.pt": Run(
        makes="latest-rank0.pt", instead={"FOLDER": "imported"}
    ),
    "m2-plugin export FOLDER --hub HUB_FOLDER": Run(makes="HUB_FOLDER/config.json"),
    "m2-plugin export FOLDER --hub HUB_FOLDER --push USER/NAME": NotRun(
        "It uploads to the hub.", "tests/checkpoints/test_push.py::test_a_folder_is_uploaded"
    ),
    "m2-plugin export FOLDER --onnx model.onnx": Run(
        makes="other.onnx", instead={"model.onnx": "other.onnx"}
    ),
    "m2-plugin extend FOLDER --max-seq-len 2048 --out LONGER": Run(makes="LONGER/config.json"),
    "m2-plugin average CHECKPOINT CHECKPOINT CHECKPOINT --out AVERAGED": Run(
        makes="AVERAGED/README.md"
    ),
    # m2_plugin/retrieval/README.md
    "m2-plugin retrieval scifact --model MODEL --out runs/scifact": NotRun(
        "Another test makes such a folder.",
        "tests/retrieval/test_retrieval.py::test_a_beir_folder",
    ),
    "m2-plugin retrieval documents.parquet queries.parquet --model MODEL --out runs/loco": NotRun(
        "Another test makes such files.",
        "tests/retrieval/test_retrieval.py::test_locov1_searches_each_data_set_by_itself",
    ),
    "m2-plugin search manuals.jsonl --model MODEL --queries questions.jsonl --out hits.jsonl": (
        NotRun(
            "Another test makes such files.",
            "tests/retrieval/test_search.py::test_as_sentence_transformers_finds",
        )
    ),
    # CONTRIBUTING.md
    "make install": BY_CI,
    "make test": BY_CI,
    "make lint": BY_CI,
    '.venv/bin/python -m pytest -m "not slow"': BY_CI,
    ".ci/run": BY_CI,
    "make clean": Run("VENV=none OUT=none"),
    # tests/benchmarks/README.md
    "python tests/benchmarks/report.py": Run(),
}


def pieces(document: Path) -> Iterator[tuple[str, str]]:
    """Read a document's code in order: its languages and texts, each command of a shell by itself.

    Comments go, continued lines are joined, and spaces are single.
    """
    text = document.read_text()
    for fence in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        language, code = fence[2], textwrap.dedent(fence[3])
        if language != "sh":
            yield language, code
            continue
        for line in code.replace("\\\n", " ").splitlines():
            command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            if command:
                yield language, command


def in_order() -> list:
    """List what runs, once each, as parameters of a test."""
    found: dict[tuple[str, str], Path] = {}
    for document in DOCUMENTS:
        for language, code in pieces(document):
            entry = COMMANDS.get(code)
            if language == "python" or (language == "sh" and not isinstance(entry, NotRun)):
                found.setdefault((language, code), document)
    return [
        pytest.param(language, code, id=f"{path.relative_to(ROOT)}: {code.splitlines()[0][:60]}")
        for (language, code), path in found.items()
    ]


def commands() -> set[str]:
    return {code for path in DOCUMENTS for language, code in pieces(path) if language == "sh"}


def fill(code: str) -> str:
    """Put something in for the words in capitals."""
    for word, value in PLACEHOLDERS.items():
        code = re.sub(rf"\b{word}\b", value, code)
    return code


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository without the package, and the files that a user would bring."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    hidden = shutil.ignore_patterns(".*", "__pycache__", "golden", "m2_plugin", "*.egg-info")
    tracked = ("yamls", "data_prep", "tests")
    for name in tracked:
        shutil.copytree(ROOT / name, folder / name, ignore=hidden)
    for name in ("README.md", "Makefile", "pyproject.toml", "train.py"):
        shutil.copy2(ROOT / name, folder)

    # `make quickstart VENV=venv` finds everything installed, and a composer that runs small jobs.
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / ".installed").touch()
    for name, more in {"python": "", "composer": f"{SMALL} {BATCHES}"}.items():
        program = folder / "venv" / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {BIN / name} "$@" {more}\n')
        program.chmod(0o755)

    labels = {"good": "blog", "bad": "news", "long": "shop"}
    for name in ("train.csv", "dev.csv", "new.csv"):
        with open(folder / name, "w", newline="") as file:
            rows = [(f"A {word} film.", label) for word, label in labels.items()] * 6
            kept = 1 if name == "new.csv" else 2
            csv.writer(file).writerows(row[:kept] for row in [("text", "label"), *rows])
    sentence = "Anna B-PER\nwent O\nto O\nParis B-LOC\n. O\n\n"
    answer = {"text": "Paris", "answer_start": 13}
    asked = [{"id": f"q{i}", "question": "Where to?", "answers": [answer]} for i in range(40)]
    paragraph = {"context": "Anna went to Paris.", "qas": asked}
    squad = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}
    for name in ("train", "dev"):
        (folder / f"{name}.conll").write_text(sentence * 40)
        (folder / f"{name}.json").write_text(json.dumps(squad))
    tensors = load_golden("base_bidir_resid_glu_monarch")[1]
    weights = {f"model.{name}": value for name, value in with_prefix(tensors, "sd/").items()}
    torch.save({"state": {"model": weights}}, folder / "m2-bert-128.pt")
    return folder


def run(words: list[str], folder: Path) -> None:
    """Run in a shell or in Python, without a GPU, a hub or Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{words[-1]}\n{done.stdout[-5000:]}"


@pytest.mark.slow
@pytest.mark.parametrize(("language", "code"), in_order())
def test_runs(language, code, clone):
    if language == "python":
        run([sys.executable, "-c", fill(code)], clone)
        return
    entry = COMMANDS[code]
    assert isinstance(entry, Run)
    command = code
    for word, other in entry.instead.items():
        assert word in command
        command = command.replace(word, other)
    run(["bash", "-c", f"{fill(command)} {entry.more}"], clone)
    assert (clone / entry.makes).exists()


def test_every_command_is_listed():
    assert commands() == COMMANDS.keys()


@pytest.mark.parametrize("command", [c for c, e in COMMANDS.items() if isinstance(e, NotRun)])
def test_what_does_not_run_is_covered(command):
    path, _, test = COMMANDS[command].covered_by.partition("::")
    assert f"def {test}(" in (ROOT / path).read_text() if test else (ROOT / path).is_file()


@pytest.mark.parametrize("command", sorted(commands()))
def test_files_and_keys_exist(command):
    """Also where the command does not run: files that it names, and variables of a YAML."""
    for path in re.findall(r"(?<![\w/])(?:yamls|data_prep|tests|m2_plugin)/[\w./-]+", command):
        assert (ROOT / path).exists(), path
    for recipe in re.findall(r"yamls/\S+\.yaml", command):
        config = OmegaConf.load(ROOT / recipe)
        if "include" in config:
            shared = OmegaConf.load((ROOT / recipe).parent / config.include)
            config = OmegaConf.merge(shared, config)
        for name in re.findall(r"variables\.(\w+)=", command):
            assert name in config.variables, f"{recipe} has no variable {name}"


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_snippets_parse(document):
    for language, code in pieces(document):
        if language == "yaml":
            assert isinstance(yaml.safe_load(code), dict)


def test_tables_are_those_of_the_results(clone):
    """The marked blocks are what report.py writes."""
    run([sys.executable, "tests/benchmarks/report.py"], clone)
    for name in ("README.md", "tests/benchmarks/README.md"):
        assert (clone / name).read_text() == (ROOT / name).read_text()
