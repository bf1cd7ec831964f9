"""Attention of one token, as any program of a grid computes its share of it.

A task is one query head and one part of the tokens. Query heads of a group read the same keys and
values, through the L2 cache: with more heads in a program there would be fewer programs, and each
would have a longer chain of instructions, which is what a single token waits for.

Several parts of a head are merged by whoever reads them.
"""

import triton
import triton.language as tl

from .gemv import padded_size, piece_count
from .grid_sync import publish, receive

LOG2_E = tl.constexpr(1.4426950408889634)
MERGED = tl.constexpr(4)  # parts that are read together
LARGEST_SUM = tl.constexpr(2.0**60)
SMALLEST_SUM = tl.constexpr(2.0**-126)


@triton.jit
def split_plan(tokens, SPLITS: tl.constexpr, BLOCK_KV: tl.constexpr):  # -> count, length
    """Cut the attention over `tokens` into up to SPLITS parts of whole blocks.

    A part has at least two blocks: one more takes less time than merging two parts.
    """
    blocks = (tokens + BLOCK_KV - 1) // BLOCK_KV
    length = tl.maximum((blocks + SPLITS - 1) // SPLITS, 2) * BLOCK_KV
    return (tokens + length - 1) // length, length


@triton.jit
def attend(
    head,
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
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    WARPS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Attend with one query head to one part of the tokens.

    The softmax is taken relative to the score of the new token, which every part knows, rather
    than to the largest one, which takes an exchange to know. Should the weights become too large
    for that, all is computed again, relative to the largest.

    Args:
        qkv: (HEADS + 2 KV_HEADS, HEAD_DIM) of the new token, rotated.
        position: of the new token; it sees the `position + 1` tokens up to itself.
        keys, values: (capacity, HEAD_DIM) of this KV head, in the dtype of the cache; those of the
            new token are taken from `qkv`.
        partial: (HEADS, SPLITS, HEAD_DIM + 1), if there are several parts: the result of each, and
            the base-2 logarithm of its sum of weights.
        attended: (HEADS, HEAD_DIM), if there is one.
        DIM: HEAD_DIM, rounded up to a power of two.
        WARPS: of this program.
    """
    KV: tl.constexpr = keys.dtype.element_ty
    splits, length = split_plan(position + 1, SPLITS, BLOCK_KV)
    first = split * length
    end = tl.minimum(first + length, position)  # of the tokens in the cache
    has_new = (first <= position) & (position < first + length)
    dim = tl.arange(0, DIM)
    token = tl.arange(0, BLOCK_KV)
    tiles = _first_tokens(keys, values, first, end, BLOCK_KV, DIM, HEAD_DIM)

    # the query, the new key and the new value, side by side
    row = tl.arange(0, 4)
    kv_head = HEADS + head // (HEADS // KV_HEADS)
    place = tl.where(row == 0, head, kv_head + tl.where(row == 2, KV_HEADS, 0)) * HEAD_DIM
    wanted = (dim < HEAD_DIM)[:, None] & (row < 3)[None, :]
    new = receive(
        qkv, place[None, :] + dim[:, None], wanted, epoch - 1, 4 * DIM, WARPS, WAIT, 1, 0
    )[0]
    even, odd = tl.split(tl.reshape(new, (DIM, 2, 2)))
    query, value = tl.split(even)  # (DIM,)
    key, _ = tl.split(odd)
    query *= scale * LOG2_E
    key = key.to(KV).to(tl.float32)
    value = value.to(KV).to(tl.float32)

    score = tl.sum(query * key, 0)
    base = score
    total = float("inf")
    out = tl.zeros((DIM,), tl.float32)
    again = True
    turn = 0
    while again:
        weight_sum = tl.zeros((BLOCK_KV,), tl.float32)
        products = tl.zeros((BLOCK_KV, DIM), tl.float32)
        k, v, more_k, more_v = tiles
        for start in range(first, end, BLOCK_KV):
            next_k, next_v = _load_tokens(
                keys, values, start + 2 * BLOCK_KV + token, end, dim, HEAD_DIM
            )
            scores = tl.sum(query[None, :] * k.to(tl.float32), 1)
            weights = tl.where(start + token < end, tl.exp2(scores - base), 0.0)
            weight_sum += weights
            products += weights[:, None] * v.to(tl.float32)
            k, more_k = more_k, next_k
            v, more_v = more_v, next_v
        new_weight = tl.where(has_new, tl.exp2(score - base), 0.0)
        total = tl.sum(weight_sum, 0) + new_weight
        out = tl.sum(products, 0) + new_weight * value
        # once: other roundings of huge scores must not make it go on
        again = (total > LARGEST_SUM) & (turn == 0)
        turn += 1
        if again:
            base = _largest_score(query, score, keys, first, end, BLOCK_KV, DIM, HEAD_DIM)
            tiles = _first_tokens(keys, values, first, end, BLOCK_KV, DIM, HEAD_DIM)

    # a part of tokens that have next to no weight may have none at all, or too little to divide by
    total = tl.maximum(total, SMALLEST_SUM, propagate_nan=tl.PropagateNan.ALL)
    out *= 1 / total
    live = dim < HEAD_DIM
    if splits == 1:
        publish(attended, head * HEAD_DIM + dim, out, live, epoch, WAIT)
    else:
        part = (head * SPLITS + split) * (HEAD_DIM + 1)
        publish(partial, part + dim, out, live, epoch, WAIT)
        publish(partial, part + HEAD_DIM + dim, base + tl.log2(total), dim == 0, epoch, WAIT)


@triton.jit
def _largest_score(
    query,
    largest,
    keys,
    first,
    end,
    BLOCK_KV: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    dim = tl.arange(0, DIM)
    for start in range(first, end, BLOCK_KV):
        token = start + tl.arange(0, BLOCK_KV)
        k, _ = _load_tokens(keys, keys, token, end, dim, HEAD_DIM)
        scores = tl.sum(query[None, :] * k.to(tl.float32), 1)
        largest = tl.maximum(largest, tl.max(tl.where(token < end, scores, largest), 0))
    return largest


@triton.jit
def _first_tokens(
    keys,
    values,
    first,
    end,
    BLOCK_KV: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Request two blocks of keys and values."""
    dim = tl.arange(0, DIM)
    token = first + tl.arange(0, BLOCK_KV)
    k, v = _load_tokens(keys, values, token, end, dim, HEAD_DIM)
    more_k, more_v = _load_tokens(keys, values, token + BLOCK_KV, end, dim, HEAD_DIM)
    return k, v, more_k, more_v


@triton.jit
def _load_tokens(keys, values, token, end, dim, HEAD_DIM: tl.constexpr):
    """Request the keys and values of the tokens before `end`: (tokens, DIM) each."""
    offset = token.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
    mask = (token < end)[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(keys + offset, mask=mask, other=0), tl.load(values + offset, mask=mask, other=0)


@triton.jit
def merge(
    partial,
    splits,
    index,
    epoch,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    WARPS: tl.constexpr,
    WAIT: tl.constexpr,
):  # -> (SIZE,)
    """Join the parts of `attend` for elements `index` (SIZE,) of the (HEADS * HEAD_DIM) values."""
    head = index // HEAD_DIM
    known = head < HEADS
    part = head * SPLITS * (HEAD_DIM + 1)
    # a value and its part's logarithm, side by side
    place = tl.join(part + index % HEAD_DIM, part + HEAD_DIM)
    largest = tl.full((SIZE,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((SIZE,), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for first in range(0, splits, MERGED):
        live = tl.where(known, tl.minimum(splits - first, MERGED), 0)
        pairs = receive(
            partial + first * (HEAD_DIM + 1),
            place,
            tl.join(live, live),
            epoch,
            2 * SIZE,
            WARPS,
            WAIT,
            MERGED,
            HEAD_DIM + 1,
        )
        for each in tl.static_range(MERGED):
            value, log = tl.split(pairs[each])
            log = tl.where(each < live, log, float("-inf"))
            new_largest = tl.where(known, tl.maximum(largest, log), 0.0)
            shrink = tl.exp2(largest - new_largest)
            weight = tl.exp2(log - new_largest)
            weight_sum = weight_sum * shrink + weight
            total = total * shrink + value * weight
            largest = new_largest
    return tl.where(known, total / tl.where(known, weight_sum, 1.0), 0.0)


@triton.jit
def receive_attended(
    partial,
    attended,
    splits,
    epoch,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    WAIT: tl.constexpr,
):  # -> (PIECE,) of each piece
    """Wait for the attention of all heads, and merge its parts."""
    COLS: tl.constexpr = HEADS * HEAD_DIM
    size: tl.constexpr = padded_size(COLS, KIND, WARPS)
    count: tl.constexpr = piece_count(COLS, KIND, WARPS)
    index = tl.arange(0, size)
    if splits == 1:
        live = (COLS - index + size - 1) // size
        values = receive(attended, index, live, epoch, size, WARPS, WAIT, count, size)
    else:
        values = ()
        for piece in tl.static_range(count):
            part = merge(
                partial,
                splits,
                piece * size + index,
                epoch,
                size,
                HEADS,
                HEAD_DIM,
                SPLITS,
                WARPS,
                WAIT,
            )
            values = values + (part,)
    return values
