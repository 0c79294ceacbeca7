import copy
import json
import shutil

import numpy as np
import pytest
import torch
from composer.core.data_spec import DataSpec
from llmfoundry.utils.builders import build_dataloader

from m2_plugin.foundry.mlm_text import MLMCollator, MLMTextDataset, build_mlm_text_dataloader

L = 32
SPLIT_OF_TOKENS = "tokens"


def text_samples(tokenizer, sentences, epoch=0, width=L):
    rows = []
    for text in sentences:
        row = tokenizer(text, truncation=True, padding="max_length", max_length=width)
        rows.append({**row, "epoch": epoch})
    return rows


def big_samples(tokenizer, count=400, width=128):
    """Rows of random ordinary ids between [CLS] and [SEP], padded to `width`."""
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.integers(width // 2, width + 1, count):
        ids = np.zeros(width, dtype=np.int64)
        ids[:length] = rng.integers(1000, len(tokenizer), length)
        ids[0], ids[length - 1] = tokenizer.cls_token_id, tokenizer.sep_token_id
        rows.append({"input_ids": ids, "attention_mask": ids != 0, "epoch": 0})
    return rows


def loader_cfg(mds, split="train", num_workers=0, drop_last=False, **dataset):
    return {
        "name": "mlm_text",
        "dataset": {
            "local": str(mds),
            "split": split,
            "shuffle": True,
            "max_seq_len": L,
            "mlm_probability": 0.3,
            **dataset,
        },
        "drop_last": drop_last,
        "num_workers": num_workers,
        "pin_memory": False,
    }


def build(cfg, tokenizer, batch_size=8):
    return build_dataloader(copy.deepcopy(cfg), tokenizer, batch_size)


def rows_by_content(batches):
    """{original tokens: masked tokens} over batches; originals are put back from the labels."""
    out = {}
    for batch in batches:
        labels = batch["labels"]
        original = torch.where(labels == -100, batch["input_ids"], labels)
        lengths = batch["attention_mask"].sum(1).tolist()
        for row, masked, length in zip(original, batch["input_ids"], lengths, strict=True):
            out[tuple(row[:length].tolist())] = tuple(masked[:length].tolist())
    return out


def test_host_builds_it_with_its_data_spec(mds, tokenizer):
    spec = build(loader_cfg(mds), tokenizer)
    assert isinstance(spec, DataSpec)
    batch = next(iter(spec.dataloader))
    for key in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        assert batch[key].shape == (8, L)
        assert batch[key].dtype == torch.int64
    assert spec.get_num_samples_in_batch(batch) == 8
    assert spec.get_num_tokens_in_batch(batch) == int(batch["attention_mask"].sum())
    masked = spec.get_num_tokens_in_batch(batch, token_type="loss_generating")
    assert masked == int((batch["labels"] != -100).sum())
    micro = spec.split_batch(batch, 4)
    counts = [spec.get_num_tokens_in_batch(b, token_type="loss_generating") for b in micro]
    assert len(counts) == 2 and sum(counts) == masked


@pytest.mark.parametrize("probability", [0.3, 0.15])
def test_proportions(tokenizer, probability):
    samples = big_samples(tokenizer)
    batch = MLMCollator(tokenizer, probability, 128)(samples)
    original = torch.tensor(np.stack([s["input_ids"] for s in samples]))
    eligible = original >= 1000
    chosen = batch["labels"] != -100
    n = int(eligible.sum())
    assert not chosen[~eligible].any()
    tolerance = 4 * (probability * (1 - probability) / n) ** 0.5
    assert abs(chosen.sum().item() / n - probability) < tolerance
    assert (batch["labels"][chosen] == original[chosen]).all()
    assert (batch["input_ids"][~chosen] == original[~chosen]).all()

    now, was = batch["input_ids"][chosen], original[chosen]
    is_mask, kept = now == tokenizer.mask_token_id, now == was
    m = len(now)
    for share, expected in ((is_mask, 0.8), (kept, 0.1), (~is_mask & ~kept, 0.1)):
        assert abs(share.float().mean().item() - expected) < 4 * (0.16 / m) ** 0.5
    random_ids = now[~is_mask & ~kept].double()
    assert abs(random_ids.mean().item() / len(tokenizer) - 0.5) < 4 * 0.29 / len(random_ids) ** 0.5


def test_positions_are_independent(tokenizer):
    chosen = MLMCollator(tokenizer, 0.3, 128)(big_samples(tokenizer))["labels"] != -100
    inside = chosen[:, 1:60].double()  # never padding, never [CLS]
    by_position = inside.mean(0)
    assert (by_position - 0.3).abs().max() < 5 * (0.21 / len(inside)) ** 0.5
    neighbours = (inside[:, 1:] * inside[:, :-1]).mean().item()
    assert abs(neighbours - 0.09) < 0.006  # n = 23,200: 3 sigma of 0.09 * 0.91


def test_special_tokens_are_never_masked(tokenizer):
    specials = tokenizer.all_special_ids * 6
    batch = MLMCollator(tokenizer, 0.9, L)([torch.tensor(specials)] * 4)
    assert (batch["labels"] == -100).all()
    assert sum(batch["loss_generating_tokens"]) == 0


def test_mask_depends_on_content_seed_and_epoch_only(tokenizer, sentences):
    collator = MLMCollator(tokenizer, 0.3, L, seed=1)
    samples = text_samples(tokenizer, sentences[:64])
    whole = rows_by_content([collator(samples)])
    reversed_pairs = [collator(samples[i : i + 2]) for i in range(62, -1, -2)]
    assert rows_by_content(reversed_pairs) == whole
    assert rows_by_content([MLMCollator(tokenizer, 0.3, L, seed=2)(samples)]) != whole
    later = text_samples(tokenizer, sentences[:64], epoch=1)
    assert rows_by_content([collator(later)]) != whole
    fixed = MLMCollator(tokenizer, 0.3, L, seed=1, remask_each_epoch=False)
    assert rows_by_content([fixed(later)]) == whole


def test_mask_does_not_depend_on_padding(tokenizer, sentences):
    collator = MLMCollator(tokenizer, 0.3, 64)
    narrow = collator(text_samples(tokenizer, sentences[:8], width=32))
    wide = collator(text_samples(tokenizer, sentences[:8], width=64))
    assert rows_by_content([narrow]) == rows_by_content([wide])


def test_text_and_tokens_in_one_batch(tokenizer, sentences):
    samples = text_samples(tokenizer, sentences[:2])
    samples += [torch.arange(1000, 1020), {"input_ids": np.array([101, 1000, 102, 0])}]
    batch = MLMCollator(tokenizer, 0.3, L)(samples)
    assert batch["input_ids"].shape == (4, L)
    assert batch["attention_mask"].sum(1).tolist()[2:] == [20, 3]
    assert (batch["input_ids"][2, 20:] == tokenizer.pad_token_id).all()
    assert (batch["token_type_ids"] == 0).all()
    assert batch["total_tokens"] == batch["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize(
    ("lengths", "width"), [((20, 20), 20), ((20, 21), 24), ((31, 32), 32), ((29, 30), 30)]
)
def test_padded_width(tokenizer, lengths, width):
    """Rows of one length keep it; others are padded to a multiple of 8, at most max_seq_len."""
    max_seq_len = 30 if max(lengths) == 30 else 32
    samples = [torch.full((n,), 1000) for n in lengths]
    assert MLMCollator(tokenizer, 0.3, max_seq_len)(samples)["input_ids"].shape[1] == width


def test_mixed_streams(mds, tokenizer):
    cfg = loader_cfg(mds)
    for key in ("local", "split"):
        cfg["dataset"].pop(key)
    cfg["dataset"]["streams"] = {
        "text": {"local": str(mds), "split": "train"},
        "tokens": {"local": str(mds), "split": SPLIT_OF_TOKENS},
    }
    batches = list(build(cfg, tokenizer).dataloader)
    assert sum(len(b["input_ids"]) for b in batches) == 192 + 64
    assert {b["input_ids"].shape[1] for b in batches} <= {24, 32}


def test_workers_and_epochs(mds, tokenizer):
    """Masks: the same from 0 and 2 workers, new in each epoch, persistent workers included."""
    alone = build(loader_cfg(mds), tokenizer).dataloader
    two = build(loader_cfg(mds, num_workers=2), tokenizer, batch_size=6).dataloader
    epochs = [rows_by_content(alone) for _ in range(2)]
    assert len(epochs[0]) > 150
    assert epochs[0].keys() == epochs[1].keys()
    assert epochs[0] != epochs[1]
    assert [rows_by_content(two) for _ in range(2)] == epochs


def test_evaluation_masks_stay(mds, tokenizer):
    loader = build(loader_cfg(mds, split="val", shuffle=False), tokenizer).dataloader
    first, second = list(loader), list(loader)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact(mds, tokenizer, num_workers):
    """Batches after a resume, and the next epoch's, equal those of an unbroken run."""
    cfg = loader_cfg(mds, num_workers=num_workers, drop_last=True)
    unbroken = build(cfg, tokenizer).dataloader
    first = list(unbroken)
    state = None
    second = []
    for i, batch in enumerate(unbroken):
        second.append(batch)
        if i == 6:
            state = unbroken.dataset.state_dict(num_samples=7 * 8, from_beginning=True)
    third = list(unbroken)

    resumed = build(cfg, tokenizer).dataloader
    resumed.dataset.load_state_dict(json.loads(json.dumps(state)))
    for expected in (second[7:], third):
        got = list(resumed)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])
            assert torch.equal(a["labels"], b["labels"])
    assert not torch.equal(first[0]["input_ids"], second[0]["input_ids"])


