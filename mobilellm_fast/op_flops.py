"""What `torch.utils.flop_counter` counts for our ops: two operations per product, as for torch's.

A causal mask does not make attention count less, nor does it in torch.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

SHAPE = tuple[int, ...]
OPS = torch.ops.mobilellm_fast


@register_flop_formula(OPS.gqa_attention)
def gqa_attention(q: SHAPE, k: SHAPE, v: SHAPE, *_: Any, **__: Any) -> int:
    return 2 * 2 * math.prod(q) * k[1]  # scores, and the sum of values: q (batch, seq, heads, n)


@register_flop_formula(OPS.swiglu)
def swiglu(x: SHAPE, gate_weight: SHAPE, up_weight: SHAPE, *_: Any, **__: Any) -> int:
    return 2 * 2 * math.prod(x) * gate_weight[0]


@register_flop_formula(OPS.linear)
def linear(x: SHAPE, packed: SHAPE, kind: str, rows: int, cols: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * rows
