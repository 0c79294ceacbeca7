"""Times `make quickstart` on a fresh clone, installation included, and keeps its loss curve.

    python tests/benchmarks/bench_quickstart.py

Writes tests/benchmarks/results/quickstart.json and quickstart.png.
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

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


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
    }
    (RESULTS / "quickstart.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
