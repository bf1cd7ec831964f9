// Vectors that programs hand to each other.
//
// A value is stored with the last bits of its *epoch*, the number of the stage that wrote it. A reader
// loads values until their epochs are the ones it waits for: one trip through the L2 cache, where a
// barrier takes three (values and their fence, the arrival, its sight) and the load another. Every
// layer writes all values again, so a few bits tell a new one from the one before: the last of a
// float, which keeps 20 of its mantissa. What some layers leave alone, parts of attention, are words of
// 64 bits with a whole epoch.
//
// A vector is overwritten only when everyone has read it: the stage that writes it again waits for
// others that read it before. A residual is kept by the thread that has its sum, not read again.
#pragma once
#include "matrices.cuh"

constexpr int EACH = 4;  // neighbours that a lane has: what it loads by one instruction
constexpr unsigned TAG = 15;  // the bits of a value that hold its epoch's last

// A warp has the inputs of its chunks, a lane some neighbours of each, four by four.
template <int KIND>
struct Mine {
    static constexpr int CHUNK = chunk_inputs(KIND);
    static constexpr int STRIDE = EACH * LANES * WARPS;  // from one four to the next
    static_assert(EACH * LANES % CHUNK == 0, "a four is of one chunk");

    DEVICE static int place(const Worker& me, int i) { return (i * LANES + me.lane) * EACH; }
    // Of the first four, in the vector.
    DEVICE static int input(const Worker& me) {
        const int at = place(me, 0);
        return (me.warp + at / CHUNK * WARPS) * CHUNK + at % CHUNK;
    }
};

// How many fours a lane has of a warp's `steps` chunks.
constexpr int fours_of(int kind, int steps) { return up_to(steps * chunk_inputs(kind), EACH * LANES); }

struct Four {
    float values[EACH];
};

// The factor, a little more than 1, makes up for the bits that are cut off, on average; NaN remains.
DEVICE void store_value(unsigned* place, float value, unsigned epoch) {
    constexpr float FACTOR = 1 + 1.0f / (1 << 21);
    store_relaxed(place, (as_bits(value * FACTOR) & ~TAG) | (epoch & TAG));
}

DEVICE bool is_late(unsigned found, unsigned epoch) { return ((found ^ epoch) & TAG) != 0; }
// Has bits of TAG where some of four values differ from the epoch: none if all are of it.
DEVICE unsigned wrong_bits(const uint4& found, unsigned epoch) {
    return (found.x ^ epoch) | (found.y ^ epoch) | (found.z ^ epoch) | (found.w ^ epoch);
}

DEVICE float value_of(unsigned found) { return as_float(found & ~TAG); }

// Gets this lane's inputs from a vector, when they are there; zeros beyond its end.
template <int KIND, int FOURS>
DEVICE void receive(
    const Worker& me, const unsigned* vector, int cols, unsigned epoch, Four (&inputs)[FOURS]) {
    const int first = Mine<KIND>::input(me);
    // all are written: a register that is not always is kept from one stage to the next
    uint4 found[FOURS];
    UNROLL for (int i = 0; i < FOURS; ++i) {
        const unsigned none = epoch & TAG;
        found[i] = make_uint4(none, none, none, none);
        const int k = first + i * Mine<KIND>::STRIDE;
        if (k < cols) found[i] = load_relaxed_4(vector + k);
    }
    while (true) {
        unsigned wrong[FOURS], any = 0;
        UNROLL for (int i = 0; i < FOURS; ++i) any |= wrong[i] = wrong_bits(found[i], epoch);
        if (!(any & TAG)) break;
        // what is there is not asked for again
        UNROLL for (int i = 0; i < FOURS; ++i)
            if (wrong[i] & TAG) found[i] = load_relaxed_4(vector + first + i * Mine<KIND>::STRIDE);
    }
    UNROLL for (int i = 0; i < FOURS; ++i)
        inputs[i] = {
            {value_of(found[i].x), value_of(found[i].y), value_of(found[i].z), value_of(found[i].w)}};
}

// The weights of a norm for this lane's inputs.
template <int KIND, int FOURS>
struct Norm {
    Four weights[FOURS];

    // Before the inputs are there; without weights, if there is no norm.
    DEVICE Norm(const Worker& me, const float* norm) {
        UNROLL for (int i = 0; i < FOURS; ++i) {
            const int k = Mine<KIND>::input(me) + i * Mine<KIND>::STRIDE;
            float4 found = make_float4(0, 0, 0, 0);
            if (norm && k < HIDDEN) found = *reinterpret_cast<const float4*>(norm + k);
            weights[i] = {{found.x, found.y, found.z, found.w}};
        }
    }

    // Multiply inputs; returns the sum of their squares.
    DEVICE float apply(Four (&inputs)[FOURS]) const {
        float square = 0;
        UNROLL for (int i = 0; i < FOURS; ++i) {
            UNROLL for (int j = 0; j < EACH; ++j) {
                float& value = inputs[i].values[j];
                square = fma_(value, value, square);
                value *= weights[i].values[j];
            }
        }
        return square;
    }
};

// Join the lanes' sums of squares; those of warps are joined by who needs them.
DEVICE void store_squares(const Worker& me, float square, float* squares) {
    UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
    if (me.lane == 0) squares[me.warp] = square;
}

// The sum of what all warps stored side by side, and zeros behind.
DEVICE float sum_of_warps(const float* parts) {
    const float4* const fours = reinterpret_cast<const float4*>(parts);
    float4 sum = fours[0];
    UNROLL for (int i = 1; i < PADDED_WARPS / 4; ++i) {
        const float4 more = fours[i];
        sum.x += more.x;
        sum.y += more.y;
        sum.z += more.z;
        sum.w += more.w;
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}

// What normed sums are multiplied with; after all threads stored their squares.
DEVICE float norm_factor(const float* squares, float eps) {
    constexpr float EACH_SQUARE = 1.0f / HIDDEN;
    return rsqrt_(fma_(sum_of_warps(squares), EACH_SQUARE, eps));
}
