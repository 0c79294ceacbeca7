"""ONNX files with any batch size and length, for runtimes without PyTorch.

Dimension key: B batch, L sequence, D channels, H maximum length.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import m2_plugin.models
from m2_plugin.checkpoints.folder import build_model, load_folder
from m2_plugin.files import whole
from m2_plugin.layers.long_conv import LongConv
from m2_plugin.layers.monarch_mixer import MonarchMixer

__all__ = ["INPUTS", "OPSET", "export_onnx"]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSET = 17
MAX_BYTES = 2**31 - 2**20  # a protobuf ends at 2 GiB; the graph needs some of it


class ToeplitzProduct(torch.autograd.Function):
    """A convolution whose kernel has no fixed size, which torch's exporter refuses to write."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, kernels: Tensor, groups: int) -> Tensor:
        """Correlate an image (1, D, 2L − 1) with kernels (D·B, 1, L) to (1, D·B, L)."""
        return F.conv1d(image, kernels, groups=groups)

    @staticmethod
    def symbolic(g: Any, image: Any, kernels: Any, groups: int) -> Any:
        """Write ONNX's Conv, which takes kernels that are computed."""
        y = g.op("Conv", image, kernels, group_i=groups)
        return y.setType(image.type().with_sizes([1, None, None]))


class ToeplitzConv(nn.Module):
    """`LongConv` for export: taps in place of their MLP, products in place of the FFT.

    Exact at any length, at a cost that grows with its square. The taps are the image and the batch
    holds the kernels, not the other way round: the runtime then unfolds the taps once for all of a
    batch, into the L × L Toeplitz matrix, without padding.

    Args:
        conv: The layer to replace.
    """

    taps: Tensor

    def __init__(self, conv: LongConv):
        super().__init__()
        self.channels = conv.filter.channels
        self.max_length = conv.filter.max_length
        self.register_buffer("taps", conv.taps(self.max_length)[None])  # (1, D, 2H − 1)

    def forward(self, u: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D), L ≤ H."""
        length = u.shape[1]
        image = self.taps[:, :, self.max_length - length : self.max_length + length - 1]
        kernels = u.permute(2, 0, 1).flip(2).reshape(-1, 1, length)
        y = ToeplitzProduct.apply(image, kernels, self.channels)
        return y.reshape(self.channels, -1, length).permute(1, 2, 0)


class Positional(nn.Module):
    """A model that takes `INPUTS` in their order and returns a tuple of tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Take (B, L) inputs; returns what the model does."""
        return self.outputs(*inputs).to_tuple()

    def outputs(self, *inputs: Tensor) -> Any:
        """Return the model's output, with names."""
        named = dict(zip(INPUTS, inputs, strict=True))
        return self.model(**named, output_hidden_states=False, return_dict=True)


def export_onnx(folder: str | Path, out: str | Path) -> list[str]:
    """Write the model of a transformers folder as one ONNX file, fp32.

    Its inputs are `input_ids`, `attention_mask` and `token_type_ids`, each (B, L) int64 and
    required, with any B and any L up to the model's longest. Its outputs have the names and shapes
    that the model's have in transformers.

    Args:
        folder: A transformers folder with an M2-BERT.
        out: The file to write. It appears when it is whole.

    Returns:
        The names of the outputs.

    Raises:
        ValueError: If the folder is none of ours or not whole, has another mixer than Monarch's, or
            is too large for a file; if `out` is there already; or if `onnx` is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ValueError("onnx is not installed: pip install onnx onnxruntime")
    config, weights = load_folder(folder)
    if config.sequence_mixer != "monarch_mixer":
        raise ValueError(
            f"only models with sequence_mixer 'monarch_mixer' are exported to ONNX, and that of "
            f"{str(folder)!r} is {config.sequence_mixer!r}"
        )
    name = (config.architectures or [""])[0]
    if name not in m2_plugin.models.__all__ or not name.startswith("M2BertFor"):
        raise ValueError(
            f"architectures in the config.json of {str(folder)!r} is {config.architectures}, where "
            f"one of the models with a head is needed, as M2BertForMaskedLM"
        )
    with whole(Path(out)) as temporary, torch.no_grad():
        config.backend = "torch"
        model = build_model(getattr(m2_plugin.models, name), config, weights)
        positional = Positional(_without_fft(model))
        # The file holds the decoder's tied weight again, transposed.
        parameters = positional.named_parameters(remove_duplicate=False)
        tensors = [*(tensor for _, tensor in parameters), *positional.buffers()]
        size = sum(tensor.nbytes for tensor in tensors)
        if size > MAX_BYTES:
            raise ValueError(
                f"{str(folder)!r} would need {size / 2**30:.1f} GiB, and an ONNX file holds 2: "
                f"the filters' taps grow with long_conv_l_max = {config.long_conv_l_max}"
            )
        # Neither 1 nor alike, so that the tracer takes no size for a constant.
        ids = torch.zeros(3, min(7, config.long_conv_l_max), dtype=torch.int64)
        inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
        outputs = positional.outputs(*inputs)
        axes = {0: "batch", 1: "sequence"}
        dynamic = dict.fromkeys(INPUTS, axes) | {
            key: axes if value.shape[:2] == ids.shape else {0: "batch"}
            for key, value in outputs.items()
        }
        with warnings.catch_warnings():
            # Sizes compared in Python are said to become constants: ours are checks only.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            torch.onnx.export(
                positional,
                inputs,
                str(temporary),
                input_names=list(INPUTS),
                output_names=list(outputs),
                dynamic_axes=dynamic,
                opset_version=OPSET,
                dynamo=False,  # that way needs onnxscript, which the host does not bring
            )
        _declare_inputs(str(temporary))
    return list(outputs)


def _declare_inputs(path: str) -> None:
    """Add the inputs that a model does not read: the exporter leaves them out."""
    import onnx

    model = onnx.load(path)
    there = {entry.name for entry in model.graph.input}
    for name in INPUTS:
        if name not in there:
            kind = onnx.helper.make_tensor_value_info(
                name, onnx.TensorProto.INT64, ["batch", "sequence"]
            )
            model.graph.input.append(kind)
    if len(model.graph.input) != len(there):
        onnx.save(model, path)


def _without_fft(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, MonarchMixer):
            # Not a plain Linear any more, so not computed transposed, in sizes the tracer freezes.
            module.in_proj = nn.Sequential(module.in_proj)  # type: ignore[assignment]
        for name, child in module.named_children():
            if isinstance(child, LongConv):
                setattr(module, name, ToeplitzConv(child))
    return model
