"""Writes the README's tables from tests/benchmarks/results/*.json, and draws the model's curves.

    python tests/benchmarks/report.py

Tables whose figures need a GPU have dashes until there is a file of them.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import floors
import scaling as arithmetic

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def model_cpu() -> str:
    report = load("model_cpu")
    rows = []
    counts = {row["scale"]: row["repeats"] for row in report["rows"]}
    repeats = ", ".join(f"{count} at {scale} scale" for scale, count in counts.items())
    for row in report["rows"]:
        ours, theirs = row["m2_bert"], row["bert_sdpa"]
        rows.append(
            [
                row["scale"],
                {"forward": "encoder forward", "step": "training step"}[row["what"]],
                str(row["length"]),
                str(row["batch"]),
                f"{ours['median_s']:.3f} ({ours['min_s']:.3f}–{ours['max_s']:.3f})",
                f"{theirs['median_s']:.3f} ({theirs['min_s']:.3f}–{theirs['max_s']:.3f})",
                f"**{row['speedup']:.2f}×**",
            ]
        )
    intro = (
        f"M2-BERT beside transformers' BERT with SDPA, alternating in one run: seconds, median "
        f"(range; repeats: {repeats}), {report['threads']} thread of {report['device']}, fp32, "
        f"torch {report['torch']}, transformers {report['transformers']}, {report['date']} "
        f"(`bench_model.py`). A training step is forward with 15% of the tokens masked, backward "
        f"and AdamW; M2-BERT decodes the masked positions only.\n\n"
    )
    header = ["scale", "what", "L", "batch", "M2-BERT", "BERT", "BERT / M2-BERT"]
    return intro + table(header, rows)


def load_if_any(name: str) -> dict:
    return load(name) if (RESULTS / f"{name}.json").exists() else {}


NONE = "–"
NO_GPU = (
    "No GPU could be had yet: entries that need one are left out. `make gpu-bench` on a machine "
    "with one fills them in.\n\n"
)
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
    """How many times the tokens per second of another model M2-BERT has."""
    ours, theirs = row.get("m2_bert", {}), row.get(other, {})
    if "median_s" in ours and "median_s" in theirs:
        return f"{theirs['median_s'] / ours['median_s']:.2f}×"
    return theirs.get("error", NONE) if "median_s" in ours else NONE


def model_cuda() -> str:
    report = load_if_any("model_cuda")
    found = {(r["what"], r["length"]): r for r in report.get("rows", []) if r["scale"] == "base"}
    rows = []
    for length in LENGTHS:
        line = [str(length)]
        for what in ("forward", "step"):
            row = found.get((what, length), {})
            rate = row.get("m2_bert", {}).get("tokens_per_ms")
            line.append(NONE if rate is None else f"{rate:,.0f}")
            line += [times_faster(row, o) for o in ("bert_sdpa", "bert_eager", "modernbert_sdpa")]
        for provider in ("m2_bert", "bert_sdpa"):
            peak = found.get(("step", length), {}).get(provider, {}).get("peak_bytes")
            line.append(NONE if peak is None else f"{peak / 2**30:.1f}")
        rows.append(line)
    intro = (
        "M2-BERT-base on a GPU, tokens per millisecond (`bench_model.py --device cuda`), and how "
        "many times those of transformers' BERT-base with SDPA, with eager attention, and "
        "ModernBERT-base with SDPA; peak memory of a training step in GiB. bf16 autocast, 32,768 "
        "tokens in a batch at every length.\n\n"
    )
    if report:
        intro += (
            f"{report['device']}, torch {report['torch']}, transformers {report['transformers']}, "
            f"{report['date']}; medians.\n\n"
        )
    names = ["× BERT", "× eager", "× ModernBERT"]
    header = ["L", "forward", *names, "training step", *names, "memory", "BERT's"]
    picture = ""
    if (RESULTS / "model_cuda.png").exists():
        picture = "\n\n![Throughput by length](tests/benchmarks/results/model_cuda.png)"
    return intro + ("" if report else NO_GPU) + table(header, rows) + picture


def ops_cuda() -> str:
    from m2_plugin.ops.backend import MAX_TOEPLITZ_LENGTH

    report = load_if_any("ops_cuda")
    found = {(r["op"], r["length"]): r for r in report.get("rows", []) if r["what"] == "forward"}
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
        "The ops' forward passes in bf16, D = 768, 65,536 tokens (`bench_ops.py`). By arithmetic: "
        "bytes that a token must move and operations of its matrix products, in millions (the "
        "mixer's up to the length where it turns to an FFT; beyond, memory alone is its floor); "
        "measured: the share of the floor, which is the larger of the times that memory and "
        "products need at the device's own rates, and the speed over plain PyTorch and over what "
        "the op replaces "
        "(`torch.fft.rfft` padded to 2·L; dense layers).\n\n"
    )
    if report:
        intro += (
            f"{report['device']}, {report['bytes_per_second'] / 1e9:,.0f} GB/s and "
            f"{report['operations_per_second'] / 1e12:,.0f} TFLOP/s measured, torch "
            f"{report['torch']}, {report['date']}; medians; the faster of the two algorithms where "
            "both were timed.\n\n"
        )
    header = ["op", "L", "bytes", "Mop", "op / byte", "ms", "GB/s", "TFLOP/s", "of floor"]
    header += ["× PyTorch", "× replaced", "error: ours / PyTorch"]
    return intro + ("" if report else NO_GPU) + table(header, rows)


def draw_model(path: Path) -> None:
    """Draws tokens per millisecond against length from a file of ``bench_model.py``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError:
        log.warning("matplotlib is not installed: %s is not drawn", path.with_suffix(".png"))
        return
    report = json.loads(path.read_text())
    scales = list(dict.fromkeys(row["scale"] for row in report["rows"]))
    figure = Figure(figsize=(9, 3.8 * len(scales)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(scales), 2, squeeze=False)
    for scale, pair in zip(scales, grid, strict=True):
        for (what, title), axes in zip(
            {"forward": "encoder forward", "step": "training step"}.items(), pair, strict=True
        ):
            rows = [r for r in report["rows"] if (r["scale"], r["what"]) == (scale, what)]
            rows.sort(key=lambda row: row["length"])
            for colour, (provider, name) in enumerate(MODELS.items()):
                done = [r for r in rows if "median_s" in r.get(provider, {})]
                if done:
                    rates = [
                        1e-3 * r["batch"] * r["length"] / r[provider]["median_s"] for r in done
                    ]
                    lengths = [r["length"] for r in done]
                    axes.plot(lengths, rates, marker="o", label=name, color=f"C{colour}")
            ticks = [row["length"] for row in rows]
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks(ticks, [str(n) if n < 1024 else f"{n // 1024}k" for n in ticks])
            axes.set_xlabel("sequence length")
            axes.set_ylabel("tokens per ms")
            axes.set_title(f"{title}, {scale} size")
            axes.grid(alpha=0.3, which="both")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{report['device']}, {report['dtype']}, torch {report['torch']}")
    figure.savefig(path.with_suffix(".png"), facecolor="white")


def conversion() -> str:
    rows, reports = [], [load("conversion_text_59mb"), load("conversion_tokens_59mb")]
    for report in reports:
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
    first = reports[0]
    intro = (
        f"Conversion of {first['corpus_mb']:.0f} MB of Wikipedia to MDS, beside llm-foundry's own "
        f"converter, alternating in one run: seconds, median (range), {first['cores']} cores, "
        f"{first['date'][:10]} (`bench_conversion.py`). *Start* is the interpreter and imports; "
        f"*others* is the share of the machine that other processes took meanwhile.\n\n"
    )
    header = ["output", "converter", "convert", "start", "CPU", "others"]
    memory = first["peak_memory_mb_two_workers"]["text"]
    sizes = "; ".join(f"{mb:.0f} MB at {size.replace('x', '×')}" for size, mb in memory.items())
    return f"{intro}{table(header, rows)}\n\nMemory with two workers: {sizes} the input."


def quickstart() -> str:
    report = load("quickstart")
    return (
        f"On {report['cores']} cores it takes {report['total_s'] / 60:.1f} minutes, "
        f"{report['install_s']:.0f} s of them for the installation. After {report['batches']} "
        f"batches the evaluation loss is **{report['eval_loss']:.2f}** nats per masked token; a "
        f"model that knows word frequencies only would reach "
        f"{report['unigram_cross_entropy']:.2f} (the corpus's unigram entropy is "
        f"{report['unigram_entropy']:.2f}).\n\n"
        f"![Loss curve of the quickstart](tests/benchmarks/results/quickstart.png)"
    )


def glue_quickstart() -> str:
    report = load("glue_quickstart")
    names = list(report["models"])
    rows = []
    for row in report["tasks"]:
        for metric in row["commonest"]:
            values = [row["models"][name]["metrics"][metric] for name in names]
            trained = row["models"][names[0]]
            count = f"{trained['train_samples']:,} × {trained['epochs']}"
            scores = [f"{value:.3f}" for value in values]
            commonest = f"{row['commonest'][metric]:.3f}"
            rows.append([row["task"], metric, count, commonest, *scores])
    sizes = "; ".join(
        f"{name} {model['parameters']:,} parameters, evaluation loss "
        f"{model['pretraining_eval_loss']:.2f} nats"
        for name, model in report["models"].items()
    )
    random_weights = report["sst2_from_random_weights"]
    scratch = ", ".join(f"{name} {value:.1%}" for name, value in random_weights.items())
    sst2 = next(row for row in report["tasks"] if row["task"] == "SST-2")
    accuracy = ", ".join(f"{n} {sst2['models'][n]['metrics']['accuracy']:.1%}" for n in names)
    intro = (
        f"Two models of the quickstart's size, pretrained by its recipe ({sizes}), then fine-tuned "
        f"through `composer train.py` on a CPU; whole dev sets, last epoch, one seed, "
        f"{report['date']} (`bench_glue.py`). It shows that the way from text to a score works: on "
        f"SST-2, trained on 20,000 of its 67,349 sentences, accuracy is {accuracy}, where the "
        f"commonest answer gives {sst2['commonest']['accuracy']:.1%} and the same training from "
        f"random weights {scratch}. So minutes of pretraining on nine novels hardly matter to "
        f"SST-2, and do not carry to CoLA or to pairs of sentences: those scores lie near or below "
        f"the commonest answer's, STS-B's a little above. One seed says nothing of "
        f"differences this small. Each saved folder, reloaded in transformers, predicts the "
        f"trainer's metric.\n\n"
    )
    header = ["task", "metric", "samples × epochs", "commonest answer", *names]
    picture = "![GLUE dev sets](tests/benchmarks/results/glue_quickstart.png)"
    return f"{intro}{table(header, rows)}\n\n{picture}"


def import_cost() -> str:
    report = load("import_cost")
    intro = (
        f"`m2-plugin import` of Composer checkpoints with random weights under the reference's "
        f"names, one process each, {report['date']} (`bench_import.py`). Memory is the peak of the "
        f"process less the {report['libraries_mb']:.0f} MB of interpreter, torch and transformers; "
        f"seconds include starting them.\n\n"
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
    lines = table(["layout", "file, MB", "memory, MB", "memory / file", "seconds"], rows)
    return intro + lines.replace("| --- | --- |", "| --- | ---: |")


EXTENSIONS = {  # by the benchmark's names
    "continue": "`continue`",
    "continue, positions interpolated": "`continue`, positions interpolated instead of repeated",
    "continue at the first rate": "`continue`, taps decaying on at the first rate",
    "tile": "`tile`",
    "tile, as the reference": "`tile` as in the reference, its first features zero",
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
        f"cut to 128, 512 or 2,048, each with masks of its own), after no, {steps[1]} and {last} "
        f"steps on other novels ({report['tokens_per_step']:,} tokens each, one seed, "
        f"{report['date']}, `bench_extension.py`). At 128 the model itself has "
        f"{report['before']['128']:.2f}; `continue` has {start['128']:.2f}, and "
        f"{start['2048']:.2f} at 2,048 without any training, `tile` "
        f"{found['tile']['0']['2048']:.2f}: hence the default. Its window decays more slowly "
        f"beyond the old length, for at the first rate nothing of it would be left to train at "
        f"2,048; that differs by {bend:+.2f} after {last} steps at 2,048, and so short a training "
        f"cannot show what far lags are worth.\n\n"
    )
    header = ["method", "128"] + [
        f"{length}, {n} steps" if n != "0" else length for length in ("512", "2,048") for n in steps
    ]
    lines = table(header, rows)
    return intro + lines.replace("| --- | --- |", "| --- | ---: |")


def gpt() -> str:
    report = load("gpt")
    last = {name: found["eval"][-1][1] for name, found in report["models"].items()}
    sizes = ", ".join(f"{n} {found['parameters']:,}" for n, found in report["models"].items())
    losses = ", ".join(f"{name} **{loss:.2f}**" for name, loss in last.items())
    return (
        f"`m2-gpt-small.yaml` beside the unmodified MPT at equal parameters ({sizes}), same data, "
        f"order, seed and optimizer (its learning rate tuned for neither), "
        f"{report['batches']} batches of {report['tokens_per_batch']:,} tokens of the "
        f"quickstart's novels, one run each, {report['date']} (`bench_gpt.py`): at the end "
        f"held-out text has {losses} nats per token; word frequencies alone give "
        f"{report['unigram_cross_entropy']:.2f}. So short a training "
        f"shows that the layers learn in the host's model, not which of the two ends up better.\n\n"
        f"![Loss of M2-GPT and MPT](tests/benchmarks/results/gpt.png)"
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
        f"M2-BERT-large (341M, L = {a.LENGTH}, {a.BATCH:,} sequences a step) on H100s, by "
        f"arithmetic (`scaling.py`): **nothing here was measured.** GB on each GPU at a microbatch "
        f"of {a.MICROBATCH}:\n\n"
    )
    text += table(["", "", "", ""], memory).replace(
        "|  |  |  |  |\n| --- | --- | ---: | ---: |",
        "| | weights, gradients, moments | activations | together |\n| --- | ---: | ---: | ---: |",
    )
    text += (
        f"\n\nA training step is {flops / 1e9:.2f} GFLOP a token; if each op took the longer of "
        f"what its bytes and its products need at the data sheet's {a.BANDWIDTH / 1e12:.2f} TB/s "
        f"and {a.OPERATIONS / 1e12:,.0f} TFLOP/s, a GPU would do "
        f"{1 / a.token_seconds() / 1e3:,.0f} thousand tokens/s. Below, kernels reach "
        f"{a.EFFICIENCY:.0%} of that, and links all of their rate. *DDP* sends "
        f"{a.PARAMETERS * 4 / 1e9:.2f} GB of fp32 gradients with the last microbatch; *sharded*, "
        f"as in the YAML for 64 GPUs, half as much, in bf16, with each. They cross NVLink at "
        f"{a.NVLINK / 1e9:.0f} GB/s within a machine of {a.NODE}, the network once, and travel "
        f"under the backward pass as far as it lasts. *Update* is what Composer's DecoupledAdamW "
        f"and the clipping read and write, which shards share. Gradients' ms → thousand tokens/s "
        f"of each GPU, by the network of a machine:\n\n"
    )
    header = ["GPUs", "sequences each", "compute, ms", "update, ms: DDP / sharded"]
    header += [f"{net}, {how}" for net in (fast, slow) for how in ("DDP", "sharded")]
    text += table(header, speed).replace("| --- | --- |", "| ---: | ---: |")
    return text + (
        "\n\nSo sharding within a machine gains a little from 8 GPUs on, since each then updates "
        "an eighth, and much where the network is slow; from some 256 GPUs the published batch is "
        "too small, its compute no longer hides the gradients. Kernel launches, and the small "
        "collectives of the filters' units, which at 8 sequences are a part of a step too, are "
        "not in this arithmetic."
    )


def kills() -> str:
    report = load("kills")
    phases = sorted(report["phases"].items(), key=lambda item: -item[1])
    tally = ", ".join(f"{count} × {name}" for name, count in phases)
    killed = [run for run in report["runs"] if run["kills"]]
    equal = sum(not any(run["exit_codes"]) and not run["unequal"] for run in killed)
    resumed = sum(batch > 0 for run in killed for batch in run["resumed"])
    return (
        f"{report['kills']} SIGKILLs over {len(killed)} small quickstart runs, a quarter at any "
        f"time, the others aimed at training and at what is being written ({tally}; `kill.py`, "
        f"{report['date']}): {equal} of {len(killed)} ended with the weights, optimizer state, "
        f"curve and folder of the unbroken run, bit for bit; {resumed} starts went on from a "
        f"checkpoint, each from the newest whole one."
    )


def serving() -> str:
    report = load("serving_cpu")
    names = ("fp32", "bf16_autocast", "bf16", "int8", "onnx")
    intro = (
        f"Masked language models with random weights, logits of all positions: ms, median (range; "
        f"at least 3 repeats, alternating), {report['threads']} thread of {report['device']}, "
        f"torch {report['torch']}, ONNX Runtime "
        f"{report['onnxruntime']}, {report['date']} (`bench_serving.py`). int8 quantises the dense "
        f"layers dynamically.\n\n"
    )
    rows = [
        [f"{row['scale']}, L = {row['length']}", str(row["batch"])]
        + [
            f"{found['median_ms']:.0f} ({found['min_ms']:.0f}–{found['max_ms']:.0f})"
            for found in (row[name] for name in names)
        ]
        for row in report["rows"]
    ]
    header = ["model", "batch", "fp32", "bf16 autocast", "bf16 weights", "int8", "ONNX fp32"]
    return intro + table(header, rows)


ORTHOGONAL = "orthogonal_projection"
RETRIEVERS = {  # by the benchmark's names
    "random": "random order",
    "start, no pooler": "the quickstart's model, mean of its last hidden states",
    "start, random pooler": "the same through a pooler with random weights",
    "infonce": "fine-tuned, `infonce`",
    "orthogonal_projection": "fine-tuned, `orthogonal_projection`",
    "bm25": "BM25",
}


def retrieval() -> str:
    report = load("retrieval")
    sets = report["sets"]
    counts = ", ".join(
        f"{name} {found['train_pairs']:,} pairs to train on and {found['test_pairs']:,} to test on"
        for name, found in sets.items()
    )

    def gain(name: str, loss: str = "infonce") -> str:
        found = sets[name]["ndcg"]
        return f"{found['start, random pooler']:.3f} to {found[loss]:.3f}"

    minutes = [value for found in sets.values() for value in found["minutes"].values()]
    intro = (
        f"The quickstart's model fine-tuned by the small recipe ({min(minutes):.0f} to "
        f"{max(minutes):.0f} minutes on one core), nDCG@10 on held-out pairs, "
        f"{report['date']} (`bench_retrieval.py`): a passage of some 80 tokens of a web page of "
        f"C4, or the beginning of a Wikipedia article, is to find the passage after it among all "
        f"of the test split ({counts}; no page and no article is in both; one seed). In minutes it "
        f"goes from {gain('c4')} on C4 and from {gain('wikipedia')} on Wikipedia by `infonce`, "
        f"from {gain('c4', ORTHOGONAL)} and from {gain('wikipedia', ORTHOGONAL)} by "
        f"`{ORTHOGONAL}`, which is for texts so long that no batch of pairs fits. BM25, to which "
        f"every rare word is known, is far ahead.\n\n"
    )
    rows = [
        [
            title,
            *(f"{found['ndcg'][n]:.3f}" if n in found["ndcg"] else NONE for found in sets.values()),
        ]
        for n, title in RETRIEVERS.items()
    ]
    return intro + table(["", *sets], rows)


def main() -> None:
    if (RESULTS / "model_cuda.json").exists():
        draw_model(RESULTS / "model_cuda.json")
    readme = ROOT / "README.md"
    text = readme.read_text()
    sections = (quickstart, glue_quickstart, gpt, scaling, kills, import_cost, extension, serving)
    for section in (*sections, retrieval, model_cpu, model_cuda, ops_cuda, conversion):
        name = section.__name__
        between = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = section()
        text, found = between.subn(lambda m, body=body: m[1] + body + "\n" + m[2], text)
        assert found == 1, f"README.md has no markers for {name}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
