"""The ops on a GPU: functions named as the ops, calling the Triton kernels of `kernels/`.

Tensors are contiguous, on one GPU, which is the current one. Triton is imported by the first call.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .triton_version import has_triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = has_triton()  # a constant, for torch.compile


@functools.cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f".kernels.{name}", __package__)


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
    return _kernels("rms_norm").rms_norm(x, weight, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _kernels("rms_norm").rms_norm_backward(grad, x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _kernels("rms_norm").add_rms_norm(x, residual, weight, eps)


def add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _kernels("rms_norm").add_rms_norm_backward(grad, grad_total, x, residual, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _kernels("rope").rope(x, cos, sin)


def rope_backward(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _kernels("rope").rope_backward(grad, cos, sin)


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    return _kernels("swiglu").swiglu(x, gate_weight, up_weight)


def swiglu_saving(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels("swiglu").swiglu_saving(x, gate_weight, up_weight)


def swiglu_saved(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(*x.shape[:-1], len(gate_weight)) for _ in range(2))


def swiglu_backward(
    grad: Tensor,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate: Tensor,
    up: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels("swiglu").swiglu_backward(grad, x, gate_weight, up_weight, gate, up)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels("quantize_per_token").quantize_per_token(x)


def int8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return _kernels("int8_gemm").int8_gemm(x, x_scales, weight, weight_scales, bias, dtype)


def weight_only_linear(x: Tensor, codes: Tensor, scales: Tensor | None = None) -> Tensor:
    return _kernels("weight_only_linear").weight_only_linear(x, codes, scales)


def head_sample(
    x: Tensor,
    codes: Tensor,
    temperature: float = 0.0,
    seed: int = 0,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _kernels("head_sample").head_sample(x, codes, temperature, seed, scales)


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return gqa_attention_saving(q, k, v, scale)[0]


def gqa_attention_saving(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the op's result and the logarithms of the softmax's sums."""
    return _kernels("gqa_attention").forward(
        q, k, v, q.shape[-1] ** -0.5 if scale is None else scale
    )


def gqa_attention_saved(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor]:
    batch, seq, heads, _ = q.shape
    return (q.new_empty(batch, heads, seq, dtype=torch.float32),)


def gqa_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels("gqa_attention").backward(
        grad, q, k, v, out, lse, q.shape[-1] ** -0.5 if scale is None else scale
    )


def gqa_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    return _kernels("gqa_decode").gqa_decode(q, k_cache, v_cache, lengths, scale)


def takes_block(tensors: list[Tensor]) -> bool:
    """Whether kernels take a block: the tables of the rotation, last, may be of another dtype."""
    return takes_one_half(tensors[:-2]) and takes_floats(tensors[-2:])


def decoder_block(*arguments: Any) -> Tensor:
    return _kernels("decoder_block").decoder_block(*arguments)[0]


def decoder_block_saving(
    x: Tensor,
    input_norm: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    post_norm: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the op's result and what `decoder_block_backward` wants behind the arguments."""
    weights = input_norm, q_weight, k_weight, v_weight, o_weight
    weights += post_norm, gate_weight, up_weight, down_weight
    return _kernels("decoder_block").decoder_block(x, *weights, cos, sin, head_dim, eps, save=True)


def decoder_block_saved(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weights, head_dim = args[:9], args[11]
    batch, seq, width = x.shape
    tokens, inner = batch * seq, len(weights[6])
    queries, keys = len(weights[1]), len(weights[2])
    heads = queries // head_dim
    return (
        *(x.new_empty(tokens, n) for n in (width, queries + 2 * keys)),
        x.new_empty(batch, seq, heads, head_dim),
        x.new_empty(batch, heads, seq, dtype=torch.float32),
        *(x.new_empty(tokens, n) for n in (width, width, inner, inner, inner)),
    )


def decoder_block_backward(
    grad: Tensor,
    x: Tensor,
    input_norm: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    post_norm: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
    normed: Tensor,
    qkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    middle: Tensor,
    middle_normed: Tensor,
    inner: Tensor,
    gate: Tensor,
    up: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = input_norm, q_weight, k_weight, v_weight, o_weight
    weights += post_norm, gate_weight, up_weight, down_weight
    saved = normed, qkv, attended, lse, middle, middle_normed, inner, gate, up
    backward = _kernels("decoder_block").decoder_block_backward
    return backward(grad, x, *weights, cos, sin, head_dim, eps, *saved)