def test_yaml_of_llm_foundrys_text_loader_works(mds, tokenizer):
    """It has every key of llm-foundry's `text` loader, and of ours only `mlm_probability`."""
    cfg = loader_cfg(
        mds, eos_token_id=tokenizer.eos_token_id, shuffle_seed=3, shuffle_block_size=64,
        num_canonical_nodes=1, validate_hash=None, keep_zip=False, remote=None, streams=None,
    )  # fmt: skip
    cfg |= {"prefetch_factor": 2, "persistent_workers": True, "timeout": 60}
    assert "sequence_id" in next(iter(build(cfg, tokenizer).dataloader))


@pytest.mark.parametrize("probability", [0, 0.0, 1.0, -0.1, 1.5, "0.3", True])
def test_bad_probability(mds, tokenizer, probability):
    with pytest.raises(ValueError, match=r"mlm_probability must be .* between 0 and 1"):
        build(loader_cfg(mds, mlm_probability=probability), tokenizer)


@pytest.mark.parametrize("key", ["mlm_probability", "max_seq_len"])
def test_missing_key(mds, tokenizer, key):
    cfg = loader_cfg(mds)
    del cfg["dataset"][key]
    with pytest.raises(ValueError, match=f"needs the key '{key}'"):
        build(cfg, tokenizer)


