"""Write the tables of measurements into the READMEs, from tests/benchmarks/results/*.json.

    python tests/benchmarks/report.py

Each table stands between two comments, `<!-- NAME -->` and `<!-- /NAME -->`. A table whose file of
results is missing is not printed: a sentence says which command measures it.
"""

import json
import logging
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import floors
import scaling as arithmetic

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"

NONE = "–"
MASKED_ONLY = "BERT, masked only"
WHAT = {"forward": "encoder forward", "step": "training step"}
NO_GPU = "Not measured yet: run `make gpu-bench` on a machine with a GPU."


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]], text_columns: int = 2) -> str:
    """Write a table in Markdown; columns after the first `text_columns` are aligned right."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


# Of `bench_model.py`: with its usual number of tokens, and with that of the recipes.
MODEL_CUDA = "model_cuda", "model_cuda_65536"


def spread(timing: dict[str, Any], unit: str, form: str) -> str:
    """Write a median and its range, e.g. `0.015 (0.011–0.016)`."""
    values = [timing[f"{key}_{unit}"] for key in ("median", "min", "max")]
    return "{} ({}–{})".format(*(form.format(value) for value in values))


def measured() -> str:
    """Write the README's three rows."""
    report, tokens = load("model_cpu"), load("conversion")["times"]["tokens"]
    steps = {r["length"]: r for r in report["rows"] if (r["scale"], r["what"]) == ("base", "step")}
    rows = []
    for length in (128, 2048):
        row = steps[length]
        ours, theirs = row["m2_bert"]["median_s"], row["bert_sdpa"]["median_s"]
        what = f"Training step, base size, {row['batch']} × {length:,} tokens, 1 CPU thread"
        rows.append([what, f"{ours:.1f} s", f"BERT-base {theirs:.1f} s", f"{row['speedup']:.1f}×"])
    passes: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    for name in MODEL_CUDA:  # the rows of the recipes' microbatch take the place of the others
        if (RESULTS / f"{name}.json").exists():
            report = load(name)
            base = [r for r in report["rows"] if r["scale"] == "base"]
            passes |= {(r["what"], r["length"]): (report["device"], r) for r in base}
    for kind, length in (("step", 128), ("step", 2048), ("forward", 8192)):
        device, row = passes.get((kind, length), ("", {}))
        if "speedup" in row:
            ours, theirs = (1e3 * row[n]["median_s"] for n in ("m2_bert", "bert_sdpa"))
            what = f"{WHAT[kind].capitalize()}, base size, {row['batch']} × {length:,} tokens"
            what += f", bf16, {device.removeprefix('NVIDIA ')}"
            other = f"BERT-base {theirs:.0f} ms"
            rows.append([what, f"{ours:.0f} ms", other, f"{row['speedup']:.1f}×"])
    ours, theirs = (tokens[name]["convert_s"] for name in ("ours, 2 workers", "llm-foundry"))
    what = "Convert 59 MB of text to tokens in MDS, 2 cores"
    other = f"llm-foundry's converter {theirs:.1f} s"
    rows.append([what, f"{ours:.1f} s", other, f"{theirs / ours:.1f}×"])
    note = ""
    if all((RESULTS / f"{name}.json").exists() for name in (*MODEL_CUDA, "profile_cuda")):
        profile, usual = load("profile_cuda"), load(MODEL_CUDA[0])["rows"]
        slow = next(r for r in usual if (r["what"], r["length"]) == ("step", 128))
        kernels = {(r["provider"], r["what"], r["length"]): r["ms"] for r in profile["rows"]}
        ratios = [
            theirs / kernels["m2_bert", what, length]
            for (provider, what, length), theirs in kernels.items()
            if provider == "bert_sdpa"
        ]
        note = (
            f"\n\nOn the GPU the steps are those of the recipes' microbatch. A smaller one makes "
            f"the GPU wait for its host: with {profile['tokens']:,} tokens M2-BERT's step at 128 "
            f"tokens takes {1e3 * slow['m2_bert']['median_s']:.0f} ms, its kernels only "
            f"{kernels['m2_bert', 'step', 128]:.0f}, and it is {slow['speedup']:.1f}× as fast as "
            f"BERT's. BERT's kernels alone take {min(ratios):.1f} to {max(ratios):.1f} times as "
            f"long as M2-BERT's."
        )
    return table(["what", "m2_plugin", "compared with", "faster by"], rows, 3) + note


def quickstart_line() -> str:
    report = load("quickstart")
    return (
        f"On {report['cores']} CPU cores this takes {report['total_s'] / 60:.1f} minutes. The loss "
        f"on held-out text falls to **{report['eval_loss']:.2f}** nats per masked token; a model "
        f"that knows only how often each word occurs reaches "
        f"{report['unigram_cross_entropy']:.2f}."
    )


def gpu_tests() -> str:
    """Write how the kernels' tests ended on a GPU."""
    if not (RESULTS / "tests_cuda.json").exists():
        return "- No GPU has run the kernels' own tests yet."
    report = load("tests_cuda")
    wrong = len(report["failed"]) + len(report["errors"])
    ended = wrong + report["passed"] + report["skipped"]
    text = (
        f"- {report['device']}, torch {report['torch']}, Triton {report['triton']}, "
        f"{report['date']}: of {report['collected']} tests of ops and layers, {report['passed']} "
        f"passed and {wrong} failed"
    )
    if ended < report["collected"]:
        text += f"; {report['collected'] - ended} had not ended when the time was over"
    return f"{text}. {report.get('note', '')}".rstrip()


def retrieval_line() -> str:
    report = load("quickstart")
    scores = report["ndcg_at_10"]
    return (
        f"On {report['cores']} CPU cores the training takes {report['retrieval_s'] / 60:.0f} "
        f"minutes, these measurements included. On held-out pages of the web the model then has "
        f"an nDCG@10 of {scores['model']:.2f}, BM25 {scores['BM25']:.2f} ([more of "
        f"it](tests/benchmarks/README.md#retrieval-at-the-quickstarts-size))."
    )


def quickstart() -> str:
    report = load("quickstart")
    return (
        f"`make quickstart` on {report['cores']} CPU cores, {report['date']} "
        f"(`bench_quickstart.py`): {report['total_s'] / 60:.1f} minutes, {report['install_s']:.0f} "
        f"s of them for the installation. After {report['batches']} batches the evaluation loss is "
        f"**{report['eval_loss']:.2f}** nats per masked token. A model that knows only word "
        f"frequencies reaches {report['unigram_cross_entropy']:.2f}; the unigram entropy of the "
        f"corpus is {report['unigram_entropy']:.2f}.\n\n"
        f"![Loss curve of the quickstart](results/quickstart.png)"
    )


def model_cpu() -> str:
    report = load("model_cpu")
    rows = []
    counts = {row["scale"]: row["repeats"] for row in report["rows"]}
    repeats = ", ".join(f"{count} at {scale} size" for scale, count in counts.items())
    for row in report["rows"]:
        rows.append(
            [
                row["scale"],
                WHAT[row["what"]],
                str(row["length"]),
                str(row["batch"]),
                *(spread(row[name], "s", "{:.3f}") for name in ("m2_bert", "bert_sdpa")),
                f"**{row['speedup']:.2f}×**",
            ]
        )
    intro = (
        f"M2-BERT and transformers' BERT with SDPA, alternating in one run. Seconds, median "
        f"(range); repeats: {repeats}; {report['threads']} thread of {report['device']}, fp32, "
        f"torch {report['torch']}, transformers {report['transformers']}, {report['date']} "
        f"(`bench_model.py`). A training step is the forward pass with 15% of the tokens masked, "
        f"the backward pass and AdamW. M2-BERT decodes only the masked positions.\n\n"
    )
    header = ["size", "what", "L", "batch", "M2-BERT", "BERT", "BERT / M2-BERT"]
    return intro + table(header, rows)


