"""M2-BERT beside transformers' BERT and ModernBERT: encoder forward and training step.

    python tests/benchmarks/bench_model.py --device cpu --threads 1
    python tests/benchmarks/bench_model.py --device cuda

Prints a table and writes tests/benchmarks/results/model_<device>.json (with another number of
tokens than the usual, model_<device>_<tokens>.json) after every row, so that a run which is cut
short leaves what it has. The encoder's forward pass is timed without gradients; a
training step is forward with the masked-language-model loss (15% masked), backward and AdamW (in
one launch or a few on a GPU, `fused=True`).

Models take turns within a row, each with the dropout that is its default. On a GPU the weights are
fp32 under bf16 autocast, as Composer's `amp_bf16` has it, for all alike; a batch has the same
number of tokens at every length, so that what does not mix positions costs the same and a curve
shows the mixing; times are CUDA events round enough calls to fill the queue. All have one
vocabulary. `m2_bert` decodes the masked positions only, as it is trained; the others, and
`m2_bert_all_logits`, every position, as transformers does.
"""

import argparse
import contextlib
import datetime
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from report import RESULTS, draw_model
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from m2_plugin.models import M2BertConfig, M2BertForMaskedLM
from m2_plugin.ops.backend import failures

VOCAB = 30528
# Each family's published sizes: BERT-base and -large, M2-BERT's 80M and 341M, ModernBERT's; and
# the model of yamls/pretrain/m2-bert-quickstart.yaml with the same sizes for all.
SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
SCALES: dict[str, dict[str, dict[str, int]]] = {
    "quickstart": {
        "m2_bert": SMALL | {"hyena_filter_order": 64},
        "bert": SMALL | {"num_attention_heads": 2},
        "modernbert": SMALL | {"num_attention_heads": 2},
    },
    "base": {"m2_bert": BASE, "bert": BASE, "modernbert": {}},
    "large": {
        "m2_bert": {"hidden_size": 1792, "intermediate_size": 7168, "num_hidden_layers": 12},
        "bert": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        "modernbert": {
            "hidden_size": 1024,
            "intermediate_size": 2624,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
        },
    },
}
BATCH = {128: 4, 512: 2, 1024: 4, 2048: 1}  # on a CPU; 4 at 128 and 1024: as the reference
FORWARD_ONLY = {1024}  # on a CPU: there for that comparison
# The lengths that the targets name come first, in case time runs out.
CUDA_LENGTHS = (128, 512, 2048, 8192, 32768, 1024, 4096, 16384)
PROVIDERS = {
    "cpu": ("m2_bert", "bert_sdpa"),
    "cuda": (
        "m2_bert",
        "bert_sdpa",
        "modernbert_sdpa",
        "bert_eager",
        "m2_bert_torch",
        "m2_bert_all_logits",
    ),
}
# The plain PyTorch path is there to show what the kernels gain; all logits, what the head costs.
ONLY = {"m2_bert_torch": "forward", "m2_bert_all_logits": "step"}
# Arguments of a model as it is trained: only M2-BERT's head can leave out what has no loss.
TRAINED = dict.fromkeys(("m2_bert", "m2_bert_torch"), {"loss_only": True})
TOKENS = 1 << 15  # in a batch on a GPU
EVENT_S = 0.2  # what is between two events on a GPU takes at least so long


def build(provider: str, scale: str, length: int, device: str) -> torch.nn.Module:
    family = next(f for f in ("m2_bert", "modernbert", "bert") if provider.startswith(f))
    sizes = SCALES[scale][family] | {"vocab_size": VOCAB, "max_position_embeddings": length}
    with torch.device(device):
        if family == "m2_bert":
            backend = "torch" if provider == "m2_bert_torch" else "auto"
            config = M2BertConfig(**sizes, long_conv_l_max=length, backend=backend)
            return M2BertForMaskedLM(config)
        attention = provider.removeprefix(family + "_")
        if family == "bert":
            return BertForMaskedLM(BertConfig(**sizes, attn_implementation=attention))
        ids = dict.fromkeys(("pad", "bos", "eos", "cls", "sep"), 0)  # its own are of its vocabulary
        config = ModernBertConfig(
            **sizes,
            **{f"{name}_token_id": value for name, value in ids.items()},
            attn_implementation=attention,
            reference_compile=False,  # compiled where all are
        )
        return ModernBertForMaskedLM(config)