def test_unknown_key_is_named(mds, tokenizer):
    with pytest.raises(ValueError, match="Unknown key 'mlm_probabilty'.*'mlm_probability'"):
        build(loader_cfg(mds, mlm_probabilty=0.3), tokenizer)
    cfg = loader_cfg(mds)
    cfg["dataset"]["streams"] = {"a": {"locl": str(mds)}}
    with pytest.raises(ValueError, match=r"Unknown key 'locl' in dataset.streams.a"):
        build(cfg, tokenizer)


@pytest.mark.parametrize("token", ["mask_token", "pad_token"])
def test_tokenizer_without_token(mds, tokenizer, token):
    bare = copy.deepcopy(tokenizer)
    setattr(bare, token, None)
    with pytest.raises(ValueError, match=f"tokenizer with a {token}"):
        build(loader_cfg(mds), bare)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        build_mlm_text_dataloader(None, 8, {}, drop_last=False, num_workers=0)


def test_missing_split_names_folder_and_splits(mds, tokenizer):
    with pytest.raises(ValueError, match=r"trian/index.json: missing\. .*tokens, train, val"):
        build(loader_cfg(mds, split="trian"), tokenizer)
    with pytest.raises(ValueError, match="nowhere.*missing.*none"):
        build(loader_cfg(mds, local=str(mds / "nowhere")), tokenizer)


