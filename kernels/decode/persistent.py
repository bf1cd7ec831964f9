"""Any number of decode steps in one launch, by programs that stay.

A program keeps its share of every matrix and takes part in every stage. It gets its inputs by
polling the vectors that the stage before publishes (`grid_sync.py`); until they are there, its next
weights travel to its registers. All programs meet at one barrier per token, which makes the new
keys and values safe to read.

A vector is overwritten only when everyone has read it: the stage that writes it again waits for
others that read it before. `tests/test_persistent_schedule.py` simulates it with programs of any
speed. The grid must be on the GPU all at once, hence the cooperative launch.
"""

import triton
import triton.language as tl

from .attention import attend, split_plan
from .gemv import row_stride
from .grid_sync import COPY_STRIDE, arrive, copies, recomputed, wait_for_all
from .next_token import candidate, choose
from .stages import embed, gate_up, output, project, query


@triton.constexpr_function
def scale_count(OUTPUTS, COLS, KIND):
    """Elements of the scales of a matrix, in the units of their pointer."""
    if KIND == "int8":
        return OUTPUTS
    return OUTPUTS * ((COLS + 31) // 32) if KIND in ("int8_g32", "int4_g32") else 0


@triton.jit(do_not_specialize=["steps", "length", "first_epoch", "seed", "temperature"])
def persistent_kernel(
    steps,
    state,  # int32: token, position, size of the KV cache in tokens
    schedule,
    length,  # of the schedule
    cache,
    tokens,
    logprobs,
    counter,
    first_epoch,
    vectors,
    candidates,
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
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    VOCAB: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    QKV_KIND: tl.constexpr,
    OUTPUT_KIND: tl.constexpr,
    GATE_UP_KIND: tl.constexpr,
    DOWN_KIND: tl.constexpr,
    EMBEDDING_KIND: tl.constexpr,
    HEAD_KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CANDIDATE_BLOCK: tl.constexpr,
    SHARE_BLOCK: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Run `steps` decode steps; tokens and logprobs (steps,) are what was chosen.

    Args:
        cache: of one sequence, (length, 2, KV_HEADS, size of the cache in tokens, HEAD_DIM).
        counter: int32 (1,), zero; counts the arrivals at barriers.
        first_epoch: of this launch, which uses `steps * (5 * length + 1)` of them; none of these
            is in `vectors` yet.
        vectors: int64 (copies, COPY_STRIDE), values with their epochs: x (HIDDEN), middle (HIDDEN),
            qkv, attended, inner (INNER), partial.
        candidates: float32 (PROGRAMS, FIELDS).
        SHARE_BLOCK: a power of two, at least a program's share of HIDDEN.
        WAIT: "grid"; "alone" for a grid of one program, which the interpreter can run.
    """
    QUERIES: tl.constexpr = HEADS * HEAD_DIM
    QKV: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    program = tl.program_id(0)
    x = vectors
    middle = x + HIDDEN
    qkv = middle + HIDDEN
    attended = qkv + QKV
    inner = attended + QUERIES
    partial = inner + INNER
    mine = program % copies(WAIT) * COPY_STRIDE  # where this program reads them

    token = tl.load(state)
    position = tl.load(state + 1)
    size = tl.load(state + 2).to(tl.int64) * HEAD_DIM  # elements per KV head
    epoch = first_epoch
    for step in range(steps):
        embed(
            program,
            token,
            embedding_codes,
            embedding_scales,
            x,
            epoch,
            HIDDEN,
            EMBEDDING_KIND,
            SHARE_BLOCK,
            PROGRAMS,
            WAIT,
        )
        for slot in range(length):
            program = recomputed(WAIT, program)
            block = tl.load(schedule + slot).to(tl.int64)
            slot_cache = cache + 2 * slot * KV_HEADS * size
            output_matrix = output_codes + block * (HIDDEN * row_stride(QUERIES, OUTPUT_KIND))
            gate_up_matrix = gate_up_codes + block * (2 * INNER * row_stride(HIDDEN, GATE_UP_KIND))
            down_matrix = down_codes + block * (HIDDEN * row_stride(INNER, DOWN_KIND))

            query(
                program,
                qkv_codes + block * (QKV * row_stride(HIDDEN, QKV_KIND)),
                qkv_scales + block * scale_count(QKV, HIDDEN, QKV_KIND),
                x + mine,
                attention_norms + block * HIDDEN,
                eps,
                position,
                cos,
                sin,
                slot_cache,
                size,
                qkv,
                epoch + 1,
                HEADS,
                KV_HEADS,
                HEAD_DIM,
                HIDDEN,
                QKV_KIND,
                WARPS,
                PROGRAMS,
                WAIT,
            )

            splits, _ = split_plan(position + 1, SPLITS, BLOCK_KV)
            for task in range(program, HEADS * splits, PROGRAMS):
                head = task % HEADS
                kv_head = head // (HEADS // KV_HEADS)
                attend(
                    head,
                    task // HEADS,
                    qkv + mine,
                    position,
                    slot_cache + kv_head * size,
                    slot_cache + (KV_HEADS + kv_head) * size,
                    scale,
                    partial,
                    attended,
                    epoch + 2,
                    HEADS,
                    KV_HEADS,
                    HEAD_DIM,
                    DIM,
                    SPLITS,
                    BLOCK_KV,
                    WARPS,
                    WAIT,
                )

            output(
                program,
                output_matrix,
                output_scales + block * scale_count(HIDDEN, QUERIES, OUTPUT_KIND),
                partial + mine,
                position,
                attended + mine,
                x + mine,
                middle,
                epoch + 3,
                HIDDEN,
                HEADS,
                HEAD_DIM,
                SPLITS,
                BLOCK_KV,
                OUTPUT_KIND,
                WARPS,
                PROGRAMS,
                WAIT,
            )

            gate_up(
                program,
                gate_up_matrix,
                gate_up_scales + block * scale_count(2 * INNER, HIDDEN, GATE_UP_KIND),
                middle + mine,
                ffn_norms + block * HIDDEN,
                eps,
                inner,
                epoch + 4,
                INNER,
                HIDDEN,
                GATE_UP_KIND,
                WARPS,
                PROGRAMS,
                WAIT,
            )
            project(
                program,
                down_matrix,
                down_scales + block * scale_count(HIDDEN, INNER, DOWN_KIND),
                inner + mine,
                middle + mine,
                x,
                epoch + 5,
                HIDDEN,
                INNER,
                DOWN_KIND,
                WARPS,
                PROGRAMS,
                WAIT,
            )
            epoch += 5

        candidate(
            program,
            head_codes,
            head_scales,
            x + mine,
            final_norm,
            eps,
            logits,
            candidates,
            temperature,
            seed,
            position,
            epoch + 1,
            VOCAB,
            HIDDEN,
            HEAD_KIND,
            WARPS,
            PROGRAMS,
            WAIT,
        )
        arrive(WAIT, counter)
        wait_for_all(WAIT, counter, (step + 1) * PROGRAMS)
        token, logprob = choose(candidates, VOCAB, PROGRAMS, CANDIDATE_BLOCK)
        position += 1
        epoch += 1
        if program == 0:
            tl.store(tokens + step, token)
            tl.store(logprobs + step, logprob)
