"""How well a model of 128 tokens reads longer texts after each way to extend it.

    python tests/benchmarks/bench_extension.py --model quickstart/run/huggingface/final \\
        --novels english_novels.jsonl.xz

The novels are 100 of computationalstylistics/100_english_novels, one JSON object per book with
`text` and `source`. Evaluated is on four that the model has not seen; a few steps of continued
training use twenty-seven others. Masks are the same for every method.
"""

import argparse
import datetime
import json
import lzma
import math
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from m2_plugin.checkpoints.extend import POSITIONS, extend
from m2_plugin.models import M2BertForMaskedLM

OUT = Path(__file__).parent / "results" / "extension.json"
LENGTH, EVALUATED = 2048, (128, 512, 2048)
HELD_OUT = ("Doyle_Micah_1889", "Forster_View_1908", "Haggard_Mines_1885", "Kipling_Kim_1901")
SEEN = (
    *("Burnett_Garden_1911", "Burnett_Lord_1886", "Burnett_Princess_1905", "Doyle_Hound_1902"),
    *("Doyle_Lost_1912", "Kipling_Captains_1896"),
    *("Stevenson_Arrow_1888", "Stevenson_Catriona_1893", "Stevenson_Treasure_1883"),
)
SEQUENCES, LR, WARMUP = 4, 1e-3, 10  # of a training step


def method(model, name: str) -> M2BertForMaskedLM:
    """The model extended to LENGTH in one of the ways that are compared."""
    how = "continue" if name.startswith("continue") else "tile"
    old = model.config.long_conv_l_max
    config, weights = extend(model.config, model.state_dict(), LENGTH, how)
    for key in weights:
        if key.endswith("filter.pos_emb"):
            if name == "tile, as the reference":
                weights[key] = weights[key].clone()
                weights[key][:old] = 0  # its loop begins one too far
            elif name == "stretch":
                weights[key] = interpolated(model.state_dict()[key])
        elif key == POSITIONS and "interpolated" in name:
            weights[key] = interpolated(model.state_dict()[key])
    longer = M2BertForMaskedLM(config)
    longer.load_state_dict(weights)
    if "first rate" in name:
        for layer in longer.model.layers:
            for conv in (layer.mixer.long_conv, layer.mixer.residual_conv):
                conv.filter.extended_from = [old * LENGTH]  # no bend below that
                conv.filter.decay = at_first_rate(conv.filter.decay, old)
    return longer


def interpolated(rows: Tensor) -> Tensor:
    return F.interpolate(rows.T[None], size=LENGTH, mode="linear", align_corners=True)[0].T


def at_first_rate(decay, old: int):
    """exp(−s·δ) at s = t / (old·LENGTH − 1), raised to what makes s = t / (old − 1)."""
    power = (old * LENGTH - 1) / (old - 1)
    return lambda length, dtype, device: decay(length, torch.float64, device).pow(power).to(dtype)


def rows(tokens: list[int], tokenizer, length: int) -> list[list[int]]:
    n = length - 2
    pieces = [tokens[i : i + n] for i in range(0, len(tokens) - n + 1, n)]
    return [[tokenizer.cls_token_id, *p, tokenizer.sep_token_id] for p in pieces]


def masked(ids: list[list[int]], tokenizer, probability: float, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
    return collate([{"input_ids": row} for row in ids])


@torch.no_grad()
def loss(model, tokens: list[int], tokenizer, length: int) -> float:
    """Nats per masked token, 15% masked."""
    model.eval()
    batch = masked(rows(tokens, tokenizer, length), tokenizer, 0.15, seed=1)
    total = count = 0.0
    pairs = (batch[key].split(max(1, 4096 // length)) for key in ("input_ids", "labels"))
    for ids, labels in zip(*pairs, strict=True):
        n = (labels != -100).sum().item()
        total += n * model(ids, labels=labels, masked_logits_only=True).loss.item()
        count += n
    return total / count


def train(model, ids: list[list[int]], tokenizer, start: int, stop: int, optimizer) -> None:
    model.train()
    for step in range(start, stop):
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / WARMUP)
        batch = masked(ids[step * SEQUENCES :][:SEQUENCES], tokenizer, 0.30, seed=100 + step)
        output = model(batch["input_ids"], labels=batch["labels"], masked_logits_only=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--novels", required=True)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = M2BertForMaskedLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model, model_max_length=10**9)
    with lzma.open(args.novels, "rt", encoding="utf-8") as file:
        novels = {book["source"]: book["text"] for book in map(json.loads, file)}

    def tokens(names, characters: int) -> list[int]:
        """From behind each book's title pages."""
        texts = [novels[name][5000 : 5000 + characters] for name in names]
        found = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [token for text in found for token in text]

    others = [name for name in sorted(novels) if name not in (*HELD_OUT, *SEEN)][::3][:27]
    held_out, training = tokens(HELD_OUT, 40_000), tokens(others, 120_000)
    ids = rows(training, tokenizer, LENGTH)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [ids[i] for i in order]
    report = {
        "what": "nats per masked token on novels that the model has not seen, 15% masked",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "length": LENGTH,
        "held_out_tokens": len(held_out),
        "tokens_per_step": SEQUENCES * LENGTH,
        "lr": LR,
        "before": {128: loss(model, held_out, tokenizer, 128)},
        "rows": [],
    }
    trained = ("continue", "continue at the first rate", "tile", "tile, as the reference")
    for name in (*trained, "continue, positions interpolated", "stretch"):
        start = time.perf_counter()
        longer = method(deepcopy(model), name)
        row = {"method": name, "losses": {}}
        optimizer = torch.optim.AdamW(
            longer.parameters(), lr=LR, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0
        )
        done = 0
        for steps in (0, args.steps // 2, args.steps) if name in trained else (0,):
            train(longer, ids, tokenizer, done, steps, optimizer)
            done = steps
            row["losses"][steps] = {n: loss(longer, held_out, tokenizer, n) for n in EVALUATED}
        row["seconds"] = time.perf_counter() - start
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        assert all(math.isfinite(v) for found in row["losses"].values() for v in found.values())
        OUT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