LENGTHS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MODELS = {
    "m2_bert": "M2-BERT",
    "m2_bert_torch": "M2-BERT, plain PyTorch",
    "m2_bert_all_logits": "M2-BERT, all logits",
    "bert_sdpa": "BERT, SDPA",
    "bert_eager": "BERT, eager",
    "modernbert_sdpa": "ModernBERT, SDPA",
}


def times_faster(row: dict[str, Any], other: str) -> str:
    """Write M2-BERT's tokens per second divided by those of another model."""
    ours, theirs = row.get("m2_bert", {}), row.get(other, {})
    if "median_s" in ours and "median_s" in theirs:
        return f"{theirs['median_s'] / ours['median_s']:.2f}×"
    return theirs.get("error", NONE) if "median_s" in ours else NONE


def model_cuda() -> str:
    if not (RESULTS / "model_cuda.json").exists():
        return NO_GPU
    report, *others = [load(name) for name in MODEL_CUDA if (RESULTS / f"{name}.json").exists()]
    text = (
        f"M2-BERT-base on a GPU: tokens per millisecond, and how many times the rate of "
        f"transformers' BERT-base with SDPA and of ModernBERT-base with SDPA "
        f"(`bench_model.py --device cuda`). The last columns are the peak memory of a training "
        f"step in GiB. bf16 autocast, {report['tokens']:,} tokens in a batch at every length, "
        f"medians of calls in a row, the models by turns; {report['device']}, "
        f"torch {report['torch']}, transformers {report['transformers']}, {report['date']}. "
        f"{report.get('note', '')}\n\n{_speeds(report)}"
    )
    for other in others:
        text += (
            f"\n\nWith {other['tokens']:,} tokens in a batch, the microbatch of the base recipes, "
            f"the GPU waits less for its host ({other['device']}, torch {other['torch']}, "
            f"{other['date']}):\n\n{_speeds(other)}"
        )
    if (RESULTS / "model_cuda_reduce-overhead.json").exists():
        compiled = load("model_cuda_reduce-overhead")
        for row in compiled["rows"]:
            ours, theirs = (1e3 * row[name]["median_s"] for name in ("m2_bert", "bert_sdpa"))
            text += (
                f"\n\nBoth compiled by `torch.compile(mode='reduce-overhead')`, whose CUDA graphs "
                f"need no host, M2-BERT needs {ours:.1f} ms for the {WHAT[row['what']]} at "
                f"{row['length']} tokens, and BERT {theirs:.1f} ms ({compiled['tokens']:,} tokens, "
                f"{compiled['device']}, {compiled['date']})."
            )
    if (RESULTS / "model_cuda.png").exists():
        text += "\n\n![Throughput by length](results/model_cuda.png)"
    return text


def _speeds(report: dict[str, Any]) -> str:
    """Write a row for each length that was measured."""
    found = {(r["what"], r["length"]): r for r in report["rows"] if r["scale"] == "base"}
    others = {"bert_sdpa": "× BERT", "bert_eager": "× eager", "modernbert_sdpa": "× ModernBERT"}
    others = {o: text for o, text in others.items() if any(o in row for row in found.values())}
    rows = []
    for length in sorted({length for _, length in found}):
        line = [f"{length:,}"]
        for what in ("forward", "step"):
            row = found.get((what, length), {})
            rate = row.get("m2_bert", {}).get("tokens_per_ms")
            line.append(NONE if rate is None else f"{rate:,.0f}")
            line += [times_faster(row, other) for other in others]
        for provider in ("m2_bert", "bert_sdpa"):
            peak = found.get(("step", length), {}).get(provider, {}).get("peak_bytes")
            line.append(NONE if peak is None else f"{peak / 2**30:.1f}")
        rows.append(line)
    names = list(others.values())
    return table(["L", "forward", *names, "training step", *names, "memory", "BERT's"], rows)


def profile_cuda() -> str:
    """Write the sums over kernels of both models, and M2-BERT's by kind of kernel."""
    if not (RESULTS / "profile_cuda.json").exists():
        return NO_GPU
    report = load("profile_cuda")
    found = {(r["provider"], r["what"], r["length"]): r for r in report["rows"]}
    sums, kinds = [], []
    for what in ("forward", "step"):
        for length in sorted({r["length"] for r in report["rows"]}):
            ours, theirs = (found.get((p, what, length)) for p in ("m2_bert", "bert_sdpa"))
            if ours is None:
                continue
            line = [WHAT[what], str(length), f"{ours['ms']:.1f}"]
            if theirs is None:
                line += [NONE, NONE]
            else:
                line += [f"{theirs['ms']:.1f}", f"**{theirs['ms'] / ours['ms']:.2f}×**"]
            sums.append(line)
            parts = dict.fromkeys(KINDS, 0.0)
            for kernel in ours["kernels"]:
                parts[kind_of(kernel["name"])] += kernel["ms"]
            rest = ours["ms"] - sum(parts.values())  # shorter than those that are listed
            parts["other"] += rest
            kinds.append([WHAT[what], str(length), *(f"{ms:.1f}" for ms in parts.values())])
    intro = (
        f"The milliseconds of all kernels of one pass, base size, {report['tokens']:,} tokens, "
        f"bf16 autocast, {report['device']}, torch {report['torch']}, {report['date']} "
        f"(`bench_profile.py`). That is the time of a pass if the host is ahead of the GPU. "
        f"{report.get('note', '')}\n\n"
    )
    header = ["what", "L", "M2-BERT", "BERT", "BERT / M2-BERT"]
    by_kind = table(["M2-BERT's, ms", "L", *KINDS], kinds)
    return intro + table(header, sums) + "\n\n" + by_kind


def counters_cuda() -> str:
    """Write what ncu measured of our kernels in a training step of one layer."""
    if not (RESULTS / "counters_cuda.json").exists():
        return NO_GPU
    report = load("counters_cuda")
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault((row["length"], row["kernel"]), []).append(row)
    rows = []
    for (length, name), launches in groups.items():
        longest = max(launches, key=lambda launch: launch["ms"])
        line = [f"`{name}`", str(length), str(len(launches)), f"{longest['ms']:.3f}"]
        for unit in ("l1", "l2", "dram"):
            line.append(f"{longest[unit]:.0f}%" if unit in longest else NONE)
        line.append(f"{longest['warps']:.0f}%" if "warps" in longest else NONE)
        waits = longest.get("waits", {})
        line.append(", ".join(f"{k.replace('_', ' ')} {v:.1f}" for k, v in waits.items()) or NONE)
        rows.append(line)
    intro = (
        f"What limits our kernels: hardware counters of a training step of one layer of base size, "
        f"{report['tokens']:,} tokens, {report['device']}, torch {report['torch']}, "
        f"{report['date']} (`bench_counters.py`); of several launches of a kernel, the longest. "
        f"{report.get('note', '')} "
        f"The shares are those of the highest rates of the caches and of the memory, and of the "
        f"warps that a multiprocessor can hold. The "
        f"last column is what a warp waits for, in cycles for each instruction. ncu measures with "
        f"cold caches, one launch at a time; so its times are longer than those above.\n\n"
    )
    header = ["kernel", "L", "launches", "ms", "L1", "L2", "memory"]
    return intro + table([*header, "warps held", "waits"], rows, 1)


