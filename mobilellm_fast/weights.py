"""All weights of a model in one buffer, in the order in which a step reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import _C, quant
from .config import MobileLLMConfig, expected_shapes
from .quant import PackedWeight

Weights = Mapping[str, PackedWeight | np.ndarray]


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: `kind` is one of `quant`'s, or "vector" for a float32 norm."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self, buffer: np.ndarray) -> PackedWeight | np.ndarray:
        """Return the tensor as part of the buffer (flat uint8)."""
        data = buffer[self.offset : self.offset + self.nbytes]
        if self.kind == "vector":
            return data.view(np.float32)
        if self.kind in ("fp32", "bf16"):
            data = data.view(np.float32 if self.kind == "fp32" else np.uint16).reshape(self.shape)
        return PackedWeight(self.kind, *self.shape, data)


def plan_slots(config: MobileLLMConfig, kinds: Mapping[str, str]) -> list[Slot]:
    """Lay tensors out one behind the other, each at a multiple of 64 bytes.

    Args:
        config: names the tensors, in execution order.
        kinds: kind of each matrix.
    """
    slots, offset = [], 0
    for name, shape in expected_shapes(config).items():
        kind = "vector" if len(shape) == 1 else kinds[name]
        nbytes = 4 * shape[0] if kind == "vector" else quant.packed_nbytes(kind, *shape)
        slots.append(Slot(name, kind, shape, offset, nbytes))
        offset += -(-nbytes // quant.ALIGNMENT) * quant.ALIGNMENT
    return slots


def read_weights(checkpoint, format: str) -> tuple[Weights, np.ndarray]:
    """Read a checkpoint tensor by tensor, in the kinds of `format`.

    Returns:
        weights, buffer: the tensors by name, and the flat uint8 that they are parts of.
    """
    kinds = {
        name: quant.kind_of(format, name, tensor.dtype)
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2
    }
    slots = plan_slots(checkpoint.config, kinds)
    buffer = _C.allocate(slots[-1].offset + slots[-1].nbytes)
    weights = {}
    for slot in slots:
        weights[slot.name] = slot.view(buffer)
        tensor = checkpoint.read(slot.name)
        if slot.kind == "vector":
            weights[slot.name][:] = tensor
        else:
            quant.pack(tensor, slot.kind, buffer[slot.offset : slot.offset + slot.nbytes])
    return weights, buffer