def setup(
    provider: str, scale: str, length: int, batch: int, what: str, device: str, compiled: str | None
) -> Callable[[], None]:
    """Returns what is timed: a `forward` pass or a training `step` of one model on one batch."""
    torch.manual_seed(0)
    model = build(provider, scale, length, device).train(what == "step")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    ids = torch.randint(1000, 30000, (batch, length), device=device)
    chosen = torch.rand(ids.shape, device=device) < 0.15
    labels = torch.where(chosen, ids, -100)
    encoder: Any = model.base_model
    trained: Any = model
    if compiled:
        encoder, trained = (torch.compile(m, mode=compiled) for m in (encoder, model))
    flags = TRAINED.get(provider, {})
    on_gpu = device == "cuda"

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast(device, torch.bfloat16) if on_gpu else contextlib.nullcontext()

    def forward() -> None:
        with torch.no_grad(), autocast():
            encoder(ids)

    def step() -> None:
        with autocast():
            loss = trained(ids, labels=labels, **flags).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward if what == "forward" else step


def seconds(fn: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Seconds that a call takes, from `calls` in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - begin) / calls


def memory(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def warm(
    make: Callable[[], Callable[[], None]], device: str
) -> tuple[Callable[[], None] | None, dict[str, Any]]:
    """Builds one contender and runs it until all is compiled, tuned and allocated.

    Returns:
        What to time, or None if it cannot run; and its peak memory, or its error.
    """
    others = memory(device)
    try:
        fn = make()
        fn()
        if device != "cuda":
            return fn, {}
        fn()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return fn, {"peak_bytes": torch.cuda.max_memory_allocated() - others}
    except torch.OutOfMemoryError:
        return None, {"error": "out of memory"}
    except Exception as problem:  # the others go on
        return None, {"error": f"{type(problem).__name__}: {problem}".splitlines()[0]}


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(
    scale: str, length: int, batch: int, what: str, providers: list[str], args: argparse.Namespace
) -> dict[str, Any]:
    device = args.device
    row: dict[str, Any] = {"scale": scale, "what": what, "length": length, "batch": batch}
    runs: dict[str, Callable[[], None]] = {}
    for provider in providers:

        def make(provider: str = provider) -> Callable[[], None]:
            return setup(provider, scale, length, batch, what, device, args.compile)

        fn, row[provider] = warm(make, device)
        if fn is None:
            free(device)
        else:
            runs[provider] = fn
    calls = dict.fromkeys(runs, 1)
    if device == "cuda":
        calls = {p: max(1, round(EVENT_S / seconds(fn, device))) for p, fn in runs.items()}
    times: dict[str, list[float]] = {p: [] for p in runs}
    deadline = time.monotonic() + args.row_seconds
    for done in range(args.repeats):
        if done and time.monotonic() > deadline:
            break
        for provider, fn in list(runs.items()):
            try:
                times[provider].append(seconds(fn, device, calls[provider]))
            except torch.OutOfMemoryError:  # beside the others' weights
                row[provider] = {"error": "out of memory"}
                del runs[provider]
    row["repeats"] = max((len(values) for values in times.values()), default=0)
    for provider in runs:
        values = times[provider]
        row[provider] |= {
            "median_s": statistics.median(values),
            "min_s": min(values),
            "max_s": max(values),
            "tokens_per_ms": 1e-3 * batch * length / statistics.median(values),
        }
    if {"m2_bert", "bert_sdpa"} <= runs.keys():
        pairs = zip(times["m2_bert"], times["bert_sdpa"], strict=True)
        row["speedup"] = statistics.median(theirs / ours for ours, theirs in pairs)
    return row


def show(row: dict[str, Any], providers: list[str]) -> None:
    for provider in providers:
        found = row[provider]
        text = found.get("error", "")
        if not text:
            spread = f"({found['min_s']:.4f}-{found['max_s']:.4f})"
            text = f"{found['median_s']:>9.4f} s {spread:<18}{found['tokens_per_ms']:>10.2f}/ms"
            if "peak_bytes" in found:
                text += f"{found['peak_bytes'] / 2**30:>9.2f} GiB"
        name = f"{row['scale']:<12}{row['what']:<9}{row['length']:>6}{row['batch']:>5}"
        print(f"{name}  {provider:<20}{text}", flush=True)
    if "speedup" in row:
        print(f"{'':34}m2_bert is {row['speedup']:.2f}x bert_sdpa", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="at most (3 on a CPU, 10 on a GPU)")
    parser.add_argument("--scales", nargs="+", choices=list(SCALES))
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="in a batch on a GPU")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS["cuda"])
    modes = ["default", "reduce-overhead"]  # the second replays CUDA graphs: no host is needed
    parser.add_argument("--compile", choices=modes, help="torch.compile all models in this mode")
    parser.add_argument("--row-seconds", type=float, default=1e9, help="stop repeating then")
    parser.add_argument("--limit", type=float, default=1e9, help="start no row after so many s")
    parser.add_argument("--plot", action="store_true", help="draw the curves (always on a GPU)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    cpu = args.device == "cpu"
    torch.set_num_threads(args.threads)
    args.repeats = args.repeats or (3 if cpu else 10)
    scales = args.scales or (["quickstart", "base"] if cpu else ["base"])
    lengths = args.lengths or (list(BATCH) if cpu else CUDA_LENGTHS)
    wanted = args.providers or PROVIDERS[args.device]
    deadline = time.monotonic() + args.limit

    report: dict[str, Any] = {
        "benchmark": "model",
        "date": datetime.date.today().isoformat(),
        "device": _cpu_name() if cpu else torch.cuda.get_device_name(),
        "threads": args.threads,
        "dtype": "float32" if cpu else "bfloat16 autocast",
        "compiled": args.compile,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    suffix = f"_{args.compile}" if args.compile else ""
    if not cpu:
        report["tokens"] = args.tokens
        suffix += f"_{args.tokens}" if args.tokens != TOKENS else ""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"model_{args.device}{suffix}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    same = all(old.get(k) == report[k] for k in ("device", "threads", "torch", "transformers"))
    rows: list[dict[str, Any]] = old["rows"] if old and same else []

    def key(row: dict[str, Any]) -> tuple:
        return row["scale"], row["length"], row["what"]

    jobs = [
        (scale, length, what)
        for scale in scales
        for length in lengths
        for what in (("forward",) if cpu and length in FORWARD_ONLY else ("forward", "step"))
    ]
    for scale, length, what in jobs:
        if time.monotonic() > deadline:
            print(f"{scale} {what} {length}: left out, no time")
            continue
        batch = BATCH[length] if cpu and length in BATCH else max(1, args.tokens // length)
        providers = [p for p in wanted if ONLY.get(p, what) == what]
        row = measure(scale, length, batch, what, providers, args)
        free(args.device)
        show(row, providers)
        rows = [r for r in rows if key(r) != key(row)] + [row]  # what was not run again stays
        rows.sort(key=lambda r: (list(SCALES).index(r["scale"]), r["length"], r["what"]))
        report |= {"fallbacks": failures(), "rows": rows}
        whole = path.with_suffix(".tmp")
        whole.write_text(json.dumps(report, indent=1) + "\n")
        whole.replace(path)
    print(f"written to {path}")
    if args.plot or not cpu:
        draw_model(path)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
