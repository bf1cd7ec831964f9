"""Any number of decode steps in one launch: programs that stay, with a barrier after each stage.

A program keeps its share of every matrix. Between two stages all programs meet at a barrier of
about a microsecond, in which their next weights are already on the way to their registers (those of
the first rows) and to the L2 cache (the rest, by `prefetch`). The grid must fit the GPU at once:
cooperative launch, at most as many programs as multiprocessors hold.

Five barriers per block and one per token. Who reads what after which barrier is simulated in
`tests/test_persistent_schedule.py`.
"""

import triton
import triton.language as tl

from .decode_stages import attend, embed, gate_up, output, project, split_plan
from .gemv import row_stride, share_of
from .grid_sync import arrive, prefetch, recomputed, wait_for_inputs
from .next_token import candidate, choose


@triton.constexpr_function
def code_nbytes(KIND):
    return {"fp32": 4, "bf16": 2, "fp16": 2}.get(KIND, 1)


@triton.jit
def _prefetch_share(
    AHEAD: tl.constexpr,
    program,
    codes,
    first_row,
    OUTPUTS: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    PROGRAMS: tl.constexpr,
    limit,
):
    """Request a program's rows of a matrix, up to `limit` bytes."""
    row, end = share_of(OUTPUTS, program, PROGRAMS)
    stride: tl.constexpr = row_stride(COLS, KIND)
    nbytes = tl.minimum((end - row) * (stride * code_nbytes(KIND)), limit)
    prefetch(AHEAD, codes + (first_row + row).to(tl.int64) * stride, nbytes // 16 * 16)


@triton.jit
def persistent_kernel(
    steps,
    state,  # int32: token, position, size of the KV cache in tokens
    schedule,
    length,  # of the schedule
    address,
    tokens,
    logprobs,
    counter,
    workspace,
    logits,
    cos,
    sin,
    attention_norms,
    ffn_norms,
    final_norm,
    qkv_codes,
    qkv_scales,
    output_codes,
    output_scales,
    gate_up_codes,
    gate_up_scales,
    down_codes,
    down_scales,
    embedding_codes,
    embedding_scales,
    head_codes,
    head_scales,
    eps,
    scale,
    temperature,
    seed,
    prefetch_limit,
    KV: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    VOCAB: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    QKV_KIND: tl.constexpr,
    OUTPUT_KIND: tl.constexpr,
    GATE_UP_KIND: tl.constexpr,
    DOWN_KIND: tl.constexpr,
    EMBEDDING_KIND: tl.constexpr,
    HEAD_KIND: tl.constexpr,
    QKV_VEC: tl.constexpr,
    OUTPUT_VEC: tl.constexpr,
    GATE_UP_VEC: tl.constexpr,
    DOWN_VEC: tl.constexpr,
    HEAD_VEC: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    COL_BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Run `steps` decode steps; tokens and log-probabilities (steps,) are what was chosen.

    Args:
        workspace: float32, shared by all programs: x (HIDDEN), middle (HIDDEN), qkv, attended,
            inner (INNER), partial, candidates; then HIDDEN + HEADS * HEAD_DIM of each program.
        counter: int32 (1,), zero; counts the arrivals at barriers.
        AHEAD: request the next stage's weights into the L2 cache.
        WAIT: "grid"; "alone" for a grid of one program, which the interpreter can run.
    """
    QUERIES: tl.constexpr = HEADS * HEAD_DIM
    QKV: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    program = tl.program_id(0)
    x = workspace
    middle = x + HIDDEN
    qkv = middle + HIDDEN
    attended = qkv + QKV
    inner = attended + QUERIES
    partial = inner + INNER
    candidates = partial + HEADS * SPLITS * (HEAD_DIM + 2)
    own = candidates + PROGRAMS * 5 + program * (HIDDEN + QUERIES)
    merged = own + HIDDEN

    token = tl.load(state)
    position = tl.load(state + 1)
    size = tl.load(state + 2).to(tl.int64) * HEAD_DIM  # elements per KV head
    cache = tl.load(address).to(tl.pointer_type(KV))
    arrivals = 0
    for step in range(steps):
        embed(token, embedding_codes, embedding_scales, own, HIDDEN, EMBEDDING_KIND, COL_BLOCK)
        tl.debug_barrier()  # other threads of this program wrote parts of it
        for slot in range(length):
            program = recomputed(WAIT, program)
            block = tl.load(schedule + slot).to(tl.int64)
            source = tl.where(slot == 0, own, x)
            qkv_matrix = qkv_codes + block * (QKV * row_stride(HIDDEN, QKV_KIND))
            output_matrix = output_codes + block * (HIDDEN * row_stride(QUERIES, OUTPUT_KIND))
            gate_up_matrix = gate_up_codes + block * (2 * INNER * row_stride(HIDDEN, GATE_UP_KIND))
            down_matrix = down_codes + block * (HIDDEN * row_stride(INNER, DOWN_KIND))

            project(
                program,
                qkv_matrix,
                qkv_scales + block * scale_count(QKV, HIDDEN, QKV_KIND),
                source,
                attention_norms + block * HIDDEN,
                eps,
                source,
                qkv,
                QKV,
                HIDDEN,
                QKV_KIND,
                QKV_VEC,
                ROWS,
                True,
                False,
                PROGRAMS,
                WAIT,
                counter,
                arrivals,
            )
            arrive(WAIT, counter)
            arrivals += PROGRAMS
            _prefetch_share(
                AHEAD,
                program,
                output_matrix,
                0,
                HIDDEN,
                QUERIES,
                OUTPUT_KIND,
                PROGRAMS,
                prefetch_limit,
            )
            _prefetch_share(
                AHEAD,
                program,
                gate_up_matrix,
                0,
                INNER,
                HIDDEN,
                GATE_UP_KIND,
                PROGRAMS,
                prefetch_limit,
            )
            _prefetch_share(
                AHEAD,
                program,
                gate_up_matrix,
                INNER,
                INNER,
                HIDDEN,
                GATE_UP_KIND,
                PROGRAMS,
                prefetch_limit,
            )

            wait_for_inputs(WAIT, counter, arrivals)
            splits, _ = split_plan(position + 1, SPLITS, BLOCK_KV)
            for task in range(program, KV_HEADS * splits, PROGRAMS):
                kv_head = task % KV_HEADS
                attend(
                    kv_head,
                    task // KV_HEADS,
                    qkv,
                    position,
                    cache + (2 * slot * KV_HEADS + kv_head) * size,
                    cache + ((2 * slot + 1) * KV_HEADS + kv_head) * size,
                    cos,
                    sin,
                    scale,
                    partial,
                    attended,
                    HEADS,
                    KV_HEADS,
                    HEAD_DIM,
                    DIM,
                    SPLITS,
                    BLOCK_KV,
                )
            arrive(WAIT, counter)
            arrivals += PROGRAMS
            _prefetch_share(
                AHEAD,
                program,
                down_matrix,
                0,
                HIDDEN,
                INNER,
                DOWN_KIND,
                PROGRAMS,
                prefetch_limit,
            )

            output(
                program,
                output_matrix,
                output_scales + block * scale_count(HIDDEN, QUERIES, OUTPUT_KIND),
                partial,
                position,
                attended,
                merged,
                source,
                middle,
                HIDDEN,
                HEADS,
                HEAD_ROWS,
                HEAD_DIM,
                DIM,
                SPLITS,
                BLOCK_KV,
                OUTPUT_KIND,
                OUTPUT_VEC,
                ROWS,
                PROGRAMS,
                WAIT,
                counter,
                arrivals,
            )
            arrive(WAIT, counter)
            arrivals += PROGRAMS

            gate_up(
                program,
                gate_up_matrix,
                gate_up_scales + block * scale_count(2 * INNER, HIDDEN, GATE_UP_KIND),
                middle,
                ffn_norms + block * HIDDEN,
                eps,
                inner,
                INNER,
                HIDDEN,
                GATE_UP_KIND,
                GATE_UP_VEC,
                ROWS,
                PROGRAMS,
                WAIT,
                counter,
                arrivals,
            )
            arrive(WAIT, counter)
            arrivals += PROGRAMS
            if slot + 1 < length:
                following = tl.load(schedule + slot + 1).to(tl.int64)
                _prefetch_share(
                    AHEAD,
                    program,
                    qkv_codes + following * (QKV * row_stride(HIDDEN, QKV_KIND)),
                    0,
                    QKV,
                    HIDDEN,
                    QKV_KIND,
                    PROGRAMS,
                    prefetch_limit,
                )
            else:
                _prefetch_share(
                    AHEAD,
                    program,
                    head_codes,
                    0,
                    VOCAB,
                    HIDDEN,
                    HEAD_KIND,
                    PROGRAMS,
                    prefetch_limit,
                )

            project(
                program,
                down_matrix,
                down_scales + block * scale_count(HIDDEN, INNER, DOWN_KIND),
                inner,
                inner,
                eps,
                middle,
                x,
                HIDDEN,
                INNER,
                DOWN_KIND,
                DOWN_VEC,
                ROWS,
                False,
                True,
                PROGRAMS,
                WAIT,
                counter,
                arrivals,
            )
            arrive(WAIT, counter)
            arrivals += PROGRAMS

        candidate(
            program,
            head_codes,
            head_scales,
            x,
            final_norm,
            eps,
            logits,
            candidates,
            temperature,
            seed,
            position,
            VOCAB,
            HIDDEN,
            HEAD_KIND,
            HEAD_VEC,
            ROWS,
            PROGRAMS,
            WAIT,
            counter,
            arrivals,
        )
        arrive(WAIT, counter)
        arrivals += PROGRAMS
        wait_for_inputs(WAIT, counter, arrivals)
        token, logprob = choose(candidates, VOCAB, PROGRAMS, BLOCK_PROGRAMS)
        position += 1
        if program == 0:
            tl.store(tokens + step, token)
            tl.store(logprobs + step, logprob)


@triton.constexpr_function
def scale_count(OUTPUTS, COLS, KIND):
    """Elements of the scales of a matrix, in the units of their pointer."""
    if KIND == "int8":
        return OUTPUTS
    return OUTPUTS * ((COLS + 31) // 32) if KIND in ("int8_g32", "int4_g32") else 0
