"""The ops on a GPU: functions named as the ops, calling the Triton kernels of `kernels/`.

Tensors are contiguous, on one GPU, which is the current one. Triton is imported by the first call.
"""

import functools
import importlib.util

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes_floats(tensors: list[Tensor]) -> bool:
    """Whether kernels take these: dtypes may differ, everything is computed in float32."""
    return has_triton() and all(t.dtype in FLOATS for t in tensors)


def takes_one_dtype(tensors: list[Tensor]) -> bool:
    """Whether kernels with matrix products take these: they want both factors alike."""
    return takes_floats(tensors) and len({t.dtype for t in tensors}) == 1


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return gqa_attention_saving(q, k, v, scale)[0]


def gqa_attention_saving(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the op's result and the logarithms of the softmax's sums."""
    from .kernels.gqa_attention import forward

    return forward(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def gqa_attention_saved(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor]:
    batch, seq, heads, _ = q.shape
    return (q.new_empty(batch, heads, seq, dtype=torch.float32),)


def gqa_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.gqa_attention import backward

    return backward(grad, q, k, v, out, lse, q.shape[-1] ** -0.5 if scale is None else scale)


def gqa_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    from .kernels.gqa_decode import gqa_decode as decode

    return decode(q, k_cache, v_cache, lengths, scale)
