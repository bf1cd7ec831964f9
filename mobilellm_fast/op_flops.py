"""What `torch.utils.flop_counter` counts for our ops: two operations per product, as for torch's.

A causal mask does not make attention count less, nor does it in torch.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

SHAPE = tuple[int, ...]
OPS = torch.ops.mobilellm_fast


@register_flop_formula([OPS.gqa_attention, OPS.gqa_attention_saving])
def gqa_attention(q: SHAPE, k: SHAPE, v: SHAPE, *_: Any, **__: Any) -> int:
    return 2 * 2 * math.prod(q) * k[1]  # scores, and the sum of values: q (batch, seq, heads, n)


@register_flop_formula(OPS.gqa_attention_backward)
def gqa_attention_backward(grad: SHAPE, q: SHAPE, k: SHAPE, *_: Any, **__: Any) -> int:
    return 2 * 5 * math.prod(q) * k[1]  # scores once more, and two gradients of each product


@register_flop_formula([OPS.swiglu, OPS.swiglu_saving])
def swiglu(x: SHAPE, gate_weight: SHAPE, up_weight: SHAPE, *_: Any, **__: Any) -> int:
    return 2 * 2 * math.prod(x) * gate_weight[0]


@register_flop_formula(OPS.swiglu_backward)
def swiglu_backward(grad: SHAPE, x: SHAPE, gate_weight: SHAPE, *_: Any, **__: Any) -> int:
    return 2 * 2 * 2 * math.prod(x) * gate_weight[0]


@register_flop_formula([OPS.decoder_block, OPS.decoder_block_saving])
def decoder_block(x: SHAPE, *args: Any, **__: Any) -> int:
    return _block_products(x, args) + 2 * 2 * _block_attention(x, args)


@register_flop_formula(OPS.decoder_block_backward)
def decoder_block_backward(grad: SHAPE, x: SHAPE, *args: Any, **__: Any) -> int:
    return 2 * _block_products(x, args) + 2 * 5 * _block_attention(x, args)


def _block_products(x: SHAPE, args: tuple) -> int:
    matrices = [math.prod(weight) for weight in args[:9] if len(weight) == 2]
    return 2 * x[0] * x[1] * sum(matrices)


def _block_attention(x: SHAPE, args: tuple) -> int:
    return x[0] * x[1] * x[1] * args[1][0]  # tokens, keys, heads * head_dim


@register_flop_formula(OPS.linear)
def linear(x: SHAPE, packed: SHAPE, kind: str, rows: int, cols: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * rows
