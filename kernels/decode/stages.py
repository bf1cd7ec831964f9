"""The stages of a decode step for one token, as any program of a grid runs its share of them.

    embed      a row of the embedding                       -> x
    query      norm + query, key and value, rotated; stores -> qkv, KV cache
    attend     attention                                    -> attended, or partial results
    output     merge the parts, output projection, + x      -> middle
    gate_up    norm + gate and up projections, SiLU * up    -> inner
    project    down projection, + middle                    -> x

Each stage first requests its weights, then waits for its inputs, so the weights travel while the
stage before it ends. `step.py` launches one kernel per stage; `persistent.py` runs
all of them in one kernel. How they wait is `grid_sync.py`'s matter; nothing here is a barrier, so
that Triton's interpreter runs it all.

All vectors are float32, in a grid together with epochs: `epoch` is the one that a stage writes, and
the stage before wrote `epoch - 1`.
"""

import triton
import triton.language as tl

from .attention import receive_attended, split_plan
from .gemv import (
    deal,
    load_norm,
    load_tile,
    multiply_tile,
    normed,
    receive_inputs,
    share_of,
    tile_count,
    tile_rows,
    unpack_pair,
)
from .grid_sync import current, publish, receive, wait_for_launch

BIGGEST_HALF = tl.constexpr(65504.0)  # of float16


