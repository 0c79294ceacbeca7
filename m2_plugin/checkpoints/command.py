"""`m2-plugin import`, `export`, `extend` and `average`: checkpoints ↔ transformers folders."""

import argparse
import sys
from collections.abc import Iterable, Sequence


def main_import(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin import`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0.

    Raises:
        ValueError: If the source is refused.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin import",
        description="Convert a checkpoint to a transformers folder. No code in it is run.",
    )
    parser.add_argument(
        "source",
        help="a Composer checkpoint or bare weights (.pt, .bin, .safetensors) of the M2 reference "
        "or of this package; or a folder with weights and perhaps config.json; or the name or "
        "URL of one on the hub",
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--config", help="a JSON file with the fields that the weights do not show")
    parser.add_argument("--tokenizer", help="folder or hub name of a tokenizer to save too")
    parser.add_argument(
        "--allow-missing",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names or patterns (cls.*) of tensors that the source may lack",
    )
    parser.add_argument(
        "--allow-unused",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names or patterns of tensors to leave out",
    )
    parser.add_argument(
        "--allow-different",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names or patterns (*.deltas) of tensors that M2-BERT computes, and whose values in "
        "the source may differ",
    )
    parser.add_argument("--verbose", action="store_true", help="list every tensor")
    args = parser.parse_args(argv)

    from m2_plugin.checkpoints.convert import import_checkpoint

    report = import_checkpoint(
        args.source,
        args.out,
        config=args.config,
        tokenizer=args.tokenizer,
        allow_missing=args.allow_missing,
        allow_unused=args.allow_unused,
        allow_different=args.allow_different,
    )
    return _say([*report.lines(args.verbose), args.out])


def main_export(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin export`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0.

    Raises:
        ValueError: If the folder is refused.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin export",
        description="Write a transformers folder as a Composer checkpoint of the M2 reference, or "
        "as a folder that works without m2_plugin, or as an ONNX file.",
    )
    parser.add_argument("folder", help="a transformers folder with an M2-BERT")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", help="the .pt file to write")
    target.add_argument("--hub", help="the folder to write, for trust_remote_code=True")
    target.add_argument("--onnx", help="the .onnx file to write, for ONNX Runtime")
    parser.add_argument(
        "--push",
        metavar="USER/NAME",
        help="with --hub: upload the folder to this repository of the hub, which is made if it "
        "does not exist",
    )
    parser.add_argument("--private", action="store_true", help="with --push: nobody else sees it")
    args = parser.parse_args(argv)
    if args.push and not args.hub:
        parser.error("--push needs --hub: it uploads that folder")
    if args.private and not args.push:
        parser.error("--private needs --push")

    if args.hub:
        from m2_plugin.checkpoints.hub import export_hub_folder
        from m2_plugin.checkpoints.push import check_access, push_folder

        if args.push:
            check_access(args.push)  # before anything is written
        files = export_hub_folder(args.folder, args.hub, args.push)
        lines = [f"{len(files)} files", args.hub]
        return _say(lines + ([push_folder(args.hub, args.push, args.private)] if args.push else []))
    if args.onnx:
        from m2_plugin.checkpoints.onnx import export_onnx

        return _say([f"outputs: {', '.join(export_onnx(args.folder, args.onnx))}", args.onnx])
    from m2_plugin.checkpoints.convert import export_checkpoint

    return _say([f"{export_checkpoint(args.folder, args.out)} tensors", args.out])


def main_extend(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin extend`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0.

    Raises:
        ValueError: If the folder is refused.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin extend",
        description="Extend a model to longer sequences, for continued pretraining.",
    )
    parser.add_argument("folder", help="a transformers folder with an M2-BERT")
    parser.add_argument(
        "--max-seq-len",
        type=int,
        required=True,
        help="the new maximum in tokens, for example 2048, 8192 or 32768",
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument(
        "--method",
        default="continue",
        choices=("continue", "tile"),
        help="how to extend the filters: continue (the default) keeps all taps and appends small "
        "ones; tile does as the M2 reference does, which changes all taps",
    )
    args = parser.parse_args(argv)

    from m2_plugin.checkpoints.extend import extend_folder

    config = extend_folder(args.folder, args.out, args.max_seq_len, args.method)
    return _say([f"takes up to {config.max_sequence_length} tokens", args.out])


def main_average(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin average`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0.

    Raises:
        ValueError: If a source is refused.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin average",
        description="Average the weights of checkpoints of one model, for example the last ones of "
        "a run. Evaluate the result: it is often, not always, better than each.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="two or more of what `m2-plugin import` takes: transformers folders, Composer "
        "checkpoints (.pt), names on the hub",
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="a number for each source, scaled to sum to 1; by default all count alike",
    )
    args = parser.parse_args(argv)

    from m2_plugin.checkpoints.average import average_checkpoints

    shares = average_checkpoints(args.sources, args.out, args.weights)
    lines = [f"{100 * n:5.1f}% {source}" for n, source in zip(shares, args.sources, strict=True)]
    return _say([*lines, args.out])


def _say(lines: Iterable[str]) -> int:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
