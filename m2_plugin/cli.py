"""The command `m2-plugin`: finds the subcommand and hands over; only that one is imported."""

import importlib
import sys
from collections.abc import Sequence

# Name: what runs it, as an entry point names it, and what it does.
COMMANDS = {
    "import": (
        "m2_plugin.checkpoints.command:main_import",
        "make a transformers folder of a checkpoint",
    ),
    "export": (
        "m2_plugin.checkpoints.command:main_export",
        "write a folder as the reference's checkpoint",
    ),
    "extend": ("m2_plugin.checkpoints.command:main_extend", "make a model take longer sequences"),
    "embed": ("m2_plugin.embed:main", "write a vector for each text of a file"),
    "doctor": (
        "m2_plugin.doctor:main",
        "say what runs here: versions, kernels, their errors and times",
    ),
    "glue": ("m2_plugin.glue.command:main", "fine-tune on GLUE by the published recipe; the table"),
    "train-report": (
        "m2_plugin.train_report.command:main",
        "draw the curves of training runs from their logs",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: Arguments, without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        module, _, function = COMMANDS[arguments[0]][0].partition(":")
        code: int = getattr(importlib.import_module(module), function)(arguments[1:])
        return code
    width = max(map(len, COMMANDS))
    rows = "".join(f"  {name:{width}}  {about}\n" for name, (_, about) in COMMANDS.items())
    usage = f"usage: m2-plugin COMMAND ...\n\n{rows}\n`m2-plugin COMMAND --help` says more.\n"
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage)
        return 0
    sys.stderr.write(f"There is no command {arguments[0]!r}.\n{usage}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
