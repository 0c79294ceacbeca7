# ruff: noqa: T201
"""What M2-BERT and BERT of the quickstart's size learn: held-out loss at equal tokens and times.

    python tests/benchmarks/bench_learning.py --corpus wikipedia.jsonl novels.jsonl

Both are pretrained by the quickstart's recipe on the same text, but with the schedule
`warmup_stable_decay`: a run of 2,000 batches continues the constant part of the run of 1,000, and
so on. So each length ends with its own decay. Three learning rates are compared after the first
length (or more, if the best is at an end), and the two best again after four times that, since a
long run may want another rate. Then all lengths are trained with two seeds, which change
the weights, the masks and the order of the samples.

Losses do not depend on how busy the machine is, but times do. So `--time`, on a quiet machine and
after the training, measures the seconds of a batch by short runs that take turns; a loss's time is
its batches times the median. BERT in transformers decodes all positions, M2-BERT the masked ones
only. That is most of the difference at this size, so a third time is that of BERT if it decoded the
masked ones only: its batch, less what that saves in a training step of the same sizes.

What is finished below --out is not run again. Writes results/learning.json and .png; with
`--finished`, of the runs that are finished, without training.
"""

import argparse
import csv
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_glue import BERT, COMPOSER, MODELS, RESULTS, ROOT, TOKENIZER, run
from omegaconf import OmegaConf
from report import MASKED_ONLY, seconds_of_a_batch
from report import main as write_tables

YAML = ROOT / "yamls/pretrain/m2-bert-quickstart.yaml"
LENGTHS = {  # batches
    "M2-BERT": (1000, 2000, 4000, 8000, 16000),
    "BERT": (1000, 2000, 4000, 6000),
}
TUNED = (1000, 4000)  # after so many batches, the learning rates are compared
BATCH, SEQUENCE = 8, 128
HELD_OUT = 2048  # samples
RATES = (7.5e-4, 1.5e-3, 3e-3)
SEEDS = (17, 18)
DECAY = 0.2  # of a run
TIMED_BATCHES, TURNS, STEPS = 100, 3, 12


def convert(corpus: list[Path], out: Path) -> Path:
    mds = out / "mds"
    if not mds.exists():
        command = [sys.executable, "data_prep/convert_text.py", "--out_root", str(mds)]
        command += ["--splits", "train", "val", "--val_fraction", "0.01", "--local_files"]
        command += [str(path.resolve()) for path in corpus]
        command += ["--concat_tokens", str(SEQUENCE), "--tokenizer", TOKENIZER]
        run(command, out / "convert.log")
    return mds


# --- training ---


def train(
    out: Path,
    folder: Path,
    name: str,
    rate: float,
    seed: int,
    batches: int,
    *,
    load: Path | None = None,
    changes: dict[str, Any] | None = None,
) -> None:
    """Run the quickstart's recipe for `batches` through the launcher.

    It may begin at a checkpoint (`load`), and keys of the recipe may have other values (`changes`).
    """
    config: Any = OmegaConf.load(YAML)
    if name == "BERT":
        config.model = BERT
    config.variables.run_name = f"{name}-{rate}-{seed}-{batches}"
    config.seed = seed
    config.train_loader.dataset.update(local=str(out / "mds"), shuffle_seed=seed)
    # A fixed choice of the held-out samples, since an evaluation of all takes a minute.
    config.eval_loader.dataset.update(
        local=str(out / "mds"), epoch_size=HELD_OUT, sampling_method="fixed"
    )
    config.optimizer.lr = rate
    # The warm-up of the recipe's 1,000 batches, at every length.
    config.scheduler = {
        "name": "warmup_stable_decay",
        "t_warmup": "60ba",
        "t_decay": f"{DECAY}dur",
        "decay": "linear",
        "alpha_f": 0.02,
    }
    # The last checkpoint of the constant part, and the one at the end.
    stable = f"{round(batches * (1 - DECAY))}ba"
    config.update(
        max_duration=f"{batches}ba",
        eval_interval=stable,
        save_interval=stable,
        save_folder=str(folder),
        save_num_checkpoints_to_keep=-1,
        progress_bar=False,
    )
    config.callbacks.hf_checkpointer.save_folder = str(folder)
    config.callbacks.loss_curve.unigram_baseline = False
    if load:
        config.load_path = str(load)
    for key, value in (changes or {}).items():
        OmegaConf.update(config, key, value, force_add=True)
    folder.mkdir(parents=True, exist_ok=True)
    yaml = folder.with_suffix(".yaml")
    OmegaConf.save(config, yaml)
    run([COMPOSER, "train.py", str(yaml)], folder.with_suffix(".log"))


