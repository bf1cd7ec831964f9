"""From the last hidden state to the next token: head, choice and log-probability."""

import triton
import triton.language as tl

from .gemv import (
    deal,
    load_norm,
    load_tile,
    multiply_tile,
    normed,
    receive_inputs,
    share_of,
    tile_count,
    tile_rows,
)
from .grid_sync import current, wait_for_launch

FIELDS = tl.constexpr(5)  # of a program's candidate: rank, token (in bits), logit, largest, sum


@triton.jit
def candidate(
    program,
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
    epoch,
    VOCAB: tl.constexpr,
    COLS: tl.constexpr,
    KIND: tl.constexpr,
    WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Compute a share of logits = rms_norm(x) W^T, and the best token of that share.

    The best is the likeliest (the first on ties), or for a temperature > 0 the one with the largest
    logit / temperature + Gumbel noise, which draws from the softmax (Gumbel-max trick). The noise
    depends on the seed, the position and the token alone.

    Args:
        logits: (VOCAB,) float32.
        candidates: (PROGRAMS, FIELDS) float32: what the token was ranked by, its id, its logit, the
            largest logit and the sum of e^(logit - largest).
    """
    ROWS: tl.constexpr = tile_rows(VOCAB, COLS, KIND, WARPS, PROGRAMS)
    first, end = share_of(VOCAB, program, PROGRAMS)
    norm = load_norm(norm_weight, COLS, KIND, WARPS)
    row = first + tl.arange(0, ROWS)
    tile = load_tile(codes, scales, row, row < end, COLS, KIND, WARPS)
    wait_for_launch(WAIT)
    position = current(WAIT, positions)
    heat = current(WAIT, temperature)
    noise_seed = current(WAIT, seed)
    inputs = receive_inputs(x, epoch - 1, COLS, KIND, WARPS, WAIT)
    inputs, factor = normed(inputs, norm, eps, COLS, KIND, WARPS)
    inputs = deal(inputs, ROWS, COLS, KIND, WARPS)
    best_rank = tl.full((ROWS,), float("-inf"), tl.float32)
    best_token = row
    best_logit = tl.full((ROWS,), float("-inf"), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for _ in range(tile_count(VOCAB, PROGRAMS, ROWS)):
        live = row < end
        next_tile = load_tile(codes, scales, row + ROWS, row + ROWS < end, COLS, KIND, WARPS)
        logit = multiply_tile(tile, inputs, ROWS, COLS, KIND, WARPS) * factor
        tl.store(logits + row, logit, mask=live)
        logit = tl.where(live, logit, float("-inf"))
        rank = logit
        if heat > 0:
            uniform = tl.rand(noise_seed, position.to(tl.int64) * VOCAB + row)
            rank = logit / heat - tl.log(-tl.log(tl.maximum(uniform, 1e-30)))
        better = rank > best_rank
        best_token = tl.where(better, row, best_token)
        best_logit = tl.where(better, logit, best_logit)
        best_rank = tl.where(better, rank, best_rank)
        # a row slot may have seen no token yet: -inf - -inf is no number
        new_largest = tl.maximum(largest, logit, propagate_nan=tl.PropagateNan.ALL)
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.exp(logit - shift)
        largest = new_largest
        row += ROWS
        tile = next_tile
    rank, token, chosen, top, weights = _best(best_rank, best_token, best_logit, largest, total)
    place = candidates + program * FIELDS
    tl.store(place, rank)
    tl.store(place + 1, token.to(tl.float32, bitcast=True))
    tl.store(place + 2, chosen)
    tl.store(place + 3, top)
    tl.store(place + 4, weights)


@triton.jit
def _best(rank, token, logit, largest, total):
    """Join candidates (n,) into one; the smallest token wins a tie."""
    top_rank = tl.max(rank, 0)
    top_token = tl.min(tl.where(rank == top_rank, token, 2147483647), 0)
    chosen = tl.max(tl.where(token == top_token, logit, float("-inf")), 0)
    top = tl.max(largest, 0)
    # a program without rows has seen no logit
    weights = tl.sum(total * tl.exp(largest - tl.where(top == float("-inf"), 0.0, top)), 0)
    return top_rank, top_token, chosen, top, weights


@triton.jit
def choose(
    candidates, VOCAB: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):  # -> token, its log-probability
    """Join the candidates of all programs; BLOCK is a power of two, at least `PROGRAMS`.

    A logit that is NaN makes the log-probability NaN; the token is in range even then.
    """
    index = tl.arange(0, BLOCK)
    live = index < PROGRAMS
    place = candidates + index * FIELDS
    lowest = float("-inf")
    rank = tl.load(place, mask=live, other=lowest, cache_modifier=".cg")
    token = tl.load(place + 1, mask=live, other=0, cache_modifier=".cg")
    logit = tl.load(place + 2, mask=live, other=lowest, cache_modifier=".cg")
    largest = tl.load(place + 3, mask=live, other=lowest, cache_modifier=".cg")
    total = tl.load(place + 4, mask=live, other=0, cache_modifier=".cg")
    token = tl.where(live, token.to(tl.int32, bitcast=True), 2147483647)
    _, token, logit, largest, total = _best(rank, token, logit, largest, total)
    return tl.minimum(token, VOCAB - 1), logit - largest - tl.log(total)
