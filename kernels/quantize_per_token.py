"""Rounding of rows to int8, each on its own scale: the codes of the reference, bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The reference's: rows that stay below this count as zeros, so the reciprocal of a scale is finite.
TINY = tl.constexpr(2.0**-100)
# Added and subtracted, it leaves |y| < 2^22 rounded to a whole number, halves to even.
ROUND = tl.constexpr(1.5 * 2.0**23)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8: `code = round(x / scale)`, halves to even.

    Args:
        x: (..., n) float32, bfloat16 or float16, contiguous, n at least 1.

    Returns:
        codes: (..., n) int8 in [-127, 127].
        scales: (...) float32, `max|x| / 127`; 0 for rows of zeros.
    """
    codes = torch.empty_like(x, dtype=torch.int8)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        cols = x.shape[-1]
        block = triton.next_power_of_2(cols)
        grid = (x.numel() // cols,)
        warps = min(max(block // 256, 1), 16)
        # a product and a sum in one step would round once where the reference rounds twice
        _quantize_per_token[grid](
            x, codes, scales, cols, BLOCK=block, num_warps=warps, enable_fp_fusion=False
        )
    return codes, scales


@triton.jit
def _quantize_per_token(x, codes, scales, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    mask = place < cols
    values = tl.load(x + row * cols + place, mask=mask, other=0).to(tl.float32)
    rounded, scale = round_row(values)
    tl.store(codes + row * cols + place, rounded, mask=mask)
    tl.store(scales + row, scale)


@triton.jit
def round_row(values):  # (BLOCK,) float32 -> (BLOCK,) int8, scale
    """Round to codes in [-127, 127] of the largest; what is all but zero becomes zero."""
    peak = tl.max(tl.abs(values), 0)
    live = peak >= TINY
    # divisions as the reference rounds them: to the nearest
    inverse = tl.where(live, tl.div_rn(127.0, tl.where(live, peak, 1.0)), 0.0)
    rounded = (values * inverse + ROUND) - ROUND
    return rounded.to(tl.int8), tl.where(live, tl.div_rn(peak, 127.0), 0.0)
