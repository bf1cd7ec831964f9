"""Sizes that the decode kernels are compiled for, from a model and a launch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MobileLLMConfig
from .weights import CudaWeights, Matrix

BLOCK = 8192  # keys of a block of attention: four loads per thread of 8 warps
SPLITS = 8  # most programs per head: more would cost more to merge than they save


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Geometry:
    """Compile-time sizes of a model's decode kernels, by the names of their parameters."""

    weights: CudaWeights

    @property
    def attention(self) -> dict[str, int]:
        """Sizes of `attend`."""
        config = self.weights.config
        return {
            **self.merging,
            "KV_HEADS": config.num_key_value_heads,
            "DIM": power_of_two(config.head_dim),
        }

    @property
    def merging(self) -> dict[str, int]:
        """Sizes of `merge`."""
        config = self.weights.config
        return {
            "HEADS": config.num_attention_heads,
            "HEAD_DIM": config.head_dim,
            "SPLITS": SPLITS,
            "BLOCK_KV": BLOCK // power_of_two(config.head_dim),
        }

    @property
    def partial_size(self) -> int:
        """Values of `attend`'s partial results."""
        return _partial_size(self.weights.config)


def vector_size(config: MobileLLMConfig) -> int:
    """Count the values of all vectors of a decode step, in the order of `persistent_kernel`."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    size = 2 * config.hidden_size + (queries + 2 * keys) + queries + config.intermediate_size
    return size + _partial_size(config)


def _partial_size(config: MobileLLMConfig) -> int:
    return config.num_attention_heads * SPLITS * (config.head_dim + 1)


def scales_of(matrix: Matrix) -> Tensor:
    """Return the scales as kernels take them: pairs of float16 as int32, codes where none are."""
    if matrix.scales is None:
        return matrix.codes
    if matrix.kind != "int4_g32":
        return matrix.scales
    return matrix.scales.view(torch.int32).squeeze(-1)


def softmax_scale(weights: CudaWeights) -> float:
    """What scores are multiplied by: 1 / sqrt(head_dim)."""
    return 1 / math.sqrt(weights.config.head_dim)
