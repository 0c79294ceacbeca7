"""The page: pictures, the table of results and the table of hyperparameters, in one file."""

import base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape

from m2_plugin.train_report.draw import PANELS
from m2_plugin.train_report.runs import Run, Summary, loss_unit, tokenizers_differ

__all__ = ["page", "table"]

# The settings of a run to show first.
MAIN = (
    "model.name", "model.pretrained_model_name_or_path", "max_duration", "max_seq_len",
    "global_train_batch_size", "n_params", "optimizer.name", "optimizer.lr", "optimizer.betas",
    "optimizer.weight_decay", "scheduler.name", "scheduler.t_warmup", "precision", "seed",
    "rank_zero_seed", "num_nodes", "num_gpus_per_node", "num_cpus_per_node", "composer_version",
)  # fmt: skip
NONE = "–"

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2024; --faint: #6a727a;
  --line: #dde1e5; --back: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e7ea; --faint: #9aa2aa; --line: #30363d; --back: #0e1013; } }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 24px; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 28px 0 8px; }
strong { color: var(--ink); }
p { color: var(--faint); margin: 4px 0; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 16px; margin-top: 20px; }
figure { margin: 0; padding: 12px; background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-top: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.parameters td { text-align: left; white-space: normal; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, monospace; }
.parameters th { text-align: left; font-size: 13px; }
details { margin-top: 8px; }
@media (max-width: 600px) { main { padding: 12px; } figure { padding: 4px; } }
summary { cursor: pointer; color: var(--faint); }
"""


def _number(value: float | None, form: str = ".3f", after: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{after}"


def _rate(value: float | None) -> str:
    return _number(value, ",.0f" if value is not None and value >= 1000 else ".4g")


def _duration(hours: float | None) -> str:
    if hours is None:
        return NONE
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.1f} min" if hours < 2 else f"{hours:,.1f} h"


def _cells(row: Summary) -> list[str]:
    best = _number(row.best_eval_loss)
    if row.best_eval_batch is not None:
        best += f" at {row.best_eval_batch:,}"
    return [
        row.name,
        f"{row.batches:,}",
        _number(row.train_loss),
        _number(row.eval_loss),
        best,
        _rate(row.rate),
        _rate(row.device_rate),
        _number(row.memory, ".3g", f" GB ({row.memory_kind})"),
        _number(row.peak_lr, ".3g"),
        _duration(row.hours),
        NONE if row.attempts is None else str(row.attempts),
    ]


def table(rows: Sequence[Summary]) -> list[list[str]]:
    """Return header and cells of the table of results, as text."""
    kind = rows[0].rate_kind
    header = [
        "run", "batches", "training loss", "evaluation loss", "best evaluation",
        f"{kind}/s", f"{kind}/s per device", "peak memory", "peak learning rate",
        "wall time", "attempts",
    ]  # fmt: skip
    return [header, *map(_cells, rows)]


def _rows(cells: Sequence[Sequence[str]]) -> str:
    """Return the rows of an HTML table; the first is its header."""
    tags = ["th", *["td"] * (len(cells) - 1)]
    return "".join(
        f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>\n"
        for tag, row in zip(tags, cells, strict=True)
    )


def _parameters(runs: Sequence[Run]) -> str:
    """Return the hyperparameters, a column per run; all but the main ones are folded."""
    names = {name for run in runs for name in run.parameters}
    if not names:
        return (
            "<h2>Hyperparameters</h2>\n<p>Not logged: the callback run_summary writes them to "
            "config.yaml in the run's save_folder.</p>"
        )
    main = [name for name in MAIN if name in names]
    parts = []
    for about, chosen in ((None, main), ("all others", sorted(names - set(main)))):
        if not chosen:
            continue
        cells = [["", *(run.name for run in runs)]]
        cells += [[name, *(run.parameters.get(name, NONE) for run in runs)] for name in chosen]
        block = f'<div class="scroll"><table class="parameters">\n{_rows(cells)}</table></div>'
        parts.append(
            block if about is None else f"<details><summary>{about}</summary>{block}</details>"
        )
    return "<h2>Hyperparameters</h2>\n" + "\n".join(parts)


def _losses(runs: Sequence[Run]) -> str:
    unit = loss_unit(runs)
    return f"Losses in {unit}." if unit else "Losses in nats; of a regression, mean squared errors."


def _image(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def page(
    runs: Sequence[Run],
    rows: Sequence[Summary],
    pictures: Mapping[str, tuple[bytes, bytes]],
    written: datetime,
) -> str:
    """Return the page as HTML; it loads no other file.

    Args:
        runs: The runs.
        rows: The summaries of the runs.
        pictures: For each panel, a PNG in light colours and one in dark colours.
        written: The time that the page shows.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    figures = "\n".join(
        f"<figure><figcaption>{escape(PANELS[name][0])}</figcaption><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_image(dark)}">'
        f'<img alt="{escape(PANELS[name][0])} of {escape(title)}" src="{_image(light)}">'
        "</picture></figure>"
        for name, (light, dark) in pictures.items()
    )
    sources = "".join(
        f"<p>{escape(run.name)}: {escape(', '.join(run.sources))}, {escape(str(run.folder))}</p>\n"
        for run in runs
    )
    note = (
        "<p><strong>The runs have different tokenizers: their losses per token do not compare."
        "</strong></p>\n"
        if tokenizers_differ(runs)
        else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: training report</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p>Training report, {written:%Y-%m-%d %H:%M}</p>
<h2>Results</h2>
<div class="scroll"><table>
{_rows(table(rows))}</table></div>
{note}<p>{_losses(runs)} The training loss is the last value of its running mean. Throughput is the
median of the logged values. Wall time is that of all attempts, with lost work and without the
pauses between them. If a run was resumed, batches trained twice appear once, with the last
attempt's values.</p>
<div class="pictures">
{figures}
</div>
{_parameters(runs)}
<h2>Read from</h2>
{sources}</main>
</body>
</html>
"""
