"""The model, matrix product by matrix product, for many tokens at once: prompts and batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .cache import FORMATS, CudaCache
from .weights import CudaWeights, Matrix

Attention = Callable[[int, Tensor], Tensor]  # slot, (tokens, qkv) float32 -> (tokens, queries)
HALF_MAX = torch.finfo(torch.float16).max


def hidden_states(weights: CudaWeights, ids: Tensor, attention: Attention) -> Tensor:
    """Run all blocks of the schedule.

    Args:
        ids: (tokens,) int64 on the device.
        attention: rotates, stores and attends, for the slot it is given.

    Returns:
        (tokens, hidden_size) float32, before the final norm.
    """
    eps = weights.config.rms_norm_eps
    hidden = embedded(weights.embedding, ids)
    for slot, block in enumerate(weights.config.schedule):
        normed = ops.rms_norm(hidden, weights.attention_norms[block], eps)
        attended = attention(slot, multiply(normed, weights.qkv[block]))
        hidden = hidden + multiply(attended, weights.output[block])
        normed = ops.rms_norm(hidden, weights.ffn_norms[block], eps)
        gate, up = multiply(normed, weights.gate_up[block]).chunk(2, -1)
        hidden = hidden + multiply(F.silu(gate) * up, weights.down[block])
    return hidden


def logits(weights: CudaWeights, hidden: Tensor) -> Tensor:
    """Map hidden states (tokens, hidden_size) to float32 (tokens, vocab_size)."""
    normed = ops.rms_norm(hidden, weights.final_norm, weights.config.rms_norm_eps)
    return multiply(normed, weights.head)


def embedded(embedding: Matrix, ids: Tensor) -> Tensor:
    """Look rows up: (tokens, cols) float32."""
    scales = None if embedding.scales is None else embedding.scales[ids]
    part = Matrix(embedding.kind, len(ids), embedding.cols, embedding.codes[ids], scales)
    return part.dequantize()


def multiply(x: Tensor, matrix: Matrix) -> Tensor:
    """Compute x W^T, (tokens, cols) float -> (tokens, rows) float32."""
    on_gpu = x.device.type == "cuda"
    if matrix.kind not in ("fp32", "bf16"):
        x = x.to(torch.bfloat16) if on_gpu else x
        return ops.weight_only_linear(x, matrix.codes, matrix.scales).float()
    x = x.to(matrix.codes.dtype)
    if on_gpu and x.dtype != torch.float32:
        # the sum is rounded once, when it has been added to the residual
        return torch.mm(x, matrix.codes.T, out_dtype=torch.float32)
    return F.linear(x, matrix.codes).float()


def prompt_attention(
    weights: CudaWeights, cache: CudaCache, rotary: tuple[Tensor, Tensor], count: int
) -> Attention:
    """Attend with `count` new tokens of one sequence, whose cache has room for them."""
    config, dim = weights.config, weights.config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    start, end = cache.length, cache.length + count
    cos, sin = (table[start:end] for table in rotary)
    dtype = FORMATS[cache.format]

    def stored(values: Tensor) -> Tensor:
        return values.clamp(-HALF_MAX, HALF_MAX) if dtype == torch.float16 else values

    def attention(slot: int, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
        q, k = (ops.rope(t.unsqueeze(0).contiguous(), cos, sin) for t in (q, k))
        keys, values = cache.data[slot].unbind(0)  # (kv_heads, capacity, head_dim)
        keys[:, start:end] = stored(k[0]).transpose(0, 1)
        values[:, start:end] = stored(v).transpose(0, 1)
        seen = (t[:, :end].transpose(0, 1).unsqueeze(0) for t in (keys, values))
        return ops.gqa_attention(q.to(dtype), *seen)[0].flatten(1)

    return attention
