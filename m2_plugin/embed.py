"""Embed the texts of a file: the command `m2-plugin embed` writes a vector for each."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m2_plugin.checkpoints.folder import build_model, load_folder
from m2_plugin.chunks import Rows, Work, check_absent, run_chunks, writing
from m2_plugin.data.formats import ENDINGS
from m2_plugin.files import replacing
from m2_plugin.inference import (
    Settings,
    add_run_arguments,
    check_options,
    default_batch,
    log_progress,
    own_tokenizer,
    survey,
)
from m2_plugin.models import M2BertForTextEmbedding
from m2_plugin.tasks import TextEmbedding

__all__ = ["embed_file", "main"]


def embed_file(
    file: str | Path,
    model: str | Path,
    out: str | Path,
    text_column: str = "text",
    batch_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    num_workers: int | None = None,
    cluster: str | None = None,
) -> tuple[int, int]:
    """Write the embeddings of all texts of a file. If a run was killed, a new one continues it.

    Up to 1024 texts at a time are sorted by length and batched by tokens. If padding would change
    vectors (a Monarch mixer with neither `mask_padding` nor `pad_inputs`), all texts of a batch
    have the same length. The vectors do not depend on the number of workers.

    Args:
        file: A file of any format in `m2_plugin.data.formats`; in a text file each line is a text.
            It is read twice, in order, so that memory does not grow with its size.
        model: A transformers folder with an `M2BertForTextEmbedding` and a tokenizer. Texts longer
            than its maximum are cut, with a warning.
        out: The `.npy` file to write, float32 (N, D), row i for text i. It appears when it is
            complete; until then a hidden folder beside it holds the finished rows.
        text_column: The column with the texts; ignored for a text file.
        batch_tokens: The most tokens in a batch, padding included; None means 16,384, on a CPU
            4,096.
        device: `auto` (CUDA if there is a GPU), or a device as torch names it.
        dtype: `float32`, or `bfloat16` for autocast.
        overwrite: Whether to replace `out` if it exists.
        num_workers: The processes on this machine; None means one per GPU, or per core. With one,
            the calling process does the work.
        cluster: The address of a Dask scheduler, or its scheduler file, to use its workers.

    Returns:
        N, the number of texts, and D, the width of the vectors.

    Raises:
        ValueError: If the file cannot be read or has no texts, the model has no pooler or no
            tokenizer, torch has no such device, or `out` exists or cannot be written. The message
            names the file or option.
        WorkersError: If the cluster cannot be reached, or a worker died.
    """
    out = Path(out)
    check_options(out, [".npy"], batch_tokens, num_workers)
    check_absent(out, overwrite)
    batch = batch_tokens or default_batch(device)
    settings = Settings(text_column, None, batch, device, dtype)
    work = Work.of(load, model, settings)
    task = work.model()
    rows = Rows(str(file), *survey((text for _, text in task.rows(str(file))), file))
    size = rows.count, task.config.hidden_size
    with writing(out, rows.job(work), overwrite) as parts:
        spans = run_chunks(rows, work, parts, "embed", num_workers, cluster)
        with replacing(out) as temporary, temporary.open("wb") as vectors:
            header = {"descr": "<f4", "fortran_order": False, "shape": size}
            np.lib.format.write_array_header_1_0(vectors, header)
            vectors.writelines(parts.contents(spans))
    return size


def load(folder: str, settings: Settings) -> TextEmbedding:
    """Load the embedding model of a transformers folder, on the CPU.

    Raises:
        ValueError: If there is none, or no tokenizer.
    """
    config, weights = load_folder(folder)
    if config.embedding_pooler and "pooler.dense.weight" not in weights:
        advice = "fine-tune it for retrieval first (yamls/finetune/retrieval)"
        if (Path(folder) / "modules.json").is_file():
            advice = (
                "its modules.json has modules other than Pooling (cls or mean), Dense with tanh "
                "and Normalize, so encode with sentence-transformers"
            )
        raise ValueError(
            f"{str(folder)!r} lacks pooler.dense.weight, which an embedding model needs: {advice}"
        )
    model = build_model(M2BertForTextEmbedding, config, weights)
    return TextEmbedding(model, own_tokenizer(Path(folder), config.vocab_size), settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin embed`.

    Args:
        argv: Arguments, without the program's name.

    Returns:
        0.

    Raises:
        ValueError: As `embed_file`.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin embed",
        description="Write a vector for each text of a file. If a run was stopped, run the same "
        "command again to continue.",
    )
    parser.add_argument("file", help=f"a file of texts: {ENDINGS}")
    parser.add_argument(
        "--model", required=True, help="a transformers folder with an embedding model"
    )
    parser.add_argument("--out", required=True, help="the .npy file to write, float32 (N, D)")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    log_progress()
    rows, width = embed_file(**vars(args))
    sys.stdout.write(f"{rows} vectors of {width} numbers\n{args.out}\n")
    return 0
