// A warp's inputs of a stage become digits in shared memory, where its lanes read them.
#pragma once
#include "vectors.cuh"

// Of all stages: a lane's fours, and a warp's chunks of a tile.
constexpr int most_fours(int first, int end) {
    return first == end ? 0
                        : most(fours_of(shape_of(first).kind, shape_of(first).steps()),
                               most_fours(first + 1, end));
}
constexpr int BODY_FOURS = most_fours(QUERY, HEAD), HEAD_FOURS = most_fours(HEAD, STAGES);
constexpr int digits_nbytes_of(int kind, int fours) {
    return fours * EACH * LANES / chunk_inputs(kind) * digits_nbytes(kind);
}
constexpr int DIGITS_NBYTES =
    most(digits_nbytes_of(BODY_KIND, BODY_FOURS), digits_nbytes_of(HEAD_KIND, HEAD_FOURS));
constexpr int MOST_FOURS = most(BODY_FOURS, HEAD_FOURS);

struct alignas(16) WarpInputs {
    unsigned char digits[DIGITS_NBYTES];
    float units[MOST_FOURS];            // what products of codes and digits stand for, for integers
    float sums[MOST_FOURS * QUARTERS];  // of the inputs of pieces, for weights with a minimum
};

// The inputs of a warp's chunks as its lanes multiply them.
template <int KIND>
struct Inputs {
    WarpInputs& warp;
    const unsigned char* column;  // of this lane: digits of its own inputs, or zeros
    int stride;                   // to those of the next chunk

    DEVICE Inputs(const Worker& me, WarpInputs& warp, const unsigned char* zeros) : warp(warp) {
        const int number = me.lane / QUARTERS;
        const bool is_own = number / 2 == me.lane % QUARTERS;
        column = is_own ? warp.digits + number * column_nbytes(KIND) : zeros;
        stride = is_own ? digits_nbytes(KIND) : 0;
    }

    // Store the digits of the lanes' first `fours` fours.
    template <int FOURS>
    DEVICE void store(const Worker& me, int fours, const Four (&inputs)[FOURS]) const {
        constexpr int CHUNK = chunk_inputs(KIND);
        UNROLL for (int i = 0; i < FOURS; ++i) {
            if (i > 0 && i >= fours) break;
            const int place = Mine<KIND>::place(me, i);
            int sum = 0;
            const float unit = store_digits<KIND>(
                warp.digits + place / CHUNK * digits_nbytes(KIND), place % CHUNK, inputs[i].values, sum);
            if (KIND != BF16 && me.lane == 0) warp.units[i] = unit / code_unit(KIND);
            if constexpr (KIND == INT4_G32) {
                // of what is multiplied: so roundings of the inputs do not meet codes and minimum apart
                constexpr int SHARERS = LANES / QUARTERS;  // of a piece
                UNROLL for (int mask = 1; mask < SHARERS; mask *= 2)
                    sum += static_cast<int>(shuffle_xor(static_cast<unsigned>(sum), mask));
                if (me.lane % SHARERS == 0)
                    warp.sums[i * QUARTERS + me.lane / SHARERS] = static_cast<float>(sum) * unit;
            }
        }
        sync_warp();
    }

    DEVICE InputScale scale(const Worker& me, int step) const {
        if constexpr (KIND == BF16) return {1, 0};
        return {
            warp.units[step * chunk_inputs(KIND) / (EACH * LANES)],
            KIND == INT4_G32 ? warp.sums[step * QUARTERS + me.lane % QUARTERS] : 0};
    }
};
