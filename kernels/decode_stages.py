"""The five stages of a block, for one decoded token, as any program of a grid runs them.

    qkv        norm + query, key and value projections      -> qkv
    attention  rotate, store key and value, attend          -> partial results of splits
    output     merge the splits, output projection, + x     -> middle
    gate_up    norm + gate and up projections, SiLU * up    -> inner
    down       down projection, + middle                    -> x

Each stage first requests its weights, then waits for its inputs (`WAIT`, see `grid_sync`), so the
weights travel while the stage before it ends. `decode_step.py` launches one kernel per stage;
`decode_persistent.py` runs all of them in one kernel. Stages have no barrier of their own, so that
Triton's interpreter runs them too.

All vectors are float32. `program` of `PROGRAMS` takes its even share of the rows.
"""

import triton
import triton.language as tl

from .gemv import load_tile, multiply_tile, share_of, tile_count, unpack_pair
from .grid_sync import current, wait_for_inputs

LOG2_E = tl.constexpr(1.4426950408889634)
QUERY_ROWS = tl.constexpr(16)  # the smallest tile of a matrix unit: the query heads of a KV head
BIGGEST_HALF = tl.constexpr(65504.0)  # of float16


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
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
    counter,
    arrivals,
):
    """out = [rms_norm](x) W^T [+ residual]: the stages `qkv` and `down`."""
    row, end = share_of(OUTPUTS, program, PROGRAMS)
    row = row + tl.arange(0, ROWS)
    tile = load_tile(codes, row, row < end, COLS, KIND, VEC)
    wait_for_inputs(WAIT, counter, arrivals)
    _project_rows(
        tile,
        row,
        end,
        codes,
        scales,
        x,
        norm_weight,
        eps,
        residual,
        out,
        OUTPUTS,
        COLS,
        KIND,
        VEC,
        ROWS,
        NORM,
        ADD,
        PROGRAMS,
    )


