// From logits to the next token; the same draws as `kernels/decode/next_token.py`.
#pragma once
#include "attention_by_tiles.cuh"

constexpr int NO_TOKEN = 2147483647;

// The best token of some, and what the softmax over all of them needs.
struct Candidate {
    float rank;
    int token;
    float logit;
    float largest, total;  // logit, sum of e^(logit - largest)
};

DEVICE Candidate no_candidate() { return {NO_SCORE, NO_TOKEN, NO_SCORE, NO_SCORE, 0}; }

// Larger of two; NaN if one is.
DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

// Both together; the smaller token wins a tie.
DEVICE Candidate better(const Candidate& a, const Candidate& b) {
    const bool first = a.rank > b.rank || (a.rank == b.rank && a.token <= b.token);
    Candidate best = first ? a : b;
    best.largest = larger(a.largest, b.largest);
    const float shift = best.largest == NO_SCORE ? 0 : best.largest;
    best.total = a.total * exp_(a.largest - shift) + b.total * exp_(b.largest - shift);
    return best;
}

// A uniform number by Philox, as Triton's `rand`.
DEVICE float uniform(unsigned long long seed, unsigned long long offset) {
    unsigned c[4] = {static_cast<unsigned>(offset), static_cast<unsigned>(offset >> 32), 0, 0};
    unsigned key[2] = {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)};
    constexpr unsigned A = 0xD2511F53u, B = 0xCD9E8D57u;
    UNROLL for (int round = 0; round < 10; ++round) {
        const unsigned c0 = c[0], c2 = c[2];
        c[0] = mul_high(B, c2) ^ c[1] ^ key[0];
        c[2] = mul_high(A, c0) ^ c[3] ^ key[1];
        c[1] = B * c2;
        c[3] = A * c0;
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    const int source = static_cast<int>(c[0]);
    return static_cast<float>(source < 0 ? -source - 1 : source) * 4.6566127342e-10f;
}

DEVICE Candidate candidate_of(
    int token, float logit, float temperature, unsigned long long seed, int position) {
    float rank = logit;
    if (temperature > 0) {
        const float u = uniform(seed, static_cast<unsigned long long>(position) * VOCAB + token);
        rank = logit / temperature - log_(-log_(u > 1e-30f ? u : 1e-30f));
    }
    return {rank, token, logit, logit, 1};
}

// The best of all threads' candidates, for all threads.
DEVICE Candidate best_of_program(const Worker& me, Candidate mine, Candidate* of_warps) {
    UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) {
        Candidate other;
        other.rank = shuffle_xor(mine.rank, mask);
        other.token = static_cast<int>(shuffle_xor(static_cast<unsigned>(mine.token), mask));
        other.logit = shuffle_xor(mine.logit, mask);
        other.largest = shuffle_xor(mine.largest, mask);
        other.total = shuffle_xor(mine.total, mask);
        mine = better(mine, other);
    }
    if (me.lane == 0) of_warps[me.warp] = mine;
    sync_workers();
    Candidate best = of_warps[0];
    for (int warp = 1; warp < WARPS; ++warp) best = better(best, of_warps[warp]);
    sync_workers();  // the next call writes to them
    return best;
}
