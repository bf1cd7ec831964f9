"""The next token from the last hidden state: products with the head's rows, and a choice of one.

Logits never go to memory. Each program keeps, of its share of the vocabulary and per token, the
best row by logit (or, to sample, by logit / temperature + Gumbel noise, which draws from the
softmax) and what the softmax's sum needs. Of one token, the program that finishes last joins the
shares; of more, a second kernel does. On Hopper one token with float weights is taken by CUDA C++,
`hopper/streamed_head.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .counters import counters_of
from .early_launch import early_options, let_next_start, wait_for_previous
from .hopper import streamed_head
from .tiles import depth, processors
from .weight_rows import VectorShape, kind_of, times_matrix, times_vector, vector_shape

NOBODY = tl.constexpr(2147483647)  # no row; the smallest row wins a tie
LOWEST = tl.constexpr(float("-inf"))
FIELDS = tl.constexpr(4)  # of a share: best score, its logit, largest logit, sum of e^(logit - it)
ROWS, TOKENS = 64, 16  # of a program with several tokens
BLOCK = 1024  # shares that are joined at a time, at most


def head_sample(
    x: Tensor,
    codes: Tensor,
    temperature: float = 0.0,
    seed: int = 0,
    scales: Tensor | None = None,
    shape: VectorShape | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a row of the head for each hidden state.

    Args:
        x: (..., cols) bfloat16, float16 or (slow) float32, contiguous.
        codes, scales: the head's weights, see `weight_rows`; of float ones `codes` has the dtype
            of `x`.
        temperature: 0 takes the largest logit (of equal ones the first); above, row i of hidden
            state t is drawn with `softmax(logits / temperature)`, by the noise of number
            `t * rows + i` of the seed.
        seed: of the noise, in 64 bits.
        shape: how Triton's kernel cuts rows for one token; None: chosen by size, or one in CUDA C++
            takes it.

    Returns:
        ids: (...) int64.
        logprobs: (...) float32, the log-probability of each id at temperature 1. It is NaN, and the
            id some id, where logits are NaN.

    Numerics: as `weight_only_linear`, but logits stay float32.
    """
    vocab, cols = codes.shape[0], x.shape[-1]
    kind = kind_of(codes, scales)
    ids = x.new_empty(x.shape[:-1], dtype=torch.int64)
    logprobs = x.new_empty(x.shape[:-1], dtype=torch.float32)
    tokens = ids.numel()
    if tokens == 0:
        return ids, logprobs
    weights = (x, codes, codes if scales is None else scales)
    inverse = 1 / temperature if temperature > 0 else 0.0
    if (
        tokens == 1
        and scales is None
        and shape is None
        and streamed_head.takes(x, codes)
        and streamed_head.choose(x, codes, inverse, seed, ids, logprobs)
    ):
        return ids, logprobs
    if tokens == 1 and (shape := shape or vector_shape(codes, kind, cols)):
        shares = min(triton.cdiv(vocab, shape.rows), processors(x.device) * shape.programs)
        found, best = _shares(x, shares, tokens)
        _head_vector[(shares,)](
            *(*weights, found, best, counters_of(x.device, 1), ids, logprobs),
            *(vocab, inverse, seed),
            COLS=cols,
            KIND=kind,
            ROWS=shape.rows,
            GROUPS=shape.groups,
            SAMPLE=temperature > 0,
            BLOCK=_block(shares),
            num_warps=shape.warps,
            **early_options(x.device),
        )
    else:
        shares = triton.cdiv(vocab, ROWS)
        found, best = _shares(x, shares, tokens)
        _head_tiles[(shares, triton.cdiv(tokens, TOKENS))](
            *(*weights, found, best, vocab, tokens, cols, inverse, seed),
            KIND=kind,
            ROWS=ROWS,
            TOKENS=TOKENS,
            GROUPS=2,
            SAMPLE=temperature > 0,
            num_warps=4,
            num_stages=depth(4),
        )
        _join_shares[(tokens,)](found, best, ids, logprobs, shares, vocab, BLOCK=_block(shares))
    return ids, logprobs


