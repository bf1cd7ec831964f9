// Vectors that programs hand to each other.
//
// A value is stored together with the number of the stage that wrote it, its *epoch*, as one word
// of 64 bits. A reader loads words until their epochs are the ones it waits for: one trip through
// the L2 cache, where a barrier takes three (values and their fence, the arrival, its sight) and
// the load another.
//
// A vector is overwritten only when everyone has read it: the stage that writes it again waits for
// others that read it before. A residual is kept in the program, not read again.
#pragma once
#if TENSOR_CORES
#include "tiles.cuh"
#else
#include "pairs.cuh"
#endif

constexpr int AT_ONCE = 2;  // neighbours that a thread has: as many words as it loads by one instruction

// Inputs of a chunk of a matrix of a kind, and how many of them a thread has.
constexpr int chunk_inputs(int kind) { return CHUNK_NBYTES / 16 * per_lane(kind); }
constexpr int each_of_chunk(int kind) { return chunk_inputs(kind) / LANES; }
static_assert(
    !TENSOR_CORES || (each_of_chunk(BODY_KIND) % AT_ONCE == 0 && each_of_chunk(HEAD_KIND) % AT_ONCE == 0),
    "a thread has several neighbours of a chunk");

// How many elements of a vector, the inputs of a matrix, a thread has, at most.
template <int KIND>
constexpr int mine_of(int size) {
    return TENSOR_CORES
               ? up_to(up_to(size, chunk_inputs(KIND)), WARPS) * each_of_chunk(KIND)
               : up_to(size, THREADS * AT_ONCE) * AT_ONCE;
}

// Calls `use(i, k)` for all k < SIZE that are this thread's, the i-th of them: with TENSOR_CORES
// those of the chunks that its warp multiplies.
template <int SIZE, int KIND, class Use>
DEVICE void for_mine(const Worker& me, const Use& use) {
    UNROLL for (int i = 0; i < mine_of<KIND>(SIZE); ++i) {
        int k;
        if constexpr (TENSOR_CORES) {
            constexpr int EACH = each_of_chunk(KIND);
            k = (me.warp() + i / EACH * WARPS) * chunk_inputs(KIND) +
                (i % EACH / AT_ONCE * LANES + me.lane()) * AT_ONCE + i % AT_ONCE;
        } else {
            k = (me.thread + i / AT_ONCE * THREADS) * AT_ONCE + i % AT_ONCE;
        }
        if (k < SIZE) use(i, k);
    }
}

// Calls `use(i, k, value)` as `for_mine`, when all of this thread's values are there.
template <int SIZE, int KIND, class Use>
DEVICE void receive(
    const Worker& me, const uint2* vector, unsigned epoch, const Use& use) {
    static_assert(SIZE % AT_ONCE == 0, "words are loaded in pairs");
    constexpr int EACH = mine_of<KIND>(SIZE);
    // all are written: a register that is not always is kept from one stage to the next
    uint2 words[EACH];
    UNROLL for (int i = 0; i < EACH; ++i) words[i] = make_uint2(0, epoch);
    const auto load = [&](int i, int k) { load_words(vector + k, words[i], words[i + 1]); };
    for_mine<SIZE, KIND>(me, [&](int i, int k) {
        if (i % AT_ONCE == 0) load(i, k);
    });
    bool late = true;
    while (late) {
        late = false;
        // what is there is not asked for again
        for_mine<SIZE, KIND>(me, [&](int i, int k) {
            if (i % AT_ONCE == 0 && (words[i].y != epoch || words[i + AT_ONCE - 1].y != epoch)) {
                late = true;
                load(i, k);
            }
        });
    }
    for_mine<SIZE, KIND>(me, [&](int i, int k) { use(i, k, as_float(words[i].x)); });
}

// Inputs of a matrix, times the weight of a norm; the sum of squares is joined later.
template <int KIND>
struct Norm {
    float weights[mine_of<KIND>(HIDDEN)];

    // Before the inputs are there.
    DEVICE Norm(const Worker& me, const float* norm) {
        for_mine<HIDDEN, KIND>(me, [&](int i, int k) { weights[i] = norm[k]; });
    }
};

DEVICE void store_squares(const Worker& me, float* squares, float square) {
    UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
    if (me.lane() == 0) squares[me.warp()] = square;
}

// What normed sums are multiplied with; after all threads stored their squares.
DEVICE float norm_factor(const float* squares, float eps) {
    float sums[4] = {0, 0, 0, 0};
    UNROLL for (int warp = 0; warp < WARPS; ++warp) sums[warp % 4] += squares[warp];
    constexpr float EACH = 1.0f / HIDDEN;
    return rsqrt_(fma_((sums[0] + sums[1]) + (sums[2] + sums[3]), EACH, eps));
}
