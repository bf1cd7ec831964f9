"""W8A8 matrix product: codes times codes in int32, scaled per token and per channel as it leaves.

Integer sums are exact, and the scales are applied as the reference applies them, without fused
multiply-adds, so the result is the reference's, bit for bit.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .early_launch import early_options, let_next_start, wait_for_previous
from .hopper import products
from .launch import SIZES
from .tiles import (
    BAND,
    Tiling,
    choose,
    depth,
    described,
    load_tile,
    processors,
    store_tile,
    tile_of,
    tile_place,
)

# Speeds are those of an H100: LARGE reads least, but its scaling and storing is not hidden behind
# products; two programs with the tiles of MEDIUM take turns.
LARGE = Tiling(128, 256, 128, 8, 3, 1, 1.03)
MEDIUM = Tiling(128, 128, 64, 4, 4, 2, 1.0)
SMALL = Tiling(64, 128, 128, 4, 3, 2, 0.85)
TINY = Tiling(64, 64, 128, 4, 4, 2, 0.6)
FEW = Tiling(16, 64, 128, 4, 4, 2, 0.3)
WITH_COPY_ENGINE = (LARGE, MEDIUM, SMALL, TINY, FEW)
WITHOUT = (SMALL, TINY, FEW)
# Of CUDA C++: a cluster's tiles, on two multiprocessors, whose speed is that of both. Measured from
# 1024 rows on, 1.18 to 1.25 times MEDIUM's; few rows are not its trade.
CLUSTER = Tiling(
    products.CLUSTER_ROWS, products.INT8_WIDTH, products.STEP_NBYTES, 12, 4, 1, 2 * 1.2
)
CLUSTER_ROWS_FROM = 512


def int8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tiling: Tiling | None = None,
) -> Tensor:
    """Multiply rounded inputs with rounded weights: `(x weight^T) x_scales weight_scales + bias`.

    Args:
        x: (..., n) int8, contiguous.
        x_scales: (...) float32, one per token.
        weight: (m, n) int8, contiguous.
        weight_scales: (m,) float32, one per output channel.
        bias: (m,) float, or None.
        dtype: of the result: float32, bfloat16 or float16.
        tiling: how the product is cut; None: chosen by size, or one of CUDA C++ takes it.

    Returns:
        (..., m), `dtype`.

    Numerics: exact in int32, which n up to 133,000 cannot overflow; then float32, rounded after
    each product, after the sum and to `dtype`.
    """
    outputs, cols = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs, dtype=dtype)
    if out.numel() == 0:
        return out
    inputs, result = x.view(-1, cols), out.view(-1, outputs)
    rows = len(inputs)
    tma = cols > 0 and described(inputs, weight)
    store_tma = tma and described(result)
    for_clusters = store_tma and bias is None and tiling is None
    if (
        for_clusters
        and _by_clusters(rows, outputs, x.device)
        and products.int8_gemm(inputs, x_scales, weight, weight_scales, result)
    ):
        return out
    count = processors(x.device)
    t = tiling or choose(WITH_COPY_ENGINE if tma else WITHOUT, rows, outputs, count)
    _int8_gemm[(min(t.tiles(rows, outputs), count * t.programs),)](
        tile_of(inputs, t.rows, t.inputs, tma),
        x_scales,
        tile_of(weight, t.outputs, t.inputs, tma),
        weight_scales,
        weight_scales if bias is None else bias,
        tile_of(result, t.rows, t.outputs, store_tma),
        *(rows, outputs, cols),
        ROWS=t.rows,
        OUTPUTS=t.outputs,
        INPUTS=t.inputs,
        BAND=BAND,
        BIAS=bias is not None,
        TMA=tma,
        STORE_TMA=store_tma,
        num_warps=t.warps,
        num_stages=depth(t.stages),
        enable_fp_fusion=False,
        **early_options(x.device),
    )
    return out


@functools.lru_cache(SIZES)
def _by_clusters(rows: int, outputs: int, device: torch.device) -> bool:
    """Whether clusters should be faster than the best of Triton's tilings."""
    if rows < CLUSTER_ROWS_FROM or not products.runs_on(device):
        return False
    count = processors(device)
    best = choose(WITH_COPY_ENGINE, rows, outputs, count)
    clusters = count // products.CLUSTER
    return CLUSTER.cost(rows, outputs, clusters) < best.cost(rows, outputs, count)


@triton.jit
def _int8_gemm(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    out,
    rows,
    outputs,
    cols,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    BAND: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(outputs, OUTPUTS)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        tile_row, tile_col = tile_place(tile, down, across, BAND)
        row = tile_row * ROWS
        col = tile_col * OUTPUTS
        # asked for before the products, which hide how long that takes
        r = row + tl.arange(0, ROWS)
        c = col + tl.arange(0, OUTPUTS)
        row_scale = tl.load(x_scales + r, mask=r < rows, other=0)
        col_scale = tl.load(weight_scales + c, mask=c < outputs, other=0)
        total = tl.zeros((ROWS, OUTPUTS), tl.int32)
        for step in range(tl.cdiv(cols, INPUTS)):
            k = step * INPUTS
            left = load_tile(x, row, k, rows, cols, ROWS, INPUTS, TMA)
            right = load_tile(weight, col, k, outputs, cols, OUTPUTS, INPUTS, TMA)
            total = tl.dot(left, right.T, total, out_dtype=tl.int32)
        scaled = total.to(tl.float32) * row_scale[:, None] * col_scale[None, :]
        if BIAS:
            scaled += tl.load(bias + c, mask=c < outputs, other=0).to(tl.float32)[None, :]
        dtype: tl.constexpr = out.dtype if STORE_TMA else out.dtype.element_ty
        store_tile(out, scaled.to(dtype), row, col, rows, outputs, ROWS, OUTPUTS, STORE_TMA)
