// A warp's inputs of a stage become digits in shared memory, where its lanes read them.
#pragma once
#include "vectors.cuh"

// Of all stages: bytes of a warp's digits, and its chunks of a tile.
constexpr int most_digits(int stage = 0) {
    return stage == STAGES
               ? 0
               : most(up_to(shape_of(stage).steps(), 4) * 4 * digits_nbytes(shape_of(stage).kind),
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
        const Worker& me, const Four (&inputs)[Mine<STAGE>::FOURS], WarpInputs& warp,
        const unsigned char* zeros) {
        constexpr int CHUNK = chunk_inputs(KIND), FOURS = Mine<STAGE>::FOURS;
        UNROLL for (int i = 0; i < FOURS; ++i) {
            const int place = Mine<STAGE>::place(me, i);
            const float unit = store_digits<KIND>(
                warp.digits + place / CHUNK * digits_nbytes(KIND), place % CHUNK, inputs[i].values);
            UNROLL for (int step = 0; step < STEPS; ++step)
                if (step * CHUNK / (EACH * LANES) == i) scales[step].unit = unit;
            if constexpr (KIND == INT4_G32) {
                constexpr int SHARERS = LANES / QUARTERS;  // of a piece
                const float(&x)[EACH] = inputs[i].values;
                float sum = (x[0] + x[1]) + (x[2] + x[3]);
                UNROLL for (int mask = 1; mask < SHARERS; mask *= 2) sum += shuffle_xor(sum, mask);
                if (me.lane % SHARERS == 0) warp.sums[i * QUARTERS + me.lane / SHARERS] = sum;
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
