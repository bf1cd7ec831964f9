"""Sizes that the decode kernels are compiled for, from a model and a launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .weights import CudaWeights, Matrix

LANES = 32
BLOCK_KV = 128  # tokens of a tile of attention: two loads per thread of 16 warps
SPLITS = 16  # most programs per KV head: more would cost more to merge than they save


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def vector_width(matrix: Matrix) -> int:
    """Elements that one lane loads at once: up to 16 bytes, fewer where that wastes fewer lanes."""
    stride = matrix.codes.shape[-1]
    largest = min(16 // matrix.codes.element_size(), stride & -stride)
    if matrix.kind == "int4_g32":
        return largest  # always a whole group: 16 bytes

    def waste(width: int) -> float:
        return -(-stride // (LANES * width)) * LANES * width / stride

    half = max(largest // 2, 1)
    return half if waste(half) < 0.8 * waste(largest) else largest


@dataclass(frozen=True)
class Geometry:
    """Compile-time sizes of a model's decode kernels, by the names of their parameters."""

    weights: CudaWeights

    @property
    def model(self) -> dict[str, int]:
        config = self.weights.config
        return {
            "HIDDEN": config.hidden_size,
            "INNER": config.intermediate_size,
            "VOCAB": config.vocab_size,
            "COL_BLOCK": power_of_two(config.hidden_size),
            **self.attention,
            **self.merging,
        }

    @property
    def attention(self) -> dict[str, int]:
        config = self.weights.config
        return {
            "HEADS": config.num_attention_heads,
            "KV_HEADS": config.num_key_value_heads,
            "HEAD_DIM": config.head_dim,
            "DIM": max(power_of_two(config.head_dim), 16),
            "SPLITS": SPLITS,
            "BLOCK_KV": BLOCK_KV,
        }

    @property
    def merging(self) -> dict[str, int]:
        sizes = self.attention
        del sizes["KV_HEADS"]
        return sizes | {"HEAD_ROWS": power_of_two(self.weights.config.num_attention_heads)}

    @property
    def partial_size(self) -> int:
        """Floats of `attend`'s partial results."""
        config = self.weights.config
        return config.num_attention_heads * SPLITS * (config.head_dim + 2)

    def matrix(self, name: str, prefix: str = "") -> dict[str, Any]:
        """Return KIND and VEC of a matrix, with a prefix."""
        matrix = getattr(self.weights, name)
        return {f"{prefix}KIND": matrix.kind, f"{prefix}VEC": vector_width(matrix)}


def scales_of(matrix: Matrix):
    """Return the scales as kernels take them: pairs of float16 as int32, codes where none are."""
    if matrix.scales is None:
        return matrix.codes
    if matrix.kind != "int4_g32":
        return matrix.scales
    import torch

    return matrix.scales.view(torch.int32).squeeze(-1)


def softmax_scale(weights: CudaWeights) -> float:
    return 1 / math.sqrt(weights.config.head_dim)