def host() -> str:
    """Write what the host takes for a pass, beside what a GPU takes."""
    report = load("host")
    profile = load("profile_cuda") if (RESULTS / "profile_cuda.json").exists() else {"rows": []}
    gpu = {(r["what"], r["length"], r["provider"]): r["ms"] for r in profile["rows"]}
    rows = []
    for row in report["rows"]:
        line = [row["scale"], WHAT[row["what"]], str(row["length"])]
        for model in ("m2_bert", "bert_sdpa"):
            found = row[model]
            line.append(f"{found['median_ms']:.1f} ({found['min_ms']:.1f}–{found['max_ms']:.1f})")
            line.append(str(found["launches"]))
            ms = gpu.get((row["what"], row["length"], model)) if row["scale"] == "base" else None
            line.append(NONE if ms is None else f"{ms:.1f}")
        rows.append(line)
    intro = (
        f"What the host takes for a pass of {report['tokens']:,} tokens, and what the kernels of "
        f"such a pass took on a GPU (ms). The GPU waits where the host takes longer. Median "
        f"(range) of {report['repeats']} passes, the models taking turns; one thread of "
        f"{report['cpu']}, torch {report['torch']}, Triton {report['triton']}, {report['date']} "
        f"(`bench_host.py`): a GPU that is not there accepts all work and does none, so the time "
        f"within CUDA's libraries is left out."
    )
    if gpu:
        intro += f" The kernels: {profile['device']}, torch {profile['torch']}, {profile['date']}."
    header = ["size", "what", "L"]
    for name in ("M2-BERT", "BERT"):
        header += [f"{name}: host", "launches", "kernels"]
    return intro + "\n\n" + table(header, rows)


# Kinds of kernels, by what begins their names.
KINDS = {
    "MLP": ("mlp_", "activation_grad"),
    "convolutions": (
        *("toeplitz", "taps_copies", "taps_grad", "shared_lags", "monarch", "cyclic"),
        *("correlation", "unfold", "fold", "gates", "short_conv", "order_", "circle", "lags_"),
        *("void vector_fft", "void regular_fft"),
    ),
    "filters": ("taps_kernel", "refresh", "layer_grad", "filter_weight"),
    "LayerNorm": ("add_layer_norm",),
    "cuBLAS": ("nvjet", "sm90_xmma", "sm80_xmma", "cutlass"),
    "other": (),
}


def kind_of(name: str) -> str:
    """Return the kind of a kernel."""
    return next((kind for kind, begins in KINDS.items() if name.startswith(begins)), "other")


def step_model() -> str:
    if not (RESULTS / "step_model.json").exists():
        return "Not computed yet: run `python tests/benchmarks/step_model.py`."
    report = load("step_model")
    found = {(r["device"], r["what"], r["length"]): r for r in report["rows"]}
    devices = list(dict.fromkeys(r["device"] for r in report["rows"]))

    def measured(name: str) -> dict[str, Any]:
        there = (RESULTS / f"{name}.json").exists()
        found = load(name) if there else {"rows": [], "device": ""}
        return found if device in found["device"] else {"rows": []}

    named = [load(n) for n in ("profile_cuda", "model_cuda") if (RESULTS / f"{n}.json").exists()]
    device = next((d for d in devices for r in named if d in r["device"]), devices[0])
    passes = {(r["what"], r["length"]): r for r in measured("model_cuda")["rows"]}
    sums = {(r["provider"], r["what"], r["length"]): r for r in measured("profile_cuda")["rows"]}

    def pair(predicted: float, taken: float | None, form: str = "{:.1f}") -> str:
        return f"{form.format(predicted)} / {NONE if taken is None else form.format(taken)}"

    lengths = sorted({r["length"] for r in report["rows"]})
    rows = []
    for what in WHAT:
        for length in lengths:
            if (row := found.get((device, what, length))) is None:
                continue
            models = {name: row[name] for name in ("m2_bert", "bert_sdpa")}
            line = [WHAT[what], str(length)]
            for model in models.values():
                line.append(f"{model['launches']:,}")
                line.append(f"{model['bytes_per_token'] / 1e3:,.0f}")
                line.append(f"{model['operations_per_token'] / 1e6:,.0f}")
            taken = {n: sums[n, what, length]["ms"] for n in models if (n, what, length) in sums}
            line += [pair(model["kernels_ms"], taken.get(name)) for name, model in models.items()]
            ours, theirs = (model["kernels_ms"] for model in models.values())
            both = taken["bert_sdpa"] / taken["m2_bert"] if len(taken) == 2 else None
            line.append(pair(theirs / ours, both, "{:.2f}×"))
            for name, model in models.items():
                timed = passes.get((what, length), {}).get(name, {}).get("median_s")
                line.append(pair(model["ms"], None if timed is None else 1e3 * timed))
            rows.append(line)
    text = (
        f"**Predicted, not measured** (`step_model.py`): a step of M2-BERT-base and of BERT-base "
        f"with SDPA on one {device}, bf16 autocast, {report['tokens']:,} tokens, from what is "
        f"launched and compiled; torch {report['torch']}, Triton {report['triton']}, "
        f"{report['date']}. Rates of PyTorch's ops, and three constants of kernels, were fitted to "
        f"measurements at five lengths on an H200, before the kernels had their present form; a "
        f"prediction may be wrong by 40%. Where a GPU would time several configurations, the "
        f"fastest by prediction runs. Launches, KB and MFLOP of a token are those of M2-BERT and "
        f"then of BERT. A pair is *predicted / measured*: the sum over kernels, and the whole "
        f"pass, of which the host's time is not predicted.\n\n"
    )
    header = ["what", "L", "launches", "KB", "MFLOP", "BERT's", "KB", "MFLOP"]
    header += ["predicted M2-BERT, kernels, ms", "BERT, kernels, ms", "BERT / M2-BERT"]
    header += ["M2-BERT, pass, ms", "BERT, pass, ms"]
    text += table(header, rows)
    asked = [
        f"{found[device, 'forward', n]['m2_bert']['requested_bytes'] / 1e9:.1f} at {n:,} positions"
        for n in (128, 512, 2048, 8192, 32768)
        if (device, "forward", n) in found
    ]
    text += "\n\nOur kernels in it: those of at least 1% of a step. *Asked for* are the bytes that "
    text += "threads ask the caches for in a launch, *conflicts* the share of accesses to shared "
    text += "memory that wait for other threads of their warp, *held* the programs × warps that a "
    text += "multiprocessor holds; the limit is the part that takes longest. In a forward pass all "
    text += f"threads ask for these GB: {', '.join(asked)}.\n\n"
    rows = []
    for what in WHAT:
        for length in (128, 2048, 8192):
            row = found.get((device, what, length), {}).get("m2_bert", {"rows": []})
            for kernel in row["rows"]:
                if "registers" in kernel:
                    line = [WHAT[what], str(length), f"`{kernel['name']}`"]
                    line += [str(kernel["launches"]), f"{kernel['ms'] / kernel['launches']:.3f}"]
                    line.append(f"{kernel['requested_bytes'] / kernel['launches'] / 1e6:,.0f}")
                    line.append(f"{kernel['bank_conflicts']:.0%}")
                    line += [str(kernel["registers"]), str(kernel["spilled_bytes"])]
                    line.append(f"{kernel['programs_per_processor']} × {kernel['warps']}")
                    line += [kernel["matrix_unit"] or NONE, kernel["limit"]]
                    rows.append(line)
    header = ["what", "L", "kernel", "launches", "predicted ms each", "asked for, MB", "conflicts"]
    header += ["registers", "spilled bytes", "held", "matrix unit", "predicted limit"]
    text += table(header, rows, 3)
    if others := [d for d in devices if d != device]:
        text += "\n\nPredicted BERT / M2-BERT on other GPUs, by their data sheets:\n\n"
        rows = [
            [name, WHAT[what]]
            + [
                f"{found[name, what, n]['speedup']:.2f}×" if (name, what, n) in found else NONE
                for n in lengths
            ]
            for name in others
            for what in WHAT
        ]
        text += table(["GPU", "predicted", *(f"{n:,}" for n in lengths)], rows)
    return text


