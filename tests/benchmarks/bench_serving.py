"""Forward passes for serving on a CPU: fp32, bf16, int8 dynamic, and ONNX Runtime.

    python tests/benchmarks/bench_serving.py

Masked-language models with random weights, logits of all positions, one thread. The four take turns
within a row; each is warmed up by one pass. int8 quantises every nn.Linear dynamically; the
block-diagonal maps stay fp32. Writes tests/benchmarks/results/serving_cpu.json after every row.
"""

import argparse
import datetime
import json
import statistics
import tempfile
from pathlib import Path

import onnxruntime
import torch
from bench_model import SCALES, VOCAB, _cpu_name, seconds
from report import RESULTS

from m2_plugin.checkpoints.onnx import INPUTS, export_onnx
from m2_plugin.models import M2BertConfig, M2BertForMaskedLM

LENGTH = 512


def contenders(scale: str, folder: Path) -> tuple[dict, dict]:
    """What is timed, by name; and the size of each model's weights in MB."""
    sizes = SCALES[scale]["m2_bert"] | {"vocab_size": VOCAB, "mask_padding": True}
    lengths = {"long_conv_l_max": LENGTH, "max_position_embeddings": LENGTH}
    torch.manual_seed(0)
    model = M2BertForMaskedLM(M2BertConfig(**sizes, **lengths)).eval()
    model.save_pretrained(folder / scale)
    path = folder / f"{scale}.onnx"
    export_onnx(folder / scale, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    bf16 = M2BertForMaskedLM.from_pretrained(folder / scale).bfloat16().eval()
    int8 = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)

    def autocast(**inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)

    def runtime(**inputs):
        return session.run(None, {key: inputs[key].numpy() for key in INPUTS})

    run = {"fp32": model, "bf16_autocast": autocast, "bf16": bf16, "int8": int8, "onnx": runtime}
    return run, {"onnx_mb": round(path.stat().st_size / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scales", nargs="+", default=["quickstart", "base"])
    parser.add_argument("--row-seconds", type=float, default=12, help="stop repeating then")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict] = []
    report = {
        "date": datetime.date.today().isoformat(),
        "device": _cpu_name(),
        "threads": 1,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "rows": rows,
    }
    for scale in args.scales:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            runs, sizes = contenders(scale, Path(folder))
            for length in (128, 512):
                for batch in (1, 8):
                    ids = torch.randint(1000, 30000, (batch, length))
                    inputs = {
                        "input_ids": ids,
                        "attention_mask": torch.ones_like(ids),
                        "token_type_ids": torch.zeros_like(ids),
                    }
                    for run in runs.values():
                        run(**inputs)
                    times: dict[str, list[float]] = {name: [] for name in runs}
                    while len(times["fp32"]) < 3 or (
                        len(times["fp32"]) < 25 and sum(map(sum, times.values())) < args.row_seconds
                    ):
                        for name, run in runs.items():
                            times[name].append(seconds(lambda r=run, i=inputs: r(**i), "cpu"))
                    row = {"scale": scale, "length": length, "batch": batch} | sizes
                    row["repeats"] = len(times["fp32"])
                    for name, values in times.items():
                        ms = [round(1e3 * t, 2) for t in values]
                        row[name] = {
                            "median_ms": round(statistics.median(ms), 2),
                            "min_ms": min(ms),
                            "max_ms": max(ms),
                        }
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    (RESULTS / "serving_cpu.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
