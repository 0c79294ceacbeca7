"""The command `m2-plugin`: find a subcommand, import only its code, and run it."""

import importlib
import sys
from collections.abc import Sequence

from m2_plugin import __version__

# For each subcommand: its function, written like an entry point, and what it does.
COMMANDS = {
    "recipes": ("m2_plugin.recipes:main", "list the recipes (YAML files), or copy some of them"),
    "convert-c4": ("m2_plugin.foundry.conversion.cli:main_c4", "convert C4 to MDS shards"),
    "convert-text": (
        "m2_plugin.foundry.conversion.cli:main_text",
        "convert Wikipedia, BookCorpus or your own text to MDS shards",
    ),
    "convert-pairs": (
        "m2_plugin.foundry.conversion.pairs:main_pairs",
        "convert pairs of query and passage to MDS shards",
    ),
    "import": (
        "m2_plugin.checkpoints.command:main_import",
        "convert a checkpoint to a transformers folder",
    ),
    "export": (
        "m2_plugin.checkpoints.command:main_export",
        "convert a folder to the reference's checkpoint",
    ),
    "extend": ("m2_plugin.checkpoints.command:main_extend", "make a model take longer sequences"),
    "embed": ("m2_plugin.embed:main", "write a vector for each text of a file"),
    "doctor": (
        "m2_plugin.doctor:main",
        "test this installation: versions, kernels, their errors and times",
    ),
    "glue": ("m2_plugin.glue.command:main", "fine-tune on GLUE by the published recipe"),
    "train-report": (
        "m2_plugin.train_report.command:main",
        "draw the curves of training runs from their logs",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: The arguments without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        module, _, function = COMMANDS[name][0].partition(":")
        command = getattr(importlib.import_module(module), function)
        if argv is not None:
            return int(command(rest))
        sys.argv = [f"m2-plugin {name}", *rest]  # so that usage and errors name the subcommand
        return int(command())
    if arguments == ["--version"]:
        sys.stdout.write(f"m2-plugin {__version__}\n")
        return 0
    width = max(map(len, COMMANDS))
    rows = "".join(f"  {name:{width}}  {about}\n" for name, (_, about) in COMMANDS.items())
    usage = (
        f"usage: m2-plugin COMMAND ...\n       m2-plugin --version\n\n{rows}\n"
        "`m2-plugin COMMAND --help` describes a command.\n"
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage)
        return 0
    sys.stderr.write(f"There is no command {arguments[0]!r}.\n{usage}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
