"""Attention of one new token per sequence over its KV cache: split-KV, in one launch.

A sequence's keys are cut into spans, each program attends one span for the query heads of one
key/value head (packed into the rows of a tile, so keys and values are read once), and the program
that finishes last merges the spans, in order. How a sequence is cut depends on its length alone, so
its result is the same bits in every run and in every batch. On Hopper clusters in CUDA C++ do the
same, `hopper/cluster_attention.py`, with bits of their own.

Lengths are read on the device and the grid covers the cache's capacity, so a captured CUDA graph
serves every step. Reference: Dao et al., https://crfm.stanford.edu/2023/10/12/flashdecoding.html
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .counters import counters_of
from .early_launch import early_options, let_next_start, wait_for_previous
from .hopper import cluster_attention

LOG2_E = 1.4426950408889634


class Cut(NamedTuple):
    """How the kernel cuts its work.

    Args:
        keys: of a tile.
        splits: spans of a sequence, at most; of at least one tile each. A power of 2.
        warps: of a program.
        stages: tiles in flight.
    """

    keys: int
    splits: int
    warps: int
    stages: int


# Of keys, and of values. Small, so that a short context has many programs; a long one has spans of
# several tiles.
TILE_BYTES = 8 << 10


@triton.jit
def _merge_spans(
    acc, peak, total, out, out_stride_head, splits, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge what the programs of one group left: acc, peak and total of each head and span.

    Spans lie side by side, so that those of a column come to few neighbouring lanes, which add
    them up without a barrier.

    Args:
        acc: (GROUP, COLUMNS, SPLITS), sums of the values times 2^(score - peak).
        peak, total: (GROUP, SPLITS), largest score and sum of 2^(score - peak).
        out: (GROUP, HEAD_DIM).
        HEADS: a power of 2; so many heads at a time.
    """
    spans = tl.arange(0, SPLITS)
    columns = tl.arange(0, COLUMNS)
    for first in tl.static_range(0, GROUP, HEADS):
        heads = first + tl.arange(0, HEADS)
        exists = (heads < GROUP)[:, None] & (spans < splits)[None, :]
        # by fours, which are loaded as one
        read = (heads < GROUP)[:, None] & (spans // 4 * 4 < splits)[None, :]
        rows = heads[:, None, None] * COLUMNS + columns[None, :, None]
        # .cg: written by other programs, so not to be found in this SM's cache
        sums = tl.load(
            acc + rows * SPLITS + spans[None, None, :], read[:, None, :], 0.0, cache_modifier=".cg"
        )
        at = heads[:, None] * SPLITS + spans[None, :]
        peaks = tl.load(peak + at, read, 0.0, cache_modifier=".cg")
        totals = tl.load(total + at, read, 0.0, cache_modifier=".cg")
        sums = tl.where(exists[:, None, :], sums, 0.0)
        peaks = tl.where(exists, peaks, float("-inf"))
        totals = tl.where(exists, totals, 0.0)
        highest = tl.where(heads < GROUP, tl.max(peaks, 1), 0.0)
        shrink = tl.exp2(peaks - highest[:, None])
        whole = tl.where(heads < GROUP, tl.sum(totals * shrink, 1), 1.0)
        merged = tl.sum(sums * shrink[:, None, :], 2) / whole[:, None]
        mask = (heads < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
        pointers = out + heads[:, None] * out_stride_head + columns[None, :]
        tl.store(pointers, merged.to(out.dtype.element_ty), mask)


@triton.jit
def _span(length, KEYS: tl.constexpr, SPLITS: tl.constexpr):
    """Return the keys of a span, a multiple of KEYS."""
    return tl.maximum(tl.cdiv(length, KEYS * SPLITS), 1) * KEYS


@triton.jit(do_not_specialize=["capacity"])
def _decode(
    q, k, v, lengths, out, acc_spans, peak_spans, total_spans, counters, qk_scale, q_stride_batch,
    q_stride_head, k_stride_batch, k_stride_head, k_stride_seq, v_stride_batch, v_stride_head,
    v_stride_seq, out_stride_batch, out_stride_head, capacity, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, MERGE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    # spans come last: the first ones, which exist, are started first
    split = tl.program_id(2)
    batch, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    rows = tl.arange(0, ROWS)  # query heads of the group, as many as a matrix product takes
    columns = tl.arange(0, COLUMNS)
    keys = tl.arange(0, KEYS)
    mask = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    q += batch * q_stride_batch + kv_head * GROUP * q_stride_head
    q_offsets = rows[:, None] * q_stride_head + columns[None, :]
    k += batch * k_stride_batch + kv_head * k_stride_head
    v += batch * v_stride_batch + kv_head * v_stride_head
    k_offsets = keys[:, None] * k_stride_seq + columns[None, :]
    v_offsets = keys[:, None] * v_stride_seq + columns[None, :]

    wait_for_previous(EARLY)  # no sooner: addresses do not depend on it
    length = tl.minimum(tl.load(lengths + batch), capacity)
    span = _span(length, KEYS, SPLITS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    weights_sum = tl.zeros((ROWS, KEYS), tl.float32)  # of each place in a tile
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    stop = tl.minimum((split + 1) * span, length)
    for first in tl.range(split * span, stop, KEYS, num_stages=STAGES):
        # what lies beyond the length may be anything: it is not read
        exists = first + keys < stop
        at = tl.cast(first, tl.int64)
        # not before the loop (which the compiler is kept from seeing): keys would wait for it
        q_tile = tl.load(q + (first >> 30) * 16 + q_offsets, mask, 0.0)
        read = exists[:, None] & (columns < HEAD_DIM)[None, :]
        k_tile = tl.load(k + at * k_stride_seq + k_offsets, read, 0.0)
        v_tile = tl.load(v + at * v_stride_seq + v_offsets, read, 0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (rows, keys)
        scores = tl.where(exists[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * qk_scale)
        weights = tl.exp2(scores * qk_scale - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        weights_sum = weights_sum * shrink[:, None] + weights
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        peak = new_peak

    # here and not before the loop, so that the length comes while addresses are computed
    if (split > 0) & (split * span >= length):
        return
    out += batch * out_stride_batch + kv_head * GROUP * out_stride_head
    if span >= length:
        total = tl.sum(weights_sum, 1)
        result = acc / tl.where(total == 0, 1.0, total)[:, None]  # no keys: zeros
        pointers = out + rows[:, None] * out_stride_head + columns[None, :]
        tl.store(pointers, result.to(out.dtype.element_ty), mask)
        return
    first_row = pair.to(tl.int64) * GROUP * SPLITS
    acc_spans += first_row * COLUMNS
    peak_spans += first_row
    total_spans += first_row
    pointers = acc_spans + (rows[:, None] * COLUMNS + columns[None, :]) * SPLITS + split
    tl.store(pointers, acc, (rows < GROUP)[:, None])
    at = rows * SPLITS + split
    total = tl.sum(weights_sum, 1)
    tl.store(peak_spans + at, peak, rows < GROUP)
    tl.store(total_spans + at, total, rows < GROUP)
    if MERGE:
        splits = tl.cdiv(length, span)
        tl.debug_barrier()  # all threads have stored before one of them releases
        arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            tl.store(counters + pair, 0)  # for the next launch
            _merge_spans(
                acc_spans, peak_spans, total_spans, out, out_stride_head, splits, GROUP, HEAD_DIM,
                HEADS, COLUMNS, SPLITS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["capacity"])
def _merge(
    lengths, out, acc_spans, peak_spans, total_spans, out_stride_batch, out_stride_head, capacity,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr,
    COLUMNS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge spans in a launch of their own."""
    batch, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = batch * tl.num_programs(1) + kv_head
    length = tl.minimum(tl.load(lengths + batch), capacity)
    span = _span(length, KEYS, SPLITS)
    if span >= length:  # written
        return
    splits = tl.cdiv(length, span)
    first_row = pair * GROUP * SPLITS
    out += batch * out_stride_batch + kv_head * GROUP * out_stride_head
    _merge_spans(
        acc_spans + first_row * COLUMNS, peak_spans + first_row, total_spans + first_row, out,
        out_stride_head, splits, GROUP, HEAD_DIM, HEADS, COLUMNS, SPLITS,
    )  # fmt: skip


def cut_of(head_dim: int, dtype: torch.dtype) -> Cut:
    """Return the kernel's cut."""
    keys = TILE_BYTES // (_columns(head_dim) * dtype.itemsize)
    return Cut(max(16, min(keys, 128)), 32, 4, 3)


def gqa_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    cut: Cut | None = None,
    merge_last: bool | None = None,
) -> Tensor:
    """Attend with one query per sequence and head to the first `lengths` tokens of a KV cache.

    Args:
        q: (batch, heads, head_dim) float16, bfloat16 or float32, on a GPU.
        k_cache, v_cache: (batch, kv_heads, capacity, head_dim) of the same dtype, any strides.
        lengths: (batch,) int32 on the same device, tokens of each sequence; those beyond capacity
            count as capacity. A sequence of no tokens gives zeros.
        scale: factor of the scores; None means `head_dim ** -0.5`.
        out: (batch, heads, head_dim), written; None makes one.
        cut: how to cut the work; None: one in CUDA C++ takes it, or `cut_of`.
        merge_last: whether the last program of a group merges its spans, or a second launch does.
            None means the former on NVIDIA. AMD's barrier within a program does not order the
            stores of all of its waves before the release of one.

    Returns:
        out.

    Numerics: products and sums in float32; softmax's weights are rounded to the dtype of `v_cache`.
        Nothing beyond a sequence's length is read.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:  # the largest product must be the largest score
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k_cache, v_cache = (_unit_columns(t) for t in (q, k_cache, v_cache))
    batch, heads, head_dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    if out is None:
        out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    for_clusters = cut is None and merge_last is None
    if (
        for_clusters
        and cluster_attention.takes(q, k_cache, v_cache, out)
        and cluster_attention.decode(q, k_cache, v_cache, lengths, scale, out)
    ):
        return out
    if merge_last is None:
        merge_last = torch.version.hip is None
    group, pairs = heads // kv_heads, batch * kv_heads
    columns, cut = _columns(head_dim), cut or cut_of(head_dim, q.dtype)
    grid_splits = max(1, min(cut.splits, triton.cdiv(capacity, cut.keys)))
    rows = pairs * cut.splits * group
    spans = torch.empty(rows * (columns + 2), dtype=torch.float32, device=q.device)
    acc, peak, total = spans.split([rows * columns, rows, rows])
    sizes = _constants(head_dim, group, cut)
    counters = counters_of(q.device, pairs) if merge_last else lengths  # not used then
    _decode[(batch, kv_heads, grid_splits)](
        q, k_cache, v_cache, lengths, out, acc, peak, total, counters, scale * LOG2_E,
        *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *out.stride()[:2], capacity,
        **sizes, ROWS=max(16, triton.next_power_of_2(group)), STAGES=cut.stages, MERGE=merge_last,
        num_warps=cut.warps, **early_options(q.device),
    )  # fmt: skip
    if not merge_last and grid_splits > 1:
        _merge[(batch, kv_heads)](
            lengths, out, acc, peak, total, *out.stride()[:2], capacity, **sizes
        )
    return out


def _constants(head_dim: int, group: int, cut: Cut) -> dict[str, int]:
    return dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        HEADS=min(triton.next_power_of_2(group), 4),
        COLUMNS=_columns(head_dim),
        KEYS=cut.keys,
        SPLITS=cut.splits,
    )


def _columns(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))  # 16: the least that a tensor core takes


def _unit_columns(x: Tensor) -> Tensor:
    """Return x with head_dim in one piece, and its rows at distances that fit into 32 bits."""
    return x if x.stride(-1) == 1 and 0 <= x.stride(-2) < 2**23 else x.contiguous()
