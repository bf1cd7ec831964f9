"""SwiGLU: two matrix products with one left factor, silu(gate) * up as they leave the registers.

A program takes tiles of the result in turn. For each it keeps two sums, of the gate and of the up
projection, so the input is read once for both and neither ever goes to memory, except for training,
which stores both for the derivative. There, silu and the product are differentiated in one pass;
the four matrix products that remain are the BLAS library's.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hopper import products
from .launch import SIZES, Launch, Tiles
from .tiles import (
    BAND,
    Tiling,
    choose,
    depth,
    described,
    load_tile,
    processors,
    store_tile,
    tile_place,
)

ELEMENTS = 1024  # of a program of the derivative

# An output here is two sums, one of each projection. Two programs share a multiprocessor: one waits
# for its first loads, or stores, while the other multiplies, which is worth more than larger tiles.
LARGE = Tiling(128, 64, 64, 8, 3, 2, 1.0)
PLAIN = Tiling(128, 64, 64, 8, 3, 1, 0.85)
SMALL = Tiling(64, 64, 64, 4, 3, 2, 0.78)
FEW = Tiling(16, 64, 64, 4, 4, 2, 0.4)
WITH_COPY_ENGINE = (LARGE, SMALL, FEW)
WITHOUT = (PLAIN, SMALL, FEW)  # addresses need registers, too
# Of CUDA C++: a cluster's tiles, on two multiprocessors, whose speed is that of both. It gained
# 2% to 5% of a block of 36 million results, for which it is 1.07 times as fast as LARGE, and lost
# 2% of one of 3 million.
CLUSTER = Tiling(products.CLUSTER_ROWS, products.SWIGLU_WIDTH, 64, 12, 4, 1, 2 * 1.07)
CLUSTER_RESULTS_FROM = 1 << 25


def swiglu(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, tiling: Tiling | None = None
) -> Tensor:
    """Gate one projection with another: `silu(x gate^T) * (x up^T)`.

    Args:
        x: (..., n) bfloat16 or float16, contiguous (float32: slow).
        gate_weight, up_weight: (m, n), dtype of `x`, contiguous.
        tiling: how the product is cut; None: chosen by size, or one of CUDA C++ takes it.

    Returns:
        (..., m), dtype of `x`.

    Numerics: sums, silu and product in float32, rounded once.
    """
    return _launch(x, gate_weight, up_weight, tiling, False)[0]


def swiglu_saving(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, tiling: Tiling | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of `swiglu` and, rounded, the two projections."""
    return _launch(x, gate_weight, up_weight, tiling, True)


