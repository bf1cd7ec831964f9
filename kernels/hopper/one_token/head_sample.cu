// The next token from one hidden state: each warp streams rows of the head through a ring of its own
// in shared memory, of which a lane reads what it copied itself, so that nobody waits for anybody.
// The program that finishes last joins what all found.
//
// Constants: COLS, THREADS, DEPTH (rows of a warp that are on their way), HALF_IS_BF16, SAMPLE
// (draw, instead of the largest logit), RESIDENT (programs of a multiprocessor).
#include <primitives.cuh>

constexpr int WARPS = THREADS / 32;
constexpr int ROW_NBYTES = COLS * 2, PIECE = 32 * 16;  // bytes that a warp copies at once
constexpr int PIECES = (ROW_NBYTES + PIECE - 1) / PIECE;
constexpr int AHEAD = DEPTH < 4 ? DEPTH : 4;  // rows of a warp that come to L2 early
constexpr float LOG2_E = 1.4426950408889634f;
constexpr int NOBODY = 2147483647;  // no row; the smallest row wins a tie
static_assert(COLS % 8 == 0 && WARPS <= 32, "sizes");

struct Arguments {
    const char *x, *rows;
    float4* shares;  // [programs][2]
    int* counter;    // 0, and 0 again in the end
    long long* id;
    float* logprob;
    unsigned long long seed;
    float inverse;  // of the temperature
    int vocab;
};

// Of some rows: the best, by logit or by score, and what the softmax over all of them needs.
struct Known {
    int row;
    float score, logit;  // of that row, if it is drawn
    float top, weights;  // largest logit, sum of e^(logit - top)
};
DEVICE Known nothing() { return {NOBODY, NOTHING, NOTHING, NOTHING, 0}; }

// Both; a NaN is never the best, but ends up in the sum.
DEVICE Known joined(const Known& a, const Known& b) {
    const float score = SAMPLE ? a.score : a.top, other = SAMPLE ? b.score : b.top;
    const bool wins = other > score || (other == score && b.row < a.row);
    const float top = b.top > a.top ? b.top : a.top, shift = top == NOTHING ? 0 : top;
    return {wins ? b.row : a.row, wins ? b.score : a.score, wins ? b.logit : a.logit, top,
            a.weights * exp2_((a.top - shift) * LOG2_E) +
                b.weights * exp2_((b.top - shift) * LOG2_E)};
}
DEVICE Known of_warp(Known known) {
    UNROLL for (int mask = 1; mask < 32; mask *= 2) {
        Known other = nothing();
        other.row = shuffle_xor(known.row, mask);
        if (SAMPLE) {
            other.score = shuffle_xor(known.score, mask);
            other.logit = shuffle_xor(known.logit, mask);
        }
        other.top = shuffle_xor(known.top, mask);
        other.weights = shuffle_xor(known.weights, mask);
        known = joined(known, other);
    }
    return known;
}
struct Packed {
    float4 words[2];
};
DEVICE Packed packed(const Known& k) {
    return {{make_float4(bits_float(k.row), k.top, k.weights, 0),
             make_float4(k.score, k.logit, 0, 0)}};
}
DEVICE Known unpacked(float4 a, float4 b) { return {float_bits(a.x), b.x, b.y, a.y, a.z}; }