def training_cuda() -> str:
    if not (RESULTS / "training_cuda.json").exists():
        return NO_GPU
    report = load("training_cuda")
    names = {"m2_bert": "M2-BERT-base", "bert": "BERT-base"}
    done = {n: m for n, m in report["models"].items() if "tokens_per_s" in m}
    rows = []
    for name, found in report["models"].items():
        if name not in done:
            rows.append([names[name], found["error"].splitlines()[0], *[NONE] * 4])
            continue
        mfu, peak = found["mfu"], found.get("peak_bytes")
        rows.append(
            [
                names[name],
                f"{found['parameters'] / 1e6:.0f} M",
                f"{found['batches']} in {found['seconds']:.0f} s",
                f"{found['tokens_per_s'] / 1e3:,.0f}",
                NONE if mfu is None else f"{mfu:.1%}",
                NONE if peak is None else f"{peak / 2**30:.1f}",
            ]
        )
    text = (
        f"The recipes `m2-bert-base.yaml` and `bert-base.yaml` through llm-foundry's "
        f"`train_from_yaml` on one {report['device']}: {report['batch']:,} sequences a step in "
        f"microbatches of {report['microbatch']}, `{report['precision']}`, "
        f"`{report['optimizer']}`, data from MDS; the first masks 30% of the tokens, the second "
        f"15%; torch {report['torch']}, transformers {report['transformers']}, {report['date']} "
        f"(`bench_training.py`). The share is that of "
        f"the device's dense bf16 rate which the model's operations take (MFU).\n\n"
    )
    header = ["model", "parameters", "batches", "thousand tokens/s", "MFU", "peak memory, GiB"]
    text += table(header, rows, 1)
    if not set(names) <= set(report["models"]):
        text += "\n\nBERT was not measured."
    if set(done) == set(names):
        ratio = done["m2_bert"]["tokens_per_s"] / done["bert"]["tokens_per_s"]
        text += f"\n\nM2-BERT trains on {ratio:.2f} times as many tokens a second."
    return text


