"""The retrieval YAML through the real launcher: sentence-transformers loads what it saves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForTextEncoding, AutoTokenizer

from m2_plugin.foundry.conversion.pairs import main_pairs
from m2_plugin.models import M2BertForTextEmbedding
from tests.utils import ROOT, TOKENIZER, write_rows

pytestmark = pytest.mark.slow

YAML = "yamls/finetune/retrieval/m2-bert-quickstart.yaml"
SMALL = {
    "variables.tokenizer": TOKENIZER,
    "variables.max_seq_len": 32,
    "model.config_overrides.hidden_size": 32,
    "model.config_overrides.intermediate_size": 64,
    "model.config_overrides.num_hidden_layers": 1,
    "model.config_overrides.hyena_filter_order": 8,
    "model.config_overrides.max_position_embeddings": 32,
    "model.config_overrides.long_conv_l_max": 32,
    "model.loss": "orthogonal_projection",
    "model.mini_batch_size": 2,
    "global_train_batch_size": 8,
    "device_train_microbatch_size": 1,  # one query and its negatives
    "device_eval_batch_size": 4,
    "max_duration": "4ba",
    "eval_interval": "2ba",
    "save_interval": "4ba",
    "progress_bar": "false",
    "log_to_console": "true",
    "console_log_interval": "1ba",
}


def test_the_saved_folder_embeds_in_sentence_transformers(tmp_path, sentences):
    negatives = [sentences[i + 2 : i + 4] for i in range(40)]
    rows = [
        {"query": sentences[i], "passage": sentences[i + 1], "negatives": negatives[i]}
        for i in range(40)
    ]
    plain = [{"query": row["query"], "passage": row["passage"]} for row in rows[:8]]
    files = [f"train={write_rows(tmp_path / 'train.jsonl', rows)}"]
    files.append(f"val={write_rows(tmp_path / 'val.jsonl', plain)}")  # without negatives
    assert main_pairs(["--out_root", str(tmp_path), "--local_files", *files]) == 0

    keys = SMALL | {"variables.out": tmp_path}
    done = subprocess.run(
        [Path(sys.executable).parent / "composer", "train.py", YAML]
        + [f"{key}={value}" for key, value in keys.items()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    assert output.count("metrics/eval/ContrastiveEvalLoss") == 2
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["metrics"]["eval"].keys() == {"contrastive_loss"}

    folder = tmp_path / "run" / "huggingface" / "final"
    model, info = AutoModelForTextEncoding.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, M2BertForTextEmbedding)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # Our own file; composer's checkpoints hold more than tensors.
    trained = torch.load(tmp_path / "run" / "latest-rank0.pt", weights_only=False)["state"]["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[f"model.{name}"]), name

    served = SentenceTransformer(str(folder), device="cpu")
    assert served.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(TOKENIZER).get_vocab()
    vectors = torch.from_numpy(served.encode(sentences[:6], batch_size=3))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(6))
    batch = served.tokenizer(sentences[:6], padding=True, return_tensors="pt")
    with torch.no_grad():
        own = model.eval()(**batch).sentence_embedding
    torch.testing.assert_close(vectors, own, rtol=1e-5, atol=1e-5)
