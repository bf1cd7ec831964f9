"""The stages of a decode step for one token, as any program of a grid runs its share of them.

    embed      a row of the embedding                       -> x
    query      norm + query, key and value, rotated; stores -> qkv, KV cache
    attend     attention                                    -> attended, or partial results
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
        NORM,
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
    DEALT: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    for _ in range(tile_count(OUTPUTS, PROGRAMS, ROWS)):
        live = row < end
        if tile_count(OUTPUTS, PROGRAMS, ROWS) > 1:
            next_tile = load_tile(codes, scales, row + ROWS, row + ROWS < end, COLS, KIND)
        y = multiply_tile(tile, inputs, ROWS, COLS, KIND, DEALT) * factor
        if ADD:
            y += receive(residual, row, live, residual_epoch, ROWS, ROWS * LANES, WAIT)
        publish(out, row, y, live, epoch, WAIT)
        if tile_count(OUTPUTS, PROGRAMS, ROWS) > 1:
            row += ROWS
            tile = next_tile


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
    ROWS: tl.constexpr,
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
    pair, end = share_of(pairs, program, PROGRAMS)
    pair = pair + tl.arange(0, ROWS)
    row = pair // half * HEAD_DIM + pair % half
    tile = load_tile(codes, scales, row, pair < end, COLS, KIND)
    partner_tile = load_tile(codes, scales, row + half, pair < end, COLS, KIND)
    norm = load_norm(norm_weight, ROWS, COLS, KIND)
    wait_for_launch(WAIT)
    position = current(WAIT, positions)
    c, s = _rotation(pair, position, cos, sin, HEADS + KV_HEADS, HEAD_DIM)
    inputs = receive_inputs(x, epoch - 1, COLS, ROWS, WAIT)
    inputs, factor = deal_normed(inputs, norm, eps, ROWS, COLS, KIND)
    for _ in range(tile_count(pairs, PROGRAMS, ROWS)):
        live = pair < end
        if tile_count(pairs, PROGRAMS, ROWS) > 1:
            next_pair = pair + ROWS
            next_row = next_pair // half * HEAD_DIM + next_pair % half
            next_tile = load_tile(codes, scales, next_row, next_pair < end, COLS, KIND)
            next_partner = load_tile(codes, scales, next_row + half, next_pair < end, COLS, KIND)
            next_c, next_s = _rotation(next_pair, position, cos, sin, HEADS + KV_HEADS, HEAD_DIM)
        first = multiply_tile(tile, inputs, ROWS, COLS, KIND, True) * factor
        second = multiply_tile(partner_tile, inputs, ROWS, COLS, KIND, True) * factor
        turned = first * c - second * s
        second = second * c + first * s
        publish(out, row, turned, live, epoch, WAIT)
        publish(out, row + half, second, live, epoch, WAIT)
        store_in_cache(cache, size, row - HEADS * HEAD_DIM, position, turned, live, HEAD_DIM)
        store_in_cache(cache, size, row + half - HEADS * HEAD_DIM, position, second, live, HEAD_DIM)
        if tile_count(pairs, PROGRAMS, ROWS) > 1:
            pair = next_pair
            row = next_row
            tile, partner_tile = next_tile, next_partner
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
    # two tiles of a narrow matrix fit the registers: the second is requested before the wait, too
    tiles: tl.constexpr = tile_count(INNER, PROGRAMS, ROWS)
    both: tl.constexpr = tiles == 2 and piece_count(COLS) == 1
    if both:
        more = row + ROWS < end
        next_gate = load_tile(codes, scales, row + ROWS, more, COLS, KIND)
        next_up = load_tile(codes, scales, row + ROWS + INNER, more, COLS, KIND)
    norm = load_norm(norm_weight, ROWS, COLS, KIND)
    wait_for_launch(WAIT)
    inputs = receive_inputs(x, epoch - 1, COLS, ROWS, WAIT)
    inputs, factor = deal_normed(inputs, norm, eps, ROWS, COLS, KIND)
    for _ in range(1 if both else tiles):
        if tiles > 1 and not both:
            more = row + ROWS < end
            next_gate = load_tile(codes, scales, row + ROWS, more, COLS, KIND)
            next_up = load_tile(codes, scales, row + ROWS + INNER, more, COLS, KIND)
        gate = multiply_tile(gate_tile, inputs, ROWS, COLS, KIND, True) * factor
        up = multiply_tile(up_tile, inputs, ROWS, COLS, KIND, True) * factor
        publish(out, row, gate / (1 + tl.exp(-gate)) * up, row < end, epoch, WAIT)
        if tiles > 1:
            row += ROWS
            gate_tile, up_tile = next_gate, next_up
    if both:
        gate = multiply_tile(gate_tile, inputs, ROWS, COLS, KIND, True) * factor
        up = multiply_tile(up_tile, inputs, ROWS, COLS, KIND, True) * factor
        publish(out, row, gate / (1 + tl.exp(-gate)) * up, row < end, epoch, WAIT)


@triton.jit
def split_plan(tokens, SPLITS: tl.constexpr, BLOCK_KV: tl.constexpr):  # -> count, length
    """Cut the attention over `tokens` into up to SPLITS parts of whole blocks.

    A part has at least 8 blocks: so many take less time than merging two parts.
    """
    blocks = (tokens + BLOCK_KV - 1) // BLOCK_KV
    length = tl.maximum((blocks + SPLITS - 1) // SPLITS, 8) * BLOCK_KV
    return (tokens + length - 1) // length, length


@triton.jit
def attend(
    kv_head,
    split,
    qkv,
    position,
    keys,
    values,
    scale,
    partial,
    attended,
    epoch,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    THREADS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Attend with the query heads of one KV head to one part of the tokens.

    Every place in a block has a softmax of its own, over the tokens that come there; these are
    joined at the end, so that threads wait for each other only then.

    Args:
        qkv: (HEADS + 2 KV_HEADS, HEAD_DIM) of the new token, rotated.
        position: of the new token; it sees the `position + 1` tokens up to itself.
        keys, values: (capacity, HEAD_DIM) of this KV head, in the dtype of the cache; those of the
            new token are taken from `qkv`.
        partial: (HEADS, SPLITS, HEAD_DIM + 1), if there are several parts: the result of each, and
            the base-2 logarithm of its sum of weights.
        attended: (HEADS, HEAD_DIM), if there is one.
        DIM: HEAD_DIM, rounded up to a power of two.
        GROUP: a power of two, at least 2 and the query heads of a KV head.
        THREADS: of this program.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    KV: tl.constexpr = keys.dtype.element_ty
    splits, length = split_plan(position + 1, SPLITS, BLOCK_KV)
    first = split * length
    end = tl.minimum(first + length, position)  # of the tokens in the cache
    has_new = (first <= position) & (position < first + length)
    dim = tl.arange(0, DIM)
    token = tl.arange(0, BLOCK_KV)
    # four blocks on their way: a block is computed in a fraction of the memory's latency
    k0, v0 = _load_tokens(keys, values, first + token, end, dim, HEAD_DIM)
    k1, v1 = _load_tokens(keys, values, first + BLOCK_KV + token, end, dim, HEAD_DIM)
    k2, v2 = _load_tokens(keys, values, first + 2 * BLOCK_KV + token, end, dim, HEAD_DIM)
    k3, v3 = _load_tokens(keys, values, first + 3 * BLOCK_KV + token, end, dim, HEAD_DIM)

    # the queries; then, in as many rows, the new key and the new value
    row = tl.arange(0, 2 * GROUP)
    head = tl.where(row < GROUP, kv_head * group + row, HEADS + kv_head)
    head += tl.where(row == GROUP + 1, KV_HEADS, 0)
    wanted = (row < group) | (row == GROUP) | (row == GROUP + 1)
    index = head[:, None] * HEAD_DIM + dim[None, :]
    wanted = wanted[:, None] & (dim < HEAD_DIM)[None, :]
    new = receive(qkv, index, wanted, epoch - 1, 2 * GROUP * DIM, THREADS, WAIT)
    queries, rest = tl.split(tl.permute(tl.reshape(new, (2, GROUP, DIM)), (1, 2, 0)))
    queries *= scale * LOG2_E  # (GROUP, DIM)
    query_row = tl.arange(0, GROUP)[:, None]
    key = tl.sum(tl.where(query_row == 0, rest, 0.0), 0).to(KV).to(tl.float32)
    value = tl.sum(tl.where(query_row == 1, rest, 0.0), 0).to(KV).to(tl.float32)

    largest = tl.full((GROUP, BLOCK_KV), float("-inf"), tl.float32)
    weight_sum = tl.zeros((GROUP, BLOCK_KV), tl.float32)
    out = tl.zeros((GROUP, BLOCK_KV, DIM), tl.float32)
    for start in range(first, end, BLOCK_KV):
        k4, v4 = _load_tokens(keys, values, start + 4 * BLOCK_KV + token, end, dim, HEAD_DIM)
        scores = tl.sum(queries[:, None, :] * k0.to(tl.float32), 2)
        scores = tl.where((start + token < end)[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, scores)
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrink = tl.exp2(largest - base)
        weights = tl.exp2(scores - base)
        weight_sum = weight_sum * shrink + weights
        out = out * shrink[:, :, None] + weights[:, :, None] * v0.to(tl.float32)
        largest = new_largest
        k0, k1, k2, k3 = k1, k2, k3, k4
        v0, v1, v2, v3 = v1, v2, v3, v4

    score = tl.where(has_new, tl.sum(queries * key[None, :], 1), float("-inf"))  # (GROUP,)
    top = tl.maximum(tl.max(largest, 1), score)
    factor = tl.exp2(largest - top[:, None])
    weight = tl.exp2(score - top)
    total = tl.sum(weight_sum * factor, 1) + weight
    out = tl.sum(out * factor[:, :, None], 1) + weight[:, None] * value[None, :]
    out = out / total[:, None]
    head = kv_head * group + tl.arange(0, GROUP)
    is_head = tl.arange(0, GROUP) < group
    mask = is_head[:, None] & (dim < HEAD_DIM)[None, :]
    if splits == 1:
        publish(attended, head[:, None] * HEAD_DIM + dim[None, :], out, mask, epoch, WAIT)
    else:
        part = (head * SPLITS + split) * (HEAD_DIM + 1)
        publish(partial, part[:, None] + dim[None, :], out, mask, epoch, WAIT)
        publish(partial, part + HEAD_DIM, top + tl.log2(total), is_head, epoch, WAIT)


@triton.jit
def _load_tokens(keys, values, token, end, dim, HEAD_DIM: tl.constexpr):
    """Request the keys and values of the tokens before `end`: (1, tokens, DIM) each.

    Three axes from the start: so everything in the loop has the layout of these loads.
    """
    offset = token.to(tl.int64)[None, :, None] * HEAD_DIM + dim[None, None, :]
    mask = (token < end)[None, :, None] & (dim < HEAD_DIM)[None, None, :]
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
        inputs = inputs + (values,)
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
        False,
        True,
        ROWS,
        PROGRAMS,
        WAIT,
    )