// Gumbel noise as `kernels/head_sample.py` draws it: 32 bits of Philox 4x32 with 10 rounds.
DEVICE float gumbel(unsigned long long seed, unsigned number) {
    unsigned c[4] = {number, 0, 0, 0};
    unsigned key[2] = {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)};
    constexpr unsigned A = 0xD2511F53u, B = 0xCD9E8D57u;
    UNROLL for (int round = 0; round < 10; ++round) {
        const unsigned c0 = c[0], c2 = c[2];
        c[0] = high_product(B, c2) ^ c[1] ^ key[0];
        c[2] = high_product(A, c0) ^ c[3] ^ key[1];
        c[1] = B * c2;
        c[3] = A * c0;
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    const float u = (static_cast<float>(c[0]) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
    // log(1 - u) as Kahan does it: that of the rounded difference, times how far that is from u
    const float rest = 1 - u, lost = 1 - rest;
    return -log_(lost == 0 ? u : -log_(rest) * (u / lost));
}

struct Shared {
    char ring[WARPS][DEPTH][ROW_NBYTES];
    Packed found[WARPS];
};
SHARED(head_sample, Shared)

// `slot` and `row` are where the lane's first 16 bytes lie.
DEVICE void copy_row_later(char* slot, const char* row, int lane) {
    UNROLL for (int i = 0; i < PIECES; ++i) {
        if (i * PIECE + lane * 16 < ROW_NBYTES) copy_16_later(slot + i * PIECE, row + i * PIECE);
    }
}

// The lane's part of the product of a row with x, in four sums.
DEVICE float product(const char* slot, const float (&x)[PIECES][8], int lane) {
    float sum[4] = {};
    UNROLL for (int i = 0; i < PIECES; ++i) {
        if (i * PIECE + lane * 16 < ROW_NBYTES) {
            const uint4 v = read_copied(slot + i * PIECE);
            sum[0] += low_half(v.x) * x[i][0];
            sum[1] += high_half(v.x) * x[i][1];
            sum[2] += low_half(v.y) * x[i][2];
            sum[3] += high_half(v.y) * x[i][3];
            sum[0] += low_half(v.z) * x[i][4];
            sum[1] += high_half(v.z) * x[i][5];
            sum[2] += low_half(v.w) * x[i][6];
            sum[3] += high_half(v.w) * x[i][7];
        }
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

KERNEL(head_sample, Arguments) {
    const Arguments& a = arguments;
    Shared& shared = shared_memory<Shared>();
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    // an equal share of the rows, to within one, of which each warp has every WARPS'th
    const int program = program_index();
    const int first = static_cast<int>(static_cast<long long>(program) * a.vocab / programs());
    const int end = static_cast<int>(static_cast<long long>(program + 1) * a.vocab / programs());
    const int row_of_warp = first + warp;
    const char* next = a.rows + static_cast<long long>(row_of_warp) * ROW_NBYTES;
    constexpr long long STRIDE = WARPS * ROW_NBYTES;  // from one row of a warp to its next
    if (lane == 0) {
        UNROLL for (int i = 0; i < AHEAD; ++i) {
            if (row_of_warp + i * WARPS < end) prefetch_bytes(next + i * STRIDE, ROW_NBYTES);
        }
    }
    wait_for_previous();
    char* ring = shared.ring[warp][0] + lane * 16;
    next += lane * 16;
    UNROLL for (int i = 0; i < DEPTH; ++i) {
        if (row_of_warp + i * WARPS < end) copy_row_later(ring + i * ROW_NBYTES, next, lane);
        close_copies();
        next += STRIDE;
    }
    float x[PIECES][8];
    UNROLL for (int i = 0; i < PIECES; ++i) {
        const int at = i * PIECE + lane * 16;
        const uint4 v = load_16(a.x + at, at < ROW_NBYTES);
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
        UNROLL for (int j = 0; j < 4; ++j) {
            x[i][2 * j] = low_half(words[j]);
            x[i][2 * j + 1] = high_half(words[j]);
        }
    }

    Known known = nothing();
    float noise = 0;  // a lane draws it for one of the warp's next 32 rows
    int slot = 0, source = 0;
    ROLLED for (int row = row_of_warp; row < end; row += WARPS) {
        if (SAMPLE && source == 0) noise = gumbel(a.seed, row + lane * WARPS);
        wait_for_copies<DEPTH - 1>();
        float logit = product(ring + slot * ROW_NBYTES, x, lane);
        if (row + DEPTH * WARPS < end) {
            copy_row_later(ring + slot * ROW_NBYTES, next, lane);
        } else {
            let_next_start();  // no sooner: its loads would delay these
        }
        close_copies();
        next += STRIDE;
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
        UNROLL for (int mask = 1; mask < 32; mask *= 2) logit += shuffle_xor(logit, mask);
        Known its = {row, logit, logit, logit, 1};
        if (SAMPLE) {
            its.score = logit * a.inverse + shuffle_from(noise, source);
            source = (source + 1) % 32;
        }
        known = joined(known, its);
    }
    let_next_start();
    if (lane == 0) shared.found[warp] = packed(known);
    sync_program();
    if (warp) return;
    const Packed its = shared.found[lane < WARPS ? lane : 0];
    known = of_warp(lane < WARPS ? unpacked(its.words[0], its.words[1]) : nothing());
    int arrived = 0;
    if (lane == 0) {
        const Packed share = packed(known);
        publish(a.shares + 2 * program, share.words[0]);
        if (SAMPLE) publish(a.shares + 2 * program + 1, share.words[1]);
        arrived = arrive_at(a.counter);
    }
    if (shuffle_from(arrived, 0) != programs() - 1) return;
    sync_warp();  // all lanes see what the first has acquired, which a shuffle does not promise
    known = nothing();
    for (int share = lane; share < programs(); share += 32) {
        const float4 words = read_published(a.shares + 2 * share);
        const float4 drawn = SAMPLE ? read_published(a.shares + 2 * share + 1) : words;
        known = joined(known, unpacked(words, drawn));
    }
    known = of_warp(known);
    if (lane == 0) {
        *a.counter = 0;  // for the next launch
        *a.id = known.row < a.vocab ? known.row : a.vocab - 1;
        *a.logprob = (SAMPLE ? known.logit : known.top) - known.top - log_(known.weights);
    }
}
