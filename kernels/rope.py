"""Rotary position embedding, and its derivative: the rotation by the opposite angle."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, Launch


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (x[i], x[i + head_dim / 2]) of every head by its position's angle.

    Args:
        x: (batch, seq, heads, head_dim) float32, bfloat16 or float16, contiguous.
        cos, sin: (seq, head_dim / 2) or (batch, seq, head_dim / 2), contiguous.

    Returns:
        (batch, seq, heads, head_dim), dtype of `x`.
    """
    return _launch(x, cos, sin, False)


def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Differentiate `rope`: the gradient of its result -> that of `x`."""
    return _launch(grad, cos, sin, True)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> None:
    """Rotate in place, `back` by the opposite angle.

    Args:
        x: as for `rope`; other values may lie between its tokens, not between its heads.
        cos, sin: as for `rope`.
    """
    if x.numel():
        _launch_of(x.shape, x.stride(1), cos.ndim, back, *_kinds(x, cos, sin))(x, cos, sin, x)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        _launch_of(x.shape, x.stride(1), cos.ndim, back, *_kinds(x, cos, sin))(x, cos, sin, out)
    return out


def _kinds(x: Tensor, cos: Tensor, sin: Tensor) -> tuple:
    return x.dtype, cos.dtype, sin.dtype, x.device


@functools.lru_cache(SIZES)
def _launch_of(shape: torch.Size, stride: int, axes: int, back: bool, *_kinds: Any) -> Launch:
    batch, seq, heads, head_dim = shape
    half = triton.next_power_of_2(head_dim // 2)
    rows = triton.next_power_of_2(heads)
    positions = seq if axes == 2 else batch * seq
    return Launch(
        _rope,
        (batch * seq,),
        (heads, head_dim // 2, positions, stride),
        HEADS=rows,
        HALF=half,
        BACK=back,
        num_warps=min(max(rows * half // 256, 1), 8),
    )


@triton.jit
def _rope(
    x,
    cos,
    sin,
    out,
    heads,
    half,
    positions,
    stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
):
    token = tl.program_id(0)
    inner = tl.arange(0, HALF)
    head = tl.arange(0, HEADS)
    angle = (token % positions).to(tl.int64) * half + inner
    cosine = tl.load(cos + angle, mask=inner < half, other=0).to(tl.float32)[None, :]
    sine = tl.load(sin + angle, mask=inner < half, other=0).to(tl.float32)[None, :]
    if BACK:
        sine = -sine
    place = token.to(tl.int64) * stride + head[:, None] * (2 * half) + inner[None, :]
    mask = (head < heads)[:, None] & (inner < half)[None, :]
    first = tl.load(x + place, mask=mask, other=0).to(tl.float32)
    second = tl.load(x + place + half, mask=mask, other=0).to(tl.float32)
    tl.debug_barrier()  # in place, threads of a small tile write what others read, too
    dtype = out.dtype.element_ty
    tl.store(out + place, (first * cosine - second * sine).to(dtype), mask=mask)
    tl.store(out + place + half, (second * cosine + first * sine).to(dtype), mask=mask)
