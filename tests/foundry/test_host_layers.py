"""llm-foundry's own MPT with Monarch layers, set by their names: an M2-GPT."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from llmfoundry.models.mpt import MPTForCausalLM
from llmfoundry.utils.builders import build_composer_model
from torch import nn
from torch.distributed.fsdp import MixedPrecision
from transformers import AutoModelForCausalLM, AutoTokenizer

from m2_plugin.foundry.host_layers import CausalMonarchMixer, MonarchFFN, MonarchGLU
from m2_plugin.layers.block_diagonal_linear import BlockDiagonalLinear
from m2_plugin.layers.long_conv import FilterLinear, HyenaFilter
from m2_plugin.layers.monarch_linear import MonarchLinear
from tests.utils import ROOT, TOKENIZER

VOCAB, LENGTH = 61, 32
MIXER = {"attn_type": "monarch_mixer", "max_seq_len": LENGTH, "filter_order": 8}
DIAGONAL = {"name": "block_diagonal", "nblocks": 2}
MONARCH = {"name": "monarch", "nblocks": 2}


def build(attn_config=None, ffn_type="monarch_glu", fc_type="torch", ffn_config=None, **cfg):
    cfg = {
        "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 4, "vocab_size": VOCAB,
        "max_seq_len": LENGTH, "loss_fn": "torch_crossentropy", "fc_type": fc_type,
        "attn_config": {"attn_impl": "torch"} | (MIXER if attn_config is None else attn_config),
        "ffn_config": {"ffn_type": ffn_type} | (ffn_config or {}),
    } | cfg  # fmt: skip
    torch.manual_seed(0)
    return build_composer_model("mpt_causal_lm", copy.deepcopy(cfg), None)  # it writes into them


def tokens(length=LENGTH, rows=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


combinations = pytest.mark.parametrize(
    "attn_config, ffn_type, fc_type, counts",
    [
        (None, "monarch_glu", "torch", (2, 2, 0, 4, 0)),
        (None, "monarch_mlp", DIAGONAL, (2, 0, 2, 8, 0)),
        (MIXER | {"residual_long_conv": True}, "mptglu", MONARCH, (2, 0, 0, 0, 10)),
        ({}, "mptmlp", MONARCH, (0, 0, 0, 0, 8)),
        ({}, "mptglu", DIAGONAL, (0, 0, 0, 10, 0)),
        ({}, "monarch_glu", DIAGONAL, (0, 2, 0, 8, 0)),
    ],
)


@combinations
def test_the_hosts_model_takes_the_names_and_learns(attn_config, ffn_type, fc_type, counts):
    model = build(attn_config, ffn_type, fc_type)
    modules = list(model.modules())
    kinds = (CausalMonarchMixer, MonarchGLU, MonarchFFN, BlockDiagonalLinear, MonarchLinear)
    assert tuple(sum(type(m) is kind for m in modules) for kind in kinds) == counts
    ids = tokens()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model.loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def gradients_by_position(model, length, position):
    """Largest gradient of the logits at a position with respect to each embedding, (L,)."""
    x = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
    logits = model(inputs_embeds=x).logits[0, position]
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    return grad[0].abs().amax(-1)


models = pytest.mark.parametrize(
    "attn_config, fc_type",
    [
        (MIXER, "torch"),
        (MIXER | {"residual_long_conv": True}, "torch"),
        (MIXER, DIAGONAL),
        (MIXER, MONARCH),
    ],
    ids=["plain", "residual", "block_diagonal", "monarch"],
)


@models
@pytest.mark.parametrize("length", [1, 17, 31, LENGTH])
def test_no_position_sees_the_future(attn_config, fc_type, length):
    model = build(attn_config, fc_type=fc_type).model.double().eval()
    for position in {0, length // 2, length - 1}:
        grad = gradients_by_position(model, length, position)
        assert (grad[: position + 1] > 1e-6 * grad.max()).all()  # it sees all of the past
        assert (grad[position + 1 :] <= 1e-13 * grad.max()).all()

        ids = tokens(length)
        changed = ids.clone()
        changed[:, position + 1 :] = (changed[:, position + 1 :] + 1) % VOCAB
        kept = slice(0, position + 1)
        logits, others = (model(i).logits for i in (ids, changed))
        torch.testing.assert_close(logits[:, kept], others[:, kept], rtol=0, atol=1e-12)
        torch.testing.assert_close(logits[:, kept], model(ids[:, kept]).logits, rtol=0, atol=1e-12)


def test_a_mixer_that_sees_the_future_is_noticed():
    model = build().model.double().eval()
    conv = model.transformer.blocks[0].attn.mixer.long_conv
    conv.filter.rev = conv.filter.fwd
    grad = gradients_by_position(model, 31, 15)
    assert (grad[16:] > 1e-6 * grad.max()).all()


@models
def test_padding_leaves_no_trace(attn_config, fc_type):
    model = build(attn_config, fc_type=fc_type).model.double().eval()
    ids = tokens(20)
    alone = model(ids[:1, :13]).logits
    for side in (slice(0, 13), slice(7, 20)):  # padding on the right, on the left
        batch, mask = ids.clone(), torch.ones_like(ids)
        mask[0] = 0
        mask[0, side] = 1
        batch[0, side] = ids[0, :13]
        logits = model(batch, attention_mask=mask).logits[:1, side]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)


def left_padded(*lengths):
    """Prompts of these lengths in one batch, and the mask."""
    ids = tokens(max(lengths), len(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids * mask, mask


def test_generates_what_whole_forward_passes_give():
    model = build().model.double().eval()
    ids, mask = left_padded(9, 6)
    expected = []
    for prompt in (ids[0], ids[1, 3:]):
        row = prompt
        for _ in range(8):
            row = torch.cat([row, model(row[None]).logits[0, -1].argmax()[None]])
        expected.append(row[len(prompt) :])
    for kwargs in ({}, {"use_cache": False}, {"use_cache": True}):  # the default is no cache
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs
        )
        assert torch.equal(out[:, 9:], torch.stack(expected))


@models
@pytest.mark.parametrize("learned_pos_emb", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_cache_changes_no_logits(attn_config, fc_type, learned_pos_emb, dtype):
    """Prompts of each length, padded on the left, continued by one and by several tokens."""
    model = build(attn_config, fc_type=fc_type, learned_pos_emb=learned_pos_emb).model
    model = model.to(dtype).eval()
    ids, mask = left_padded(LENGTH, LENGTH - 5, 12)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        for parts in ([1] * LENGTH, [20, *[1] * 12], [17, 14, 1]):
            past, logits, end = None, [], 0
            for part in parts:
                new, end = ids[:, end : end + part], end + part
                out = model(new, past_key_values=past, attention_mask=mask[:, :end], use_cache=True)
                past = out.past_key_values
                logits.append(out.logits)
            error = (torch.cat(logits, 1) - expected)[mask.bool()].abs().max()
            assert error <= 50 * torch.finfo(dtype).eps * expected.abs().max()
            size = sum(t.numel() for t in past[0])
            convolutions = 1 + ("residual_long_conv" in attn_config)
            assert size == 3 * 16 * (convolutions * LENGTH + 2 * 3)  # B·D·(L per convolution + …)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=str)
def test_beams_and_samples_are_the_same_with_a_cache(kwargs):
    model = build(MIXER | {"residual_long_conv": True}).model.double().eval()
    ids, mask = left_padded(9, 6)
    found = []
    for use_cache in (False, True):
        torch.manual_seed(3)
        found.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=16,
                pad_token_id=0,
                use_cache=use_cache,
                **{"do_sample": False} | kwargs,
            )
        )
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=f"only supports total sequence length <= {LENGTH}"):
        model.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, use_cache=True,
                       pad_token_id=0, eos_token_id=None)  # fmt: skip


def test_a_cache_longer_than_the_filters_is_an_error():
    model = build(MIXER | {"max_seq_len": 8}, learned_pos_emb=False).model.eval()
    past = model(tokens(8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"9 positions.*attn_config.max_seq_len = 8"):
        model(tokens(1), past_key_values=past, use_cache=True)


def test_the_cache_has_the_layout_of_the_attention_it_replaces():
    """MPT reads the number of positions from the first tensor, where that attention has them."""
    x = torch.randn(2, 5, 16)
    for attn_impl, dimension in (("torch", 3), ("flash", 1)):
        layer = CausalMonarchMixer(16, 2, max_seq_len=8, filter_order=8, attn_impl=attn_impl)
        expected, _, nothing = layer.eval()(x)
        assert nothing is None
        *_, past = layer(x[:, :4], past_key_value=())
        assert past[0].shape[dimension] == 4
        y, _, past = layer(x[:, 4:], past_key_value=past)
        assert past[0].shape[dimension] == 5
        torch.testing.assert_close(y, expected[:, 4:])


@pytest.mark.parametrize(
    "init",
    [
        {"name": "kaiming_normal_"},
        {"name": "kaiming_uniform_"},
        {"name": "xavier_normal_"},
        {"name": "xavier_uniform_"},
        {"name": "baseline_", "init_std": 0.02},
        {"name": "small_init_"},
        {"name": "neox_init_"},
        {"name": "default_"},
    ],
    ids=lambda init: init["name"],
)
def test_every_initialisation_of_llm_foundry(init):
    """A model on the meta device that gets storage, as with FSDP, draws the same weights."""
    on_cpu = build(fc_type=MONARCH, init_config=init).model
    torch.manual_seed(5)
    on_cpu.apply(on_cpu.param_init_fn)
    on_meta = build(fc_type=MONARCH, init_config=init, init_device="meta").model
    assert all(p.is_meta for p in on_meta.parameters())
    on_meta.to_empty(device="cpu")
    for parameter in on_meta.parameters():
        nn.init.constant_(parameter, math.nan)
    torch.manual_seed(5)
    on_meta.apply(on_meta.param_init_fn)
    expected = dict(on_cpu.named_parameters())
    for name, parameter in on_meta.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, expected[name]), name
    assert on_meta(tokens()).logits.isfinite().all()


def test_the_initialisation_is_the_hosts_block_by_block():
    config = {"name": "kaiming_normal_", "init_nonlinearity": "relu"}
    sizes = {"d_model": 256, "n_layers": 2, "init_config": config}
    model = build(fc_type={"name": "block_diagonal", "nblocks": 8}, **sizes).model
    residual = math.sqrt(2 * 2)
    for block in model.transformer.blocks:
        mixer, ffn = block.attn.mixer, block.ffn
        assert mixer.in_proj.bias is None
        for layer, scale in (
            (mixer.in_proj, 1), (mixer.out_proj, residual), (ffn.up_proj, 1),
            (ffn.down_proj, residual),
        ):  # fmt: skip
            fan_in = layer.weight.shape[2]
            assert layer.weight.std().item() == pytest.approx(
                math.sqrt(2 / fan_in) / scale, rel=0.05
            )
            assert layer.bias is None or not layer.bias.any()
        for layer in mixer.modules():
            if isinstance(layer, FilterLinear):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert (mixer.long_conv.filter.freq == 10).all()
    monarch = build({}, "mptmlp", {"name": "monarch", "nblocks": 8}, **sizes).model
    ffn = monarch.transformer.blocks[0].ffn
    x = torch.randn(512, 256)
    assert ffn.up_proj(x).std().item() == pytest.approx(math.sqrt(2), rel=0.05)
    x = torch.randn(512, 1024)
    assert ffn.down_proj(x).std().item() == pytest.approx(math.sqrt(2) / residual, rel=0.05)


def test_no_bias_leaves_none():
    model = build(no_bias=True).model.double().eval()
    named = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert named and all(".filter." in name for name in named)  # the filters' are no features'
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert loss.isfinite()
    only_mixer = build(attention_bias=False).model
    names = {name for name, _ in only_mixer.named_parameters()}
    assert not any(name.endswith("short_conv.bias") for name in names)
    assert any(name.endswith("out_proj.bias") for name in names)


def test_activation_checkpointing_knows_the_names():
    for name, kind in (("monarch_mixer", CausalMonarchMixer), ("monarch_glu", MonarchGLU)):
        model = build(activation_checkpointing_target=[name]).model
        chosen = [m for m in model.modules() if model.activation_checkpointing_fn(m)]
        assert [type(m) for m in chosen] == [kind] * 2


@pytest.mark.parametrize(
    "key, value", [("qk_ln", True), ("kv_n_heads", 2), ("clip_qkv", 6), ("sliding_window_size", 8)]
)
def test_refuses_what_only_attention_has(key, value):
    with pytest.raises(ValueError, match=rf"attn_config\.{key}: {value}.*remove it"):
        build(MIXER | {key: value})


def test_refuses_heads_of_a_size():
    with pytest.raises(ValueError, match=r"attn_config\.head_dim: 8"):
        build(head_dim=8)


@pytest.mark.parametrize(
    "config, kwargs, message",
    [
        ({"rope": True, "rope_impl": "hf"}, {}, "attn_config.rope"),
        ({"alibi": True}, {}, "attn_config.alibi"),
        (
            {"attn_uses_sequence_id": True},
            {"sequence_id": torch.zeros(2, LENGTH, dtype=torch.int64)},
            "attn_config.attn_uses_sequence_id",
        ),
        ({}, {"output_attentions": True}, "output_attentions"),
        ({"max_seq_len": 16}, {}, r"32 positions.*attn_config.max_seq_len = 16"),
    ],
    ids=["rope", "alibi", "sequence_id", "output_attentions", "max_seq_len"],
)
def test_refuses_what_a_convolution_cannot_do(config, kwargs, message):
    model = build(MIXER | config).model
    with pytest.raises(ValueError, match=message):
        model(tokens(), **kwargs)


def test_refuses_packed_documents_of_flash_attention():
    """There MPT gives its layers the starts of sequences: more of them than rows."""
    layer = build().model.transformer.blocks[0].attn
    x = torch.randn(2, 8, 16)
    one_each = {"cu_seqlens_q": torch.tensor([0, 8, 16])}
    assert layer(x, flash_attn_padding_info=one_each)[0].shape == x.shape
    with pytest.raises(ValueError, match="attn_uses_sequence_id"):
        layer(x, flash_attn_padding_info={"cu_seqlens_q": torch.tensor([0, 3, 8, 16])})
    with pytest.raises(ValueError, match="it is causal"):
        layer(x, is_causal=False)


def test_refuses_another_activation():
    with pytest.raises(ValueError, match=r"ffn_act_fn.*gelu.*relu"):
        build(ffn_config={"ffn_act_fn": {"name": "relu"}})
    build(ffn_config={"ffn_act_fn": {"name": "gelu"}, "nblocks": 2, "ffn_hidden_size": 50})


def test_filters_are_units_of_fsdp1_that_stay_in_fp32():
    model = build().model
    units = [module for module in model.modules() if model.fsdp_wrap_fn(module)]
    filters = [module for module in units if isinstance(module, HyenaFilter)]
    assert len(filters) == 2 and len(units) == 2 + 2  # and MPT's blocks
    assert all(model.fsdp_wrap_fn(f) == {"mixed_precision": MixedPrecision()} for f in filters)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m2-gpt-360m"])  # the other recipe differs in sizes only
def test_the_published_sizes_train_are_saved_and_generate(name, mds, tmp_path):
    """With small layers: by the launcher, to a transformers folder, which generates."""
    out = tmp_path / "run"
    values = {
        "variables.data": mds, "variables.tokenizer": TOKENIZER, "variables.max_seq_len": 32,
        "tokenizer.kwargs.bos_token": "'[CLS]'", "tokenizer.kwargs.eos_token": "'[SEP]'",
        "model.d_model": 16, "model.n_layers": 2, "model.n_heads": 2,
        "model.ffn_config.ffn_hidden_size": 32, "precision": "fp32", "max_duration": "2ba",
        "global_train_batch_size": 4, "device_train_microbatch_size": 2, "progress_bar": "false",
        "train_loader.num_workers": 0, "eval_loader.num_workers": 0,
        "eval_subset_num_batches": 1, "eval_interval": "2ba", "save_interval": "2ba",
        "save_folder": out, "callbacks.hf_checkpointer.save_folder": out,
        "loggers.tensorboard.log_dir": tmp_path,
    }  # fmt: skip
    for loader in ("train_loader", "eval_loader"):
        values |= {f"{loader}.prefetch_factor": "null", f"{loader}.persistent_workers": "false"}
        values |= {f"{loader}.pin_memory": "false"}
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "1", "train.py"]
    command += [f"yamls/pretrain/{name}.yaml", *(f"{key}={v}" for key, v in values.items())]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]

    folder = out / "huggingface" / "final"
    with pytest.raises(ValueError, match="attn_type.*monarch_mixer"):  # transformers' own MPT
        AutoModelForCausalLM.from_pretrained(folder)
    model = MPTForCausalLM.from_pretrained(folder)
    trained = torch.load(out / "latest-rank0.pt", weights_only=False)["state"]["model"]
    saved = {f"model.{key}": weight for key, weight in model.state_dict().items()}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[key], weight) for key, weight in trained.items())
    prompt = AutoTokenizer.from_pretrained(folder)(
        ["call me", "the sea"], add_special_tokens=False, return_tensors="pt"
    )
    ids = prompt["input_ids"]
    kwargs = {"attention_mask": prompt["attention_mask"], "max_new_tokens": 5, "do_sample": False}
    cached = model.generate(ids, **kwargs, use_cache=True)
    assert torch.equal(cached, model.generate(ids, **kwargs, use_cache=False))
    assert torch.equal(cached[:, :-1], model.generate(ids, **kwargs | {"max_new_tokens": 4}))