def swiglu_backward(
    grad: Tensor, x: Tensor, gate_weight: Tensor, up_weight: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `swiglu`.

    Args:
        grad: the gradient of its result.
        x, gate_weight, up_weight: its arguments.
        gate, up: what `swiglu_saving` returned beside the result.

    Returns:
        Gradients of `x`, `gate_weight` and `up_weight`.
    """
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if count := grad.numel():
        launch = _derivative_of(count, gate.dtype, grad.device)
        launch(grad, gate, up, grad_gate, grad_up)
    inner, cols = gate_weight.shape
    grad_gate, grad_up = grad_gate.view(-1, inner), grad_up.view(-1, inner)
    inputs = x.view(-1, cols)
    grad_x = torch.mm(grad_gate, gate_weight).addmm_(grad_up, up_weight)
    grad_weights = torch.mm(grad_gate.t(), inputs), torch.mm(grad_up.t(), inputs)
    return grad_x.view(x.shape), *grad_weights


@functools.lru_cache(SIZES)
def _derivative_of(count: int, *_kinds: Any) -> Launch:
    grid = (triton.cdiv(count, ELEMENTS),)
    return Launch(_swiglu_derivative, grid, (count,), BLOCK=ELEMENTS)


def _launch(x, gate_weight, up_weight, tiling, save: bool) -> tuple[Tensor, ...]:
    inner, cols = gate_weight.shape
    shape = (*x.shape[:-1], inner)
    outputs = tuple(x.new_empty(shape) for _ in range(3 if save else 1))
    count = outputs[0].numel()
    if count == 0 or cols == 0:
        return tuple(out.zero_() for out in outputs)
    tma = described(x, gate_weight, up_weight)
    store_tma = tma and described(*outputs)
    sizes = count // inner, inner, cols
    for_clusters = store_tma and tiling is None and not save
    if for_clusters and _by_clusters(*sizes[:2], x.device):
        matrices = x.view(-1, cols), gate_weight, up_weight, outputs[0].view(-1, inner)
        if products.swiglu(*matrices):
            return outputs
    launch = _launch_of(sizes, tiling, save, tma, store_tma, x.dtype, x.device)
    launch(x, gate_weight, up_weight, *(outputs if save else outputs * 3))
    return outputs


@functools.lru_cache(SIZES)
def _by_clusters(rows: int, inner: int, device: torch.device) -> bool:
    """Whether clusters should be faster than the best of Triton's tilings."""
    if rows * inner < CLUSTER_RESULTS_FROM or not products.runs_on(device):
        return False
    count = processors(device)
    best = choose(WITH_COPY_ENGINE, rows, inner, count)
    clusters = count // products.CLUSTER
    return CLUSTER.cost(rows, inner, clusters) < best.cost(rows, inner, count)


@functools.lru_cache(SIZES)
def _launch_of(
    sizes: tuple[int, int, int],
    tiling: Tiling | None,
    save: bool,
    tma: bool,
    store_tma: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    rows, inner, cols = sizes
    count = processors(device)
    t = tiling or choose(WITH_COPY_ENGINE if tma else WITHOUT, rows, inner, count)
    tiles: dict[int, Tiles] = {}
    if tma:
        weights = Tiles((inner, cols), (t.outputs, t.inputs), dtype)
        tiles |= {0: Tiles((rows, cols), (t.rows, t.inputs), dtype), 1: weights, 2: weights}
    if store_tma:
        tiles |= dict.fromkeys((3, 4, 5), Tiles((rows, inner), (t.rows, t.outputs), dtype))
    return Launch(
        _swiglu,
        (min(t.tiles(rows, inner), count * t.programs),),
        sizes,
        tiles,
        ROWS=t.rows,
        INNER=t.outputs,
        COLS=t.inputs,
        BAND=BAND,
        TMA=tma,
        STORE_TMA=store_tma,
        SAVE=save,
        num_warps=t.warps,
        num_stages=depth(t.stages),
    )


@triton.jit
def _swiglu(
    x,
    gate_weight,
    up_weight,
    out,
    gate_out,
    up_out,
    rows,
    inner,
    cols,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    COLS: tl.constexpr,
    BAND: tl.constexpr,
    TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
    SAVE: tl.constexpr,
):
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(inner, INNER)
    # not flattened with the loop over inputs: ptxas then waits after every matrix instruction
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        tile_row, tile_col = tile_place(tile, down, across, BAND)
        row = tile_row * ROWS
        col = tile_col * INNER
        gate = tl.zeros((ROWS, INNER), tl.float32)
        up = tl.zeros((ROWS, INNER), tl.float32)
        for step in range(tl.cdiv(cols, COLS)):
            k = step * COLS
            left = load_tile(x, row, k, rows, cols, ROWS, COLS, TMA)
            gate_tile = load_tile(gate_weight, col, k, inner, cols, INNER, COLS, TMA)
            up_tile = load_tile(up_weight, col, k, inner, cols, INNER, COLS, TMA)
            gate = tl.dot(left, gate_tile.T, gate, input_precision="ieee")
            up = tl.dot(left, up_tile.T, up, input_precision="ieee")
        if SAVE:
            dtype: tl.constexpr = gate_out.dtype if STORE_TMA else gate_out.dtype.element_ty
            store_tile(gate_out, gate.to(dtype), row, col, rows, inner, ROWS, INNER, STORE_TMA)
            store_tile(up_out, up.to(dtype), row, col, rows, inner, ROWS, INNER, STORE_TMA)
        product = gate * tl.sigmoid(gate) * up
        out_dtype: tl.constexpr = out.dtype if STORE_TMA else out.dtype.element_ty
        store_tile(out, product.to(out_dtype), row, col, rows, inner, ROWS, INNER, STORE_TMA)


@triton.jit
def _swiglu_derivative(grad, gate, up, grad_gate, grad_up, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    g = tl.load(gate + place, mask=mask, other=0).to(tl.float32)
    u = tl.load(up + place, mask=mask, other=0).to(tl.float32)
    d = tl.load(grad + place, mask=mask, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    slope = sigmoid * (1 + g * (1 - sigmoid))
    dtype = grad_gate.dtype.element_ty
    tl.store(grad_gate + place, (d * u * slope).to(dtype), mask=mask)
    tl.store(grad_up + place, (d * g * sigmoid).to(dtype), mask=mask)