@triton.jit
def embed(
    program,
    token,
    codes,
    scales,
    x,
    epoch,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """x = row `token` of the embedding; BLOCK is a power of two, at least a program's share."""
    groups: tl.constexpr = (COLS + 31) // 32
    first, end = share_of(COLS, program, PROGRAMS)
    col = first + tl.arange(0, BLOCK)
    live = col < end
    row = token.to(tl.int64)
    if KIND == "int4_g32":
        byte = tl.load(codes + row * groups * 16 + col // 32 * 16 + col % 16, mask=live, other=0)
        values = tl.where(col % 32 < 16, byte & 15, byte >> 4).to(tl.float32)
        pair = tl.load(scales + row * groups + col // 32, mask=live, other=0)
        scale, low = unpack_pair(pair)
        values = values * scale + low
    else:
        values = tl.load(codes + row * COLS + col, mask=live, other=0).to(tl.float32)
        if KIND == "int8":
            values = values * tl.load(scales + row)
        elif KIND == "int8_g32":
            scale = tl.load(scales + row * groups + col // 32, mask=live, other=0)
            values = values * scale.to(tl.float32)
    publish(x, col, values, live, epoch, WAIT)


@triton.jit
def query(
    program,
    codes,
    scales,
    x,
    norm_weight,
    eps,
    positions,
    cos,
    sin,
    cache,
    size,
    out,
    epoch,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """out = rope(rms_norm(x) W^T); keys and values go to the cache, too, for later steps.

    Rows are computed in the pairs that are rotated with each other.

    Args:
        cache: keys, then values of this slot: (2, KV_HEADS, size) in the dtype of the cache.
    """
    half: tl.constexpr = HEAD_DIM // 2
    pairs: tl.constexpr = (HEADS + 2 * KV_HEADS) * half
    ROWS: tl.constexpr = tile_rows(pairs, COLS, KIND, WARPS, PROGRAMS, 2)
    TILES: tl.constexpr = tile_count(pairs, PROGRAMS, ROWS)
    first, end = share_of(pairs, program, PROGRAMS)
    norm = load_norm(norm_weight, COLS, KIND, WARPS)
    pair = first + tl.arange(0, ROWS)
    row = pair // half * HEAD_DIM + pair % half
    upper = load_tile(codes, scales, row, pair < end, COLS, KIND, WARPS)
    lower = load_tile(codes, scales, row + half, pair < end, COLS, KIND, WARPS)
    wait_for_launch(WAIT)
    position = current(WAIT, positions)
    c, s = _rotation(pair, position, cos, sin, HEADS + KV_HEADS, HEAD_DIM)
    inputs = receive_inputs(x, epoch - 1, COLS, KIND, WARPS, WAIT)
    inputs, factor = normed(inputs, norm, eps, COLS, KIND, WARPS)
    inputs = deal(inputs, ROWS, COLS, KIND, WARPS)
    for _ in range(TILES):
        live = pair < end
        if TILES > 1:
            next_pair = pair + ROWS
            next_row = next_pair // half * HEAD_DIM + next_pair % half
            more = next_pair < end
            next_upper = load_tile(codes, scales, next_row, more, COLS, KIND, WARPS)
            next_lower = load_tile(codes, scales, next_row + half, more, COLS, KIND, WARPS)
            next_c, next_s = _rotation(next_pair, position, cos, sin, HEADS + KV_HEADS, HEAD_DIM)
        y = multiply_tile(upper, inputs, ROWS, COLS, KIND, WARPS) * factor
        z = multiply_tile(lower, inputs, ROWS, COLS, KIND, WARPS) * factor
        turned = y * c - z * s
        z = z * c + y * s
        publish(out, row, turned, live, epoch, WAIT)
        publish(out, row + half, z, live, epoch, WAIT)
        store_in_cache(cache, size, row - HEADS * HEAD_DIM, position, turned, live, HEAD_DIM)
        store_in_cache(cache, size, row + half - HEADS * HEAD_DIM, position, z, live, HEAD_DIM)
        if TILES > 1:
            pair, row = next_pair, next_row
            upper, lower = next_upper, next_lower
            c, s = next_c, next_s


@triton.jit
def _rotation(pair, position, cos, sin, ROTATED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return the cosine and sine for pairs of rows; values, behind ROTATED heads, stay."""
    half: tl.constexpr = HEAD_DIM // 2
    place = position * half + pair % half
    rotated = pair < ROTATED * half
    c = tl.load(cos + place, mask=rotated, other=1)
    s = tl.load(sin + place, mask=rotated, other=0)
    return c, s


@triton.jit
def store_in_cache(cache, size, row, position, value, live, HEAD_DIM: tl.constexpr):
    """Store rows (of all keys, then all values; negative ones are queries) of one token."""
    KV: tl.constexpr = cache.dtype.element_ty
    if KV == tl.float16:  # noqa: SIM300
        value = tl.minimum(tl.maximum(value, -BIGGEST_HALF), BIGGEST_HALF)
    place = (row // HEAD_DIM).to(tl.int64) * size + position.to(tl.int64) * HEAD_DIM
    tl.store(cache + place + row % HEAD_DIM, value.to(KV), mask=live & (row >= 0))


@triton.jit
def project(
    program,
    codes,
    scales,
    x,
    residual,
    out,
    epoch,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """out = x W^T + residual, which was written one stage before x."""
    ROWS: tl.constexpr = tile_rows(OUTPUTS, COLS, KIND, WARPS, PROGRAMS)
    TILES: tl.constexpr = tile_count(OUTPUTS, PROGRAMS, ROWS)
    first, end = share_of(OUTPUTS, program, PROGRAMS)
    row = first + tl.arange(0, ROWS)
    tile = load_tile(codes, scales, row, row < end, COLS, KIND, WARPS)
    wait_for_launch(WAIT)
    added = receive_residual(residual, first, end, epoch - 2, ROWS, TILES, WARPS, WAIT)
    inputs = receive_inputs(x, epoch - 1, COLS, KIND, WARPS, WAIT)
    _project_rows(
        tile,
        row,
        end,
        codes,
        scales,
        inputs,
        added,
        out,
        epoch,
        COLS,
        KIND,
        ROWS,
        TILES,
        WARPS,
        WAIT,
    )


@triton.jit
def output(
    program,
    codes,
    scales,
    partial,
    positions,
    attended,
    residual,
    out,
    epoch,
    HIDDEN: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """out = attention W^T + residual; every program merges the parts for itself."""
    COLS: tl.constexpr = HEADS * HEAD_DIM
    ROWS: tl.constexpr = tile_rows(HIDDEN, COLS, KIND, WARPS, PROGRAMS)
    TILES: tl.constexpr = tile_count(HIDDEN, PROGRAMS, ROWS)
    first, end = share_of(HIDDEN, program, PROGRAMS)
    row = first + tl.arange(0, ROWS)
    tile = load_tile(codes, scales, row, row < end, COLS, KIND, WARPS)
    wait_for_launch(WAIT)
    added = receive_residual(residual, first, end, epoch - 3, ROWS, TILES, WARPS, WAIT)
    splits, _ = split_plan(current(WAIT, positions) + 1, SPLITS, BLOCK_KV)
    inputs = receive_attended(
        partial, attended, splits, epoch - 1, HEADS, HEAD_DIM, SPLITS, KIND, WARPS, WAIT
    )
    _project_rows(
        tile,
        row,
        end,
        codes,
        scales,
        inputs,
        added,
        out,
        epoch,
        COLS,
        KIND,
        ROWS,
        TILES,
        WARPS,
        WAIT,
    )


@triton.jit
def _project_rows(
    tile,
    row,
    end,
    codes,
    scales,
    inputs,
    added,
    out,
    epoch,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Multiply and add; `tile` has the first rows, and was requested before the inputs came."""
    inputs = deal(inputs, ROWS, COLS, KIND, WARPS)
    for index in range(TILES):
        if TILES > 1:
            next_tile = load_tile(codes, scales, row + ROWS, row + ROWS < end, COLS, KIND, WARPS)
        y = multiply_tile(tile, inputs, ROWS, COLS, KIND, WARPS)
        y += _residual_of(added, index, ROWS, TILES)
        publish(out, row, y, row < end, epoch, WAIT)
        if TILES > 1:
            row += ROWS
            tile = next_tile


@triton.constexpr_function
def rounded(ROWS, TILES):
    """Rows of all tiles, a power of two."""
    return 1 << (ROWS * TILES - 1).bit_length()


@triton.jit
def receive_residual(
    residual,
    first,
    end,
    epoch,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Get what is added to all rows of a share: in one trip, before the inputs are there."""
    size: tl.constexpr = rounded(ROWS, TILES)
    row = first + tl.arange(0, size)
    return receive(residual, row, row < end, epoch, size, WARPS, WAIT, 1, 0)[0]


@triton.jit
def _residual_of(added, tile, ROWS: tl.constexpr, TILES: tl.constexpr):  # -> (ROWS,)
    if TILES == 1:
        return added
    else:
        place = tl.arange(0, rounded(ROWS, TILES))
        mine = place[None, :] == tile * ROWS + tl.arange(0, ROWS)[:, None]
        return tl.sum(tl.where(mine, added[None, :], 0.0), 1)


@triton.jit
def gate_up(
    program,
    codes,
    scales,
    x,
    norm_weight,
    eps,
    out,
    epoch,
    INNER: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """out = silu(h gate^T) * (h up^T), h = rms_norm(x); the gate's rows come before the up's."""
    ROWS: tl.constexpr = tile_rows(INNER, COLS, KIND, WARPS, PROGRAMS, 2)
    TILES: tl.constexpr = tile_count(INNER, PROGRAMS, ROWS)
    first, end = share_of(INNER, program, PROGRAMS)
    norm = load_norm(norm_weight, COLS, KIND, WARPS)
    row = first + tl.arange(0, ROWS)
    gate_tile = load_tile(codes, scales, row, row < end, COLS, KIND, WARPS)
    up_tile = load_tile(codes, scales, row + INNER, row < end, COLS, KIND, WARPS)
    wait_for_launch(WAIT)
    inputs = receive_inputs(x, epoch - 1, COLS, KIND, WARPS, WAIT)
    inputs, factor = normed(inputs, norm, eps, COLS, KIND, WARPS)
    inputs = deal(inputs, ROWS, COLS, KIND, WARPS)
    for _ in range(TILES):
        if TILES > 1:
            more = row + ROWS < end
            next_gate = load_tile(codes, scales, row + ROWS, more, COLS, KIND, WARPS)
            next_up = load_tile(codes, scales, row + ROWS + INNER, more, COLS, KIND, WARPS)
        gate = multiply_tile(gate_tile, inputs, ROWS, COLS, KIND, WARPS) * factor
        up = multiply_tile(up_tile, inputs, ROWS, COLS, KIND, WARPS) * factor
        publish(out, row, gate / (1 + tl.exp(-gate)) * up, row < end, epoch, WAIT)
        if TILES > 1:
            row += ROWS
            gate_tile, up_tile = next_gate, next_up
