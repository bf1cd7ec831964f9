"""Modules over packed weights, and the way between a torch model and the engine's weights."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from . import ops, quant
from .errors import MobileLLMError
from .layers import Embedding, Linear, RMSNorm
from .quant import PackedWeight
from .weights import Weights

# What a layer does that its weight says all about; a class of somebody else's may inherit it.
FORWARDS = (nn.Linear.forward, nn.Embedding.forward, RMSNorm.forward)
COMPILED = "_orig_mod."  # before the names of what `torch.compile` wraps


class PackedLinear(nn.Module):
    """A linear layer with quantized weights, in the memory that the C++ kernels read.

    Gradients reach its input, not its weights.

    Args:
        weight: of a quantized kind; not copied.
        activation: what the input is rounded to, see `ops.linear`.
    """

    def __init__(self, weight: PackedWeight, activation: str) -> None:
        super().__init__()
        self.kind, self.rows, self.cols = weight.kind, weight.rows, weight.cols
        self.activation = activation
        # Named after its kind: the state_dict of another format has other names, and is refused.
        self.register_buffer(f"packed_{weight.kind}", torch.from_numpy(weight.data))

    @property
    def packed(self) -> Tensor:
        """The packed matrix: flat uint8, laid out as `csrc/quant.h` says."""
        return self._buffers[f"packed_{self.kind}"]

    @property
    def weight(self) -> PackedWeight:
        """The matrix, for code without torch; shares the memory of a buffer on the CPU."""
        return PackedWeight(self.kind, self.rows, self.cols, self.packed.cpu().numpy())

    def forward(self, x: Tensor) -> Tensor:
        """(..., cols) -> (..., rows)."""
        return ops.linear(x, self.packed, self.kind, self.rows, self.cols, self.activation)

    def extra_repr(self) -> str:
        return f"{self.cols}, {self.rows}, {self.kind}, activation={self.activation}"


class PackedEmbedding(PackedLinear):
    """An embedding with quantized rows, which may serve as the output head too."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids -> (..., cols) float32."""
        return ops.embed(ids, self.packed, self.kind, self.rows, self.cols)

    def project(self, hidden: Tensor) -> Tensor:
        """(..., cols) -> (..., rows)."""
        return super().forward(hidden)


def install(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, PackedWeight | np.ndarray],
    format: str,
) -> None:
    """Put weights into a model without copying them; layers of quantized ones become packed.

    `format` says what the inputs of those are rounded to, see `quant.activation_before`.

    Raises:
        MobileLLMError: a weight is missing, unexpected or has a wrong shape.
    """
    for name in sorted(shapes.keys() ^ weights.keys()):
        fault = "lack" if name in shapes else "have an unexpected"
        raise MobileLLMError(f"[from_weights] weights {fault} {name}")
    for name, weight in weights.items():
        is_matrix = isinstance(weight, PackedWeight)
        got = (weight.rows, weight.cols) if is_matrix else weight.shape
        if got != shapes[name]:
            raise MobileLLMError(f"[from_weights] {name} must have shape {shapes[name]}, got {got}")
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        is_table = isinstance(layer, (nn.Embedding, PackedEmbedding))
        if is_matrix and weight.kind in quant.QUANTIZED_KINDS:
            activation = quant.activation_before(format, name, weight.kind)
            new = (PackedEmbedding if is_table else PackedLinear)(weight, activation)
        else:
            tensor = torch.from_numpy(weight.data if is_matrix else weight)
            if tensor.dtype == torch.uint16:
                tensor = tensor.view(torch.bfloat16)
            new = layer
            if isinstance(layer, PackedLinear):
                rows, cols = weight.rows, weight.cols
                new = (
                    Embedding(rows, cols, device="meta")
                    if is_table
                    else Linear(cols, rows, bias=False, device="meta")
                )
            new.weight = nn.Parameter(tensor)
        if new is not layer:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, new)


def floats(model: nn.Module, names: Iterable[str]) -> Weights:
    """Return those of a model's weights that are parameters, see `collect`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return collect(model, [name for name in names if name in parameters])


def _beside_weight(layer: nn.Module) -> list[str]:
    """Return the names of parameters that a layer computes with beside its weight."""
    if type(layer).forward in FORWARDS:  # whatever makes its weight, as parametrizations do
        return [] if getattr(layer, "bias", None) is None else ["bias"]
    names = (name.removeprefix(COMPILED) for name, _ in layer.named_parameters())
    return [name for name in names if name != "weight"]


def collect(model: nn.Module, names: Iterable[str]) -> Weights:
    """Return a model's weights as `install` takes them, sharing the memory of matrices.

    Those on a GPU are copied.

    Raises:
        MobileLLMError: a parameter is nowhere, or neither float32 nor bfloat16, or its layer
            computes more than with it.
    """
    weights = {}
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, PackedLinear):
            if layer.packed.is_meta:
                raise MobileLLMError(f"[weights] {name} must have values, got {layer.kind} on meta")
            weights[name] = layer.weight
            continue
        if hasattr(layer, "codes"):  # see cuda/modules.py
            raise MobileLLMError(
                f"[weights] {name} must be float, or packed for a CPU, got it quantized for a GPU"
            )
        if more := _beside_weight(layer):
            raise MobileLLMError(
                f"[weights] {name} must be all that its layer computes with, got {', '.join(more)} "
                "beside it: adapters must be merged and unloaded, biases removed"
            )
        tensor = layer.weight.detach()
        if tensor.device.type == "cuda":
            tensor = tensor.cpu()
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.bfloat16):
            got = f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
            raise MobileLLMError(f"[weights] {name} must be float32 or bfloat16 on cpu, got {got}")
        tensor = tensor.contiguous()
        if tensor.ndim == 1:
            weights[name] = tensor.float().numpy()
        elif tensor.dtype == torch.float32:
            weights[name] = PackedWeight("fp32", *tensor.shape, tensor.numpy())
        else:
            bits = tensor.view(torch.uint16).numpy()
            weights[name] = PackedWeight("bf16", *tensor.shape, bits)
    return weights
