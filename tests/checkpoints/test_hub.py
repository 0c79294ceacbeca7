"""A folder with its code: the same logits where this package is not there."""

import ast
import json
import os
import subprocess
import sys

import torch
from transformers import AutoModelForMaskedLM

from m2_plugin.checkpoints.hub import flat_sources
from m2_plugin.cli import main
from m2_plugin.models import (
    M2BertForMaskedLM,
    M2BertForMultipleChoice,
    M2BertForQuestionAnswering,
    M2BertForSequenceClassification,
    M2BertForTokenClassification,
)
from tests.models.test_modeling_m2_bert import ids, small
from tests.utils import TOKENIZER

# Run where this package cannot be imported.
ELSEWHERE = """
import sys
from pathlib import Path

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "m2_plugin":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
try:
    import m2_plugin
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("m2_plugin can be imported here")

import torch
import transformers

*folders, ids, out = sys.argv[1:]
ids = torch.load(ids)
remote = {"trust_remote_code": True}
outputs = []
for folder, auto, field in (
    (folders[0], transformers.AutoModelForMaskedLM, "logits"),
    (folders[0], transformers.AutoModel, "last_hidden_state"),
    (folders[1], transformers.AutoModelForSequenceClassification, "logits"),
    (folders[2], transformers.AutoModelForTokenClassification, "logits"),
    (folders[3], transformers.AutoModelForQuestionAnswering, "end_logits"),
    (folders[4], transformers.AutoModelForMultipleChoice, "logits"),
):
    model = auto.from_pretrained(folder, **remote).eval()
    assert not type(model).__module__.startswith("m2_plugin")
    with torch.no_grad():
        choices = auto is transformers.AutoModelForMultipleChoice
        outputs.append(model(ids[None] if choices else ids)[field])
fill = transformers.pipeline("fill-mask", model=folders[0], **remote)
assert len(fill("He did not [MASK].")) == 5
tag = transformers.pipeline("token-classification", model=folders[2], ignore_labels=[], **remote)
assert [found["word"] for found in tag("he did not")] == ["he", "did", "not"]
for auto in (transformers.AutoModelForMaskedLM, transformers.AutoModel):
    model = auto.from_pretrained(folders[0], **remote)
    model.save_pretrained(auto.__name__)  # the next is loaded from there
    again = auto.from_pretrained(auto.__name__, **remote)
    assert type(again).__module__ != type(model).__module__
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    there, saved = (
        {path.name for path in Path(folder).glob("*.py")} for folder in (folders[0], auto.__name__)
    )
    assert saved == there, (saved, there)
try:
    transformers.AutoModel.from_pretrained(folders[0], backend="triton", **remote)(ids)
except RuntimeError as error:
    assert "plain PyTorch only" in str(error), error
else:
    raise SystemExit("backend triton ran")
torch.save(outputs, out)
"""


def test_a_folder_with_its_code(tmp_path):
    from transformers import AutoTokenizer

    models = [M2BertForMaskedLM(small(vocab_size=30522, mask_padding=True)).eval()]
    for cls in (
        M2BertForSequenceClassification,
        M2BertForTokenClassification,
        M2BertForQuestionAnswering,
        M2BertForMultipleChoice,
    ):
        models.append(cls(small(vocab_size=30522, num_labels=3)).eval())
    folders = []
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"plain{i}")
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / f"plain{i}")
        folders.append(str(tmp_path / f"hub{i}"))
        assert main(["export", str(tmp_path / f"plain{i}"), "--hub", folders[-1]]) == 0
    # Where the package is, no remote code is needed, nor asked about.
    local = AutoModelForMaskedLM.from_pretrained(folders[0])
    assert type(local) is M2BertForMaskedLM

    torch.save(ids(), tmp_path / "ids.pt")
    arguments = [*folders, str(tmp_path / "ids.pt"), str(tmp_path / "outputs.pt")]
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    x = torch.load(tmp_path / "ids.pt")
    with torch.no_grad():
        expected = [models[0](x).logits, models[0].model(x).last_hidden_state]
        expected += [models[1](x).logits, models[2](x).logits, models[3](x).end_logits]
        expected += [models[4](x[None]).logits]
    for found, exact in zip(torch.load(tmp_path / "outputs.pt"), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


def test_the_code_stands_alone(tmp_path, capsys):
    sources = flat_sources()
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source, name)):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("m2_plugin") for alias in node.names), name
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in sources, name
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] not in ("m2_plugin", "triton"), name
    gates = [s for s in sources.values() if "def why_no_kernel" in s]
    assert len(gates) == 1 and "the kernels need 8.0 or more" not in gates[0]

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert main(["export", str(tmp_path), "--hub", str(tmp_path / "hub")]) == 1
    assert "model_type in its config.json is 'bert'" in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()