def _block(shares: int) -> int:
    return min(triton.next_power_of_2(shares), BLOCK)


def _shares(x: Tensor, shares: int, tokens: int) -> tuple[Tensor, Tensor]:
    found = x.new_empty(tokens, FIELDS.value, shares, dtype=torch.float32)
    return found, x.new_empty(tokens, shares, dtype=torch.int32)


@triton.jit
def gumbel(seed, number):
    """Gumbel noise number `number` of a seed: -log(-log(1 - u)) for u uniform in (0, 1].

    The largest values, which decide, come of the smallest u, of which floats tell the most apart.
    """
    bits = tl.randint(seed, number).to(tl.uint32, bitcast=True)
    u = (bits.to(tl.float32) + 0.5) * (2.0**-32)
    # log(1 - u) as Kahan does it: that of the rounded difference, times how far that is from u
    rest = 1 - u
    lost = 1 - rest
    return -tl.log(tl.where(lost == 0, u, -tl.log(rest) * (u / lost)))


@triton.jit
def _score(logit, number, live, inverse, seed, SAMPLE: tl.constexpr):
    if SAMPLE:
        return tl.where(live, logit * inverse + gumbel(seed, number), LOWEST)
    else:
        return tl.where(live, logit, LOWEST)


@triton.jit
def _better(score, row, logit, other_score, other_row, other_logit):
    """Lane by lane, the better of two candidates; the smaller row of equal ones."""
    wins = (other_score > score) | ((other_score == score) & (other_row < row))
    chosen = tl.where(wins, other_row, row)
    return tl.where(wins, other_score, score), chosen, tl.where(wins, other_logit, logit)


@triton.jit
def _add_weights(top, weights, other_top, other_weights):
    """Lane by lane, add sums of e^(logit - top) that are relative to different tops."""
    new_top = tl.maximum(top, other_top, propagate_nan=tl.PropagateNan.ALL)
    shift = tl.where(new_top == LOWEST, 0.0, new_top)  # a lane may have seen nothing yet
    return new_top, weights * tl.exp(top - shift) + other_weights * tl.exp(other_top - shift)


@triton.jit
def _joined(
    score, row, logit, top, weights, other_score, other_row, other_logit, other_top, other_weights
):
    """Lane by lane, what is known of the rows of both sides."""
    score, row, logit = _better(score, row, logit, other_score, other_row, other_logit)
    top, weights = _add_weights(top, weights, other_top, other_weights)
    return score, row, logit, top, weights


@triton.jit
def _store_share(found, best, token, shares, share, mask, score, row, logit, top, weights):
    place = token.to(tl.int64) * FIELDS * shares + share
    tl.store(found + place, score, mask=mask)
    tl.store(found + place + shares, logit, mask=mask)
    tl.store(found + place + 2 * shares, top, mask=mask)
    tl.store(found + place + 3 * shares, weights, mask=mask)
    tl.store(best + token.to(tl.int64) * shares + share, row, mask=mask)


