"""Causal grouped-query attention for prefill and training: `softmax(q k^T scale + mask) v`.

The query heads of one key/value head are packed into the rows of a tile: row r is head r % group
of token r // group, so a tile of keys and values is loaded once for the group, and a tile of rows
covers few tokens: little of it is above the diagonal. Keys that every row of the tile sees are
attended without a mask, then the few tiles on the diagonal with one; later keys are never read.

Softmax is online (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867), tiled as in Dao,
https://arxiv.org/abs/2307.08691, in base 2. Nothing is summed atomically: the gradients of keys and
values have one program per tile of keys, that of queries one per tile of rows, so results are the
same bits in every run.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import SIZES, Launch

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Heads whose keys and values the running programs read at once stay within this share of the L2.
L2_BYTES = 16 << 20


class Tile(NamedTuple):
    """How a kernel cuts its work.

    Args:
        rows, keys: packed queries and keys of a tile.
        warps: of a program.
        stages: tiles in flight.
        descriptors: load keys and values through tensor descriptors (TMA on Hopper).
        specialized: use the kernel of `hopper/prefill_attention.py`, where it can run.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    specialized: bool = False


# For heads of up to 64, and of up to 128: the largest that no compiler spills, in 100 KB of shared
# memory. Tests hold them to it.
TILES = {
    "hopper": {  # where it differs from "cuda"
        "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        "backward_keys": (Tile(64, 128, 8, 2), Tile(64, 64, 8, 1)),
    },
    "cuda": {
        "forward": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        "backward_queries": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        # with 64 rows Triton 3.7 spills 3 KB on an A100
        "backward_keys": (Tile(32, 128, 8, 2), Tile(64, 64, 8, 1)),
    },
    "hip": {  # 64 KB of shared memory
        "forward": (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)),
        "backward_queries": (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1)),
        "backward_keys": (Tile(32, 64, 4, 1), Tile(16, 64, 4, 1)),
    },
}
# For float32, which has no tensor cores, and for larger heads.
SMALL_TILES = {
    "forward": Tile(32, 32, 4, 1),
    "backward_queries": Tile(32, 32, 4, 1),
    "backward_keys": Tile(16, 32, 4, 1),
}


# --- device functions --------------------------------------------------------------------------


