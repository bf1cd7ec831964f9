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
        WARPS: of this program.
    """
    KV: tl.constexpr = keys.dtype.element_ty
    splits, length = split_plan(position + 1, SPLITS, BLOCK_KV)
    first = split * length
    end = tl.minimum(first + length, position)  # of the tokens in the cache
    has_new = (first <= position) & (position < first + length)
    dim = tl.arange(0, DIM)
    token = tl.arange(0, BLOCK_KV)
    k, v = _load_tokens(keys, values, first + token, end, dim, HEAD_DIM)
    more_k, more_v = _load_tokens(keys, values, first + BLOCK_KV + token, end, dim, HEAD_DIM)

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

    largest = tl.full((BLOCK_KV,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_KV,), tl.float32)
    out = tl.zeros((BLOCK_KV, DIM), tl.float32)
    for start in range(first, end, BLOCK_KV):
        next_k, next_v = _load_tokens(
            keys, values, start + 2 * BLOCK_KV + token, end, dim, HEAD_DIM
        )
        scores = tl.sum(query[None, :] * k.to(tl.float32), 1)
        scores = tl.where(start + token < end, scores, float("-inf"))
        new_largest = tl.maximum(largest, scores)
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrink = tl.exp2(largest - base)
        weights = tl.exp2(scores - base)
        weight_sum = weight_sum * shrink + weights
        out = out * shrink[:, None] + weights[:, None] * v.to(tl.float32)
        largest = new_largest
        k, more_k = more_k, next_k
        v, more_v = more_v, next_v

    score = tl.where(has_new, tl.sum(query * key, 0), float("-inf"))
    top = tl.maximum(tl.max(largest, 0), score)
    factor = tl.exp2(largest - top)
    weight = tl.exp2(score - top)
    total = tl.sum(weight_sum * factor, 0) + weight
    out = (tl.sum(out * factor[:, None], 0) + weight * value) / total
    live = dim < HEAD_DIM
    if splits == 1:
        publish(attended, head * HEAD_DIM + dim, out, live, epoch, WAIT)
    else:
        part = (head * SPLITS + split) * (HEAD_DIM + 1)
        publish(partial, part + dim, out, live, epoch, WAIT)
        log = tl.where(dim == 0, top + tl.log2(total), 0.0)
        publish(partial, part + HEAD_DIM + dim, log, dim == 0, epoch, WAIT)


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
