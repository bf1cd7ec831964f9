"""The forward kernel of `gqa_attention` for Hopper, with a job for each group of warps.

One warp loads keys and values through the copy engine. Two or three groups of four warps, 64 rows
each, attend to them, out of step, so that matrix products of one run during the softmax of another;
within a group, a tile's values are weighed and added during the softmax of the next one. That is
the order of work of Shah et al., https://arxiv.org/abs/2407.08608. It needs Gluon, in which layouts
and barriers are explicit, and is neither interpreted nor run on other GPUs: it must equal
`gqa_attention`.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the name up to Triton 3.6
ROWS = 64  # of a group of warps: the height of its matrix products
# Registers of a thread, by the number of groups. The loading warp needs few.
REGISTERS = {2: 232, 3: 160}
LOADER_REGISTERS = 24
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _load(k, v, tiles, batch, head, count, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """Fill tiles as they become free."""
    k_tiles, v_tiles, k_full, v_full, k_free, v_free = tiles
    slot = 0
    phase = 1  # what has not been filled yet is free
    for tile in range(count):
        mbarrier.wait(k_free.index(slot), phase)
        mbarrier.expect(k_full.index(slot), k.block_type.nbytes)
        tma.async_copy_global_to_shared(
            k, [batch, tile * KEYS, head, 0], k_full.index(slot), k_tiles.index(slot)
        )
        mbarrier.wait(v_free.index(slot), phase)
        mbarrier.expect(v_full.index(slot), v.block_type.nbytes)
        tma.async_copy_global_to_shared(
            v, [batch, tile * KEYS, head, 0], v_full.index(slot), v_tiles.index(slot)
        )
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


@gluon.jit
def _weigh(scores, total, peak, qk_scale, first, shared, position, KEYS: gl.constexpr):
    """Turn a tile of scores into weights; also return sum, peak, and what older sums shrink by."""
    if first + KEYS > shared:
        keys = first + gl.arange(0, KEYS, gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * qk_scale)
    weights = gl.exp2(scores * qk_scale - new_peak[:, None])
    shrink = gl.exp2(peak - new_peak)
    return weights, total * shrink + gl.sum(weights, 1), new_peak, shrink


@gluon.jit
def _step(
    tile, slot, phase, weights, sums, total, peak, q_tile, tiles, qk_scale, shared, position,
    scores_layout: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add a tile, of which weights are, to the sums, and weigh the next one meanwhile."""
    k_tiles, v_tiles, k_full, v_full, k_free, v_free = tiles
    SUMS: gl.constexpr = sums.type.layout
    HEAD_DIM: gl.constexpr = sums.shape[1]
    next_slot = slot + 1
    next_phase = phase
    if next_slot == STAGES:
        next_slot = 0
        next_phase = phase ^ 1
    mbarrier.wait(k_full.index(next_slot), next_phase)
    k_tile = k_tiles.index(next_slot).reshape([KEYS, HEAD_DIM]).permute((1, 0))
    nothing = gl.zeros([sums.shape[0], KEYS], gl.float32, scores_layout)
    scores = warpgroup_mma(q_tile, k_tile, nothing, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot), phase)
    v_tile = v_tiles.index(slot).reshape([KEYS, HEAD_DIM])
    next_sums = warpgroup_mma(weights, v_tile, sums, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(k_free.index(next_slot), count=1)
    next_weights, total, peak, shrink = _weigh(
        scores, total, peak, qk_scale, tile * KEYS + KEYS, shared, position, KEYS
    )
    sums = warpgroup_mma_wait(0, [next_sums])
    mbarrier.arrive(v_free.index(slot), count=1)
    sums = sums * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
    weights = gl.convert_layout(next_weights.to(weights.dtype), gl.DotOperandLayout(0, SUMS, 2))
    return weights, sums, total, peak, next_slot, next_phase


@gluon.jit
def _attend(
    q_tile, start, work, GROUP: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Attend with ROWS packed rows of one key/value head, of which q, out and lse are."""
    q, out, lse, tiles, strides, qk_scale, seq, kv_seq, count = work
    k_tiles, v_tiles, k_full, v_full, k_free, _ = tiles
    q_stride_seq, q_stride_head, out_stride_seq, out_stride_head = strides
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    PER_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    # 16 bytes per thread
    MEMORY: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0]
    )
    dtype: gl.constexpr = q.dtype.element_ty
    rows = start + gl.arange(0, ROWS, gl.SliceLayout(1, MEMORY))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, MEMORY))
    token, member = (rows // GROUP).to(gl.int64), (rows % GROUP).to(gl.int64)
    in_memory = (rows < seq * GROUP)[:, None]
    pointers = q + (token * q_stride_seq + member * q_stride_head)[:, None] + columns[None, :]
    q_tile.store(gl.load(pointers, mask=in_memory, other=0.0))
    fence_async_shared()
    barrier()

    row = start + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    position = kv_seq - seq + row // GROUP  # the last key that a row sees
    shared = kv_seq - seq + start // GROUP + 1  # keys that all rows see
    peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    sums = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
    nothing = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    mbarrier.wait(k_full.index(0), 0)
    k_tile = k_tiles.index(0).reshape([KEYS, HEAD_DIM]).permute((1, 0))
    scores = warpgroup_mma(q_tile, k_tile, nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_free.index(0), count=1)
    slot = 0
    phase = 0
    weights, total, peak, _ = _weigh(scores, total, peak, qk_scale, 0, shared, position, KEYS)
    weights = gl.convert_layout(weights.to(dtype), WEIGHTS)
    for tile in range(count - 1):
        weights, sums, total, peak, slot, phase = _step(
            tile, slot, phase, weights, sums, total, peak, q_tile, tiles, qk_scale, shared,
            position, SCORES, KEYS, STAGES,
        )  # fmt: skip
    mbarrier.wait(v_full.index(slot), phase)
    v_tile = v_tiles.index(slot).reshape([KEYS, HEAD_DIM])
    next_sums = warpgroup_mma(weights, v_tile, sums, is_async=True)
    sums = warpgroup_mma_wait(0, [next_sums])

    place = (row % GROUP).to(gl.int64) * seq + row // GROUP
    gl.store(lse + place, (peak + gl.log2(total)) * LN_2, mask=row < seq * GROUP)
    sums = sums / gl.convert_layout(total, PER_ROW)[:, None]
    pointers = out + (token * out_stride_seq + member * out_stride_head)[:, None] + columns[None, :]
    gl.store(pointers, gl.convert_layout(sums.to(dtype), MEMORY), mask=in_memory)


@gluon.jit(do_not_specialize=["seq", "kv_seq", "kv_heads", "batch_heads", "chunk"])
def _forward(
    q, k, v, out, lse, qk_scale, q_stride_batch, q_stride_seq, q_stride_head, out_stride_batch,
    out_stride_seq, out_stride_head, seq, kv_seq, kv_heads, batch_heads, chunk,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    # batch, key/value head and rows of this program, as in `gqa_attention._program`
    height = gl.cdiv(seq * GROUP, GROUPS * ROWS)  # in tiles
    program = gl.program_id(0)
    first = program // (chunk * height) * chunk
    size = gl.minimum(chunk, batch_heads - first)
    within = program - first * height
    batch_head = first + within % size
    batch, head = batch_head // kv_heads, batch_head % kv_heads
    start = (height - 1 - within // size) * (GROUPS * ROWS)
    seen = gl.minimum(kv_seq - seq + (start + GROUPS * ROWS - 1) // GROUP + 1, kv_seq)
    count = gl.cdiv(seen, KEYS)
    q += batch.to(gl.int64) * q_stride_batch + head.to(gl.int64) * GROUP * q_stride_head
    out += batch.to(gl.int64) * out_stride_batch + head.to(gl.int64) * GROUP * out_stride_head
    lse += batch_head.to(gl.int64) * GROUP * seq

    dtype: gl.constexpr = q.dtype.element_ty
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    Q_TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, HEAD_DIM], Q_TILE)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, KEYS, 1, HEAD_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, KEYS, 1, HEAD_DIM], v.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)  # all groups are done with it
        mbarrier.init(v_free.index(i), count=GROUPS)
    tiles = (k_tiles, v_tiles, k_full, v_full, k_free, v_free)
    strides = (q_stride_seq, q_stride_head, out_stride_seq, out_stride_head)
    work = (q, out, lse, tiles, strides, qk_scale, seq, kv_seq, count)
    second = start + ROWS
    third = start + 2 * ROWS
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (q_tiles.index(0), start, work, GROUP, ROWS, KEYS, STAGES, HEAD_DIM)),
                (_attend, (q_tiles.index(1), second, work, GROUP, ROWS, KEYS, STAGES, HEAD_DIM)),
                (_load, (k, v, tiles, batch, head, count, KEYS, STAGES)),
            ],
            [4, 1],
            [REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.static_assert(GROUPS == 3)
        gl.warp_specialize(
            [
                (_attend, (q_tiles.index(0), start, work, GROUP, ROWS, KEYS, STAGES, HEAD_DIM)),
                (_attend, (q_tiles.index(1), second, work, GROUP, ROWS, KEYS, STAGES, HEAD_DIM)),
                (_attend, (q_tiles.index(2), third, work, GROUP, ROWS, KEYS, STAGES, HEAD_DIM)),
                (_load, (k, v, tiles, batch, head, count, KEYS, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, LOADER_REGISTERS],
        )


def constants(head_dim: int, group: int, rows: int, keys: int, stages: int) -> dict[str, int]:
    """Return the constants of a launch; rows is 128 or 192."""
    return dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        ROWS=ROWS,
        KEYS=keys,
        STAGES=stages,
        GROUPS=rows // ROWS,
        REGISTERS=REGISTERS[rows // ROWS],
        LOADER_REGISTERS=LOADER_REGISTERS,
    )


def launch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor, chunk: int, rows: int,
    keys: int, stages: int,
) -> None:  # fmt: skip
    """Compute `out` and `lse` as `gqa_attention.forward` does.

    Args:
        q, k, v: as there, 16-bit, heads of 64 or 128; tensor descriptors can point to k and v.
        scale: as there, times log2(e).
        chunk: heads that run at once.
        rows, keys, stages: of a tile (128 or 192 rows), and tiles in flight.
    """
    batch, seq, heads, head_dim = q.shape
    kv_seq, kv_heads = k.shape[1:3]
    group, pairs = heads // kv_heads, batch * kv_heads
    layout = gl.NVMMASharedLayout(128, 16, 4)
    described = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, keys, 1, head_dim], layout)
        for t in (k, v)
    )
    _forward[(pairs * triton.cdiv(seq * group, rows),)](
        q, *described, out, lse, scale, *q.stride()[:3], *out.stride()[:3], seq, kv_seq, kv_heads,
        pairs, chunk, **constants(head_dim, group, rows, keys, stages), num_warps=4,
    )  # fmt: skip
