"""The ops as torch operators: `torch.ops.mobilellm_fast.<stem>`, differentiable and compilable.

One call of `register` per op joins the reference with its checks (`op_checks`) and its kernels
(`op_cpu`, `op_cuda`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import op_checks, op_cpu, op_cuda, reference
from .op_checks import FLOATS, INTEGERS
from .op_registry import register

__all__ = ["FLOATS", "INTEGERS"]


def _table_dtype(kind: str) -> torch.dtype:
    return torch.bfloat16 if kind == "bf16" else torch.float32


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`reference.gqa_attention` without its matrix of scores."""
    seq, kv_seq = q.shape[1], k.shape[1]
    mask = None
    if seq != kv_seq:  # torch aligns its causal mask with the first key, not with the last
        mask = torch.ones(seq, kv_seq, dtype=torch.bool, device=q.device).tril(kv_seq - seq)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        *heads_first, mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


rms_norm = register(
    reference.rms_norm,
    check=op_checks.rms_norm,
    fake=_like_first,
    cpu=op_cpu.rms_norm,
    cuda=op_cuda.rms_norm,
    cuda_backward=op_cuda.rms_norm_backward,
)
add_rms_norm = register(
    reference.add_rms_norm,
    check=op_checks.add_rms_norm,
    fake=lambda x, *_: (_like_first(x), _like_first(x)),
    cuda=op_cuda.add_rms_norm,
    cuda_backward=op_cuda.add_rms_norm_backward,
    cuda_gradients=(0, 0, 1),
)
rope = register(
    reference.rope,
    check=op_checks.rope,
    fake=_like_first,
    cpu=op_cpu.rope,
    cuda=op_cuda.rope,
    cuda_backward=op_cuda.rope_backward,
)
gqa_attention = register(
    reference.gqa_attention,
    check=op_checks.gqa_attention,
    fake=_like_first,
    cpu=op_cpu.gqa_attention,
    cuda=op_cuda.gqa_attention,
    cuda_saving=op_cuda.gqa_attention_saving,
    cuda_backward=op_cuda.gqa_attention_backward,
    cuda_takes=op_cuda.takes_one_dtype,
    fake_saved=op_cuda.gqa_attention_saved,
    once_differentiable=_fused_attention,
)
gqa_decode = register(
    reference.gqa_decode,
    check=op_checks.gqa_decode,
    cuda=op_cuda.gqa_decode,
    cuda_takes=op_cuda.takes_one_dtype,
)
swiglu = register(
    reference.swiglu,
    check=op_checks.swiglu,
    fake=lambda x, gate, _: x.new_empty(*x.shape[:-1], len(gate)),
    cpu=op_cpu.swiglu,
    cuda=op_cuda.swiglu,
    cuda_saving=op_cuda.swiglu_saving,
    cuda_backward=op_cuda.swiglu_backward,
    cuda_takes=op_cuda.takes_one_half,
    fake_saved=op_cuda.swiglu_saved,
)
decoder_block = register(
    reference.decoder_block,
    check=op_checks.decoder_block,
    cuda=op_cuda.decoder_block,
    cuda_saving=op_cuda.decoder_block_saving,
    cuda_backward=op_cuda.decoder_block_backward,
    cuda_takes=op_cuda.takes_block,
    fake=_like_first,
    fake_saved=op_cuda.decoder_block_saved,
)
quantize_per_token = register(
    reference.quantize_per_token,
    check=op_checks.quantize_per_token,
    cpu=op_cpu.quantize_per_token,
    cuda=op_cuda.quantize_per_token,
)
int8_gemm = register(reference.int8_gemm, check=op_checks.int8_gemm, cuda=op_cuda.int8_gemm)
weight_only_linear = register(
    reference.weight_only_linear,
    check=op_checks.weight_only_linear,
    cuda=op_cuda.weight_only_linear,
)
head_sample = register(reference.head_sample, check=op_checks.head_sample, cuda=op_cuda.head_sample)
dequantize = register(
    reference.dequantize,
    check=op_checks.dequantize,
    fake=lambda packed, kind, rows, cols: packed.new_empty(rows, cols, dtype=_table_dtype(kind)),
)
embed = register(
    reference.embed,
    check=op_checks.embed,
    fake=lambda ids, packed, kind, rows, cols: packed.new_empty(
        *ids.shape, cols, dtype=_table_dtype(kind)
    ),
)
linear = register(
    reference.linear,
    check=op_checks.linear,
    cpu=op_cpu.linear,
    fake=lambda x, packed, kind, rows, cols, activation="float": x.new_empty(*x.shape[:-1], rows),
    # the rounding of activations passes gradients straight through
    differentiable=lambda x, packed, kind, rows, cols, activation="float": F.linear(
        x, dequantize(packed, kind, rows, cols).to(x.dtype)
    ),
)

from . import op_flops  # noqa: E402, F401 - what it counts has to be there
