"""Times `make quickstart` on a fresh clone, installation included, and keeps its loss curve.

    python tests/benchmarks/bench_quickstart.py

Then it times the README's training for retrieval, and keeps what `m2-plugin retrieval` measures.
Writes tests/benchmarks/results/quickstart.json and quickstart.png, and the tables.
"""

import csv
import datetime
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from report import RESULTS
from report import main as write_tables

ROOT = Path(__file__).parents[2]
RETRIEVAL = """
python data_prep/quickstart/pairs.py --out quickstart/pairs
python data_prep/convert_pairs.py --out_root quickstart/retrieval \
    --local_files train=quickstart/pairs/train.jsonl val=quickstart/pairs/val.jsonl
composer train.py yamls/finetune/retrieval/m2-bert-quickstart.yaml
m2-plugin retrieval quickstart/pairs/test.jsonl --model quickstart/retrieval/run/huggingface/final \
    --out quickstart/retrieval/measured
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "m2_plugin"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        outside = ("VIRTUAL_ENV", "PYTHONPATH", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
        environment = {k: v for k, v in os.environ.items() if k not in outside}
        start = time.perf_counter()
        subprocess.run(["make", "install"], cwd=clone, env=environment, check=True)
        installed = time.perf_counter()
        subprocess.run(["make", "quickstart"], cwd=clone, env=environment, check=True)
        finished = time.perf_counter()
        programs = {"PATH": f"{clone / '.venv/bin'}{os.pathsep}{environment['PATH']}"}
        train = ["bash", "-e", "-c", RETRIEVAL]
        subprocess.run(train, cwd=clone, env=environment | programs, check=True)
        trained = time.perf_counter()
        measured = clone / "quickstart" / "retrieval" / "measured" / "results.json"
        (scores,) = json.loads(measured.read_text())["results"].values()
        run = clone / "quickstart" / "run"
        with open(run / "loss_curve.csv") as file:
            rows = list(csv.DictReader(file))
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(run / "loss_curve.png", RESULTS / "quickstart.png")

    evals = [r for r in rows if r["curve"] == "eval"]
    baseline = {r["curve"]: float(r["loss"]) for r in rows if r["curve"].startswith("unigram")}
    report = {
        "benchmark": "quickstart",
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "install_s": installed - start,
        "total_s": finished - start,
        "batches": int(evals[-1]["batch"]),
        "eval_loss": float(evals[-1]["loss"]),
        **baseline,
        "retrieval_s": trained - finished,
        "ndcg_at_10": {name: found["nDCG@10"] for name, found in scores.items()},
    }
    (RESULTS / "quickstart.json").write_text(json.dumps(report, indent=1) + "\n")
    write_tables()


if __name__ == "__main__":
    main()
