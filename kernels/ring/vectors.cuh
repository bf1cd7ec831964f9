// Vectors that programs hand to each other.
//
// A value is stored together with the number of the stage that wrote it, its *epoch*, as one word
// of 64 bits. A reader loads words until their epochs are the ones it waits for: one trip through
// the L2 cache, where a barrier takes three (values and their fence, the arrival, its sight) and
// the load another.
//
// A vector is overwritten only when everyone has read it: the stage that writes it again waits for
// others that read it before. A residual is kept by the thread that has its sum, not read again.
#pragma once
#include "matrices.cuh"

// A warp has the inputs of its chunks, a lane some neighbours of each, two by two.
template <int STAGE>
struct Mine {
    static constexpr int KIND = shape_of(STAGE).kind, COLS = shape_of(STAGE).cols;
    static constexpr int CHUNK = chunk_inputs(KIND), EACH = neighbours(KIND);
    static constexpr int STEPS = shape_of(STAGE).steps();
    static constexpr int TWOS = up_to(STEPS * CHUNK, 2 * LANES);
    static_assert(COLS % 2 == 0, "words are loaded in pairs");

    // Where the i-th two are in the warp's chunks, one behind the other, and in the vector.
    DEVICE static int place(const Worker& me, int i) {
        return i * 2 / EACH * (LANES * EACH) + me.lane * EACH + i * 2 % EACH;
    }
    DEVICE static int input(const Worker& me, int i) {
        const int at = place(me, i);
        return (me.warp + at / CHUNK * WARPS) * CHUNK + at % CHUNK;
    }
};

// Two of a lane's inputs.
struct Two {
    float values[2];
};

// Gets this lane's inputs of a stage from a vector, when they are there; zeros beyond its end.
template <int STAGE>
DEVICE void receive(
    const Worker& me, const uint2* vector, unsigned epoch, Two (&inputs)[Mine<STAGE>::TWOS]) {
    constexpr int TWOS = Mine<STAGE>::TWOS;
    // all are written: a register that is not always is kept from one stage to the next
    uint2 words[TWOS][2];
    UNROLL for (int i = 0; i < TWOS; ++i) words[i][0] = words[i][1] = make_uint2(0, epoch);
    UNROLL for (int i = 0; i < TWOS; ++i) {
        const int k = Mine<STAGE>::input(me, i);
        if (k < Mine<STAGE>::COLS) load_words(vector + k, words[i][0], words[i][1]);
    }
    bool late = true;
    while (late) {
        late = false;
        // what is there is not asked for again
        UNROLL for (int i = 0; i < TWOS; ++i) {
            if (words[i][0].y != epoch || words[i][1].y != epoch) {
                late = true;
                load_words(vector + Mine<STAGE>::input(me, i), words[i][0], words[i][1]);
            }
        }
    }
    UNROLL for (int i = 0; i < TWOS; ++i)
        UNROLL for (int j = 0; j < 2; ++j) inputs[i].values[j] = as_float(words[i][j].x);
}

// The weights of a norm for this lane's inputs.
template <int STAGE>
struct Norm {
    Two weights[Mine<STAGE>::TWOS];

    // Before the inputs are there.
    DEVICE Norm(const Worker& me, const float* norm) {
        UNROLL for (int i = 0; i < Mine<STAGE>::TWOS; ++i) {
            const int k = Mine<STAGE>::input(me, i);
            float2 found = make_float2(0, 0);
            if (k < Mine<STAGE>::COLS) found = *reinterpret_cast<const float2*>(norm + k);
            weights[i] = {{found.x, found.y}};
        }
    }

    // Multiply inputs; the sum of their squares is joined later.
    DEVICE void apply(const Worker& me, Two (&inputs)[Mine<STAGE>::TWOS], float* squares) const {
        float square = 0;
        UNROLL for (int i = 0; i < Mine<STAGE>::TWOS; ++i) {
            UNROLL for (int j = 0; j < 2; ++j) {
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