@triton.jit
def _rows_at(base, stride_seq, stride_head, rows, columns, GROUP: tl.constexpr):
    """Return pointers (rows, columns) to packed rows."""
    token, head = (rows // GROUP).to(tl.int64), (rows % GROUP).to(tl.int64)
    return base + (token * stride_seq + head * stride_head)[:, None] + columns[None, :]


@triton.jit
def _load(pointers, exists, columns, HEAD_DIM: tl.constexpr):
    """Load a tile (rows, columns); zeros in rows that do not exist and beyond the head."""
    if columns.shape[0] > HEAD_DIM:
        return tl.load(pointers, exists[:, None] & (columns < HEAD_DIM)[None, :], 0.0)
    else:
        return tl.load(pointers, exists[:, None], 0.0)


@triton.jit
def _load_keys(
    base, stride, offsets, batch, head, first, kv_seq, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load the keys or values [first, first + KEYS) of one head: (KEYS, COLUMNS)."""
    if DESCRIPTORS:
        tile = base.load([batch.to(tl.int32), first, head.to(tl.int32), 0])
        return tile.reshape(KEYS, COLUMNS)
    else:
        exists = first + tl.arange(0, KEYS) < kv_seq
        pointers = base + tl.cast(first, tl.int64) * stride + offsets
        return _load(pointers, exists, tl.arange(0, COLUMNS), HEAD_DIM)


@triton.jit
def _program(seq, kv_heads, batch_heads, chunk, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return batch, key/value head and place of this program's tile among those of its head.

    Programs start in the order of their ids. Within a chunk of heads, whose keys and values fit
    into the L2, all heads' first tiles come first: the longest ones, so that short ones fill the
    gaps at the end.
    """
    tiles = tl.cdiv(seq * GROUP, ROWS)
    program = tl.program_id(0)
    first = program // (chunk * tiles) * chunk
    size = tl.minimum(chunk, batch_heads - first)
    within = program - first * tiles
    head = first + within % size
    return (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64), within // size


# --- kernels -----------------------------------------------------------------------------------

# One loop over all keys with a branch for the mask, not one loop for the tiles before the diagonal
# and one for those on it: ptxas serializes matrix products whose sums pass from loop to loop.


@triton.jit(do_not_specialize=["seq", "kv_seq", "kv_heads", "batch_heads", "chunk"])
def _forward(
    q, k, v, out, lse, qk_scale, q_stride_batch, q_stride_seq, q_stride_head, k_stride_batch,
    k_stride_seq, k_stride_head, v_stride_batch, v_stride_seq, v_stride_head, out_stride_batch,
    out_stride_seq, out_stride_head, seq, kv_seq, kv_heads, batch_heads, chunk,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    batch, kv_head, place = _program(seq, kv_heads, batch_heads, chunk, GROUP, ROWS)
    start = (tl.cdiv(seq * GROUP, ROWS) - 1 - place) * ROWS  # the last rows see the most keys
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    keys = tl.arange(0, KEYS)
    exists = rows < seq * GROUP
    position = kv_seq - seq + rows // GROUP  # of each row's token: the last key that it sees
    q += batch * q_stride_batch + kv_head * GROUP * q_stride_head
    q_tile = _load(
        _rows_at(q, q_stride_seq, q_stride_head, rows, columns, GROUP), exists, columns, HEAD_DIM
    )
    if not DESCRIPTORS:
        k += batch * k_stride_batch + kv_head * k_stride_head
        v += batch * v_stride_batch + kv_head * v_stride_head
    k_offsets = keys[:, None] * k_stride_seq + columns[None, :]
    v_offsets = keys[:, None] * v_stride_seq + columns[None, :]

    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    shared = kv_seq - seq + start // GROUP + 1  # keys that all rows see
    seen = tl.minimum(kv_seq - seq + (start + ROWS - 1) // GROUP + 1, kv_seq)
    for first in tl.range(0, seen, KEYS, num_stages=STAGES):
        k_tile = _load_keys(
            k, k_stride_seq, k_offsets, batch, kv_head, first, kv_seq, KEYS, HEAD_DIM, COLUMNS,
            DESCRIPTORS,
        )  # fmt: skip
        v_tile = _load_keys(
            v, v_stride_seq, v_offsets, batch, kv_head, first, kv_seq, KEYS, HEAD_DIM, COLUMNS,
            DESCRIPTORS,
        )  # fmt: skip
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (rows, keys)
        if first + KEYS > shared:
            visible = first + keys[None, :] <= position[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * qk_scale)
        weights = tl.exp2(scores * qk_scale - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        peak = new_peak

    head_row = (batch * kv_heads + kv_head) * GROUP + rows % GROUP  # of lse (batch, heads, seq)
    tl.store(lse + head_row * seq + rows // GROUP, (peak + tl.log2(total)) * LN_2, exists)
    out += batch * out_stride_batch + kv_head * GROUP * out_stride_head
    pointers = _rows_at(out, out_stride_seq, out_stride_head, rows, columns, GROUP)
    mask = exists[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, (acc / total[:, None]).to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["seq", "heads"])
def _delta(
    out, grad, delta, out_stride_batch, out_stride_seq, out_stride_head, grad_stride_batch,
    grad_stride_seq, grad_stride_head, seq, heads, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write delta (batch, heads, seq): the sum of out * grad over each row."""
    head = tl.program_id(0)
    batch, within = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    exists = rows < seq
    out += batch * out_stride_batch + within * out_stride_head
    grad += batch * grad_stride_batch + within * grad_stride_head
    outs = _load(_rows_at(out, out_stride_seq, 0, rows, columns, 1), exists, columns, HEAD_DIM)
    grads = _load(_rows_at(grad, grad_stride_seq, 0, rows, columns, 1), exists, columns, HEAD_DIM)
    total = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * seq + rows, total, exists)


@triton.jit(do_not_specialize=["seq", "kv_seq", "kv_heads", "batch_heads", "chunk"])
def _backward_queries(
    q, k, v, grad, lse, delta, dq, scale, q_stride_batch, q_stride_seq, q_stride_head,
    k_stride_batch, k_stride_seq, k_stride_head, v_stride_batch, v_stride_seq, v_stride_head,
    grad_stride_batch, grad_stride_seq, grad_stride_head, dq_stride_batch, dq_stride_seq,
    dq_stride_head, seq, kv_seq, kv_heads, batch_heads, chunk, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    batch, kv_head, place = _program(seq, kv_heads, batch_heads, chunk, GROUP, ROWS)
    start = (tl.cdiv(seq * GROUP, ROWS) - 1 - place) * ROWS
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    keys = tl.arange(0, KEYS)
    exists = rows < seq * GROUP
    position = kv_seq - seq + rows // GROUP
    q += batch * q_stride_batch + kv_head * GROUP * q_stride_head
    pointers = _rows_at(q, q_stride_seq, q_stride_head, rows, columns, GROUP)
    q_tile = _load(pointers, exists, columns, HEAD_DIM)
    grad += batch * grad_stride_batch + kv_head * GROUP * grad_stride_head
    pointers = _rows_at(grad, grad_stride_seq, grad_stride_head, rows, columns, GROUP)
    grad_tile = _load(pointers, exists, columns, HEAD_DIM)
    head_row = (batch * kv_heads + kv_head) * GROUP + rows % GROUP
    lse_row = tl.load(lse + head_row * seq + rows // GROUP, exists, float("inf")) * LOG2_E
    delta_row = tl.load(delta + head_row * seq + rows // GROUP, exists, 0.0)
    k += batch * k_stride_batch + kv_head * k_stride_head
    v += batch * v_stride_batch + kv_head * v_stride_head
    k_offsets = keys[:, None] * k_stride_seq + columns[None, :]
    v_offsets = keys[:, None] * v_stride_seq + columns[None, :]

    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    shared = kv_seq - seq + start // GROUP + 1
    seen = tl.minimum(kv_seq - seq + (start + ROWS - 1) // GROUP + 1, kv_seq)
    for first in tl.range(0, seen, KEYS, num_stages=STAGES):
        k_tile = _load_keys(
            k, k_stride_seq, k_offsets, batch, kv_head, first, kv_seq, KEYS, HEAD_DIM, COLUMNS,
            False,
        )  # fmt: skip
        v_tile = _load_keys(
            v, v_stride_seq, v_offsets, batch, kv_head, first, kv_seq, KEYS, HEAD_DIM, COLUMNS,
            False,
        )  # fmt: skip
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        weights = tl.exp2(scores * (scale * LOG2_E) - lse_row[:, None])
        if first + KEYS > shared:
            weights = tl.where(first + keys[None, :] <= position[:, None], weights, 0.0)
        grad_scores = weights * (grad_weights - delta_row[:, None])
        acc = tl.dot(grad_scores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    dq += batch * dq_stride_batch + kv_head * GROUP * dq_stride_head
    pointers = _rows_at(dq, dq_stride_seq, dq_stride_head, rows, columns, GROUP)
    mask = exists[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, (acc * scale).to(dq.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["seq", "kv_seq", "kv_heads", "batch_heads", "chunk"])
def _backward_keys(
    q, k, v, grad, lse, delta, dk, dv, scale, q_stride_batch, q_stride_seq, q_stride_head,
    k_stride_batch, k_stride_seq, k_stride_head, v_stride_batch, v_stride_seq, v_stride_head,
    grad_stride_batch, grad_stride_seq, grad_stride_head, dk_stride_batch, dk_stride_seq,
    dk_stride_head, seq, kv_seq, kv_heads, batch_heads, chunk, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # the first keys are seen by the most rows
    batch, kv_head, place = _program(kv_seq, kv_heads, batch_heads, chunk, 1, KEYS)
    keys = place * KEYS + tl.arange(0, KEYS)
    columns = tl.arange(0, COLUMNS)
    steps = tl.arange(0, ROWS)
    exists = keys < kv_seq
    k += batch * k_stride_batch + kv_head * k_stride_head
    v += batch * v_stride_batch + kv_head * v_stride_head
    k_tile = _load(_rows_at(k, k_stride_seq, 0, keys, columns, 1), exists, columns, HEAD_DIM)
    v_tile = _load(_rows_at(v, v_stride_seq, 0, keys, columns, 1), exists, columns, HEAD_DIM)
    q += batch * q_stride_batch + kv_head * GROUP * q_stride_head
    grad += batch * grad_stride_batch + kv_head * GROUP * grad_stride_head
    lse += (batch * kv_heads + kv_head) * GROUP * seq
    delta += (batch * kv_heads + kv_head) * GROUP * seq
    q_offsets = steps[:, None] * q_stride_seq + columns[None, :]
    grad_offsets = steps[:, None] * grad_stride_seq + columns[None, :]

    grad_k = tl.zeros((KEYS, COLUMNS), tl.float32)
    grad_v = tl.zeros((KEYS, COLUMNS), tl.float32)
    # One loop over the tokens that see a key of this tile, for one query head after the other.
    past = kv_seq - seq
    start = tl.maximum(place * KEYS - past, 0) // ROWS * ROWS
    tiles = tl.cdiv(seq - start, ROWS)
    for step in tl.range(0, tiles * GROUP, num_stages=STAGES):
        head = tl.cast(step // tiles, tl.int64)
        first = start + step % tiles * ROWS
        tokens = first + steps
        there = tokens < seq
        at = tl.cast(first, tl.int64)
        q_base = q + head * q_stride_head + at * q_stride_seq
        grad_base = grad + head * grad_stride_head + at * grad_stride_seq
        q_tile = _load(q_base + q_offsets, there, columns, HEAD_DIM)
        grad_tile = _load(grad_base + grad_offsets, there, columns, HEAD_DIM)
        # tokens that do not exist get the weights 2^-inf
        lse_row = tl.load(lse + head * seq + tokens, there, float("inf")) * LOG2_E
        delta_row = tl.load(delta + head * seq + tokens, there, 0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # (keys, rows)
        weights = tl.exp2(scores * (scale * LOG2_E) - lse_row[None, :])
        if first + past < place * KEYS + KEYS - 1:
            weights = tl.where(keys[:, None] <= past + tokens[None, :], weights, 0.0)
        grad_v = tl.dot(weights.to(grad_tile.dtype), grad_tile, grad_v, input_precision="ieee")
        grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta_row[None, :])
        grad_k = tl.dot(grad_scores.to(q_tile.dtype), q_tile, grad_k, input_precision="ieee")

    # dk and dv have the same strides
    offset = batch * dk_stride_batch + kv_head * dk_stride_head
    mask = exists[:, None] & (columns < HEAD_DIM)[None, :]
    pointers = _rows_at(dk + offset, dk_stride_seq, 0, keys, columns, 1)
    tl.store(pointers, (grad_k * scale).to(dk.dtype.element_ty), mask)
    pointers = _rows_at(dv + offset, dk_stride_seq, 0, keys, columns, 1)
    tl.store(pointers, grad_v.to(dv.dtype.element_ty), mask)


# --- launchers ---------------------------------------------------------------------------------


def tile_of(kernel: str, head_dim: int, dtype: torch.dtype, backend: str) -> Tile:
    """Return the tile of a kernel.

    Args:
        kernel: "forward", "backward_queries" or "backward_keys".
        head_dim, dtype: of the tensors.
        backend: "hopper", "cuda" or "hip", see `backend_of`.
    """
    if dtype == torch.float32 or head_dim > 128:
        return SMALL_TILES[kernel]
    tiles = TILES[backend].get(kernel) or TILES["cuda"][kernel]
    return tiles[head_dim > 64]


@functools.cache
def backend_of(device: torch.device) -> str:
    """Return the kind of a GPU; interpreted kernels take the tiles of "cuda"."""
    if device.type != "cuda":
        return "cuda"
    if torch.version.hip is not None:
        return "hip"
    return "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else "cuda"


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Attend causally, query heads sharing key/value heads.

    Args:
        q: (batch, seq, heads, head_dim) float16, bfloat16 or float32, on a GPU.
        k, v: (batch, kv_seq, kv_heads, head_dim) of the same dtype, kv_seq >= seq.
        scale: factor of the scores.
        tile: how to cut the work; None means `tile_of`.

    Returns:
        out: (batch, seq, heads, head_dim), dtype of `q`.
        lse: (batch, heads, seq) float32, log(sum(exp(scores))) of each row, for `backward`.

    Numerics: products and sums in float32; softmax's weights are rounded to the dtype of `v`.
    """
    if scale <= 0:  # the largest product must be the largest score
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    out = torch.empty((batch, seq, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, seq), dtype=torch.float32, device=q.device)
    if out.numel():
        tile = tile or tile_of("forward", head_dim, q.dtype, backend_of(q.device))
        group = heads // kv_heads
        descriptors = tile.descriptors and _describable(k) and _describable(v)
        fits = head_dim in (64, 128) and q.dtype != torch.float32
        if tile.specialized and fits and descriptors and backend_of(q.device) == "hopper":
            from .hopper import prefill_attention

            sizes = tile.rows, tile.keys, tile.stages
            chunk = _chunk(k.shape, k.dtype)
            prefill_attention.launch(q, k, v, scale * LOG2_E.value, out, lse, chunk, *sizes)
            return out, lse
        if descriptors:
            grid = (batch * kv_heads * triton.cdiv(seq * group, tile.rows),)
            _forward[grid](
                q, _describe(k, tile.keys), _describe(v, tile.keys), out, lse,
                scale * LOG2_E.value, *_strides(q, k, v, out), *_sizes(q.shape, k.shape, q.dtype),
                **_constants(head_dim, tile), GROUP=group, DESCRIPTORS=True,
            )  # fmt: skip
        else:
            strides = _strides(q, k, v, out)
            launch = _forward_of(q.shape, k.shape, strides, scale, tile, q.dtype, q.device)
            launch(q, k, v, out, lse)
    return out, lse


@functools.lru_cache(SIZES)
def _forward_of(q_shape, k_shape, strides, scale, tile, dtype, _device) -> Launch:
    batch, seq, heads, head_dim = q_shape
    group = heads // k_shape[2]
    return Launch(
        _forward,
        (batch * k_shape[2] * triton.cdiv(seq * group, tile.rows),),
        (scale * LOG2_E.value, *strides, *_sizes(q_shape, k_shape, dtype)),
        GROUP=group,
        DESCRIPTORS=False,
        **_constants(head_dim, tile),
    )


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    tiles: tuple[Tile, Tile] | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (dq, dk, dv) of `forward`; the same bits in every run.

    Args:
        grad: (batch, seq, heads, head_dim), dtype of `q`: the gradient of `out`.
        q, k, v, scale: as for `forward`.
        out, lse: what `forward` returned.
        tiles: how to cut the work; for queries and for keys; None means `tile_of`.
        into: the gradients, to be written: heads in one piece, those of keys and values at the same
            distances; None means new ones.
    """
    grad, q, k, v, out = (_rows(t) for t in (grad, q, k, v, out))
    dq, dk, dv = into or [t.new_empty(t.shape) for t in (q, k, v)]
    if not dq.numel():
        return dq, dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    if tiles is None:
        backend = backend_of(q.device)
        kernels = "backward_queries", "backward_keys"
        tiles = tuple(tile_of(kernel, q.shape[-1], q.dtype, backend) for kernel in kernels)
    strides = _strides(q, k, v, grad, out, dq, dk)
    launches = _backward_of(q.shape, k.shape, strides, scale, *tiles, q.dtype, q.device)
    launches[0](out, grad, delta)
    launches[1](q, k, v, grad, lse, delta, dq)
    launches[2](q, k, v, grad, lse, delta, dk, dv)
    return dq, dk, dv


@functools.lru_cache(SIZES)
def _backward_of(
    q_shape, k_shape, strides, scale, tile, k_tile, dtype, _device
) -> tuple[Launch, Launch, Launch]:
    batch, seq, heads, head_dim = q_shape
    kv_seq, kv_heads = k_shape[1:3]
    group = heads // kv_heads
    read, grad_strides, out_strides = strides[:12], strides[9:12], strides[12:15]
    dq_strides, dk_strides = strides[15:18], strides[18:]
    sizes = _sizes(q_shape, k_shape, dtype)
    return (
        Launch(
            _delta,
            (batch * heads, triton.cdiv(seq, 64)),
            (*out_strides, *grad_strides, seq, heads),
            HEAD_DIM=head_dim,
            COLUMNS=_columns(head_dim),
            ROWS=64,
        ),
        Launch(
            _backward_queries,
            (batch * kv_heads * triton.cdiv(seq * group, tile.rows),),
            (scale, *read, *dq_strides, *sizes),
            GROUP=group,
            **_constants(head_dim, tile),
        ),
        Launch(
            _backward_keys,
            (batch * kv_heads * triton.cdiv(kv_seq, k_tile.keys),),
            (scale, *read, *dk_strides, *sizes),
            GROUP=group,
            **_constants(head_dim, k_tile),
        ),
    )


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """List what lies between the batches, tokens and heads of each."""
    return tuple([s for t in tensors for s in t.stride()[:3]])


def _sizes(q_shape: torch.Size, k_shape: torch.Size, dtype: torch.dtype) -> tuple[int, ...]:
    batch, kv_seq, kv_heads, _ = k_shape
    return q_shape[1], kv_seq, kv_heads, batch * kv_heads, _chunk(k_shape, dtype)


def _rows(x: Tensor) -> Tensor:
    """Return x (batch, seq, heads, head_dim) with rows in one piece, at distances of few bytes.

    The offsets within a tile are 32-bit.
    """
    return x if x.stride(-1) == 1 and 0 <= x.stride(1) < 2**23 else x.contiguous()


def _describable(x: Tensor) -> bool:
    """Tell if a descriptor can point to x: 16 bytes are the unit of addresses and strides."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(s * size % 16 == 0 and s > 0 for s in x.stride()[:3])


def _describe(x: Tensor, keys: int) -> TensorDescriptor:
    return TensorDescriptor(x, x.shape, x.stride(), [1, keys, 1, _columns(x.shape[-1])])


def _columns(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))  # 16: the least that a tensor core takes


def _constants(head_dim: int, tile: Tile) -> dict[str, int]:
    return dict(
        HEAD_DIM=head_dim,
        COLUMNS=_columns(head_dim),
        ROWS=tile.rows,
        KEYS=tile.keys,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )


def _chunk(k_shape: torch.Size, dtype: torch.dtype) -> int:
    """Return the number of heads whose keys and values are read at once."""
    _, kv_seq, _, head_dim = k_shape
    return max(1, L2_BYTES // (2 * kv_seq * head_dim * dtype.itemsize))
