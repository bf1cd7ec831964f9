"""The stages of a decode step for one token, as any program of a grid runs its share of them.

    embed      a row of the embedding                       -> x
    project    norm + query, key and value projections      -> qkv
    attend     rotate, store key and value, attend          -> attended, or partial results
    output     merge the parts, output projection, + x      -> middle
    gate_up    norm + gate and up projections, SiLU * up    -> inner
    project    down projection, + middle                    -> x

Each stage first requests its weights, then waits for its inputs, so the weights travel while the
stage before it ends. `decode_step.py` launches one kernel per stage; `decode_persistent.py` runs
all of them in one kernel. How they wait is `grid_sync.py`'s matter; nothing here is a barrier, so
that Triton's interpreter runs it all.

All vectors are float32, in a grid together with epochs: `epoch` is the one that a stage writes, and
the stage before wrote `epoch - 1`.
"""

import triton
import triton.language as tl

from .gemv import (
    LANES,
    PIECE,
    deal,
    deal_all,
    deal_normed,
    load_norm,
    load_tile,
    multiply_tile,
    piece_count,
    piece_size,
    receive_inputs,
    share_of,
    tile_count,
    unpack_pair,
)
from .grid_sync import current, publish, receive, wait_for_launch

LOG2_E = tl.constexpr(1.4426950408889634)
QUERY_ROWS = tl.constexpr(32)  # query heads of a KV head, its new key and its new value, padded
BIGGEST_HALF = tl.constexpr(65504.0)  # of float16
MERGED = tl.constexpr(4)  # parts of the attention that are read together


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
def project(
    program,
    codes,
    scales,
    x,
    norm_weight,
    eps,
    residual,
    out,
    epoch,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """out = [rms_norm](x) W^T [+ residual, which was written one stage before x]."""
    row, end = share_of(OUTPUTS, program, PROGRAMS)
    row = row + tl.arange(0, ROWS)
    tile = load_tile(codes, scales, row, row < end, COLS, KIND)
    if NORM:
        norm = load_norm(norm_weight, ROWS, COLS, KIND)
    wait_for_launch(WAIT)
    inputs = receive_inputs(x, epoch - 1, COLS, ROWS, WAIT)
    if NORM:
        inputs, factor = deal_normed(inputs, norm, eps, ROWS, COLS, KIND)
    else:
        inputs = deal_all(inputs, COLS, KIND)
        factor = tl.full((ROWS,), 1.0, tl.float32)
    _project_rows(
        tile,
        row,
        end,
        codes,
        scales,
        inputs,
        factor,
        residual,
        epoch - 2,
        out,
        epoch,
        OUTPUTS,
        COLS,
        KIND,
        ADD,
        ROWS,
        PROGRAMS,
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
    factor,
    residual,
    residual_epoch,
    out,
    epoch,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    for _ in range(tile_count(OUTPUTS, PROGRAMS, ROWS)):
        live = row < end
        if tile_count(OUTPUTS, PROGRAMS, ROWS) > 1:
            next_tile = load_tile(codes, scales, row + ROWS, row + ROWS < end, COLS, KIND)
        y = multiply_tile(tile, inputs, ROWS, COLS, KIND) * factor
        if ADD:
            y += receive(residual, row, live, residual_epoch, ROWS, ROWS * LANES, WAIT)
        publish(out, row, y, live, epoch, WAIT)
        if tile_count(OUTPUTS, PROGRAMS, ROWS) > 1:
            row += ROWS
            tile = next_tile


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
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """out = silu(h gate^T) * (h up^T), h = rms_norm(x); the gate's rows come before the up's."""
    row, end = share_of(INNER, program, PROGRAMS)
    row = row + tl.arange(0, ROWS)
    gate_tile = load_tile(codes, scales, row, row < end, COLS, KIND)
    up_tile = load_tile(codes, scales, row + INNER, row < end, COLS, KIND)
    norm = load_norm(norm_weight, ROWS, COLS, KIND)
    wait_for_launch(WAIT)
    inputs = receive_inputs(x, epoch - 1, COLS, ROWS, WAIT)
    inputs, factor = deal_normed(inputs, norm, eps, ROWS, COLS, KIND)
    for _ in range(tile_count(INNER, PROGRAMS, ROWS)):
        live = row < end
        if tile_count(INNER, PROGRAMS, ROWS) > 1:
            next_live = row + ROWS < end
            next_gate = load_tile(codes, scales, row + ROWS, next_live, COLS, KIND)
            next_up = load_tile(codes, scales, row + ROWS + INNER, next_live, COLS, KIND)
        gate = multiply_tile(gate_tile, inputs, ROWS, COLS, KIND) * factor
        up = multiply_tile(up_tile, inputs, ROWS, COLS, KIND) * factor
        publish(out, row, gate / (1 + tl.exp(-gate)) * up, live, epoch, WAIT)
        if tile_count(INNER, PROGRAMS, ROWS) > 1:
            row += ROWS
            gate_tile, up_tile = next_gate, next_up


@triton.jit
def split_plan(tokens, SPLITS: tl.constexpr, BLOCK_KV: tl.constexpr):  # -> count, length
    """Cut the attention over `tokens` into up to SPLITS parts of whole blocks."""
    blocks = (tokens + BLOCK_KV - 1) // BLOCK_KV
    length = (blocks + SPLITS - 1) // SPLITS * BLOCK_KV
    return (tokens + length - 1) // length, length


@triton.jit
def attend(
    kv_head,
    split,
    qkv,
    position,
    keys,
    values,
    cos,
    sin,
    scale,
    partial,
    attended,
    epoch,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    THREADS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Attend with the query heads of one KV head to one part of the tokens.

    The part that has the new token also stores its rotated key and its value, for later steps.

    Args:
        qkv: (HEADS + 2 KV_HEADS, HEAD_DIM) of the new token, not rotated.
        position: of the new token; it sees the `position + 1` tokens up to itself.
        keys, values: (capacity, HEAD_DIM) of this KV head, in the dtype of the cache.
        partial: (HEADS, SPLITS, HEAD_DIM + 1), if there are several parts: the result of each, and
            the base-2 logarithm of its sum of weights.
        attended: (HEADS, HEAD_DIM), if there is one.
        DIM: HEAD_DIM, rounded up to a power of two of at least 16.
        THREADS: of this program.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    half: tl.constexpr = DIM // 2
    KV: tl.constexpr = keys.dtype.element_ty
    precision: tl.constexpr = "ieee" if KV == tl.float32 else "tf32"  # noqa: SIM300
    splits, length = split_plan(position + 1, SPLITS, BLOCK_KV)
    first = split * length
    end = tl.minimum(first + length, position)  # of the tokens in the cache
    has_new = (first <= position) & (position < first + length)

    # the new token's rotation: the halves of a head are rotated with each other
    pair = tl.arange(0, half)
    c = tl.load(cos + position * (HEAD_DIM // 2) + pair, mask=pair < HEAD_DIM // 2, other=0)
    s = tl.load(sin + position * (HEAD_DIM // 2) + pair, mask=pair < HEAD_DIM // 2, other=0)
    dim = tl.arange(0, DIM)
    has_dim = dim % half < HEAD_DIM // 2
    place = dim // half * (HEAD_DIM // 2) + dim % half  # of an element in memory
    token = tl.arange(0, BLOCK_KV)
    k, v = _load_tokens(keys, values, first + token, end, place, has_dim, HEAD_DIM)

    row = tl.arange(0, QUERY_ROWS)
    is_query = row < group
    head = tl.where(is_query, kv_head * group + row, HEADS + kv_head)  # then the key, the value
    head += tl.where(row == group + 1, KV_HEADS, 0)
    wanted = (row < group + 2)[:, None] & has_dim[None, :]
    new = receive(
        qkv,
        head[:, None] * HEAD_DIM + place[None, :],
        wanted,
        epoch - 1,
        QUERY_ROWS * DIM,
        THREADS,
        WAIT,
    )
    a, b = tl.split(tl.permute(tl.reshape(new, (QUERY_ROWS, 2, half)), (0, 2, 1)))
    turned = tl.join(a * c[None, :] - b * s[None, :], b * c[None, :] + a * s[None, :])
    turned = tl.reshape(tl.permute(turned, (0, 2, 1)), (QUERY_ROWS, DIM))
    key = tl.sum(tl.where((row == group)[:, None], turned, 0.0), 0)
    value = tl.sum(tl.where((row == group + 1)[:, None], new, 0.0), 0)
    if KV == tl.float16:  # noqa: SIM300
        key = tl.minimum(tl.maximum(key, -BIGGEST_HALF), BIGGEST_HALF)
        value = tl.minimum(tl.maximum(value, -BIGGEST_HALF), BIGGEST_HALF)
    key, value = key.to(KV), value.to(KV)
    query = turned * (scale * LOG2_E)

    # begin with the new token, where this part has it
    score = tl.sum(query.to(KV).to(tl.float32) * key.to(tl.float32)[None, :], 1)
    largest = tl.where(has_new, score, float("-inf"))
    weight_sum = tl.where(has_new, 1.0, 0.0) + tl.zeros((QUERY_ROWS,), tl.float32)
    out = tl.where(has_new, value.to(tl.float32), 0.0)[None, :]
    out = out + tl.zeros((QUERY_ROWS, DIM), tl.float32)
    for start in range(first, end, BLOCK_KV):
        seen = start + token < end
        scores = tl.dot(query.to(KV), tl.trans(k), input_precision=precision)
        scores = tl.where(seen[None, :], scores, float("-inf"))  # (QUERY_ROWS, BLOCK_KV)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        out += tl.dot(weights.to(KV), v, input_precision=precision)
        largest = new_largest
        following = start + BLOCK_KV + token
        k, v = _load_tokens(keys, values, following, end, place, has_dim, HEAD_DIM)

    out = out / weight_sum[:, None]
    mask = is_query[:, None] & has_dim[None, :]
    if splits == 1:
        publish(attended, head[:, None] * HEAD_DIM + place[None, :], out, mask, epoch, WAIT)
    else:
        part = (head * SPLITS + split) * (HEAD_DIM + 1)
        publish(partial, part[:, None] + place[None, :], out, mask, epoch, WAIT)
        publish(partial, part + HEAD_DIM, largest + tl.log2(weight_sum), is_query, epoch, WAIT)
    if has_new:
        offset = position.to(tl.int64) * HEAD_DIM + place
        tl.store(keys + offset, key, mask=has_dim)
        tl.store(values + offset, value, mask=has_dim)


@triton.jit
def _load_tokens(keys, values, token, end, place, has_dim, HEAD_DIM: tl.constexpr):
    """Request the keys and values of the tokens before `end`: (tokens, DIM) each."""
    offset = token.to(tl.int64)[:, None] * HEAD_DIM + place[None, :]
    mask = (token < end)[:, None] & has_dim[None, :]
    return tl.load(keys + offset, mask=mask, other=0), tl.load(values + offset, mask=mask, other=0)


@triton.jit
def merge(
    partial,
    splits,
    epoch,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    piece: tl.constexpr,
    THREADS: tl.constexpr,
    WAIT: tl.constexpr,
):  # -> (PIECE,)
    """Join the parts of `attend` for a piece of the (HEADS * HEAD_DIM) attended values."""
    size: tl.constexpr = piece_size(HEADS * HEAD_DIM, piece)
    index = piece * PIECE + tl.arange(0, size)
    head, dim = index // HEAD_DIM, index % HEAD_DIM
    part = tl.arange(0, MERGED)
    # the result and its logarithm, side by side
    place = tl.join(dim, tl.full((size,), HEAD_DIM, tl.int32))[:, None, :]
    largest = tl.full((size,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((size,), tl.float32)
    total = tl.zeros((size,), tl.float32)
    for first in range(0, splits, MERGED):
        row = head[:, None] * SPLITS + first + part[None, :]
        live = (first + part < splits)[None, :] & (head < HEADS)[:, None]
        word = row[:, :, None] * (HEAD_DIM + 1) + place
        pairs = receive(
            partial,
            word,
            tl.broadcast_to(live[:, :, None], (size, MERGED, 2)),
            epoch,
            size * MERGED * 2,
            THREADS,
            WAIT,
        )
        values, logs = tl.split(pairs)  # (PIECE, MERGED)
        logs = tl.where(live, logs, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logs, 1))
        new_largest = tl.where(head < HEADS, new_largest, 0.0)
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(logs - new_largest[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        total = total * shrink + tl.sum(values * weights, 1)
        largest = new_largest
    return tl.where(head < HEADS, total / tl.where(head < HEADS, weight_sum, 1.0), 0.0)


@triton.jit
def _attended_piece(
    partial,
    attended,
    splits,
    epoch,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    piece: tl.constexpr,
    ROWS: tl.constexpr,
    WAIT: tl.constexpr,
):
    if splits == 1:
        index = piece * PIECE + tl.arange(0, piece_size(HEADS * HEAD_DIM, piece))
        values = receive(
            attended,
            index,
            index < HEADS * HEAD_DIM,
            epoch,
            piece_size(HEADS * HEAD_DIM, piece),
            ROWS * LANES,
            WAIT,
        )
    else:
        values = merge(partial, splits, epoch, HEADS, HEAD_DIM, SPLITS, piece, ROWS * LANES, WAIT)
    return values


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
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """out = attention W^T + residual; every program merges the parts for itself."""
    COLS: tl.constexpr = HEADS * HEAD_DIM
    row, end = share_of(HIDDEN, program, PROGRAMS)
    row = row + tl.arange(0, ROWS)
    tile = load_tile(codes, scales, row, row < end, COLS, KIND)
    wait_for_launch(WAIT)
    splits, _ = split_plan(current(WAIT, positions) + 1, SPLITS, BLOCK_KV)
    inputs = ()
    for piece in tl.static_range(piece_count(COLS)):
        values = _attended_piece(
            partial, attended, splits, epoch - 1, HEADS, HEAD_DIM, SPLITS, piece, ROWS, WAIT
        )
        inputs = inputs + deal(values, piece, COLS, KIND)
    _project_rows(
        tile,
        row,
        end,
        codes,
        scales,
        inputs,
        tl.full((ROWS,), 1.0, tl.float32),
        residual,
        epoch - 3,
        out,
        epoch,
        HIDDEN,
        COLS,
        KIND,
        True,
        ROWS,
        PROGRAMS,
        WAIT,
    )
