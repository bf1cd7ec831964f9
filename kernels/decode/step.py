"""One kernel per stage of a decode step; `WAIT="pdl"` lets each start while the one before ends.

`stages.py` has the maths. A step is a fixed sequence of launches on fixed buffers, so it can
be recorded as a CUDA graph and replayed: token, position and place of the KV cache are read from
device memory, and `finish_kernel` writes those of the next step.

With `AHEAD`, some kernels request weights of a later stage, `ahead`, into the L2 cache: memory is
busy while attention and launches are not.
"""

import triton
import triton.language as tl

from .attention import attend, merge, split_plan
from .grid_sync import allow_next, prefetch_part, wait_for_launch
from .next_token import candidate, choose
from .stages import embed, gate_up, output, project, query, store_in_cache


@triton.jit
def embed_kernel(
    token,
    codes,
    scales,
    x,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the embedding that a first step begins with; a grid of one program."""
    embed(0, tl.load(token), codes, scales, x, 0, COLS, KIND, BLOCK, 1, "none")


@triton.jit
def project_kernel(
    codes,
    scales,
    x,
    residual,
    out,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    allow_next(WAIT)
    project(
        tl.program_id(0),
        codes,
        scales,
        x,
        residual,
        out,
        0,
        OUTPUTS,
        COLS,
        KIND,
        WARPS,
        PROGRAMS,
        WAIT,
    )


@triton.jit
def slot_of(addresses, capacities, sequence, slot, KV: tl.constexpr, KV_HEADS, HEAD_DIM):
    """Return the keys and values of a sequence and slot, and their elements per KV head."""
    cache = tl.load(addresses + sequence).to(tl.pointer_type(KV))
    cache = tl.multiple_of(cache, 16)  # as the allocator gives memory
    size = tl.load(capacities + sequence).to(tl.int64) * HEAD_DIM
    return cache + 2 * slot * KV_HEADS * size, size


@triton.jit(do_not_specialize=["slot"])
def query_kernel(
    codes,
    scales,
    x,
    norm_weight,
    eps,
    positions,
    cos,
    sin,
    addresses,
    capacities,
    slot,
    out,
    ahead,
    ahead_nbytes,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    AHEAD: tl.constexpr,
    WAIT: tl.constexpr,
):
    allow_next(WAIT)
    prefetch_part(AHEAD, ahead, ahead_nbytes, tl.program_id(0), PROGRAMS)
    # where the cache is changes between launches alone: no need to wait for it
    cache, size = slot_of(addresses, capacities, 0, slot, KV, KV_HEADS, HEAD_DIM)
    query(
        tl.program_id(0),
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
        0,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        COLS,
        KIND,
        WARPS,
        PROGRAMS,
        WAIT,
    )


@triton.jit(do_not_specialize=["slot"])
def rotate_kernel(
    positions,
    cos,
    sin,
    addresses,
    capacities,
    slot,
    qkv,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate and store a new token of each sequence, in place; grid (sequences, heads).

    qkv is (sequences, HEADS + 2 KV_HEADS, HEAD_DIM); BLOCK is a power of two >= HEAD_DIM / 2.
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + sequence)
    cache, size = slot_of(addresses, capacities, sequence, slot, KV, KV_HEADS, HEAD_DIM)
    half: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, BLOCK)
    live = pair < half
    qkv += (sequence * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + pair
    first = tl.load(qkv, mask=live, other=0)
    second = tl.load(qkv + half, mask=live, other=0)
    rotated = live & (head < HEADS + KV_HEADS)
    c = tl.load(cos + position * half + pair, mask=rotated, other=1)
    s = tl.load(sin + position * half + pair, mask=rotated, other=0)
    turned = first * c - second * s
    second = second * c + first * s
    tl.store(qkv, turned, mask=live)
    tl.store(qkv + half, second, mask=live)
    row = (head - HEADS) * HEAD_DIM + pair
    store_in_cache(cache, size, row, position, turned, live, HEAD_DIM)
    store_in_cache(cache, size, row + half, position, second, live, HEAD_DIM)


@triton.jit(do_not_specialize=["slot"])
def attention_kernel(
    positions,
    addresses,
    capacities,
    slot,
    qkv,
    scale,
    partial,
    attended,
    KV: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    WARPS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Grid (HEADS * SPLITS, sequences)."""
    allow_next(WAIT)
    head, split = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    kv_head = head // (HEADS // KV_HEADS)
    sequence = tl.program_id(1)
    wait_for_launch(WAIT)
    position = tl.load(positions + sequence)
    splits, _ = split_plan(position + 1, SPLITS, BLOCK_KV)
    if split < splits:
        cache, size = slot_of(addresses, capacities, sequence, slot, KV, KV_HEADS, HEAD_DIM)
        attend(
            head,
            split,
            qkv + sequence * (HEADS + 2 * KV_HEADS) * HEAD_DIM,
            position,
            cache + kv_head * size,
            cache + (KV_HEADS + kv_head) * size,
            scale,
            partial + sequence * HEADS * SPLITS * (HEAD_DIM + 1),
            attended + sequence * HEADS * HEAD_DIM,
            0,
            HEADS,
            KV_HEADS,
            HEAD_DIM,
            DIM,
            SPLITS,
            BLOCK_KV,
            WARPS,
            WAIT,
        )


@triton.jit
def merge_kernel(
    positions,
    partial,
    attended,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Join the parts of several sequences' attention; grid (pieces of SIZE values, sequences)."""
    sequence = tl.program_id(1)
    partial += sequence * HEADS * SPLITS * (HEAD_DIM + 1)
    attended += sequence * HEADS * HEAD_DIM
    splits, _ = split_plan(tl.load(positions + sequence) + 1, SPLITS, BLOCK_KV)
    if splits > 1:
        index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        values = merge(partial, splits, index, 0, SIZE, HEADS, HEAD_DIM, SPLITS, 4, "none")
        tl.store(attended + index, values, mask=index < HEADS * HEAD_DIM)


@triton.jit
def output_kernel(
    codes,
    scales,
    partial,
    positions,
    attended,
    residual,
    out,
    ahead,
    ahead_nbytes,
    HIDDEN: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    AHEAD: tl.constexpr,
    WAIT: tl.constexpr,
):
    allow_next(WAIT)
    prefetch_part(AHEAD, ahead, ahead_nbytes, tl.program_id(0), PROGRAMS)
    output(
        tl.program_id(0),
        codes,
        scales,
        partial,
        positions,
        attended,
        residual,
        out,
        0,
        HIDDEN,
        HEADS,
        HEAD_DIM,
        SPLITS,
        BLOCK_KV,
        KIND,
        WARPS,
        PROGRAMS,
        WAIT,
    )


@triton.jit
def gate_up_kernel(
    codes,
    scales,
    x,
    norm_weight,
    eps,
    out,
    ahead,
    ahead_nbytes,
    INNER: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    AHEAD: tl.constexpr,
    WAIT: tl.constexpr,
):
    allow_next(WAIT)
    prefetch_part(AHEAD, ahead, ahead_nbytes, tl.program_id(0), PROGRAMS)
    gate_up(
        tl.program_id(0),
        codes,
        scales,
        x,
        norm_weight,
        eps,
        out,
        0,
        INNER,
        COLS,
        KIND,
        WARPS,
        PROGRAMS,
        WAIT,
    )


@triton.jit
def candidate_kernel(
    codes,
    scales,
    x,
    norm_weight,
    eps,
    logits,
    candidates,
    temperature,
    seed,
    positions,
    VOCAB: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    allow_next(WAIT)
    candidate(
        tl.program_id(0),
        codes,
        scales,
        x,
        norm_weight,
        eps,
        logits,
        candidates,
        temperature,
        seed,
        positions,
        0,
        VOCAB,
        COLS,
        KIND,
        WARPS,
        PROGRAMS,
        WAIT,
    )


@triton.jit
def finish_kernel(
    candidates,
    positions,
    steps,
    tokens,
    logprobs,
    codes,
    scales,
    x,
    VOCAB: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CANDIDATE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Write the token chosen, and the embedding that the next step begins with; one program."""
    allow_next(WAIT)
    wait_for_launch(WAIT)
    token, logprob = choose(candidates, VOCAB, PROGRAMS, CANDIDATE_BLOCK)
    step = tl.load(steps)
    tl.store(tokens + step, token)
    tl.store(logprobs + step, logprob)
    tl.store(steps, step + 1)
    tl.store(positions, tl.load(positions) + 1)
    embed(0, token, codes, scales, x, 0, COLS, KIND, BLOCK, 1, WAIT)