def ops_cuda() -> str:
    if not (RESULTS / "ops_cuda.json").exists():
        return NO_GPU
    from m2_plugin.ops.backend import MAX_TOEPLITZ_LENGTH

    report = load("ops_cuda")
    found = {(r["op"], r["length"]): r for r in report["rows"] if r["what"] == "forward"}
    tokens, hidden = 1 << 16, 768
    jobs: list[tuple[str, int | None, floors.Work]] = []
    for length in LENGTHS:
        work = floors.gated_long_conv(tokens, hidden)
        if length <= MAX_TOEPLITZ_LENGTH:
            operations = floors.toeplitz_operations(tokens, hidden, length)
            work = floors.Work(work.bytes, operations)
        jobs.append(("gated_long_conv", length, work))
    for op, weights in (
        ("monarch_mlp", floors.mlp_weights(hidden)),
        ("block_diagonal_linear", hidden * hidden // 4),
    ):
        jobs.append((op, None, floors.block_maps(tokens, hidden, weights)))
    rows = []
    for op, length, work in jobs:
        row = next((r for (o, n), r in found.items() if o == op and length in (None, n)), {})
        times = {n: t for n, t in row.get("times", {}).items() if "median_ms" in t}
        kernels = [name for name in times if name.startswith("triton")]
        best = min(kernels, key=lambda name: times[name]["median_ms"], default=None)
        ours = times.get(best, {})

        def ratio(*others: str, times: dict = times, ours: dict = ours) -> str:
            other = next((times[o] for o in others if o in times), None)
            if not other or not ours:
                return NONE
            return f"{other['median_ms'] / ours['median_ms']:.1f}×"

        def entry(key: str, form: str, ours: dict = ours) -> str:
            return form.format(ours[key]) if key in ours else NONE

        operations = work.operations
        error = entry("error_fp64", "{:.1e}")
        if "error_fp64" in ours:
            error += f" / {times['torch']['error_fp64']:.1e}"
        rows.append(
            [
                f"`{op}`",
                NONE if length is None else str(length),
                f"{work.bytes / tokens:,.0f}",
                NONE if operations is None else f"{operations / tokens / 1e6:.2f}",
                NONE if operations is None else f"{operations / work.bytes:,.0f}",
                entry("median_ms", "{:.3f}"),
                entry("gb_per_s", "{:,.0f}"),
                entry("tflop_per_s", "{:,.0f}"),
                entry("of_floor", "**{:.0%}**"),
                ratio("torch"),
                ratio("rfft", "dense GELU MLP", "nn.Linear"),
                error,
            ]
        )
    intro = (
        f"Forward passes of the ops in bf16, D = 768, 65,536 tokens (`bench_ops.py`); "
        f"{report['device']}, torch {report['torch']}, {report['date']}; medians; the faster of "
        f"two algorithms where both were timed. {report.get('note', '')} The columns up to "
        f"*op / byte* are arithmetic: the bytes that each token must move, and the operations of "
        f"its matrix products in millions. "
        f"Where an FFT takes over, memory alone sets the floor. The floor is the larger of the two "
        f"times that memory and products need at the rates measured on this device "
        f"({report['bytes_per_second'] / 1e9:,.0f} GB/s and "
        f"{report['operations_per_second'] / 1e12:,.0f} TFLOP/s). *× replaced* compares with what "
        f"the op replaces: `torch.fft.rfft` padded to 2·L, or dense layers.\n\n"
    )
    header = ["op", "L", "bytes", "Mop", "op / byte", "ms", "GB/s", "TFLOP/s", "of floor"]
    header += ["× PyTorch", "× replaced", "error: ours / PyTorch"]
    return intro + table(header, rows)


def draw_model(path: Path) -> None:
    """Draw tokens per millisecond against length from a file of `bench_model.py`."""
    try:
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        log.warning("matplotlib is not installed: %s is not drawn", path.with_suffix(".png"))
        return
    from m2_plugin.files import write_atomically
    from m2_plugin.pictures import LIGHT, drawing, to_png

    report = json.loads(path.read_text())
    scales = list(dict.fromkeys(row["scale"] for row in report["rows"]))
    shown = {
        p: n for p, n in MODELS.items() if any("median_s" in r.get(p, {}) for r in report["rows"])
    }
    with drawing(height=3.7 * len(scales)) as figure:
        grid = figure.subplots(len(scales), 2, squeeze=False, sharey="row")
        for scale, pair in zip(scales, grid, strict=True):
            titles = {"forward": "encoder forward", "step": "training step"}
            for (what, title), axes in zip(titles.items(), pair, strict=True):
                rows = [r for r in report["rows"] if (r["scale"], r["what"]) == (scale, what)]
                rows.sort(key=lambda row: row["length"])
                for (provider, name), color in zip(shown.items(), LIGHT.series, strict=False):
                    done = [r for r in rows if "median_s" in r.get(provider, {})]
                    if done:
                        rates = [
                            1e-3 * r["batch"] * r["length"] / r[provider]["median_s"] for r in done
                        ]
                        lengths = [r["length"] for r in done]
                        label = name if axes is grid[0][0] else None
                        axes.plot(lengths, rates, marker="o", label=label, color=color)
                ticks = [row["length"] for row in rows]
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.set_xticks(ticks, [str(n) if n < 1024 else f"{n // 1024}k" for n in ticks])
                axes.set(xlabel="sequence length", title=f"{title},\n{scale} size")
            pair[0].set_ylabel("tokens per ms")
        figure.suptitle(f"{report['device']}, {report['dtype']}, torch {report['torch']}")
        figure.legend(loc="outside lower left", ncols=2)
        write_atomically(path.with_suffix(".png"), to_png(figure))


def conversion() -> str:
    report = load("conversion")
    rows = []
    for mode, contenders in report["times"].items():
        for name, run in contenders.items():
            low, high = run["convert_s_range"]
            rows.append(
                [
                    mode,
                    name,
                    f"{run['convert_s']:.2f} ({low:.2f}–{high:.2f})",
                    f"{run['start_s']:.1f}",
                    f"{run['cpu_s']:.1f}",
                    f"{100 * run['others']:.0f}%",
                ]
            )
    intro = (
        f"Conversion of {report['corpus_mb']:.0f} MB of Wikipedia to MDS: ours, llm-foundry's "
        f"converter, and ours before its blocks became independent of each other (*older*), "
        f"alternating in one run. Seconds, median (range), {report['cores']} cores, "
        f"{report['date'][:10]} (`bench_conversion.py`). *Start* is the interpreter and imports; "
        f"*others* is the share of the machine that other processes used.\n\n"
    )
    header = ["output", "converter", "convert", "start", "CPU", "others"]
    memory = "; ".join(
        f"{mode} " + ", ".join(f"{mb:.0f}" for mb in sizes.values()) + " MB"
        for mode, sizes in report["peak_memory_mb_two_workers"].items()
    )
    note = f"Memory with two workers, at 1, 2 and 4 times the input: {memory}."
    return f"{intro}{table(header, rows)}\n\n{note}"


def glue_quickstart() -> str:
    report = load("glue_quickstart")
    names = list(report["models"])
    longer = load("glue_longer") if (RESULTS / "glue_longer.json").exists() else None
    runs = [report, longer] if longer else [report]
    rows = []
    for i, row in enumerate(report["tasks"]):
        for metric in row["commonest"]:
            trained = row["models"][names[0]]
            count = f"{trained['train_samples']:,} × {trained['epochs']}"
            commonest = f"{row['commonest'][metric]:.3f}"
            models = [run["tasks"][i]["models"][name] for run in runs for name in names]
            scores = [f"{model['metrics'][metric]:.3f}" for model in models]
            rows.append([row["task"], metric, count, commonest, *scores])

    def sizes(run: dict) -> str:
        return "; ".join(
            f"{name}: {model['parameters']:,} parameters, held-out loss "
            f"{model['pretraining_eval_loss']:.2f} nats"
            for name, model in run["models"].items()
        )

    random_weights = report["sst2_from_random_weights"]
    scratch = ", ".join(f"{name} {value:.1%}" for name, value in random_weights.items())
    sst2 = next(row for row in report["tasks"] if row["task"] == "SST-2")
    accuracy = ", ".join(f"{n} {sst2['models'][n]['metrics']['accuracy']:.1%}" for n in names)
    intro = (
        f"Two models of the quickstart's size, pretrained by its recipe ({sizes(report)}), then "
        f"fine-tuned with `composer train.py` on a CPU. Whole dev sets, last epoch, one seed, "
        f"{report['date']} (`bench_glue.py`). The table shows that the path from text to a score "
        f"works. On SST-2, trained on 20,000 of its 67,349 sentences, the accuracy is {accuracy}; "
        f"the most common answer gives {sst2['commonest']['accuracy']:.1%}; the same training "
        f"from random weights gives {scratch}. So a few minutes of pretraining on nine novels "
        f"change little on SST-2, and they do not help on CoLA or on pairs of sentences: these "
        f"scores are near or below the most common answer, STS-B's a little above it. With one "
        f"seed, differences this small mean nothing. Each saved folder, loaded again in "
        f"transformers, gives the trainer's metric.\n\n"
    )
    if longer:
        intro += (
            f"The columns *longer* are of models of the section above, of the same size and "
            f"pretrained for about the same time ({sizes(longer)}); {longer['date']}. "
            f"{pairs_of_sentences(longer)}\n\n"
        )
        names += [f"{name}, longer" for name in names]
    header = ["task", "metric", "samples × epochs", "most common answer", *names]
    pictures = ["glue_quickstart", "glue_longer"][: len(runs)]
    drawn = "\n\n".join(f"![GLUE dev sets](results/{picture}.png)" for picture in pictures)
    return f"{intro}{table(header, rows)}\n\n{drawn}"


def pairs_of_sentences(report: dict[str, Any]) -> str:
    """Say where no model of a table of GLUE reaches the commonest answer."""
    below = [
        row["task"]
        for row in report["tasks"]
        if all(
            model["metrics"][metric] <= commonest
            for model in row["models"].values()
            for metric, commonest in row["commonest"].items()
        )
    ]
    if not below:
        return "In each task a model is better than the commonest answer."
    return f"On {' and '.join(below)} still no model reaches the commonest answer."


def seconds_of_a_batch(report: dict[str, Any]) -> dict[str, float]:
    """The median seconds of a batch, also of BERT if it decoded the masked positions only."""
    seconds = {n: statistics.median(v) for n, v in report["seconds_of_a_batch"].items()}
    saved = report["saved_by_masked_decoding"]["median"]
    return seconds | {MASKED_ONLY: seconds["BERT"] - saved}


def learning() -> str:
    report = load("learning") if (RESULTS / "learning.json").exists() else {}
    if "seconds_of_a_batch" not in report:
        return "Not measured yet: run `bench_learning.py`, then again with `--time`."
    seconds = seconds_of_a_batch(report)
    rates = []
    for name, model in report["models"].items():
        found = model["loss_by_lr"]
        for rate in sorted({rate for tried in found.values() for rate in tried}, key=float):
            ends = [f"{tried[rate]:.3f}" if rate in tried else NONE for tried in found.values()]
            rates.append([name, f"**{rate}**" if float(rate) == model["lr"] else rate, *ends])
    rows = []
    for name, second in seconds.items():
        for batches, point in report["models"][name.split(",")[0]]["batches"].items():
            count = int(batches)
            ends = " and ".join(f"{loss:.3f}" for loss in point["loss"])
            tokens = count * report["tokens_of_a_batch"] / 1e6
            rows.append([name, f"{tokens:.1f}", f"{count * second / 60:.1f}", ends])
    intro = (
        f"M2-BERT and BERT of the quickstart's size (4.3 and 4.4 million parameters), pretrained "
        f"on {report['corpus_mb']} MB of Wikipedia and novels by the quickstart's recipe with "
        f"`warmup_stable_decay`: each length ends with its own decay ({report['decay']:.0%} of "
        f"it). Held-out loss in nats for each masked token (15% of {report['held_out_samples']:,} "
        f"samples of 128 tokens, the same for all), a number for each seed; {report['date']} "
        f"(`bench_learning.py`). Each has the learning rate that is best by the second table. "
        f"Minutes are batches times the seconds of a batch on one core, measured on a "
        f"quiet machine: M2-BERT {seconds['M2-BERT']:.3f}, BERT {seconds['BERT']:.3f}. "
        f"transformers' BERT decodes all positions, which is most of that difference; if it "
        f"decoded the masked ones only, it would take {seconds[MASKED_ONLY]:.3f} s. A model that "
        f"knows only how often each word occurs has {report['unigram_loss']:.3f} nats.\n\n"
    )
    header = ["model", "million tokens", "minutes", "held-out loss"]
    picture = "![Held-out loss over tokens and time](results/learning.png)"
    tuning = (
        "Held-out loss at each learning rate, one seed; the two best after the first length ran on:"
    )
    tuned = ["model", "learning rate", *(f"{int(n):,} batches" for n in found)]
    return f"{intro}{table(header, rows, 1)}\n\n{picture}\n\n{tuning}\n\n{table(tuned, rates, 1)}"


def choices() -> str:
    if not (RESULTS / "choices.json").exists():
        return "Not measured yet: run `bench_choices.py`."
    report = load("choices")
    found = report["choices"]
    recipe = statistics.mean(found["recipe"]["loss"])
    rows = []
    for name, row in found.items():
        if "unpadded" not in row:
            ends = " and ".join(f"{loss:.3f}" for loss in row["loss"])
            change = statistics.mean(row["loss"]) - recipe
            rows.append([name, ends, NONE if name == "recipe" else f"{change:+.3f}"])
    intro = (
        f"What the choices of a recipe change: the held-out loss of M2-BERT of the quickstart's "
        f"size after {report['batches']:,} batches of 8 × 128 tokens, as in the section above (the "
        f"same text, samples, schedule, and learning rate, {report['lr']}), with one choice "
        f"changed; two seeds, {report['date']} (`bench_choices.py`). The loss is that of 15% of "
        f"the tokens masked, whatever the training masks.\n\n"
    )
    texts = (
        "\n\nOn texts of different lengths (paragraphs of Wikipedia, one a sample, padded to 128 "
        "tokens in training), the held-out loss on the same masked tokens, with that padding and "
        "without it:\n\n"
    )
    padded = [
        [f"with{'' if 'mask_padding' in name else 'out'} `mask_padding`", *ends]
        for name, row in found.items()
        if "unpadded" in row
        for ends in [[" and ".join(f"{x:.3f}" for x in row[k]) for k in ("padded", "unpadded")]]
    ]
    return (
        intro
        + table(["choice", "held-out loss", "change of the mean"], rows, text_columns=1)
        + texts
        + table(["", "padded", "not padded"], padded, text_columns=1)
    )


def learned() -> str:
    """Write the README's paragraph on what the models learn."""
    report = load("learning") if (RESULTS / "learning.json").exists() else {}
    if "seconds_of_a_batch" not in report:
        return NONE
    seconds = seconds_of_a_batch(report)
    ends = {
        name: {int(n): statistics.mean(point["loss"]) for n, point in model["batches"].items()}
        for name, model in report["models"].items()
    }
    ours, theirs = ends["M2-BERT"], ends["BERT"]
    same, longest = max(ours.keys() & theirs.keys()), {name: max(e) for name, e in ends.items()}
    minutes = {n: longest[n.split(",")[0]] * second / 60 for n, second in seconds.items()}
    spread = max(
        max(point["loss"]) - min(point["loss"])
        for model in report["models"].values()
        for point in model["batches"].values()
    )
    alone = " and ".join(
        name
        for name, model in report["models"].items()
        if len(model["batches"][str(longest[name])]["loss"]) == 1
    )
    seeds = f"at most {spread:.2f} apart" + (
        f"; one for the longest run of {alone}" if alone else ""
    )
    return (
        f"What do they learn? Two models of the quickstart's size (4 million parameters), one "
        f"core, {report['corpus_mb']} MB of Wikipedia and novels, batches of 8 × 128 tokens, each "
        f"model at the best of three learning rates, two seeds ({seeds}): after "
        f"{same * report['tokens_of_a_batch'] / 1e6:.1f} million tokens the held-out loss of "
        f"M2-BERT is {ours[same]:.2f} nats, of BERT {theirs[same]:.2f}. After "
        f"{minutes['M2-BERT']:.0f} minutes M2-BERT has {ours[longest['M2-BERT']]:.2f}, after "
        f"{minutes['BERT']:.0f} minutes BERT has {theirs[longest['BERT']]:.2f} (it would take "
        f"{minutes[MASKED_ONLY]:.0f} if it decoded masked tokens only, as M2-BERT does). Word "
        f"frequencies alone give {report['unigram_loss']:.2f}. So at this size M2-BERT begins to "
        f"use the context much sooner. This does not show which model is better at base size, in "
        f"large batches, after days: nobody trained that here. "
        f"([Picture](tests/benchmarks/README.md#what-m2-bert-and-bert-learn).)"
    )


def import_cost() -> str:
    report = load("import_cost")
    intro = (
        f"`m2-plugin import` of Composer checkpoints with random weights under the reference's "
        f"names, one process each, {report['date']} (`bench_import.py`). Memory is the peak of the "
        f"process minus the {report['libraries_mb']:.0f} MB that the interpreter, torch and "
        f"transformers take. Seconds include starting them.\n\n"
    )
    rows = [
        [
            row["layout"],
            f"{row['file_mb']:.0f}",
            f"{row['peak_mb'] - report['libraries_mb']:.0f}",
            f"{(row['peak_mb'] - report['libraries_mb']) / row['file_mb']:.2f}×",
            f"{row['seconds']:.0f}",
        ]
        for row in report["rows"]
    ]
    return intro + table(
        ["layout", "file, MB", "memory, MB", "memory / file", "seconds"], rows, text_columns=1
    )


EXTENSIONS = {  # by the benchmark's names
    "continue": "`continue`",
    "continue, positions interpolated": "`continue`, positions interpolated instead of repeated",
    "continue at the first rate": "`continue`, new taps decay at the first rate",
    "tile": "`tile`",
    "tile, as the reference": "`tile` as in the reference, with its first features zero",
    "stretch": "features interpolated",
}


def extension() -> str:
    report = load("extension")
    found = {row["method"]: row["losses"] for row in report["rows"]}
    steps = list(found["continue"])
    rows = []
    for name, title in EXTENSIONS.items():
        losses = found[name]
        cells = [losses.get(n, {}).get(length) for length in ("512", "2048") for n in steps]
        rows.append(
            [title, f"{losses['0']['128']:.2f}"] + [f"{c:.2f}" if c else NONE for c in cells]
        )
    start, last = found["continue"]["0"], steps[-1]
    bend = found["continue"][last]["2048"] - found["continue at the first rate"][last]["2048"]
    intro = (
        f"The quickstart's model, extended from 128 to {report['length']:,} tokens: nats per "
        f"masked token on four novels that it has not seen ({report['held_out_tokens']:,} tokens, "
        f"cut to 128, 512 or 2,048, each length with its own masks), after 0, {steps[1]} and "
        f"{last} steps on other novels ({report['tokens_per_step']:,} tokens each, one seed, "
        f"{report['date']}, `bench_extension.py`). At 128 the model before the extension has "
        f"{report['before']['128']:.2f}. Without training, `continue` has {start['128']:.2f} at "
        f"128 and {start['2048']:.2f} at 2,048, and `tile` has "
        f"{found['tile']['0']['2048']:.2f} at 2,048: therefore `continue` is the default. Its "
        f"window decays more slowly beyond the old length, because at the first rate nothing would "
        f"be left to train at 2,048. This changes the loss by {bend:+.2f} after {last} steps at "
        f"2,048; so short a training cannot show what the far lags are worth.\n\n"
    )
    header = ["method", "128"] + [
        f"{length}, {n} steps" if n != "0" else length for length in ("512", "2,048") for n in steps
    ]
    return intro + table(header, rows, text_columns=1)


def gpt() -> str:
    report = load("gpt")
    last = {name: found["eval"][-1][1] for name, found in report["models"].items()}
    sizes = ", ".join(f"{n} {found['parameters']:,}" for n, found in report["models"].items())
    losses = ", ".join(f"{name} **{loss:.2f}**" for name, loss in last.items())
    return (
        f"`m2-gpt-small.yaml` and the unmodified MPT with equally many parameters ({sizes}); same "
        f"data, order, seed and optimizer, the learning rate tuned for neither; "
        f"{report['batches']} batches of {report['tokens_per_batch']:,} tokens of the quickstart's "
        f"novels, one run each, {report['date']} (`bench_gpt.py`). Nats per token on held-out text "
        f"at the end: {losses}; word frequencies alone give "
        f"{report['unigram_cross_entropy']:.2f}. So short a training shows that the layers learn "
        f"in llm-foundry's model. It does not show which of the two becomes better.\n\n"
        f"![Loss of M2-GPT and MPT](results/gpt.png)"
    )


def scaling() -> str:
    a = arithmetic
    memory = [
        [s.name, f"{s.state() / 1e9:.1f}", f"{s.activations() / 1e9:.1f}", f"{s.total() / 1e9:.0f}"]
        for s in a.SETTINGS
    ]
    speed = []
    for gpus in a.GPUS:
        steps = [a.step(gpus, sharded, n) for n in a.NETWORKS.values() for sharded in (False, True)]
        ddp, sharded = steps[:2]
        speed.append(
            [
                str(gpus),
                f"{a.BATCH // gpus:,}",
                f"{ddp.compute:,.0f}",
                f"{ddp.update:,.0f} / {sharded.update:,.0f}",
                *(f"{s.reduce:,.0f} → {s.rate:,.0f}" for s in steps),
            ]
        )
    fast, slow = a.NETWORKS
    flops = a.token_operations()
    text = (
        f"**Predicted, not measured** (`scaling.py`): M2-BERT-large (341M, L = {a.LENGTH}, "
        f"{a.BATCH:,} sequences a step) on H100s. GB on each GPU at a microbatch of "
        f"{a.MICROBATCH}:\n\n"
    )
    text += table(["", "weights, gradients, moments", "activations", "together"], memory, 1)
    text += (
        f"\n\nA training step needs {flops / 1e9:.2f} GFLOP a token. If each op took the longer of "
        f"the two times that its bytes and its products need at the data sheet's "
        f"{a.BANDWIDTH / 1e12:.2f} TB/s and {a.OPERATIONS / 1e12:,.0f} TFLOP/s, a GPU would do "
        f"{1 / a.token_seconds() / 1e3:,.0f} thousand tokens/s. The table below assumes that "
        f"kernels reach {a.EFFICIENCY:.0%} of that, and links their full rate. *DDP* sends "
        f"{a.PARAMETERS * 4 / 1e9:.2f} GB of fp32 gradients with the last microbatch. *Sharded*, "
        f"as in the YAML for 64 GPUs, sends half as much, in bf16, with each microbatch. Gradients "
        f"cross NVLink at {a.NVLINK / 1e9:.0f} GB/s inside a machine of {a.NODE} and the network "
        f"once; as long as the backward pass lasts, it hides them. *Update* is what Composer's "
        f"DecoupledAdamW and the clipping read and write; shards divide it. The last columns are "
        f"the gradients' ms → thousand tokens/s of each GPU, by the network of a machine:\n\n"
    )
    header = ["GPUs", "sequences each", "compute, ms", "update, ms: DDP / sharded"]
    header += [f"{net}, {how}" for net in (fast, slow) for how in ("DDP", "sharded")]
    text += table(header, speed, 0)
    return text + (
        "\n\nSo, from 8 GPUs on, sharding inside a machine gains a little, because each GPU "
        "updates an eighth; it gains much where the network is slow. From about 256 GPUs on the "
        "published batch is too small: its compute no longer hides the gradients. The arithmetic "
        "leaves out kernel launches and the small collectives of the filters' units; at 8 "
        "sequences they are a part of a step too."
    )


def kills() -> str:
    report = load("kills")
    phases = sorted(report["phases"].items(), key=lambda item: -item[1])
    tally = ", ".join(f"{count} × {name}" for name, count in phases)
    killed = [run for run in report["runs"] if run["kills"]]
    equal = sum(not any(run["exit_codes"]) and not run["unequal"] for run in killed)
    resumed = sum(batch > 0 for run in killed for batch in run["resumed"])
    return (
        f"{report['kills']} SIGKILLs in {len(killed)} small quickstart runs (`kill.py`, "
        f"{report['date']}). A quarter came at any time; the others were aimed at training and at "
        f"files being written: {tally}. {equal} of {len(killed)} runs ended with the weights, "
        f"optimizer state, curve and folder of the uninterrupted run, bit for bit. {resumed} "
        f"starts resumed from a checkpoint, each from the newest complete one."
    )


def kill_commands() -> str:
    if not (RESULTS / "kill_commands.json").exists():
        return (
            "Not measured yet: run `python tests/benchmarks/kill_commands.py --kills 15 --out "
            "tests/benchmarks/results/kill_commands.json`."
        )
    report = load("kill_commands")
    tallies = report["commands"]
    kills, before = (sum(t[key] for t in tallies.values()) for key in ("kills", "before the end"))
    wrong = ("half written", "different", "hidden after the rerun")
    others = ("traceback", "orphans", "repeated")
    rows = [
        [name, *(str(tally.get(key, NONE)) for key in ("kills", "before the end", *wrong, *others))]
        for name, tally in tallies.items()
    ]
    header = ["command", "kills", "before the end", "half written", "other bytes after the rerun"]
    header += ["hidden files after it", "tracebacks", "processes that live on", "jobs repeated"]
    return (
        f"SIGKILL at random times, then the same command again (`kill_commands.py`, "
        f"{report['date']}): {kills} kills, {before} of them before the command had ended. The "
        f"converters are killed in four ways: all processes (*group*), one *worker*, all while a "
        f"split gets its name (*naming*), and all while it is sent to a server with the interface "
        f"of S3 (*sending*). The columns from *half written* on count what must not happen; "
        f"*other bytes* means other ones than an unbroken run writes.\n\n"
        + table(header, rows, text_columns=1)
    )


def cluster() -> str:
    report = load("cluster")
    rows = []
    for name, row in report["commands"].items():
        same = [row["same on the cluster"], row["same with a worker killed"]]
        seconds = (f"{row['seconds'][key]:.1f}" for key in ("here", "cluster", "a worker killed"))
        rows.append([name, str(row["files"]), *("yes" if s else "NO" for s in same),
                     str(row["repeated"]), *seconds])  # fmt: skip
    header = ["command", "files compared", "same on the cluster", "same, a worker killed"]
    header += ["tasks repeated", "s here", "s cluster", "s a worker killed"]
    return (
        f"Two processes of this machine, then a Dask scheduler with two workers on it, then the "
        f"same with one worker killed by SIGKILL after {report['killed_after']} tasks or more "
        f"(`cluster.py`, {report['date']}): {report['corpus_bytes'] / 1e6:.0f} MB of Wikipedia "
        f"converted, {report['texts']:,} of its texts embedded by a small model, four GLUE jobs "
        f"with a tiny one. Compared are all files but logs and reports, which hold times. A task "
        f"is repeated if its result was there before the kill and was written again.\n\n"
        + table(header, rows, text_columns=1)
    )


def serving() -> str:
    report = load("serving_cpu")
    names = ("fp32", "bf16_autocast", "bf16", "int8", "onnx")
    intro = (
        f"Masked language models with random weights, logits of all positions. Milliseconds, "
        f"median (range; at least 3 repeats, alternating), {report['threads']} thread of "
        f"{report['device']}, torch {report['torch']}, ONNX Runtime {report['onnxruntime']}, "
        f"{report['date']} (`bench_serving.py`). int8 quantises the dense layers dynamically.\n\n"
    )
    rows = [
        [f"{row['scale']}, L = {row['length']}", str(row["batch"])]
        + [spread(row[name], "ms", "{:.0f}") for name in names]
        for row in report["rows"]
    ]
    header = ["model", "batch", "fp32", "bf16 autocast", "bf16 weights", "int8", "ONNX fp32"]
    return intro + table(header, rows)


def retrieval() -> str:
    report = load("retrieval")
    sets, changes = report["sets"], report["changes"]
    counts = "; ".join(
        f"{name}: {found['train_pairs']:,} to train on, {found['test_pairs']:,} to test on"
        for name, found in sets.items()
    )
    intro = (
        f"The retrieval quickstart ({max(f['minutes'] for f in sets.values()):.0f} minutes of one "
        f"core): nDCG@10 on held-out pairs, {report['date']} (`bench_retrieval.py`). A query is a "
        f"passage of about 80 tokens of a web page of C4, or the beginning of a Wikipedia article; "
        f"it is to find the passage that follows it among all of the test split (pairs of {counts};"
        f" no page or article is in both; one seed). BM25, which knows every rare word, is "
        f"ahead.\n\n"
    )
    titles = {"random": "random order", "recipe": "the quickstart", "bm25": "BM25"}
    rows = [[t, *(f"{f[key]:.3f}" for f in sets.values())] for key, t in titles.items()]
    short = (
        "\n\nWhat its choices do, by runs on Wikipedia for a third of the batches, each with one "
        "choice changed. With 1,000 queries and one seed, differences below 0.03 mean nothing:\n\n"
    )
    changed = [
        [name, f"{found['model']:.3f}", f"{found['minutes']:.1f}"]
        for name, found in changes.items()
    ]
    header = ["", "nDCG@10", "minutes of one core"]
    return (
        intro
        + table(["", *sets], rows, text_columns=1)
        + short
        + table(header, changed, text_columns=1)
    )


def adapt() -> str:
    report = load("adapt")
    before, after = report["before"], report["after"]
    rows = [
        [title, *(f"{found[key]:{form}}" for found in (before, after))]
        for title, key, form in (
            ("cross-entropy, nats per masked token", "cross_entropy", ".2f"),
            ("perplexity", "perplexity", ",.0f"),
            ("accuracy at masked tokens", "masked_accuracy", ".1%"),
        )
    ]
    found = [report["classifier_unadapted"], report["classifier"]]
    rows.append(["accuracy, kinds of web pages", *(f"{f['metrics']:.1%}" for f in found)])
    intro = (
        f"The quickstart's model, which has read nine novels, adapted to Wikipedia by "
        f"`data_prep/adapt.sh` ({report['date']}, `bench_adapt.py`, "
        f"{report['minutes']:.0f} minutes on one core beside other work): the {report['articles']} "
        f"articles of WikiText-2's validation and test files, of which a fifth is held out "
        f"({before['rows']:,.0f} sequences of 128 tokens). Before and after three epochs on the "
        f"others, on the held-out articles; a model that knows only how often each word occurs in "
        f"the others has {report['unigram_cross_entropy']:.2f} nats. Then both models are "
        f"fine-tuned on the quickstart's web pages, which are another domain: the commonest "
        f"answer gives {found[1]['commonest_answer']:.1%}, and on so few pages differences of some "
        f"per cent mean nothing. One seed.\n\n"
    )
    return intro + table(["", "before", "after"], rows, text_columns=1)


SECTIONS: dict[str, tuple[Callable[[], str], ...]] = {  # by the file that they stand in
    "README.md": (quickstart_line, retrieval_line, measured, learned, gpu_tests),
    "tests/benchmarks/README.md": (
        *(
            model_cpu,
            model_cuda,
            profile_cuda,
            counters_cuda,
            host,
            training_cuda,
            step_model,
            ops_cuda,
            conversion,
            quickstart,
        ),
        *(kills, kill_commands, cluster, learning, choices, glue_quickstart),
        *(retrieval, adapt, extension, import_cost, serving, gpt, scaling),
    ),
}


def fill(text: str, sections: tuple[Callable[[], str], ...]) -> str:
    """Replace what stands between the marks of each section."""
    for section in sections:
        name = section.__name__
        between = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = section()
        text, found = between.subn(lambda m, body=body: m[1] + body + "\n" + m[2], text)
        if found != 1:
            raise ValueError(f"The mark <!-- {name} --> must occur once, not {found} times.")
    return text


def main() -> None:
    if (RESULTS / "model_cuda.json").exists():
        draw_model(RESULTS / "model_cuda.json")
    for path, sections in SECTIONS.items():
        readme = ROOT / path
        readme.write_text(fill(readme.read_text(), sections))


if __name__ == "__main__":
    main()
