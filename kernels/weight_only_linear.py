"""Inputs in floating point times stored weights, which are widened as they are read."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tiling, choose, depth, processors
from .weight_rows import kind_of, times_matrix, times_vector, vector_shape

FEW_TOKENS = 64  # up to these, memory is the limit; above, float weights are the BLAS library's
TILINGS = (Tiling(128, 128, 64, 8, 3, 1, 1.0), Tiling(64, 64, 64, 4, 3, 2, 0.7))  # for many tokens
BLOCK = 1024  # sums that a program of the last step adds up


@dataclass(frozen=True)
class Shape:
    """Tiles of rows x tokens, `groups` of 32 inputs at a time; `splits` share the inputs."""

    rows: int
    tokens: int
    groups: int
    splits: int
    warps: int
    stages: int


def choose_shape(outputs: int, tokens: int, cols: int, count: int) -> Shape:
    """Choose tiles: as large as leave one per multiprocessor, and splits where none do."""
    if tokens > FEW_TOKENS:
        t = choose(TILINGS, tokens, outputs, count)
        return Shape(t.outputs, t.rows, t.inputs // 32, 1, t.warps, t.stages)
    wide = min(max(triton.next_power_of_2(tokens), 16), 64)
    rows = 64 if outputs >= 64 * count else 16
    steps = triton.cdiv(cols, 64)
    splits = min(max(count * rows // max(outputs, 1), 1), max(steps // 4, 1), 8)
    return Shape(rows, wide, 2, splits, 4 if rows == 64 else 2, 5 if rows == 16 else 4)


def weight_only_linear(x: Tensor, codes: Tensor, scales: Tensor | None = None) -> Tensor:
    """Multiply by stored weights: `x W^T`.

    Args:
        x: (..., cols) bfloat16, float16 or (slow) float32, contiguous.
        codes, scales: the weights, see `weight_rows`; of float ones `codes` has the dtype of `x`.

    Returns:
        (..., rows), dtype of `x`.

    Numerics: float32 sums; with more than one row of `x`, weights of groups are rounded to its
    dtype.
    """
    cols, outputs = x.shape[-1], codes.shape[0]
    kind = kind_of(codes, scales)
    out = x.new_empty(*x.shape[:-1], outputs)
    if out.numel() == 0 or cols == 0:
        return out.zero_()
    tokens = x.numel() // cols
    if tokens == 1 and (shape := vector_shape(codes, kind, cols)):
        _weight_vector[(triton.cdiv(outputs, shape.rows),)](
            *(x, codes, codes if scales is None else scales, out, outputs),
            COLS=cols,
            KIND=kind,
            ROWS=shape.rows,
            GROUPS=shape.groups,
            num_warps=shape.warps,
        )
        return out
    if kind == "float" and tokens > FEW_TOKENS:
        return F.linear(x, codes)
    shape = choose_shape(outputs, tokens, cols, processors(x.device))
    return _by_tiles(x, codes, scales, kind, out, tokens, shape)


def _by_tiles(x, codes, scales, kind, out, tokens, shape: Shape) -> Tensor:
    cols, outputs = x.shape[-1], codes.shape[0]
    split = shape.splits > 1
    sums = out.new_empty(shape.splits, tokens, outputs, dtype=torch.float32) if split else out
    grid = (
        triton.cdiv(outputs, shape.rows),
        triton.cdiv(tokens, shape.tokens),
        shape.splits,
    )
    _weight_tiles[grid](
        *(x, codes, codes if scales is None else scales, sums, outputs, tokens, cols),
        KIND=kind,
        ROWS=shape.rows,
        TOKENS=shape.tokens,
        GROUPS=shape.groups,
        num_warps=shape.warps,
        num_stages=depth(shape.stages),
    )
    if split:
        count = out.numel()
        _add_splits[(triton.cdiv(count, BLOCK),)](
            sums, out, count, SPLITS=shape.splits, BLOCK=BLOCK
        )
    return out


@triton.jit
def _weight_vector(
    x,
    codes,
    scales,
    out,
    outputs,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < outputs
    product = times_vector(x, codes, scales, row, live, COLS, KIND, ROWS, GROUPS)
    tl.store(out + row, product.to(out.dtype.element_ty), mask=live)


@triton.jit
def _weight_tiles(
    x,
    codes,
    scales,
    out,
    outputs,
    tokens,
    cols,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    live = row < outputs
    split = tl.program_id(2)
    steps = tl.cdiv(cols, GROUPS * 32)
    share = tl.cdiv(steps, tl.num_programs(2))
    first = split * share
    product = times_matrix(
        *(x, codes, scales, row, live, token, tokens, first, min(first + share, steps), cols),
        KIND,
        ROWS,
        TOKENS,
        GROUPS,
    )
    place = (split * tokens + token).to(tl.int64)[None, :] * outputs + row[:, None]
    mask = live[:, None] & (token < tokens)[None, :]
    tl.store(out + place, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_splits(sums, out, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + split * count + place, mask=mask, other=0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
