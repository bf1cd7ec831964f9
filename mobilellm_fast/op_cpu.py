"""The ops on a CPU: functions named as the ops, calling the C++ kernels.

Tensors are contiguous, the floating ones float32.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _C, quant, reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _C.rms_norm(_rows(x), _parameter(weight), eps, _rows(out))
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    batch = x.shape[0]
    cos, sin = (t.expand(batch, *t.shape[-2:]).flatten(0, 1).contiguous() for t in (cos, sin))
    _C.rope(x.flatten(0, 1).numpy(), cos.numpy(), sin.numpy(), out.flatten(0, 1).numpy())
    return out


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    out = torch.empty_like(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for i in range(q.shape[0]):
        _C.gqa_attention(q[i].numpy(), k[i].numpy(), v[i].numpy(), scale, out[i].numpy())
    return out


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:-1], gate_weight.shape[0])
    gate, up = (("fp32", *w.shape, _parameter(w)) for w in (gate_weight, up_weight))
    _C.swiglu(_rows(x), gate, up, _rows(out), "float", threads=torch.get_num_threads())
    return out


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1])
    _C.quantize_per_token(_rows(x), _rows(codes), scales.reshape(-1).numpy())
    return codes, scales


def linear(
    x: Tensor, packed: Tensor, kind: str, rows: int, cols: int, activation: str = "float"
) -> Tensor:
    if (kind in quant.QUANTIZED_KINDS) != (activation != "float"):
        return reference.linear(x, packed, kind, rows, cols, activation)
    out = x.new_empty(*x.shape[:-1], rows)
    weight = (kind, rows, cols, packed.numpy())
    _C.linear(_rows(x), weight, _rows(out), activation, threads=torch.get_num_threads())
    return out


def _parameter(weight: Tensor) -> Any:
    """View a parameter as an array; `numpy()` would forbid FSDP to free its memory ever after."""
    return np.from_dlpack(weight)


def _rows(x: Tensor) -> Any:
    """View as (rows, n), sharing memory with the tensor."""
    return x.reshape(-1, x.shape[-1]).numpy()
