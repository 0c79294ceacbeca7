"""Embedding error of bf16 weights on long texts, with the filters rounded or kept in fp32.

    python tests/benchmarks/bench_bf16_weights.py FOLDER TEXTS [--length 2048]

FOLDER is a trained model as a transformers folder with a tokenizer; if its filters are shorter than
the length, the model is extended first (`m2-plugin extend`). TEXTS is a text file; its lines are
joined until they fill the length. Each text is embedded three times, in fp32, with all weights
rounded to bf16 (the filters too, as before they were kept in fp32), and with bf16 weights as the
model is now. An embedding is the mean of the encoder's output, so that the pooler, which may be
untrained, has no part in it. Prints a table of relative errors and cosines to fp32.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from m2_plugin.checkpoints.extend import extend
from m2_plugin.checkpoints.folder import load_folder
from m2_plugin.layers.long_conv import HyenaFilter
from m2_plugin.models import M2BertModel


def passages(path: Path, tokenizer, length: int, number: int) -> Tensor:
    """Return the first ids of the file as (number, length)."""
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += tokenizer(line, add_special_tokens=False)["input_ids"]
        if len(ids) >= number * length:
            break
    number = min(number, len(ids) // length)
    if not number:
        raise SystemExit(f"{path} has {len(ids)} tokens, fewer than one text of {length}")
    return torch.tensor(ids[: number * length]).view(number, length)


def embed(model: M2BertModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        rows = [model(row[None]).last_hidden_state.float().mean(1) for row in ids]
    return torch.cat(rows)


def round_filters(model: M2BertModel) -> M2BertModel:
    """Give the filters the values that bf16 leaves of them."""
    for module in model.modules():
        if isinstance(module, HyenaFilter):
            for parameter in module.parameters():
                parameter.data = parameter.data.bfloat16().float()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--number", type=int, default=8, help="texts to embed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config, weights = load_folder(args.folder)
    if config.long_conv_l_max < args.length:
        config, weights = extend(config, weights, args.length)
    model = M2BertModel(config).eval()
    encoder = {name: value for name, value in weights.items() if name.startswith("model.")}
    model.load_state_dict({k.removeprefix("model."): v for k, v in encoder.items()})
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    ids = passages(args.texts, tokenizer, args.length, args.number)
    exact = embed(model, ids)
    rounded = round_filters(copy.deepcopy(model))
    filters = [m for m in model.modules() if isinstance(m, HyenaFilter)]
    std = torch.stack([f.fwd.out.weight.std() for f in filters]).mean().item()
    print(f"{len(ids)} texts of {args.length} tokens; filters' last weights: std {std:.3f}")
    print(f"{'weights':28}{'relative error':>16}{'cosine, least':>16}")
    for name, other in (
        ("bf16, filters bf16 (before)", rounded.bfloat16()),
        ("bf16, filters fp32 (now)", copy.deepcopy(model).bfloat16()),
    ):
        found = embed(other, ids)
        error = ((found - exact).norm() / exact.norm()).item()
        cosine = torch.cosine_similarity(found, exact).min().item()
        print(f"{name:28}{error:>16.4f}{cosine:>16.6f}")


if __name__ == "__main__":
    main()
