"""The command `m2-plugin`: find a subcommand, import only its code, and run it.

Here, and nowhere else, errors that a user can solve become one line and an exit code.
"""

import importlib
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from m2_plugin import __version__

STDOUT = "standard output"
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
    "mine-negatives": (
        "m2_plugin.retrieval.negatives:main_mine",
        "add negatives that BM25 finds to pairs of query and passage",
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
    "average": (
        "m2_plugin.checkpoints.command:main_average",
        "average the weights of checkpoints of one model",
    ),
    "embed": ("m2_plugin.embed:main", "write a vector for each text of a file"),
    "search": (
        "m2_plugin.retrieval.command:main_search",
        "find the texts of a file that are closest to a query",
    ),
    "retrieval": (
        "m2_plugin.retrieval.command:main_retrieval",
        "measure how well an embedding model finds relevant documents",
    ),
    "predict": ("m2_plugin.predict:main", "write the rows of a file with a model's predictions"),
    "evaluate": (
        "m2_plugin.evaluate:main",
        "measure a trained model on other data, by the metrics of its training",
    ),
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


INTERRUPTED = 130, "interrupted: run the same command again to continue"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: The arguments without the program's name; by default those of the process.

    Returns:
        The exit code, as from `run`; 2 if there is no such command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        return guarded(lambda: _usage(arguments))
    name, *rest = arguments
    if argv is not None:
        return run(name, rest)
    sys.argv = [f"m2-plugin {name}", *rest]  # so that usage and errors name the subcommand
    return run(name)


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a subcommand by its name; scripts of their own call this.

    A `ValueError` or an `OSError` is about the input or the machine: its message is written to
    stderr. Other exceptions are bugs, and keep their traceback.

    Args:
        name: A key of `COMMANDS`.
        argv: The arguments; by default those of the process.

    Returns:
        The command's exit code; 1 after an error, 130 if it was interrupted, 141 if the reader of
        its output is gone.
    """

    def command() -> int:
        module, _, function = COMMANDS[name][0].partition(":")
        # In a process of our own, nothing has begun while modules are imported.
        own = argv is None and callable(signal.getsignal(signal.SIGINT))
        with _on_interrupt(_leave, own):
            found = getattr(importlib.import_module(module), function)
        return int(found() if argv is None else found(argv))

    return guarded(command)


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process. An exception within an import may be ignored, or end it by the signal."""
    os._exit(_end(*INTERRUPTED))


@contextmanager
def _on_interrupt(handler: Callable[[int, FrameType | None], None], ours: bool) -> Iterator[None]:
    """Handle Ctrl-C in this way, if it is ours to handle and this thread is the one that may."""
    ours = ours and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if ours:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _usage(arguments: Sequence[str]) -> int:
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


def guarded(command: Callable[[], int]) -> int:
    """Run a function, and turn known exceptions into one line and an exit code."""
    _open_streams()
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        with _on_interrupt(interrupt, ours):
            try:
                return command()
            finally:
                _flush()
    except BaseException as error:
        # Imports may turn an interrupt into an error of their own. Composer's handler exits.
        exits = isinstance(error, SystemExit) and error.code == 128 + signal.SIGINT
        if exits or interrupted.is_set() or isinstance(error, KeyboardInterrupt):
            return _end(*INTERRUPTED)
        if isinstance(error, BrokenPipeError) and _nobody_reads(error):
            return 141  # as a shell shows a process that SIGPIPE ended
        if isinstance(error, MemoryError):
            return _end(1, str(error) or "out of memory")
        if isinstance(error, ValueError | OSError):
            return _end(1, _message(error))
        raise


def _message(error: Exception) -> str:
    """Return the message of an error in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([*names, error.strerror])
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _end(code: int, message: str) -> int:
    with suppress(OSError):  # if nobody reads stderr either
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
    return code


def _open_streams() -> None:
    """Open closed streams; otherwise the next file that is opened would get their output."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 (Python leaves None)
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files may be any bytes


def _flush() -> None:
    """Write what is buffered now, since an error at the interpreter's end is a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        raise OSError(error.errno, error.strerror, STDOUT) from error


def _nobody_reads(error: OSError) -> bool:
    """Tell whether stdout or stderr is closed; other pipes may break, too."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # asks for nothing, and so hears of errors and hang-ups only
    return error.filename == STDOUT or bool(poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
