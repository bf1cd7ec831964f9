// Vectors that programs hand to each other.
//
// A value is stored with its *epoch*, the number of the stage that wrote it. A reader loads values
// until their epochs are the ones it waits for: one trip through the L2 cache, where a barrier takes
// three (values and their fence, the arrival, its sight) and the load another.
//
// All programs read all of a vector, often more than once: its bytes count. What every layer writes
// again needs a few bits to tell a new value from the one before: the last of a float, which keeps 20
// of its mantissa. What some layers leave alone, attention's results, is a word of 64 bits with a
// whole epoch.
//
// A vector is overwritten only when everyone has read it: the stage that writes it again waits for
// others that read it before. A residual is kept by the thread that has its sum, not read again.
#pragma once
#include "matrices.cuh"

constexpr int EACH = 4;  // neighbours that a lane has: what it loads by one instruction
// Where a value lies: eight neighbours are a sector of the L2 cache, and sectors are apart, so that
// what everyone asks for at the same time is spread over more of its banks.
DEVICE int spread(int k) { return k / 8 * (8 * SPREAD) + k % 8; }

constexpr unsigned TAG = 15;  // the bits of a value that hold its epoch's last

// A warp has the inputs of its chunks, a lane some neighbours of each, four by four.
template <int STAGE>
struct Mine {
    static constexpr int KIND = shape_of(STAGE).kind, COLS = shape_of(STAGE).cols;
    static constexpr int CHUNK = chunk_inputs(KIND);
    static constexpr int FOURS = up_to(shape_of(STAGE).steps() * CHUNK, EACH * LANES);
    static_assert(COLS % EACH == 0, "values are loaded four by four");

    // Where the i-th four are in the warp's chunks, one behind the other, and in the vector.
    DEVICE static int place(const Worker& me, int i) { return (i * LANES + me.lane) * EACH; }
    DEVICE static int input(const Worker& me, int i) {
        const int at = place(me, i);
        return (me.warp + at / CHUNK * WARPS) * CHUNK + at % CHUNK;
    }
    DEVICE static bool is_live(const Worker& me, int i) { return input(me, i) < COLS; }
};

// Four of a lane's inputs.
struct Four {
    float values[EACH];
};

// `factor` is a little more than 1, so that cutting off bits makes values no smaller on average; NaN
// remains.
DEVICE void store_value(unsigned* vector, int k, float value, unsigned epoch) {
    constexpr float FACTOR = 1 + 1.0f / (1 << 21);
    store_relaxed(vector + spread(k), (as_bits(value * FACTOR) & ~TAG) | (epoch & TAG));
}

DEVICE bool is_late(const uint4& found, unsigned epoch) {
    return (((found.x ^ epoch) | (found.y ^ epoch) | (found.z ^ epoch) | (found.w ^ epoch)) & TAG) != 0;
}

DEVICE float value_of(unsigned found) { return as_float(found & ~TAG); }

// Gets this lane's inputs of a stage from a vector, when they are there; zeros beyond its end.
template <int STAGE>
DEVICE void receive(
    const Worker& me, const unsigned* vector, unsigned epoch, Four (&inputs)[Mine<STAGE>::FOURS]) {
    constexpr int FOURS = Mine<STAGE>::FOURS;
    // all are written: a register that is not always is kept from one stage to the next
    uint4 found[FOURS];
    UNROLL for (int i = 0; i < FOURS; ++i) {
        const unsigned none = epoch & TAG;
        found[i] = make_uint4(none, none, none, none);
        if (Mine<STAGE>::is_live(me, i)) found[i] = load_relaxed_4(vector + spread(Mine<STAGE>::input(me, i)));
    }
    bool late = true;
    while (late) {
        late = false;
        // what is there is not asked for again
        UNROLL for (int i = 0; i < FOURS; ++i) {
            if (is_late(found[i], epoch)) {
                late = true;
                found[i] = load_relaxed_4(vector + spread(Mine<STAGE>::input(me, i)));
            }
        }
    }
    UNROLL for (int i = 0; i < FOURS; ++i)
        inputs[i] = {{value_of(found[i].x), value_of(found[i].y), value_of(found[i].z), value_of(found[i].w)}};
}

// The same from words with whole epochs.
template <int STAGE>
DEVICE void receive_words(
    const Worker& me, const uint2* vector, unsigned epoch, Four (&inputs)[Mine<STAGE>::FOURS]) {
    constexpr int FOURS = Mine<STAGE>::FOURS;
    uint2 words[FOURS][EACH];
    UNROLL for (int i = 0; i < FOURS; ++i)
        UNROLL for (int j = 0; j < EACH; ++j) words[i][j] = make_uint2(0, epoch);
    bool late = true;
    while (late) {
        late = false;
        UNROLL for (int i = 0; i < FOURS; ++i) {
            if (Mine<STAGE>::is_live(me, i)) {
                const uint2* const place = vector + Mine<STAGE>::input(me, i);
                load_words(place, words[i][0], words[i][1]);
                load_words(place + 2, words[i][2], words[i][3]);
            }
        }
        UNROLL for (int i = 0; i < FOURS; ++i)
            UNROLL for (int j = 0; j < EACH; ++j) late |= words[i][j].y != epoch;
    }
    UNROLL for (int i = 0; i < FOURS; ++i)
        UNROLL for (int j = 0; j < EACH; ++j) inputs[i].values[j] = as_float(words[i][j].x);
}

// The weights of a norm for this lane's inputs.
template <int STAGE>
struct Norm {
    Four weights[Mine<STAGE>::FOURS];

    // Before the inputs are there.
    DEVICE Norm(const Worker& me, const float* norm) {
        UNROLL for (int i = 0; i < Mine<STAGE>::FOURS; ++i) {
            float4 found = make_float4(0, 0, 0, 0);
            if (Mine<STAGE>::is_live(me, i))
                found = *reinterpret_cast<const float4*>(norm + Mine<STAGE>::input(me, i));
            weights[i] = {{found.x, found.y, found.z, found.w}};
        }
    }

    // Multiply inputs; the sum of their squares is joined later.
    DEVICE void apply(const Worker& me, Four (&inputs)[Mine<STAGE>::FOURS], float* squares) const {
        float square = 0;
        UNROLL for (int i = 0; i < Mine<STAGE>::FOURS; ++i) {
            UNROLL for (int j = 0; j < EACH; ++j) {
                float& value = inputs[i].values[j];
                square = fma_(value, value, square);
                value *= weights[i].values[j];
            }
        }
        UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) square += shuffle_xor(square, mask);
        if (me.lane == 0) squares[me.warp] = square;
    }
};

// The sum of what all warps stored side by side.
DEVICE float sum_of_warps(const float* parts) {
    const float4* const fours = reinterpret_cast<const float4*>(parts);
    float4 sum = fours[0];
    UNROLL for (int i = 1; i < WARPS / 4; ++i) {
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
    constexpr float EACH = 1.0f / HIDDEN;
    return rsqrt_(fma_(sum_of_warps(squares), EACH, eps));
}
