"""Root mean square norm of rows, alone or of a sum with a residual, and its derivative.

One program per row: a row of 1600 is 3 KB, and rows are plenty where time matters. The sum with the
residual is rounded to its dtype before it is normed, as if the two were separate operators.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SIZES, Launch

PARTS = 256  # programs that share the rows of a derivative: as many partial sums for the weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm rows: `x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        x: (..., n) float32, bfloat16 or float16, contiguous.
        weight: (n,), dtype of its own.
        eps: added to the mean square.

    Returns:
        (..., n), dtype of `x`.
    """
    out = torch.empty_like(x)
    _launch_forward(x, x, weight, eps, out, out, False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add rows, then norm the sum.

    Args:
        x, residual: (..., n) of one dtype, contiguous.
        weight, eps: as for `rms_norm`.

    Returns:
        The norm of the sum, and the sum: (..., n), dtype of `x`.
    """
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch_forward(x, residual, weight, eps, out, total, True)
    return out, total


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, grad_total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Differentiate `rms_norm`: the gradient of its result -> gradients of `x` and `weight`.

    That of `x` includes `grad_total`, what flows into `x` beside the norm.
    """
    return _launch_backward(grad, grad_total, x, None, weight, eps)


def add_rms_norm_backward(
    grad: Tensor, grad_total: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Differentiate `add_rms_norm`: gradients of both results -> those of the sum and `weight`."""
    return _launch_backward(grad, grad_total, x, residual, weight, eps)


def _launch_forward(x, residual, weight, eps, out, total, add: bool) -> None:
    if count := x.numel():
        cols = x.shape[-1]
        launch = _forward_of(count // cols, cols, eps, add, x.dtype, weight.dtype, x.device)
        launch(x, residual, weight, out, total)


@functools.lru_cache(SIZES)
def _forward_of(rows, cols, eps, add, *_kinds) -> Launch:
    block = triton.next_power_of_2(cols)
    constants = dict(BLOCK=block, ADD=add, num_warps=_warps(block))
    return Launch(_rms_norm, (rows,), (cols, eps), **constants)


def _launch_backward(grad, grad_total, x, residual, weight, eps) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x)
    count = x.numel()
    if not count:
        return grad_x, torch.zeros_like(weight)
    cols = x.shape[-1]
    rows = count // cols
    parts = min(rows, PARTS)
    partial = x.new_empty(parts, cols, dtype=torch.float32)
    flags = residual is not None, grad_total is not None
    launch = _backward_of(rows, cols, parts, eps, *flags, x.dtype, weight.dtype, x.device)
    added = grad if grad_total is None else grad_total, x, x if residual is None else residual
    launch(grad, *added, weight, grad_x, partial)
    sums = partial.sum(0)
    return grad_x, sums if weight.dtype == torch.float32 else sums.to(weight.dtype)


@functools.lru_cache(SIZES)
def _backward_of(rows, cols, parts, eps, add, total, *_kinds) -> Launch:
    block = triton.next_power_of_2(cols)
    constants = dict(BLOCK=block, ADD=add, TOTAL=total, num_warps=_warps(block))
    return Launch(_rms_norm_backward, (parts,), (rows, cols, eps), **constants)


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)  # 8 elements per thread: one 16-byte load of 16-bit ones


@triton.jit
def _rms_norm(x, residual, weight, out, total, cols, eps, BLOCK: tl.constexpr, ADD: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * cols
    place = tl.arange(0, BLOCK)
    mask = place < cols
    row = tl.load(x + start + place, mask=mask, other=0)
    if ADD:
        added = row.to(tl.float32) + tl.load(residual + start + place, mask=mask, other=0)
        row = added.to(x.dtype.element_ty)
        tl.store(total + start + place, row, mask=mask)
    scale = tl.load(weight + place, mask=mask, other=0).to(tl.float32)
    row = row.to(tl.float32)
    normed = row * tl.rsqrt(tl.sum(row * row, 0) / cols + eps)
    tl.store(out + start + place, (normed * scale).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward(
    grad,
    grad_total,
    x,
    residual,
    weight,
    grad_x,
    partial,
    rows,
    cols,
    eps,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """Every `tl.num_programs`-th row: its gradient, and the sum of its shares of the weight's."""
    place = tl.arange(0, BLOCK)
    mask = place < cols
    scale = tl.load(weight + place, mask=mask, other=0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(index, tl.int64) * cols
        row = tl.load(x + start + place, mask=mask, other=0)
        if ADD:
            added = row.to(tl.float32) + tl.load(residual + start + place, mask=mask, other=0)
            row = added.to(x.dtype.element_ty)
        row = row.to(tl.float32)
        grad_row = tl.load(grad + start + place, mask=mask, other=0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(row * row, 0) / cols + eps)
        normed = row * factor
        weight_sum += grad_row * normed
        inner = grad_row * scale
        result = factor * (inner - normed * (tl.sum(inner * normed, 0) / cols))
        if TOTAL:
            result += tl.load(grad_total + start + place, mask=mask, other=0)
        tl.store(grad_x + start + place, result.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0) * cols + place, weight_sum, mask=mask)