def corrupt(mds, tmp_path, change):
    copied = tmp_path / "mds"
    shutil.copytree(mds, copied)
    shard = copied / "train/shard.00001.mds"
    change(shard)
    return copied


def test_truncated_shard_is_named(mds, tokenizer, tmp_path):
    copied = corrupt(mds, tmp_path, lambda s: s.write_bytes(s.read_bytes()[:-100]))
    with pytest.raises(ValueError, match=r"shard.00001.mds: \d+ bytes, .* truncated"):
        build(loader_cfg(copied), tokenizer)


def test_missing_shard_is_named(mds, tokenizer, tmp_path):
    copied = corrupt(mds, tmp_path, lambda s: s.unlink())
    with pytest.raises(ValueError, match=r"shard.00001.mds: missing, .* lists it"):
        build(loader_cfg(copied), tokenizer)


def test_altered_shard_is_named(mds, tokenizer, tmp_path):
    copied = corrupt(mds, tmp_path, lambda s: s.write_bytes(b"\xff" * len(s.read_bytes())))
    with pytest.raises(ValueError, match=r"shard.00001.mds: its xxh64 hash is not .*: altered"):
        build(loader_cfg(copied, validate_hash="xxh64"), tokenizer)
    with pytest.raises(ValueError, match="no 'sha1' hash .* it has xxh64"):
        build(loader_cfg(mds, validate_hash="sha1"), tokenizer)
    with pytest.raises(RuntimeError, match=r"cannot be read from shard .*shard.00001.mds"):
        list(build(loader_cfg(copied), tokenizer).dataloader)


def test_corrupt_index_is_named(mds, tokenizer, tmp_path):
    copied = corrupt(mds, tmp_path, lambda s: (s.parent / "index.json").write_text("{"))
    with pytest.raises(ValueError, match=r"index.json: empty, corrupt or not"):
        build(loader_cfg(copied), tokenizer)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_drop_last_needs_a_whole_batch(mds, tokenizer, num_workers):
    """Without a batch, Composer would run for ever, or save an untrained model."""
    cfg = loader_cfg(mds, "val", num_workers, drop_last=True)
    with pytest.raises(ValueError, match=r"no batch: .* 64 samples .* batch has 65\. Set"):
        build(cfg, tokenizer, batch_size=65)
    (batch,) = build(cfg, tokenizer, batch_size=64).dataloader
    assert len(batch["input_ids"]) == 64
    assert build(cfg | {"drop_last": False}, tokenizer, batch_size=65).dataloader


def test_ids_beyond_the_vocabulary(tokenizer):
    with pytest.raises(ValueError, match="Token id 99999 is outside .* 30522"):
        MLMCollator(tokenizer, 0.3, L)([torch.tensor([101, 99999, 102])])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ahead", [4, 12, 40])
def test_shards_that_vanish_end_the_epoch_with_an_error(mds, tokenizer, tmp_path, ahead):
    """The reader or a thread ahead of it finds the gap first; neither hangs or ends silently."""
    shutil.copytree(mds / "train", tmp_path / "train")
    dataset = MLMTextDataset(
        tokenizer=tokenizer, max_seq_len=32, local=str(tmp_path), split="train", shuffle=False,
        batch_size=4, predownload=ahead,
    )  # fmt: skip
    shards = sorted(tmp_path.joinpath("train").glob("*.mds"))
    assert len(shards) > 2
    seen = 0
    with pytest.raises(RuntimeError, match=r"cannot be read from shard .*/train/shard\.0000[1-9]"):
        for sample in dataset:
            assert sample["input_ids"].size
            seen += 1
            if seen == 10:
                for shard in shards[1:]:
                    shard.unlink()
    assert 10 <= seen < dataset.size
