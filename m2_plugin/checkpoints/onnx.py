"""Export ONNX files that take any batch size and length, for runtimes without PyTorch.

Dimension key: B batch, L sequence, D channels, H maximum length.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from itertools import takewhile
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
from m2_plugin.models.modeling_m2_bert import M2BertForMultipleChoice

__all__ = ["INPUTS", "OPSET", "export_onnx"]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSET = 17
MAX_BYTES = 2**31 - 2**20  # protobuf's limit is 2 GiB; 1 MiB is left for the graph


class ToeplitzProduct(torch.autograd.Function):
    """A convolution with a kernel of variable size, which torch's exporter does not support."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, kernels: Tensor, groups: int) -> Tensor:
        """Correlate an image (1, D, 2L − 1) with kernels (D·B, 1, L) to (1, D·B, L)."""
        return F.conv1d(image, kernels, groups=groups)

    @staticmethod
    def symbolic(g: Any, image: Any, kernels: Any, groups: int) -> Any:
        """Write ONNX's Conv, which accepts a computed kernel."""
        y = g.op("Conv", image, kernels, group_i=groups)
        return y.setType(image.type().with_sizes([1, None, None]))


class ToeplitzConv(nn.Module):
    """`LongConv` for export: stored taps replace their MLP, and matrix products replace the FFT.

    The result is exact at any length; the cost grows with the square of the length. The taps are
    the image and the inputs are the kernels. So the runtime unfolds the taps into the L × L
    Toeplitz matrix once per batch, without padding.

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
        """Run the model on (B, L) inputs; return its outputs as a tuple."""
        return self.outputs(*inputs).to_tuple()

    def outputs(self, *inputs: Tensor) -> Any:
        """Run the model; return its outputs by name."""
        named = dict(zip(INPUTS, inputs, strict=True))
        return self.model(**named, output_hidden_states=False, return_dict=True)


def export_onnx(folder: str | Path, out: str | Path) -> list[str]:
    """Write the model in a transformers folder as one ONNX file, in fp32.

    The inputs are `input_ids`, `attention_mask` and `token_type_ids`, each (B, L) int64, or
    (B, C, L) for multiple choice. All three are required. B and C are any numbers, L any up to the
    model's maximum. The outputs have the names and shapes of the model's outputs in transformers.

    Args:
        folder: A transformers folder with an M2-BERT.
        out: The file to write. It appears when it is complete.

    Returns:
        The names of the outputs.

    Raises:
        ValueError: If the folder has no complete M2-BERT with a head; its mixer is not
            `monarch_mixer`; the model is too large for one file; `out` exists; or `onnx` is not
            installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ValueError("onnx is not installed: pip install onnx onnxruntime")
    config, weights = load_folder(folder)
    if config.sequence_mixer != "monarch_mixer":
        raise ValueError(
            f"sequence_mixer in {str(folder)!r} is {config.sequence_mixer!r}: only models with "
            f"'monarch_mixer' can be exported to ONNX"
        )
    name = (config.architectures or [""])[0]
    if name not in m2_plugin.models.__all__ or not name.startswith("M2BertFor"):
        raise ValueError(
            f"architectures in the config.json of {str(folder)!r} is {config.architectures}: only "
            f"models with a head can be exported to ONNX, for example M2BertForMaskedLM"
        )
    with whole(Path(out)) as temporary, torch.no_grad():
        config.backend = "torch"
        model = build_model(getattr(m2_plugin.models, name), config, weights)
        positional = Positional(_without_fft(model))
        # The file holds the decoder's tied weight a second time, transposed.
        parameters = positional.named_parameters(remove_duplicate=False)
        tensors = [*(tensor for _, tensor in parameters), *positional.buffers()]
        size = sum(tensor.nbytes for tensor in tensors)
        if size > MAX_BYTES:
            raise ValueError(
                f"{str(folder)!r} would need {size / 2**30:.1f} GiB, but an ONNX file holds at "
                f"most 2: the filters' taps grow with long_conv_l_max = {config.long_conv_l_max}"
            )
        choices = isinstance(model, M2BertForMultipleChoice)
        axes = ("batch", "choices", "sequence") if choices else ("batch", "sequence")
        # All sizes differ and are not 1, so that the tracer does not treat them as constants.
        length = min(6 if config.num_labels == 7 else 7, config.long_conv_l_max)
        ids = torch.zeros(*(3, 5)[: len(axes) - 1], length, dtype=torch.int64)
        inputs = (ids, torch.ones_like(ids), torch.zeros_like(ids))
        outputs = positional.outputs(*inputs)
        dynamic = dict.fromkeys(INPUTS, dict(enumerate(axes))) | {
            key: _shared_axes(value, ids, axes) for key, value in outputs.items()
        }
        with warnings.catch_warnings():
            # The tracer warns that comparisons of sizes become constants. Ours are only checks.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            torch.onnx.export(
                positional,
                inputs,
                str(temporary),
                input_names=list(INPUTS),
                output_names=list(outputs),
                dynamic_axes=dynamic,
                opset_version=OPSET,
                dynamo=False,  # True needs onnxscript, which llm-foundry does not install
            )
        _declare_inputs(str(temporary), axes)
    return list(outputs)


def _shared_axes(output: Tensor, ids: Tensor, axes: Sequence[str]) -> dict[int, str]:
    """Name the first dimensions of an output, as far as they are those of the inputs."""
    shared = takewhile(
        lambda sizes: sizes[0] == sizes[1], zip(output.shape, ids.shape, strict=False)
    )
    return dict(enumerate(axes[: len(list(shared))]))


def _declare_inputs(path: str, axes: Sequence[str]) -> None:
    """Add inputs that the model does not read, because the exporter leaves them out."""
    import onnx

    model = onnx.load(path)
    declared = {entry.name for entry in model.graph.input}
    for name in INPUTS:
        if name not in declared:
            kind = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, list(axes))
            model.graph.input.append(kind)
    if len(model.graph.input) != len(declared):
        onnx.save(model, path)


def _without_fft(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, MonarchMixer):
            # MonarchMixer.project computes a plain Linear transposed, with sizes that the tracer
            # would store as constants. It calls any other module.
            module.in_proj = nn.Sequential(module.in_proj)  # type: ignore[assignment]
        for name, child in module.named_children():
            if isinstance(child, LongConv):
                setattr(module, name, ToeplitzConv(child))
    return model
