"""The command `m2-plugin train-report`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from m2_plugin.files import write_atomically
from m2_plugin.pictures import DARK, LIGHT
from m2_plugin.train_report.draw import PANELS, draw
from m2_plugin.train_report.page import page, table
from m2_plugin.train_report.runs import (
    AXES,
    Run,
    common_rate,
    load_runs,
    summarize,
    tokenizers_differ,
)

__all__ = ["main", "write_report"]

log = logging.getLogger(__name__)

EPILOG = """examples:
  m2-plugin train-report runs/m2-bert-base
  m2-plugin train-report runs/m2-bert-base runs/bert-base --x tokens --out compared
It reads TensorBoard event files, MLflow file stores, offline files of Weights & Biases,
loss_curve.csv and config.yaml, at any depth below the folders."""


def write_report(
    folders: Sequence[str | Path], out: str | Path | None = None, axis: str = "batch"
) -> tuple[list[list[str]], list[Path]]:
    """Draw the runs below some folders on common axes.

    Args:
        folders: Folders with the logs of one run or more.
        out: The folder to write; by default `report` in a single folder, else `./train-report`.
        axis: One of `AXES`.

    Returns:
        The table of results, header first, and the files written.

    Raises:
        ValueError: If a folder has no logs, or no run has the axis.
    """
    runs = load_runs([Path(folder) for folder in folders])
    _check_axis(runs, axis)
    if tokenizers_differ(runs):
        log.warning("The runs have different tokenizers: their losses per token do not compare.")
    default = Path(folders[0]) / "report" if len(folders) == 1 else Path("train-report")
    out = default if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        name: (draw(name, runs, axis, LIGHT), draw(name, runs, axis, DARK)) for name in PANELS
    }
    rows = [summarize(run, common_rate(runs)) for run in runs]
    files: dict[Path, str | bytes] = {
        out / f"{name}.png": light for name, (light, _) in pictures.items()
    }
    files[out / "report.html"] = page(runs, rows, pictures, datetime.now())
    for path, content in files.items():
        write_atomically(path, content)
    return table(rows), list(files)


def _check_axis(runs: Sequence[Run], axis: str) -> None:
    lacking = [
        run.name
        for run in runs
        if all(run.x(series, axis) is None for series in run.series.values())
    ]
    needed = AXES[axis][1]
    if len(lacking) == len(runs):
        raise ValueError(f"--x {axis} needs {needed}: {', '.join(lacking)} has none")
    for name in lacking:
        log.warning("%s has no %s: only the table shows it", name, needed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin train-report`.

    Returns:
        0.

    Raises:
        ValueError: If the input is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin train-report",
        description="Draw loss, learning rate, throughput and memory of training runs, as PNGs and "
        "as one page.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="a folder with a run's logs")
    parser.add_argument(
        "--out", metavar="DIR", help="default: RUN_DIR/report, or ./train-report for several"
    )
    parser.add_argument("--x", dest="axis", default="batch", choices=AXES, help="default: batch")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    rows, files = write_report(**vars(args))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        sys.stdout.write("  ".join(cells) + "\n")
    sys.stdout.write("".join(f"{path}\n" for path in files))
    return 0