def losses(folder: Path, curve: str = "eval") -> list[tuple[int, float]]:
    """The batch and the held-out loss of each evaluation."""
    with open(folder / "loss_curve.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["curve"] == curve]
    return [(int(row["batch"]), float(row["loss"])) for row in rows]


def place(out: Path, name: str, rate: float, seed: int, batches: int) -> Path:
    return out / name / f"{rate}-{seed}" / str(batches)


def is_finished(folder: Path) -> bool:
    return (folder / "huggingface/final/config.json").exists()


def trained(out: Path, name: str, rate: float, seed: int, batches: int) -> Path:
    """The finished run of a length, which continues the constant part of the one before."""
    folder = place(out, name, rate, seed, batches)
    if not is_finished(folder):
        load = None
        if batches > LENGTHS[name][0]:
            shorter = max(length for length in LENGTHS[name] if length < batches)
            before = trained(out, name, rate, seed, shorter)
            load = before / f"ep0-ba{round(shorter * (1 - DECAY))}-rank0.pt"
        train(out, folder, name, rate, seed, batches, load=load)
        print(f"{name}, {rate}, seed {seed}, {batches}: {losses(folder)[-1][1]:.4f}", flush=True)
    return folder


def best_rate(out: Path, name: str) -> tuple[float, dict[str, dict[str, float]]]:
    """The best learning rate, and the losses of those tried after each of TUNED."""
    found: dict[float, float] = {}
    wanted = list(RATES)
    while wanted:
        for rate in wanted:
            found[rate] = losses(trained(out, name, rate, SEEDS[0], TUNED[0]))[-1][1]
        best = min(found, key=lambda rate: found[rate])
        beyond = {min(found): best / 2, max(found): best * 2}  # a best one at an end is no best
        wanted = [beyond[best]] if best in beyond else []
    two = sorted(found, key=lambda rate: found[rate])[:2]
    longer = {rate: losses(trained(out, name, rate, SEEDS[0], TUNED[1]))[-1][1] for rate in two}
    tried = {
        str(batches): {str(rate): tried[rate] for rate in sorted(tried)}
        for batches, tried in zip(TUNED, (found, longer), strict=True)
    }
    return min(longer, key=lambda rate: longer[rate]), tried


def learn(out: Path, name: str, finished: bool) -> dict[str, Any]:
    rate, tried = best_rate(out, name)
    points: dict[str, dict[str, list[float]]] = {}
    for batches in LENGTHS[name]:
        seeds = [
            seed
            for seed in SEEDS
            if not finished or is_finished(place(out, name, rate, seed, batches))
        ]
        if not seeds:
            break
        ends = [dict(losses(trained(out, name, rate, seed, batches))) for seed in seeds]
        points[str(batches)] = {
            "loss": [end[batches] for end in ends],
            "before_decay": [end[round(batches * (1 - DECAY))] for end in ends],
        }
    return {"lr": rate, "loss_by_lr": tried, "batches": points}


# --- times ---


def short_run(out: Path, name: str) -> tuple[float, float]:
    """The median seconds of a batch, as Composer's speed monitor sees them, and the unigram loss.

    That is the held-out loss of a model that knows only how often each word occurs.
    """
    from m2_plugin.train_report.readers import read_logs

    folder = out / "timing" / f"{name}-{time.time_ns()}"
    changes = {"callbacks.loss_curve.unigram_baseline": True}
    train(out, folder, name, RATES[0], SEEDS[0], TIMED_BATCHES, changes=changes)
    (log,) = [log for log in read_logs(folder) if "throughput/batches_per_sec" in log.series]
    seconds = 1 / statistics.median(log.series["throughput/batches_per_sec"].values)
    ((_, unigram),) = losses(folder, "unigram_cross_entropy")
    return seconds, unigram


def step(model: Any, masked_only: bool) -> Callable[[], None]:
    """A training step of transformers' BERT on random tokens, 30% of them masked."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(1000, 30000, (BATCH, SEQUENCE))
    chosen = torch.rand(ids.shape) < 0.3

    def once() -> None:
        hidden = model.bert(ids)[0]
        logits = model.cls(hidden[chosen] if masked_only else hidden)
        labels = ids[chosen] if masked_only else torch.where(chosen, ids, -100).flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(end_dim=-2), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def saved_by_masked_decoding() -> list[float]:
    """The seconds of a batch that BERT would save by decoding masked positions, in each turn."""
    from transformers import BertConfig, BertForMaskedLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = BERT["config_overrides"] | {"vocab_size": 30528}
    steps = [step(BertForMaskedLM(BertConfig(**sizes)), masked_only=only) for only in (False, True)]
    saved = []
    for turn in range(TURNS * STEPS + 2):
        times = []
        for once in steps:
            start = time.perf_counter()
            once()
            times.append(time.perf_counter() - start)
        if turn >= 2:  # the first ones allocate
            saved.append(times[0] - times[1])
    return saved


def measure(out: Path) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    for _ in range(TURNS):
        for name in MODELS:
            second, unigram = short_run(out, name)
            seconds[name].append(second)
            print(f"{name}: {seconds[name][-1]:.4f} s a batch", flush=True)
    saved = saved_by_masked_decoding()
    low, middle, high = statistics.quantiles(saved, n=4)
    times: dict[str, Any] = {
        "unigram_loss": unigram,
        "seconds_of_a_batch": seconds,
        "saved_by_masked_decoding": {"median": middle, "quartiles": [low, high]},
    }
    (out / "times.json").write_text(json.dumps(times))
    return times


# --- the picture ---


def draw(report: dict[str, Any], path: Path) -> None:
    from m2_plugin.files import write_atomically
    from m2_plugin.pictures import LIGHT, drawing, to_png

    timed = "seconds_of_a_batch" in report
    with drawing(height=4.4) as figure:
        panels = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
        tokens = dict.fromkeys(MODELS, report["tokens_of_a_batch"] / 1e6)
        scales = [tokens]
        if timed:
            scales.append({n: s / 60 for n, s in seconds_of_a_batch(report).items()})
        for axes, units in zip(panels, scales, strict=True):
            for (name, unit), color in zip(units.items(), LIGHT.series, strict=False):
                points = report["models"][name.split(",")[0]]["batches"]
                x = [int(batches) * unit for batches in points]
                ends = [point["loss"] for point in points.values()]
                line = "--" if name == MASKED_ONLY else "-"
                middle = [statistics.mean(end) for end in ends]
                axes.plot(x, middle, line, marker="o", color=color, label=name)
                low, high = [min(end) for end in ends], [max(end) for end in ends]
                axes.fill_between(x, low, high, color=color, alpha=0.3)
            if timed:
                label = "word frequencies only"
                axes.axhline(report["unigram_loss"], linestyle=":", color=LIGHT.ink, label=label)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.3g}")
        panels[0].set(xlabel="million tokens", ylabel="held-out loss, nats")
        if timed:
            panels[1].set(xlabel="minutes of a core")
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower left", ncols=2)
        write_atomically(path, to_png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="JSON lines of text")
    parser.add_argument("--out", type=Path, default=ROOT / "quickstart" / "bench_learning")
    parser.add_argument("--time", action="store_true", help="measure times on a quiet machine")
    parser.add_argument("--finished", action="store_true", help="train nothing more")
    args = parser.parse_args()
    out = args.out.resolve()
    convert(args.corpus, out)
    if args.time:
        measure(out)
    with ThreadPoolExecutor(len(MODELS)) as pool:
        found = pool.map(lambda name: learn(out, name, args.finished), MODELS)
        models = dict(zip(MODELS, found, strict=True))
    report = {
        "benchmark": "learning",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "corpus_mb": round(sum(path.stat().st_size for path in args.corpus) / 1e6),
        "held_out_samples": HELD_OUT,
        "tokens_of_a_batch": BATCH * SEQUENCE,
        "decay": DECAY,
        "models": models,
    }
    times = out / "times.json"
    if times.exists():
        report |= json.loads(times.read_text())
    (RESULTS / "learning.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, RESULTS / "learning.png")
    write_tables()


if __name__ == "__main__":
    main()
