"""Writes the README's tables from tests/benchmarks/results/*.json.

python tests/benchmarks/report.py
"""

import json
import re
from pathlib import Path

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


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for section in (quickstart, glue_quickstart, model_cpu, conversion):
        name = section.__name__
        between = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = section()
        text, found = between.subn(lambda m, body=body: m[1] + body + "\n" + m[2], text)
        assert found == 1, f"README.md has no markers for {name}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
