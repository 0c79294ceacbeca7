"""Time and memory of `m2-plugin import`, for the layouts of all published checkpoints.

    python tests/benchmarks/bench_import.py --out FOLDER

Each checkpoint has random weights under the reference's names. Memory is the peak of the whole
process, interpreter and libraries included, as the kernel counts it; pages of the mapped file too.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from m2_plugin.checkpoints.names import to_reference
from m2_plugin.models import M2BertConfig, M2BertForMaskedLM, M2BertForTextEmbedding

RESULT = Path(__file__).parent / "results" / "import_cost.json"
SIZES = {"80M": (768, 3072), "110M": (960, 3840), "260M": (1536, 6144), "341M": (1792, 7168)}
LENGTHS = {"2k": 2048, "8k": 8192, "32k": 32768}


def layouts():
    """Name, model class and configuration of each published layout."""
    for name, (hidden, intermediate) in SIZES.items():
        yield name, M2BertForMaskedLM, {"hidden_size": hidden, "intermediate_size": intermediate}
    for name, length in LENGTHS.items():
        fields = {"long_conv_l_max": length, "max_position_embeddings": length}
        yield f"80M-{name}", M2BertForMaskedLM, fields
        yield f"80M-{name}-retrieval", M2BertForTextEmbedding, fields


def write(path: Path, model_class, fields: dict) -> None:
    weights = to_reference(model_class(M2BertConfig(**fields)).state_dict())
    torch.save({"state": {"model": {f"model.{k}": v for k, v in weights.items()}}}, path)


def measured(command: list) -> tuple[float, float]:
    """Peak memory in MB, and seconds."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss * 1024 / 1e6, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    libraries, _ = measured([sys.executable, "-c", "import m2_plugin.checkpoints.convert"])
    rows: list[dict] = []
    report = {"date": datetime.date.today().isoformat(), "libraries_mb": libraries, "rows": rows}
    for name, model_class, fields in layouts():
        source, folder = out / f"{name}.pt", out / name
        if os.fork() == 0:  # so that this process's own peak stays small
            write(source, model_class, fields)
            os._exit(0)
        assert os.wait()[1] == 0
        command = [sys.executable, "-m", "m2_plugin.cli", "import", source, "--out", folder]
        peak, seconds = measured(command)
        size = source.stat().st_size / 1e6
        row = {"layout": name, "file_mb": size, "peak_mb": peak, "seconds": seconds}
        rows.append({k: v if isinstance(v, str) else round(v, 2) for k, v in row.items()})
        print(json.dumps(rows[-1]), flush=True)
        source.unlink()
        shutil.rmtree(folder)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
