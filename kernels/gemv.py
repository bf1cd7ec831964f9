"""Matrix times vector, for one decoded token: tiles of rows, requested before they are needed.

A tile is `ROWS` rows of a weight matrix, one per warp, in `(LANES, ROWS, VEC)` order: 32 lanes side
by side along the inputs, each with `VEC` neighbouring ones, which is one 16-byte load. Loads of
inputs have the same shape, so that they come in the same layout and a product needs no exchange
between threads until the final sum over the lanes of a warp.

`load_tile` and `multiply_tile` are apart because weights are known before inputs are: a tile is
requested, then whoever computes the inputs is waited for.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(32)
GROUP = tl.constexpr(32)  # inputs that share a scale in the *_g32 kinds


@triton.constexpr_function
def row_stride(COLS, KIND):
    """Elements of `codes` per row: bytes of two inputs each for int4_g32, else inputs."""
    return (COLS + 31) // 32 * 16 if KIND == "int4_g32" else COLS


@triton.constexpr_function
def chunk_count(COLS, KIND, VEC):
    """How many loads of `LANES * VEC` elements a row takes."""
    return (row_stride(COLS, KIND) + 32 * VEC - 1) // (32 * VEC)


@triton.jit
def load_tile(
    codes, row, live, COLS: tl.constexpr, KIND: tl.constexpr, VEC: tl.constexpr
):  # -> tuple of (LANES, ROWS, VEC), one per chunk
    """Request the rows `row` (ROWS,) of a matrix, those that are `live`."""
    stride: tl.constexpr = row_stride(COLS, KIND)
    lane = tl.arange(0, LANES) * VEC
    start = codes + (row[None, :, None] * stride + lane[:, None, None])
    start += tl.arange(0, VEC)[None, None, :]
    tile = ()
    for chunk in tl.static_range(chunk_count(COLS, KIND, VEC)):
        inside = lane < stride - chunk * LANES * VEC
        mask = live[None, :, None] & inside[:, None, None]
        # a constant step from one address: further chunks need no registers of their own
        tile = tile + (tl.load(start + chunk * LANES * VEC, mask=mask, other=0),)
    return tile


@triton.jit
def multiply_tile(
    tile,
    scales,
    row,
    live,
    x,
    norm_weight,
    eps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    VEC: tl.constexpr,
    NORM: tl.constexpr,
):  # -> (ROWS,) float32
    """Multiply a tile with x (COLS,) float32; with NORM, with `rms_norm(x, norm_weight, eps)`.

    Numerics: float32 products and sums; the norm's factor is applied to the result.
    """
    stride: tl.constexpr = row_stride(COLS, KIND)
    groups: tl.constexpr = (COLS + GROUP - 1) // GROUP
    packed: tl.constexpr = KIND == "int4_g32"
    span: tl.constexpr = LANES * VEC * (2 if packed else 1)  # inputs of a chunk
    lane = tl.arange(0, LANES) * VEC
    # x is the same for all rows; a full tile of pointers gives it the layout of the weights
    place = tl.arange(0, VEC)[None, None, :] + tl.zeros((1, ROWS, 1), tl.int32)
    place += (lane // 16 * GROUP + lane % 16 if packed else lane)[:, None, None]
    scale_place = row[None, :] * groups + (lane // (16 if packed else GROUP))[:, None]
    total = tl.zeros((LANES, ROWS), tl.float32)
    squares = tl.zeros((LANES, ROWS), tl.float32)
    for chunk in tl.static_range(chunk_count(COLS, KIND, VEC)):
        inside = (lane < stride - chunk * LANES * VEC)[:, None] & live[None, :]
        values, part = _inputs(x, norm_weight, place, chunk * span, inside, COLS, NORM)
        squares += part
        weights = tile[chunk]
        if packed:
            high, part = _inputs(x, norm_weight, place, chunk * span + 16, inside, COLS, NORM)
            squares += part
            low_codes = (weights & 15).to(tl.float32)
            high_codes = (weights >> 4).to(tl.float32)
            sums = tl.sum(low_codes * values + high_codes * high, 2)
            pair = tl.load(scales + scale_place + chunk * span // GROUP, mask=inside, other=0)
            scale, low = unpack_pair(pair)
            total += sums * scale + tl.sum(values + high, 2) * low
        else:
            sums = tl.sum(weights.to(tl.float32) * values, 2)
            if KIND == "int8_g32":
                scale = tl.load(scales + scale_place + chunk * span // GROUP, mask=inside, other=0)
                sums = sums * scale.to(tl.float32)
            total += sums
    out = tl.sum(total, 0)
    if KIND == "int8":
        out = out * tl.load(scales + row, mask=live, other=0)
    if NORM:
        out = out * tl.rsqrt(tl.sum(squares, 0) / COLS + eps)
    return out


@triton.jit
def _inputs(
    x, norm_weight, place, STEP: tl.constexpr, inside, COLS: tl.constexpr, NORM: tl.constexpr
):
    """Load inputs, times the norm's weight; return them and the sums of their squares."""
    mask = inside[:, :, None]
    if COLS // GROUP * GROUP != COLS:
        mask = mask & (place + STEP < COLS)
    values = tl.load(x + place + STEP, mask=mask, other=0)
    if NORM:
        squares = tl.sum(values * values, 2)
        values = values * tl.load(norm_weight + place + STEP, mask=mask, other=0)
    else:
        squares = 0.0
    return values, squares


@triton.jit
def unpack_pair(pair):  # int32 -> scale, min, float32
    """Split the two float16 that a group of int4_g32 has."""
    scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    low = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, low


@triton.jit
def share_of(count: tl.constexpr, program, PROGRAMS: tl.constexpr):  # -> first, end
    """Split `count` rows evenly: what falls to one program."""
    return program * count // PROGRAMS, (program + 1) * count // PROGRAMS


@triton.constexpr_function
def tile_count(count, PROGRAMS, ROWS):
    """How many tiles of ROWS rows the largest share has."""
    return (-(-count // PROGRAMS) + ROWS - 1) // ROWS
