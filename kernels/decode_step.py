"""One kernel per stage of a decode step; `WAIT="pdl"` lets each start while the one before ends.

`decode_stages.py` has the maths. A step is a fixed sequence of launches on fixed buffers, so it can
be recorded as a CUDA graph and replayed: token, position and place of the KV cache are read from
device memory, and `finish` writes those of the next step.
"""

import triton
import triton.language as tl

from .decode_stages import attend, embed, gate_up, merge, output, project, split_plan
from .grid_sync import allow_next, wait_for_inputs
from .next_token import candidate, choose


@triton.jit
def project_kernel(
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
):
    allow_next(WAIT)
    project(
        tl.program_id(0),
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
        WAIT,
        0,
        0,
    )


@triton.jit
def attention_kernel(
    positions,
    addresses,
    capacities,
    slot,
    qkv,
    cos,
    sin,
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
    WAIT: tl.constexpr,
):
    """Grid (KV_HEADS * SPLITS, sequences)."""
    allow_next(WAIT)
    kv_head, split = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    sequence = tl.program_id(1)
    wait_for_inputs(WAIT, 0, 0)
    position = tl.load(positions + sequence)
    splits, _ = split_plan(position + 1, SPLITS, BLOCK_KV)
    if split < splits:
        cache = tl.load(addresses + sequence).to(tl.pointer_type(KV))
        size = tl.load(capacities + sequence).to(tl.int64) * HEAD_DIM
        attend(
            kv_head,
            split,
            qkv + sequence * (HEADS + 2 * KV_HEADS) * HEAD_DIM,
            position,
            cache + (2 * slot * KV_HEADS + kv_head) * size,
            cache + ((2 * slot + 1) * KV_HEADS + kv_head) * size,
            cos,
            sin,
            scale,
            partial + sequence * HEADS * SPLITS * (HEAD_DIM + 2),
            attended + sequence * HEADS * HEAD_DIM,
            HEADS,
            KV_HEADS,
            HEAD_DIM,
            DIM,
            SPLITS,
            BLOCK_KV,
        )


@triton.jit
def merge_kernel(
    positions,
    partial,
    attended,
    HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """Grid (sequences,)."""
    sequence = tl.program_id(0)
    splits, _ = split_plan(tl.load(positions + sequence) + 1, SPLITS, BLOCK_KV)
    if splits > 1:
        merge(
            partial + sequence * HEADS * SPLITS * (HEAD_DIM + 2),
            splits,
            attended + sequence * HEADS * HEAD_DIM,
            HEADS,
            HEAD_ROWS,
            HEAD_DIM,
            DIM,
            SPLITS,
        )


@triton.jit
def output_kernel(
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
):
    allow_next(WAIT)
    program = tl.program_id(0)
    output(
        program,
        codes,
        scales,
        partial,
        positions,
        attended,
        merged + program * HEADS * HEAD_DIM,
        residual,
        out,
        HIDDEN,
        HEADS,
        HEAD_ROWS,
        HEAD_DIM,
        DIM,
        SPLITS,
        BLOCK_KV,
        KIND,
        VEC,
        ROWS,
        PROGRAMS,
        WAIT,
        0,
        0,
    )


@triton.jit
def gate_up_kernel(
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
):
    allow_next(WAIT)
    gate_up(
        tl.program_id(0),
        codes,
        scales,
        x,
        norm_weight,
        eps,
        out,
        INNER,
        COLS,
        KIND,
        VEC,
        ROWS,
        PROGRAMS,
        WAIT,
        0,
        0,
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
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
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
        VOCAB,
        COLS,
        KIND,
        VEC,
        ROWS,
        PROGRAMS,
        WAIT,
        0,
        0,
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
    BLOCK: tl.constexpr,
    COL_BLOCK: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Write the token chosen, and the embedding that the next step begins with."""
    allow_next(WAIT)
    wait_for_inputs(WAIT, 0, 0)
    token, logprob = choose(candidates, VOCAB, PROGRAMS, BLOCK)
    step = tl.load(steps)
    tl.store(tokens + step, token)
    tl.store(logprobs + step, logprob)
    tl.store(steps, step + 1)
    tl.store(positions, tl.load(positions) + 1)
    embed(token, codes, scales, x, COLS, KIND, COL_BLOCK)


@triton.jit
def embed_kernel(
    token,
    codes,
    scales,
    x,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    COL_BLOCK: tl.constexpr,
):
    """Write the embedding that a first step begins with."""
    embed(tl.load(token), codes, scales, x, COLS, KIND, COL_BLOCK)
