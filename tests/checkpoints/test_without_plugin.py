"""Embeddings from a virtual environment without this package: everybody's are the same."""

import json
import subprocess
import sys
import sysconfig

import numpy as np

from m2_plugin.cli import main
from tests.models.test_text_embedding import TEXTS
from tests.test_embed import save

ELSEWHERE = """
import importlib.util
import json
import sys

# The models of an editable installation are not found through a .pth file; others would be.
found = importlib.util.find_spec("m2_plugin") and importlib.util.find_spec("m2_plugin.models")
assert found is None, "install this package with --editable"

import numpy as np
import onnxruntime
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForTextEncoding, AutoTokenizer

hub, onnx, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
batch = AutoTokenizer.from_pretrained(hub)(texts, return_tensors="pt", padding=True)
model = AutoModelForTextEncoding.from_pretrained(hub, trust_remote_code=True).eval()
with torch.no_grad():
    transformers_ = model(**batch).sentence_embedding.numpy()
sentences = SentenceTransformer(hub, trust_remote_code=True, device="cpu").encode(texts)
session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
inputs = {i.name: batch[i.name].numpy() for i in session.get_inputs()}
runtime = session.run(["sentence_embedding"], inputs)[0]
np.savez(sys.argv[4], transformers=transformers_, sentences=sentences, runtime=runtime)
"""


def test_without_this_package(tmp_path):
    folder, hub, onnx = tmp_path / "model", tmp_path / "hub", tmp_path / "model.onnx"
    save(folder, mask_padding=True, classifier_pooling="mean", normalize_embeddings=True)
    assert main(["export", str(folder), "--hub", str(hub)]) == 0
    assert main(["export", str(folder), "--onnx", str(onnx)]) == 0
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    out = tmp_path / "vectors.npy"
    assert main(["embed", str(texts), "--model", str(folder), "--out", str(out)]) == 0

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    arguments = [str(hub), str(onnx), json.dumps(TEXTS), str(tmp_path / "found.npz")]
    run = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", ELSEWHERE, *arguments],
        env={"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = np.load(tmp_path / "found.npz")
    assert set(found) == {"transformers", "sentences", "runtime"}
    for name, vectors in found.items():
        np.testing.assert_allclose(vectors, np.load(out), rtol=0, atol=1e-5, err_msg=name)
