"""List and copy the recipes (YAML files) and the files that they need.

In an installed package they are in the folder `share`. In a clone, and in an editable installation
of one, they are `yamls/`, `data_prep/` and `train.py` in the top folder.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from m2_plugin.files import write_atomically

__all__ = ["ROOT", "copy", "files_needed", "main", "names"]

_HERE = Path(__file__).parent
ROOT = _HERE / "share" if (_HERE / "share").is_dir() else _HERE.parent
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*")


def names() -> dict[str, str]:
    """List the recipes.

    Returns:
        For each name, such as `pretrain/m2-bert-base`, the first line of the recipe's comment.
    """
    folder = ROOT / "yamls"
    files = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.yaml")}
    return {
        name: files[name].read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for name in sorted(files)
    }


def find(wanted: str) -> list[str]:
    """Find recipes by name, by the last part of a name, or by folder; `all` finds every recipe.

    Raises:
        ValueError: If no recipe is found.
    """
    found = [
        name
        for name in names()
        if wanted == "all" or f"/{name}".endswith(f"/{wanted}") or name.startswith(f"{wanted}/")
    ]
    if not found:
        raise ValueError(f"There is no recipe {wanted!r}. `m2-plugin recipes` lists them.")
    return found


def files_needed(recipes: Iterable[str]) -> list[Path]:
    """Find the files of recipes: the YAML files, and all files and folders that these name.

    A file names another one by its path from the top folder, or by its file name alone if both are
    in the same folder. The README.md of each folder is included: it names the source of the data.

    Returns:
        Paths, relative to `ROOT`.
    """
    todo = [ROOT / "yamls" / f"{name}.yaml" for name in recipes]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path.is_dir():
            todo += path.iterdir()
        elif path not in found and path.suffix != ".pyc":
            found.add(path)
            todo += _named_in(path)
    return sorted(path.relative_to(ROOT) for path in found)


def _named_in(path: Path) -> list[Path]:
    if path.suffix not in (".yaml", ".py"):
        return []
    words = {word.rstrip(".") for word in _PATH.findall(path.read_text(encoding="utf-8"))}
    files = [word for word in words if Path(word).suffix in (".yaml", ".py", ".gz")]
    folders = [word for word in words if word.startswith("data_prep/")]
    named = [ROOT / word for word in files + folders]
    named += [path.parent / name for name in (*files, "README.md") if path.parent != ROOT]
    return [candidate for candidate in named if candidate.exists()]


def copy(recipes: Iterable[str], out: str | Path = ".", overwrite: bool = False) -> list[Path]:
    """Copy recipes and the files that they need, with their folders.

    The commands in a YAML's comments, and its relative paths, work in the folder `out`.

    Args:
        recipes: Names, as `find` takes them.
        out: The folder to write to.
        overwrite: Whether to replace existing files with other content.

    Returns:
        The files that were written, without files that existed with the same content.

    Raises:
        ValueError: If a recipe does not exist.
        FileExistsError: If a file exists with other content; nothing is written then.
    """
    out = Path(out)
    found = dict.fromkeys(name for wanted in recipes for name in find(wanted))
    contents = {out / path: (ROOT / path).read_bytes() for path in files_needed(found)}
    existing = {path for path in contents if path.exists()}
    same = {path for path in existing if path.is_file() and path.read_bytes() == contents[path]}
    if existing > same and not overwrite:
        differ = ", ".join(str(path) for path in sorted(existing - same))
        raise FileExistsError(
            f"These files exist and differ from the ones to be copied: {differ}. Choose another "
            "folder with --out, or replace them with --overwrite."
        )
    written = sorted(contents.keys() - same)
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, contents[path])
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Run `m2-plugin recipes`.

    Returns:
        0.

    Raises:
        ValueError: If a recipe does not exist.
        OSError: If a file cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="m2-plugin recipes",
        description="List the recipes (YAML files for composer), or copy some of them.",
    )
    parser.add_argument(
        "--copy", nargs="+", metavar="NAME",
        help="copy these recipes and the files that they need: a name, the last part of one, "
        "a folder such as finetune/glue, or all",
    )  # fmt: skip
    parser.add_argument("--out", default=".", metavar="FOLDER", help="where to copy them to (.)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that exist and differ"
    )
    args = parser.parse_args(argv)
    if args.copy is None:
        listed = names()
        width = max(map(len, listed))
        sys.stdout.write("".join(f"{name:{width}}  {about}\n" for name, about in listed.items()))
        return 0
    written = copy(args.copy, args.out, args.overwrite)
    sys.stdout.write("".join(f"{path}\n" for path in written))
    sys.stdout.write(f"{len(written)} files written\n")
    return 0
