import random
import shutil
from pathlib import Path

import pytest
import torch
from streaming import MDSWriter
from transformers import AutoTokenizer

REPO = Path(__file__).parents[2]
TOKENIZER = REPO / "data_prep/quickstart/tokenizer"
MAX_SEQ_LEN = 32


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER, model_max_length=MAX_SEQ_LEN)


@pytest.fixture(scope="session")
def words():
    vocabulary = (TOKENIZER / "vocab.txt").read_text().split()
    return [word for word in vocabulary if word.isalpha() and len(word) > 2][:60]


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory, words):
    """A tokenizer's folder with a vocabulary of these words only.

    A sharded checkpoint has an object for each entry of the tokenizer's vocabulary.
    """
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *words]))
    return folder


@pytest.fixture(scope="session")
def sentences(words):
    """Make sentences in which each word determines the next, so that a tiny model can learn."""
    rng = random.Random(0)
    out = []
    for _ in range(256):
        start, length = rng.randrange(60), rng.randrange(5, 25)
        out.append(" ".join(words[(start + 7 * i) % 60] for i in range(length)))
    return out


@pytest.fixture(scope="session")
def mds(tmp_path_factory, sentences, tokenizer):
    """MDS folder with splits `train` and `val` (text) and `tokens` (ids without mask)."""
    root = tmp_path_factory.mktemp("mds")
    splits = {"train": sentences[:192], "val": sentences[192:]}
    for split, texts in splits.items():
        with MDSWriter(
            out=str(root / split), columns={"text": "str"}, hashes=["xxh64"], size_limit=1 << 12
        ) as writer:
            for text in texts:
                writer.write({"text": text})
    with MDSWriter(out=str(root / "tokens"), columns={"tokens": "ndarray:int32"}) as writer:
        for text in sentences[:64]:
            ids = tokenizer(text, truncation=True, max_length=20, return_tensors="np")
            writer.write({"tokens": ids["input_ids"][0].astype("int32")})
    return root


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Use one thread: with tiny models, more threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
