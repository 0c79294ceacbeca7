"""The command `m2-plugin glue`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from m2_plugin.glue.recipes import load_sweep, write_yamls

log = logging.getLogger(__name__)

CLUSTER_HELP = """the workers of a Dask cluster instead: the address of its scheduler, or its
scheduler file. They must see this folder, the input and --out under the same paths."""

EPILOG = """examples:
  m2-plugin glue --config yamls/finetune/glue/sweep-m2-bert-base.yaml --start m2-bert-base.pt
  m2-plugin glue --config ... --tasks cola sst2 --seeds 19 variables.glue_path=/data/glue
  m2-plugin glue --report-only --out runs/glue-m2-bert-base
The same command continues a sweep that was stopped."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the arguments."""
    parser = argparse.ArgumentParser(
        prog="m2-plugin glue",
        description="Fine-tune on the GLUE tasks by a recipe, each task and seed in its own "
        "process, and write the table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="YAML", help="the sweep file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results (default: runs/glue-NAME)")
    parser.add_argument("--start", metavar="CHECKPOINT", help="transformers folder or .pt file")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    parser.add_argument("--seeds", nargs="+", metavar="N", help="only these seeds of the recipe")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="jobs at a time; default: one per GPU, or per 4 cores; with --cluster one per thread "
        "of its workers",
    )
    parser.add_argument("--cluster", metavar="ADDRESS|FILE", help=CLUSTER_HELP)
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="do not train; write the table of existing results",
    )
    parser.add_argument(
        "--submission", type=Path, metavar="DIR", help="also write the files for the GLUE server"
    )
    parser.add_argument(
        "--write-yamls",
        type=Path,
        metavar="DIR",
        help="write the single-task YAMLs only",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the sweep file")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; `key=value` may come anywhere, even after a list."""
    arguments = build_parser().parse_intermixed_args(argv)
    for name in ("tasks", "seeds"):
        values = getattr(arguments, name) or []
        arguments.overrides += [value for value in values if "=" in value]
        setattr(arguments, name, [value for value in values if "=" not in value] or None)
    if arguments.seeds:
        if not all(value.isdigit() for value in arguments.seeds):
            raise ValueError(f"--seeds takes whole numbers, got {' '.join(arguments.seeds)}.")
        arguments.seeds = [int(value) for value in arguments.seeds]
    if arguments.start is not None:
        arguments.overrides.append(f"start={arguments.start}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if all results are complete, 1 if a job failed.

    Raises:
        ValueError: If the input is wrong.
        WorkersError: If the cluster cannot be reached, or a worker died.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse(argv)
    if arguments.report_only:
        if arguments.out is None and arguments.config is None:
            raise ValueError("--report-only needs --out, or --config to find the default.")
        return _report(arguments, _out(arguments))
    if arguments.config is None:
        raise ValueError("--config is missing: give a sweep file, such as sweep-m2-bert-base.yaml.")
    sweep = load_sweep(arguments.config, arguments.overrides)
    if arguments.write_yamls:
        for path in write_yamls(sweep, arguments.config, arguments.write_yamls):
            log.info("%s", path)
        return 0
    if sweep.start is None and sweep.model.get("pretrained") is not False:
        raise ValueError(
            "--start is missing: give the checkpoint to fine-tune. To start from random weights, "
            "add model.pretrained=false variables.tokenizer=FOLDER."
        )
    from m2_plugin.glue.sweep import FINISHED, run_sweep

    out = arguments.out or Path("runs") / f"glue-{sweep.name}"
    statuses = run_sweep(
        sweep,
        out,
        tasks=arguments.tasks,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        cluster=arguments.cluster,
    )
    code = _report(arguments, out)
    return code if all(status == FINISHED for status in statuses.values()) else 1


def _out(arguments: argparse.Namespace) -> Path:
    if arguments.out is not None:
        out: Path = arguments.out
        return out
    return Path("runs") / f"glue-{load_sweep(arguments.config, arguments.overrides).name}"


def _report(arguments: argparse.Namespace, out: Path) -> int:
    """Write the report, and the submission if it was requested."""
    from m2_plugin.glue.report import load_report, to_text, write_report

    report = load_report(out)
    files = write_report(report, out)
    sys.stdout.write(to_text(report) + "\n")
    log.info("%s", "  ".join(str(path) for path in files))
    if arguments.submission:
        from m2_plugin.glue.submission import write_submission

        for path in write_submission(out, arguments.submission):
            log.info("%s", path)
    return 0
