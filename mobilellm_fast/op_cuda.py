"""The ops on a GPU: functions named as the ops, calling the Triton kernels of `kernels/`.

Tensors are contiguous, on one GPU, which is the current one. Triton is imported by the first call.
"""

import importlib.util

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # a constant, for torch.compile


def takes_floats(tensors: list[Tensor]) -> bool:
    """Whether kernels take these: dtypes may differ, everything is computed in float32."""
    return HAS_TRITON and all(t.dtype in FLOATS for t in tensors)


def takes_one_dtype(tensors: list[Tensor]) -> bool:
    """Whether kernels with matrix products take these: they want both factors alike."""
    return takes_floats(tensors) and len({t.dtype for t in tensors}) == 1


def takes_one_half(tensors: list[Tensor]) -> bool:
    """Whether these are of one 16-bit dtype: products in float32 are faster in the BLAS library."""
    return takes_one_dtype(tensors) and tensors[0].dtype != torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from .kernels.rms_norm import rms_norm

    return rms_norm(x, weight, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .kernels.rms_norm import rms_norm_backward

    return rms_norm_backward(grad, x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .kernels.rms_norm import add_rms_norm

    return add_rms_norm(x, residual, weight, eps)


def add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from .kernels.rms_norm import add_rms_norm_backward

    return add_rms_norm_backward(grad, grad_total, x, residual, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from .kernels.rope import rope

    return rope(x, cos, sin)


def rope_backward(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from .kernels.rope import rope_backward

    return rope_backward(grad, x, cos, sin)


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    from .kernels.swiglu import swiglu

    return swiglu(x, gate_weight, up_weight)


def swiglu_saving(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.swiglu import swiglu_saving

    return swiglu_saving(x, gate_weight, up_weight)


def swiglu_saved(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(*x.shape[:-1], len(gate_weight)) for _ in range(2))


def swiglu_backward(
    grad: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    out: Tensor,
    gate: Tensor,
    up: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.swiglu import swiglu_backward

    return swiglu_backward(grad, x, gate_weight, up_weight, gate, up)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    from .kernels.quantize_per_token import quantize_per_token

    return quantize_per_token(x)


def int8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    from .kernels.int8_gemm import int8_gemm

    return int8_gemm(x, x_scales, weight, weight_scales, bias, dtype)


def weight_only_linear(x: Tensor, codes: Tensor, scales: Tensor | None = None) -> Tensor:
    from .kernels.weight_only_linear import weight_only_linear

    return weight_only_linear(x, codes, scales)


def head_sample(
    x: Tensor,
    codes: Tensor,
    temperature: float = 0.0,
    seed: int = 0,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from .kernels.head_sample import head_sample

    return head_sample(x, codes, temperature, seed, scales)


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