@triton.jit
def _project_rows(
    tile,
    row,
    end,
    codes,
    scales,
    x,
    norm_weight,
    eps,
    residual,
    out,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    for _ in range(tile_count(OUTPUTS, PROGRAMS, ROWS)):
        live = row < end
        if tile_count(OUTPUTS, PROGRAMS, ROWS) > 1:
            following = load_tile(codes, row + ROWS, row + ROWS < end, COLS, KIND, VEC)
        y = multiply_tile(tile, scales, row, live, x, norm_weight, eps, ROWS, COLS, KIND, VEC, NORM)
        if ADD:
            y += tl.load(residual + row, mask=live, other=0)
        tl.store(out + row, y, mask=live)
        if tile_count(OUTPUTS, PROGRAMS, ROWS) > 1:
            row += ROWS
            tile = following


@triton.jit
def gate_up(
    program,
    codes,
    scales,
    x,
    norm_weight,
    eps,
    out,
    INNER: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
    counter,
    arrivals,
):
    """out = silu(h gate^T) * (h up^T), h = rms_norm(x); the gate's rows come before the up's."""
    row, end = share_of(INNER, program, PROGRAMS)
    row = row + tl.arange(0, ROWS)
    gate_tile = load_tile(codes, row, row < end, COLS, KIND, VEC)
    up_tile = load_tile(codes, row + INNER, row < end, COLS, KIND, VEC)
    wait_for_inputs(WAIT, counter, arrivals)
    for _ in range(tile_count(INNER, PROGRAMS, ROWS)):
        live = row < end
        if tile_count(INNER, PROGRAMS, ROWS) > 1:
            next_live = row + ROWS < end
            next_gate = load_tile(codes, row + ROWS, next_live, COLS, KIND, VEC)
            next_up = load_tile(codes, row + ROWS + INNER, next_live, COLS, KIND, VEC)
        gate = multiply_tile(
            gate_tile, scales, row, live, x, norm_weight, eps, ROWS, COLS, KIND, VEC, True
        )
        up = multiply_tile(
            up_tile, scales, row + INNER, live, x, norm_weight, eps, ROWS, COLS, KIND, VEC, True
        )
        tl.store(out + row, gate / (1 + tl.exp(-gate)) * up, mask=live)
        if tile_count(INNER, PROGRAMS, ROWS) > 1:
            row += ROWS
            gate_tile, up_tile = next_gate, next_up


@triton.jit
def split_plan(tokens, SPLITS: tl.constexpr, BLOCK_KV: tl.constexpr):  # -> count, length
    """Split the attention over `tokens`: into up to SPLITS parts, of whole blocks.

    A part has at least two blocks: a second one costs less than merging what two programs found.
    """
    wanted = tl.minimum((tokens + 2 * BLOCK_KV - 1) // (2 * BLOCK_KV), SPLITS)
    blocks = (tokens + BLOCK_KV - 1) // BLOCK_KV
    length = (blocks + wanted - 1) // wanted * BLOCK_KV
    return (tokens + length - 1) // length, length


@triton.jit
def rotated(vector, dim, position, cos, sin, live, HEAD_DIM: tl.constexpr):
    """Load heads at `vector` (a pointer, or one per row) and rotate them to a position."""
    half: tl.constexpr = HEAD_DIM // 2
    values = tl.load(vector + dim, mask=live, other=0)
    partners = tl.load(vector + (dim + half) % HEAD_DIM, mask=live, other=0)
    angle = position * half + dim % half
    c = tl.load(cos + angle)
    s = tl.load(sin + angle)
    return values * c + tl.where(dim < half, -partners, partners) * s


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
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Attend with the query heads of one KV head to one split of the tokens.

    The split that has the new token first stores its rotated key and its value.

    Args:
        qkv: (HEADS + 2 KV_HEADS, HEAD_DIM) float32 of the new token, not rotated.
        position: of the new token; it sees the `position + 1` tokens up to itself.
        keys, values: (capacity, HEAD_DIM) of this KV head, in the dtype of the cache.
        partial: (HEADS, SPLITS, HEAD_DIM + 2) float32, if there are several splits: sums of values,
            largest score (in bits), sum of weights.
        attended: (HEADS, HEAD_DIM) float32, if there is one.
        DIM: HEAD_DIM, rounded up to a power of two of at least 16.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    KV: tl.constexpr = keys.dtype.element_ty
    precision: tl.constexpr = "ieee" if tl.float32 == KV else "tf32"
    tokens = position + 1
    splits, length = split_plan(tokens, SPLITS, BLOCK_KV)
    first = split * length
    end = tl.minimum(first + length, tokens)

    dim = tl.arange(0, DIM)
    has_dim = dim < HEAD_DIM
    if (first <= position) & (position < first + length):
        key = rotated(
            qkv + (HEADS + kv_head) * HEAD_DIM, dim, position, cos, sin, has_dim, HEAD_DIM
        )
        value = tl.load(qkv + (HEADS + KV_HEADS + kv_head) * HEAD_DIM + dim, mask=has_dim, other=0)
        if tl.float16 == KV:
            key = tl.minimum(tl.maximum(key, -BIGGEST_HALF), BIGGEST_HALF)
            value = tl.minimum(tl.maximum(value, -BIGGEST_HALF), BIGGEST_HALF)
        place = position.to(tl.int64) * HEAD_DIM + dim
        tl.store(keys + place, key.to(KV), mask=has_dim)
        tl.store(values + place, value.to(KV), mask=has_dim)
        tl.debug_barrier()  # other threads of this program read them below

    query_row = tl.arange(0, QUERY_ROWS)
    head = kv_head * group + query_row
    is_head = (query_row < group)[:, None]
    query = rotated(
        qkv + (head * HEAD_DIM)[:, None],
        dim[None, :],
        position,
        cos,
        sin,
        is_head & has_dim[None, :],
        HEAD_DIM,
    )
    query = (query * (scale * LOG2_E)).to(KV)  # (QUERY_ROWS, DIM)

    largest = tl.full((QUERY_ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((QUERY_ROWS,), tl.float32)
    out = tl.zeros((QUERY_ROWS, DIM), tl.float32)
    for start in range(first, end, BLOCK_KV):
        token = start + tl.arange(0, BLOCK_KV)
        seen = token < end
        place = token.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        mask = seen[:, None] & has_dim[None, :]
        k = tl.load(keys + place, mask=mask, other=0, cache_modifier=".cg")
        v = tl.load(values + place, mask=mask, other=0, cache_modifier=".cg")
        scores = tl.dot(query, tl.trans(k), input_precision=precision)  # (QUERY_ROWS, BLOCK_KV)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        out += tl.dot(weights.to(KV), v, input_precision=precision)
        largest = new_largest

    if splits == 1:
        whole = attended + head[:, None] * HEAD_DIM + dim[None, :]
        tl.store(whole, out / weight_sum[:, None], mask=is_head & has_dim[None, :])
    else:
        part = partial + (head * SPLITS + split) * (HEAD_DIM + 2)
        tl.store(part[:, None] + dim[None, :], out, mask=is_head & has_dim[None, :])
        tl.store(part + HEAD_DIM, largest, mask=query_row < group)
        tl.store(part + HEAD_DIM + 1, weight_sum, mask=query_row < group)


@triton.jit
def merge(
    partial,
    splits,
    out,
    HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the splits of `attend` into out (HEADS, HEAD_DIM) float32, all of it by one program.

    HEAD_ROWS is HEADS, rounded up to a power of two.
    """
    dim = tl.arange(0, DIM)
    head = tl.arange(0, HEAD_ROWS)
    is_head = head < HEADS
    mask = is_head[:, None] & (dim < HEAD_DIM)[None, :]
    largest = tl.full((HEAD_ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((HEAD_ROWS,), tl.float32)
    total = tl.zeros((HEAD_ROWS, DIM), tl.float32)
    for split in range(splits):
        place = partial + (head * SPLITS + split) * (HEAD_DIM + 2)
        part = tl.load(place[:, None] + dim[None, :], mask=mask, other=0, cache_modifier=".cg")
        part_largest = tl.load(place + HEAD_DIM, mask=is_head, other=0, cache_modifier=".cg")
        part_sum = tl.load(place + HEAD_DIM + 1, mask=is_head, other=1, cache_modifier=".cg")
        new_largest = tl.maximum(largest, part_largest)
        shrink = tl.exp2(largest - new_largest)
        factor = tl.exp2(part_largest - new_largest)
        weight_sum = weight_sum * shrink + part_sum * factor
        total = total * shrink[:, None] + part * factor[:, None]
        largest = new_largest
    total = total / weight_sum[:, None]
    tl.store(out + head[:, None] * HEAD_DIM + dim[None, :], total, mask=mask)


@triton.jit
def output(
    program,
    codes,
    scales,
    partial,
    positions,
    attended,
    merged,
    residual,
    out,
    HIDDEN: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    KIND: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
    counter,
    arrivals,
):
    """out = attention W^T + residual; every program merges the splits for itself.

    `merged` (HEADS * HEAD_DIM,) is this program's own: nobody else waits for it.
    """
    COLS: tl.constexpr = HEADS * HEAD_DIM
    row, end = share_of(HIDDEN, program, PROGRAMS)
    row = row + tl.arange(0, ROWS)
    tile = load_tile(codes, row, row < end, COLS, KIND, VEC)
    wait_for_inputs(WAIT, counter, arrivals)
    splits, _ = split_plan(current(WAIT, positions) + 1, SPLITS, BLOCK_KV)
    if splits > 1:
        merge(partial, splits, merged, HEADS, HEAD_ROWS, HEAD_DIM, DIM, SPLITS)
        tl.debug_barrier()  # other threads of this program wrote parts of it
        attended = merged
    _project_rows(
        tile,
        row,
        end,
        codes,
        scales,
        attended,
        attended,
        0.0,
        residual,
        out,
        HIDDEN,
        COLS,
        KIND,
        VEC,
        ROWS,
        False,
        True,
        PROGRAMS,
    )


@triton.jit
def embed(
    token,
    codes,
    scales,
    out,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the embedding of a token to out (COLS,) float32; BLOCK is a power of two >= COLS."""
    groups: tl.constexpr = (COLS + 31) // 32
    col = tl.arange(0, BLOCK)
    live = col < COLS
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
    tl.store(out + col, values, mask=live)
