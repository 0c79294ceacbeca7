"""Make a small task of classification from the sample of C4 here: what kind of web page is this?

    python data_prep/quickstart/pages.py --out quickstart/pages

writes train.csv and dev.csv, with the columns `text` and `label`, and new.csv, which has no label
but the page's address, `url`. A text is a piece of a page of at least 300 characters. The label is
blog, news or shop: the address of the page has that word, or one of the same meaning. So the labels
are no more than a guess. Each page is in one of the three files.
"""

import argparse
import csv
import io
import logging
import re
import sys
from itertools import islice
from pathlib import Path

from pairs import SAMPLE, pieces, read, split_of

from m2_plugin.files import write_atomically

log = logging.getLogger("pages")

KINDS = {"blog": "blog", "news": "news", "shop": "shop|store|product"}
FILES = {"train": "train.csv", "test": "dev.csv", "val": "new.csv"}
MOST = 6  # pieces of a page, so that no long page decides


def kind(url: str) -> str | None:
    """Return the kind of page that an address tells; None if it tells none, or two."""
    found = [name for name, words in KINDS.items() if re.search(words, url.lower())]
    return found[0] if len(found) == 1 else None


def rows() -> dict[str, list[tuple[str, str]]]:
    """Return the rows of each file, without the header line."""
    files: dict[str, list[tuple[str, str]]] = {file: [] for file in FILES.values()}
    for page in read(SAMPLE):
        label = kind(page["url"])
        if label is None:
            continue
        file = FILES[split_of(page["url"])]
        second = page["url"] if file == "new.csv" else label
        files[file] += [(text, second) for text in islice(pieces(page["text"]), MOST)]
    return files


def main() -> int:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="Pieces of web pages, with the kind of page.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    for file, lines in rows().items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("text", "url" if file == "new.csv" else "label"))
        writer.writerows(lines)
        write_atomically(out / file, text.getvalue())
        log.info("%s: %d pieces", out / file, len(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
