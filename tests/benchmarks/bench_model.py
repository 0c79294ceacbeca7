"""M2-BERT beside transformers' BERT: encoder forward and training step, alternating in one run.

    python tests/benchmarks/bench_model.py --device cpu --threads 1

Prints a table and writes tests/benchmarks/results/model_<device>.json. The encoder's forward pass
is timed without gradients; a training step is forward with the masked-language-model loss (15%
masked), backward and AdamW.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertForMaskedLM

from m2_plugin.models import M2BertConfig, M2BertForMaskedLM

RESULTS = Path(__file__).parent / "results"
VOCAB = 30528
# The model of yamls/pretrain/m2-bert-quickstart.yaml, and the published M2-BERT-base.
SCALES = {
    "quickstart": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2},
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
}
BATCH = {128: 4, 512: 2, 1024: 4, 2048: 1}  # 4 at 128 and 1024: as the reference was timed
FORWARD_ONLY = {1024}  # there for that comparison
PROVIDERS = ("m2_bert", "bert_sdpa")


def build(provider: str, scale: str, length: int, device: str) -> torch.nn.Module:
    sizes = SCALES[scale] | {"vocab_size": VOCAB, "max_position_embeddings": length}
    if provider == "m2_bert":
        order = {"quickstart": 64, "base": 128}[scale]
        config = M2BertConfig(**sizes, long_conv_l_max=length, hyena_filter_order=order)
        model = M2BertForMaskedLM(config)
    else:
        heads = sizes["hidden_size"] // 64
        config = BertConfig(**sizes, num_attention_heads=heads, attn_implementation="sdpa")
        model = BertForMaskedLM(config)
    return model.to(device)


def setup(provider: str, scale: str, length: int, device: str) -> dict[str, Callable[[], None]]:
    """Returns what is timed: ``forward`` and ``step`` of one model on one batch."""
    torch.manual_seed(0)
    model = build(provider, scale, length, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(1000, 30000, (BATCH[length], length), device=device)
    chosen = torch.rand(ids.shape, device=device) < 0.15
    labels = torch.where(chosen, ids, -100)
    encoder = model.model if provider == "m2_bert" else model.bert
    # Each as it is trained: only M2-BERT's head can leave out what has no loss.
    flags = {"masked_logits_only": True} if provider == "m2_bert" else {}

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            encoder(ids)

    def step() -> None:
        model.train()
        loss = model(ids, labels=labels, **flags).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "step": step}


def seconds(fn: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(scale: str, length: int, what: str, device: str, repeats: int) -> dict:
    runs = {p: setup(p, scale, length, device)[what] for p in PROVIDERS}
    times: dict[str, list[float]] = {p: [] for p in PROVIDERS}
    for fn in runs.values():
        fn()  # warm-up
    for _ in range(repeats):
        for provider, fn in runs.items():
            times[provider].append(seconds(fn, device))
    row: dict = {"scale": scale, "what": what, "length": length, "batch": BATCH[length]}
    row["repeats"] = repeats
    for provider, values in times.items():
        row[provider] = {
            "median_s": statistics.median(values),
            "min_s": min(values),
            "max_s": max(values),
        }
    ratios = [b / m for m, b in zip(times["m2_bert"], times["bert_sdpa"], strict=True)]
    row["speedup"] = statistics.median(ratios)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scales", nargs="+", default=list(SCALES), choices=list(SCALES))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(BATCH))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    print(f"{'scale':<12}{'what':<9}{'L':>6}{'B':>4}{'M2-BERT s':>11}{'BERT s':>9}{'ratio':>8}")
    for scale in args.scales:
        for length in args.lengths:
            for what in ("forward",) if length in FORWARD_ONLY else ("forward", "step"):
                row = measure(scale, length, what, args.device, args.repeats)
                rows.append(row)
                ours, theirs = (row[p]["median_s"] for p in PROVIDERS)
                print(
                    f"{scale:<12}{what:<9}{length:>6}{BATCH[length]:>4}{ours:>11.3f}"
                    f"{theirs:>9.3f}{row['speedup']:>7.2f}x",
                    flush=True,
                )
    name = torch.cuda.get_device_name() if args.device == "cuda" else _cpu_name()
    report = {
        "benchmark": "model",
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": args.threads,
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"model_{args.device}.json"
    if path.exists():  # a part of the scales replaces its own rows only
        old = json.loads(path.read_text())
        same = all(old[k] == report[k] for k in ("device", "threads", "torch", "transformers"))
        kept = [r for r in old["rows"] if r["scale"] not in args.scales] if same else []
        report["rows"] = rows + kept
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