@triton.jit(do_not_specialize=["seed"])
def _head_vector(
    x,
    codes,
    scales,
    found,
    best,
    counter,
    ids,
    logprobs,
    vocab,
    inverse,
    seed,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """An equal share of the rows, tile by tile; the program that finishes last joins all shares."""
    let_next_start(EARLY)
    wait_for_previous(EARLY)
    share = tl.program_id(0)
    shares = tl.num_programs(0)
    # to within a row, so that no multiprocessor reads a tile more than others
    first, end = share * vocab // shares, (share + 1) * vocab // shares
    score = tl.full((ROWS,), LOWEST, tl.float32)
    row = tl.full((ROWS,), NOBODY, tl.int32)
    logit = tl.full((ROWS,), LOWEST, tl.float32)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    for start in range(first, end, ROWS):
        its_row = start + tl.arange(0, ROWS)
        live = its_row < end
        # x, but not for the compiler, which would keep all of it in registers between tiles
        inputs = x + (start >> 30) * 16
        its_logit = times_vector(inputs, codes, scales, its_row, live, COLS, KIND, ROWS, GROUPS)
        its_logit = tl.where(live, its_logit, LOWEST)
        its_score = _score(its_logit, its_row, live, inverse, seed, SAMPLE)
        score, row, logit, top, weights = _joined(
            *(score, row, logit, top, weights),
            *(its_score, its_row, its_logit, its_logit, tl.where(live, 1.0, 0.0)),
        )
    # one pass through the threads for all of it: each has barriers
    known = tl.reduce((score, row, logit, top, weights), 0, _joined)
    _store_share(found, best, share * 0, shares, share, True, *known)
    tl.debug_barrier()  # all threads have stored before one of them releases
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == shares - 1:
        tl.store(counter, 0)  # for the next launch
        _join(found, best, ids, logprobs, shares, vocab, BLOCK)


@triton.jit(do_not_specialize=["seed"])
def _head_tiles(
    x,
    codes,
    scales,
    found,
    best,
    vocab,
    tokens,
    cols,
    inverse,
    seed,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    share = tl.program_id(0)
    row = share * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    live = row < vocab
    steps = tl.cdiv(cols, GROUPS * 32)
    logit = times_matrix(
        *(x, codes, scales, row, live, token, tokens, 0, steps, cols),
        KIND,
        ROWS,
        TOKENS,
        GROUPS,
    )
    known = live[:, None]
    logit = tl.where(known, logit, LOWEST)
    number = token.to(tl.int64)[None, :] * vocab + row[:, None]
    score = _score(logit, number, known, inverse, seed, SAMPLE)
    rows = row[:, None] + tl.zeros((1, TOKENS), tl.int32)
    top_score = tl.max(score, 0)
    chosen = tl.min(tl.where(score == top_score[None, :], rows, NOBODY), 0)
    its_logit = tl.max(tl.where(rows == chosen[None, :], logit, LOWEST), 0)
    top = tl.max(logit, 0)
    weights = tl.sum(tl.exp(logit - top[None, :]), 0)
    _store_share(
        *(found, best, token, tl.num_programs(0), share, token < tokens),
        *(top_score, chosen, its_logit, top, weights),
    )


@triton.jit
def _join_shares(found, best, ids, logprobs, shares, vocab, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    found += token * FIELDS * shares
    _join(found, best + token * shares, ids + token, logprobs + token, shares, vocab, BLOCK)


@triton.jit
def _join(found, best, ids, logprobs, shares, vocab, BLOCK: tl.constexpr):
    """Join the shares of one token."""
    lane = tl.arange(0, BLOCK)
    score = tl.full((BLOCK,), LOWEST, tl.float32)
    row = tl.full((BLOCK,), NOBODY, tl.int32)
    logit = tl.full((BLOCK,), LOWEST, tl.float32)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, shares, BLOCK):
        share = start + lane
        live = share < shares
        its_score = tl.load(found + share, mask=live, other=LOWEST)
        its_row = tl.load(best + share, mask=live, other=NOBODY)
        its_logit = tl.load(found + shares + share, mask=live, other=LOWEST)
        its_top = tl.load(found + 2 * shares + share, mask=live, other=LOWEST)
        its_weights = tl.load(found + 3 * shares + share, mask=live, other=0)
        score, row, logit, top, weights = _joined(
            *(score, row, logit, top, weights),
            *(its_score, its_row, its_logit, its_top, its_weights),
        )
    _, chosen, its_logit, largest, total = tl.reduce((score, row, logit, top, weights), 0, _joined)
    tl.store(ids, tl.minimum(chosen, vocab - 1).to(tl.int64))
    tl.store(logprobs, its_logit - largest - tl.log(total))
