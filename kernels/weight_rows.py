"""Rows of stored weights times inputs: of one token, or, by matrix instructions, of several.

Weights lie row by row, as a GPU reads them: `codes` and `scales` are

============  =============================================  ==============================
kind          codes                                          scales
============  =============================================  ==============================
``float``     (rows, cols) float32, bfloat16 or float16      none
``int8``      (rows, cols) int8                              (rows,) float32
``int8_g32``  (rows, cols) int8                              (rows, groups) float16
``int4_g32``  (rows, groups * 16) uint8: byte j of group g   (rows, groups, 2) float16:
              holds input 32 g + j in its low half and       scale and min; a value is
              input 32 g + 16 + j in the high one            ``scale * code + min``
============  =============================================  ==============================

with groups of 32 inputs, the last one padded with codes that scale and min make 0.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = tl.constexpr(32)
HALF = tl.constexpr(16)  # bytes of a group of 4-bit codes

MANY_ROWS = 16384
LONGEST = 32  # steps along a row
# Programs of 4 warps for whose registers a multiprocessor has place, at MobileLLM's widths.
RESIDENT = {"float": 4, "int8": 4, "int8_g32": 4, "int4_g32": 2}


def kind_of(codes: Tensor, scales: Tensor | None) -> str:
    """Tell how weights are stored from the tensors that hold them."""
    if scales is None:
        return "float"
    if codes.dtype == torch.uint8:
        return "int4_g32"
    return "int8" if scales.ndim == 1 else "int8_g32"


@dataclass(frozen=True)
class VectorShape:
    """How rows are multiplied with a vector.

    Args:
        rows: of a tile.
        groups: of each row that are read at a time.
        warps: of a program.
        programs: that a multiprocessor runs at a time, where each takes several tiles.
    """

    rows: int
    groups: int
    warps: int
    programs: int


def vector_shape(codes: Tensor, kind: str, cols: int) -> VectorShape | None:
    """Choose a shape; None for rows so long that the code, which is unrolled, would be, too.

    A thread's load is 16 bytes, and all loads of a tile are in flight at once. Groups divide those
    of a row, so that no lane idles. Few rows take a warp each program, so that all multiprocessors
    have some.
    """
    groups = triton.cdiv(cols, 32)
    step = min(max(groups & -groups, 2), 16)
    while triton.cdiv(groups, step) > LONGEST and step < 16:
        step *= 2
    if triton.cdiv(groups, step) > LONGEST:
        return None
    per_thread = 32 if kind == "int4_g32" else 16 // codes.element_size()
    rows = max(per_thread // step, 1)
    warps = max(step // per_thread, 1)
    many = max(4 // warps, 1) if len(codes) >= MANY_ROWS else 1
    return VectorShape(rows * many, step, warps * many, RESIDENT[kind])


@triton.jit
def times_vector(
    x,
    codes,
    scales,
    row,
    live,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # -> (ROWS,) float32
    """Multiply the rows `row` (ROWS,), those that are `live`, with x (COLS,).

    Tiles of weights are (ROWS, GROUPS, 32), bytes of 4-bit codes (ROWS, GROUPS, 16). Inputs are
    loaded in the same shape, so that they come in the same layout; the first level of cache serves
    all rows but one. Sums run in every lane until the end.
    """
    groups: tl.constexpr = (COLS + GROUP - 1) // GROUP
    width: tl.constexpr = HALF if KIND == "int4_g32" else GROUP
    stride: tl.constexpr = groups * HALF if KIND == "int4_g32" else COLS
    start = row.to(tl.int64)[:, None, None]
    known = live[:, None, None]
    total = tl.zeros((ROWS, GROUPS, width), tl.float32)
    for step in tl.static_range((groups + GROUPS - 1) // GROUPS):
        group = (step * GROUPS + tl.arange(0, GROUPS))[None, :, None]
        inner = tl.arange(0, width)[None, None, :]
        place = group * width + inner
        tile = tl.load(codes + start * stride + place, mask=known & (place < stride), other=0)
        every_row = tl.zeros((ROWS, 1, 1), tl.int32)
        source = group * GROUP + inner + every_row
        value = tl.load(x + source, mask=source < COLS, other=0).to(tl.float32)
        if KIND == "int4_g32":
            high = tl.load(x + source + HALF, mask=source + HALF < COLS, other=0).to(tl.float32)
            pair = scales + (start * groups + group) * 2
            mask = known & (group < groups)
            scale = tl.load(pair, mask=mask, other=0).to(tl.float32)
            low_end = tl.load(pair + 1, mask=mask, other=0).to(tl.float32)
            product = (tile & 15).to(tl.float32) * value + (tile >> 4).to(tl.float32) * high
            total += product * scale + (value + high) * low_end
        elif KIND == "int8_g32":
            mask = known & (group < groups)
            scale = tl.load(scales + start * groups + group, mask=mask, other=0).to(tl.float32)
            total += tile.to(tl.float32) * value * scale
        else:
            total += tile.to(tl.float32) * value
    out = tl.sum(tl.sum(total, 2), 1)
    if KIND == "int8":
        out *= tl.load(scales + row, mask=live, other=0)
    return out


@triton.jit
def times_matrix(
    x,
    codes,
    scales,
    row,
    live,
    token,
    tokens,
    first_step,
    end_step,
    cols,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # -> (ROWS, TOKENS) float32
    """Multiply the rows `row` (ROWS,) with tokens `token` (TOKENS,) of x (tokens, cols).

    Weights are the left factor, since they are many and tokens are few. They are rounded to the
    dtype of x, but for those of kind int8, whose codes are exact in it. Steps of GROUPS groups,
    from the first to before the end, are summed up.
    """
    groups = (cols + GROUP - 1) // GROUP
    source = token.to(tl.int64)[:, None] * cols
    start = row.to(tl.int64)
    known = (token < tokens)[:, None]
    dtype = x.dtype.element_ty
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(first_step, end_step):
        if KIND == "int4_g32":
            byte = tl.arange(0, GROUPS * HALF)
            place = step * GROUPS * HALF + byte
            tile = tl.load(
                codes + start[:, None] * (groups * HALF) + place[None, :],
                mask=live[:, None] & (place < groups * HALF)[None, :],
                other=0,
            )
            col = (step * GROUPS + byte // HALF) * GROUP + byte % HALF
            low_x = tl.load(x + source + col[None, :], mask=known & (col < cols)[None, :], other=0)
            high_x = tl.load(
                x + source + col[None, :] + HALF, mask=known & (col + HALF < cols)[None, :], other=0
            )
            group = step * GROUPS + tl.arange(0, GROUPS)
            pair = scales + (start[:, None] * groups + group[None, :]) * 2
            mask = live[:, None] & (group < groups)[None, :]
            scale = tl.load(pair, mask=mask, other=0).to(tl.float32)[:, :, None]
            low_end = tl.load(pair + 1, mask=mask, other=0).to(tl.float32)[:, :, None]
            tile = tl.reshape(tile, (ROWS, GROUPS, HALF))
            low = (tile & 15).to(tl.float32) * scale + low_end
            high = (tile >> 4).to(tl.float32) * scale + low_end
            low = tl.reshape(low.to(dtype), (ROWS, GROUPS * HALF))
            high = tl.reshape(high.to(dtype), (ROWS, GROUPS * HALF))
            total = tl.dot(low, low_x.T, total, input_precision="ieee")
            total = tl.dot(high, high_x.T, total, input_precision="ieee")
        else:
            col = step * GROUPS * GROUP + tl.arange(0, GROUPS * GROUP)
            inputs = tl.load(x + source + col[None, :], mask=known & (col < cols)[None, :], other=0)
            tile = tl.load(
                codes + start[:, None] * cols + col[None, :],
                mask=live[:, None] & (col < cols)[None, :],
                other=0,
            )
            if KIND == "int8_g32":
                group = step * GROUPS + tl.arange(0, GROUPS)
                mask = live[:, None] & (group < groups)[None, :]
                scale = tl.load(
                    scales + start[:, None] * groups + group[None, :], mask=mask, other=0
                ).to(tl.float32)[:, :, None]
                values = tl.reshape(tile, (ROWS, GROUPS, GROUP)).to(tl.float32) * scale
                tile = tl.reshape(values, (ROWS, GROUPS * GROUP))
            total = tl.dot(tile.to(dtype), inputs.T, total, input_precision="ieee")
    if KIND == "int8":
        total *= tl.load(scales + row, mask=live, other=0)[:, None]
    return total
