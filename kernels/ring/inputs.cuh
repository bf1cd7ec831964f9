// A warp's inputs of a stage become digits in shared memory, where its lanes read them.
#pragma once
#include "vectors.cuh"

// Of all stages: bytes of a warp's digits, and its chunks of a tile.
constexpr int most_digits(int stage = 0) {
    return stage == STAGES
               ? 0
               : most(up_to(shape_of(stage).steps(), 2) * 2 * digits_nbytes(shape_of(stage).kind),
                      most_digits(stage + 1));
}
constexpr int most_steps(int stage = 0) {
    return stage == STAGES ? 0 : most(shape_of(stage).steps(), most_steps(stage + 1));
}
constexpr int DIGITS_NBYTES = most_digits();

struct WarpInputs {
    unsigned char digits[DIGITS_NBYTES];
    float sums[(has_scales(BODY_KIND) || has_scales(HEAD_KIND) ? most_steps() : 1) * QUARTERS];
};

// The inputs of a warp's chunks for its lanes.
template <int STAGE>
struct Inputs {
    static constexpr int KIND = shape_of(STAGE).kind, STEPS = shape_of(STAGE).steps();
    const unsigned char* column;  // of this lane: digits of its own inputs, or zeros
    InputScale scales[STEPS];

    DEVICE Inputs(
        const Worker& me, const Two (&inputs)[Mine<STAGE>::TWOS], WarpInputs& warp,
        const unsigned char* zeros) {
        constexpr int CHUNK = chunk_inputs(KIND), EACH = neighbours(KIND);
        if constexpr (KIND == BF16) {
            UNROLL for (int i = 0; i < Mine<STAGE>::TWOS; ++i) {
                const int place = Mine<STAGE>::place(me, i);
                store_bf16_digits(
                    warp.digits + place / CHUNK * digits_nbytes(KIND), place % CHUNK,
                    inputs[i].values[0], inputs[i].values[1]);
            }
        } else {
            UNROLL for (int step = 0; step < STEPS; ++step) {
                float values[EACH];
                UNROLL for (int i = 0; i < EACH; ++i)
                    values[i] = inputs[step * (EACH / 2) + i / 2].values[i % 2];
                scales[step].unit = store_int_digits<KIND>(
                    warp.digits + step * digits_nbytes(KIND), me.lane * EACH, values);
                if constexpr (KIND == INT4_G32) {
                    constexpr int SHARERS = LANES / QUARTERS;  // of a piece
                    float sum = (values[0] + values[1]) + (values[2] + values[3]);
                    UNROLL for (int mask = 1; mask < SHARERS; mask *= 2) sum += shuffle_xor(sum, mask);
                    if (me.lane % SHARERS == 0) warp.sums[step * QUARTERS + me.lane / SHARERS] = sum;
                }
            }
        }
        sync_warp();
        const int number = me.lane / QUARTERS;
        column = number / 2 == me.lane % QUARTERS ? warp.digits + number * column_nbytes(KIND) : zeros;
        if constexpr (KIND == INT4_G32)
            UNROLL for (int step = 0; step < STEPS; ++step)
                scales[step].sum = warp.sums[step * QUARTERS + me.lane % QUARTERS];
    }

    // Add the products of chunk STEP of a tile.
    template <int STEP>
    DEVICE void multiply(const Pieces& pieces, TileSums<KIND>& sums) const {
        sums.add(pieces, column + STEP * digits_nbytes(KIND), scales[STEP]);
    }
};
