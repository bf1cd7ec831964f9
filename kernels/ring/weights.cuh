// Rows of stored weights, as the lanes of a warp read them and, without tensor cores, multiply them.
//
// There a load is 16 bytes of a row per lane, a *chunk* per warp. The inputs lie in shared memory so that
// all lanes read those of their weights without conflicts.
#pragma once
#include <primitives.cuh>

// see `mobilellm_fast/cuda/weights.py`
enum Kind { FP32, BF16, INT8, INT8_G32, INT4_G32 };

constexpr int LANES = 32;
constexpr int GROUP = 32;  // inputs that share a scale

constexpr int up_to(int n, int unit) { return (n + unit - 1) / unit; }

// Weights in 16 bytes.
constexpr int per_lane(int kind) {
    return kind == FP32 ? 4 : kind == BF16 ? 8 : kind == INT4_G32 ? 32 : 16;
}

constexpr int row_nbytes(int kind, int cols) {
    return kind == INT4_G32 ? up_to(cols, GROUP) * 16 : cols * 16 / per_lane(kind);
}

// Bytes of the scales of a row; those of `INT8` belong to whoever has the sum.
constexpr int scales_nbytes(int kind, int cols) {
    return kind == INT8       ? 4
           : kind == INT8_G32 ? up_to(cols, GROUP) * 2
           : kind == INT4_G32 ? up_to(cols, GROUP) * 4
                              : 0;
}

// What a lane has of a chunk of one row.
struct alignas(16) Codes16 {
    unsigned words[4];
};
struct Piece {
    Codes16 codes;
    unsigned scales;
};

// Where input k of a row lies, in floats: four of a lane side by side, then those of the other
// lanes. Planes are turned against each other, so that storing meets few conflicts, too.
template <int KIND>
DEVICE int input_place(int k) {
    constexpr int EACH = per_lane(KIND);
    const int chunk = k / (EACH * LANES), lane = k / EACH % LANES, quad = k % EACH / 4;
    return ((chunk * (EACH / 4) + quad) * LANES + (lane + quad) % LANES) * 4 + k % 4;
}

template <int KIND>
DEVICE float4 load_inputs(const float4* inputs, int chunk, int lane, int quad) {
    return inputs[(chunk * (per_lane(KIND) / 4) + quad) * LANES + (lane + quad) % LANES];
}

DEVICE float bf16_to_float(unsigned bits) { return as_float(bits << 16); }

// Four signed bytes as floats, exactly: each becomes the last bits of 2^23 + 128 + byte.
DEVICE float4 bytes_to_floats(unsigned word) {
    constexpr unsigned BIAS = 0x4B000000;
    constexpr float SHIFT = 8388608.0f + 128.0f;
    word ^= 0x80808080u;
    return make_float4(
        as_float(byte_perm(word, BIAS, 0x7440)) - SHIFT,
        as_float(byte_perm(word, BIAS, 0x7441)) - SHIFT,
        as_float(byte_perm(word, BIAS, 0x7442)) - SHIFT,
        as_float(byte_perm(word, BIAS, 0x7443)) - SHIFT);
}

DEVICE float dot(float4 a, float4 b, float sum) {
    return fma_(a.x, b.x, fma_(a.y, b.y, fma_(a.z, b.z, fma_(a.w, b.w, sum))));
}

// Four weights of a lane, but for those of 4 bits.
template <int KIND>
DEVICE float4 unpack(const Piece& piece, int quad) {
    if constexpr (KIND == FP32) {
        return make_float4(
            as_float(piece.codes.words[0]), as_float(piece.codes.words[1]), as_float(piece.codes.words[2]),
            as_float(piece.codes.words[3]));
    } else if constexpr (KIND == BF16) {
        const unsigned low = piece.codes.words[2 * quad], high = piece.codes.words[2 * quad + 1];
        return make_float4(
            as_float(low << 16), as_float(low & 0xFFFF0000u), as_float(high << 16),
            as_float(high & 0xFFFF0000u));
    } else {
        return bytes_to_floats(piece.codes.words[quad]);
    }
}

constexpr float NIBBLE_BIAS = 16.0f;

// The code in bits `at` to `at + 3` of a word, too large by the bias: the first bits of a mantissa.
template <int AT>
DEVICE float unpack_nibble(unsigned word) {
    const unsigned moved = AT < 19 ? word << (19 - AT) : word >> (AT - 19);
    return as_float(masked_or(moved, 0x780000u, 0x41800000u));
}

// Those in the low halves of four bytes, or with HIGH = 4 in the high ones.
template <int HIGH>
DEVICE float4 unpack_nibbles(unsigned word) {
    return make_float4(
        unpack_nibble<HIGH>(word), unpack_nibble<HIGH + 8>(word), unpack_nibble<HIGH + 16>(word),
        unpack_nibble<HIGH + 24>(word));
}

// Add the products of a chunk of two rows with the inputs to a lane's sums.
template <int KIND>
DEVICE void multiply_pieces(
    const Piece (&pieces)[2], const float4* inputs, int chunk, int lane, float (&sums)[2]) {
    if constexpr (KIND == INT4_G32) {
        float input_sum = 0;
        float products[2] = {0, 0};
        UNROLL for (int quad = 0; quad < 4; ++quad) {
            const float4 x = load_inputs<KIND>(inputs, chunk, lane, quad);
            const float4 y = load_inputs<KIND>(inputs, chunk, lane, quad + 4);
            input_sum += ((x.x + x.y) + (x.z + x.w)) + ((y.x + y.y) + (y.z + y.w));
            UNROLL for (int row = 0; row < 2; ++row) {
                const unsigned word = pieces[row].codes.words[quad];
                products[row] = dot(unpack_nibbles<0>(word), x, products[row]);
                products[row] = dot(unpack_nibbles<4>(word), y, products[row]);
            }
        }
        UNROLL for (int row = 0; row < 2; ++row) {
            const float scale = half_to_float(pieces[row].scales & 0xFFFF);
            const float low = half_to_float(pieces[row].scales >> 16);
            const float product = fma_(-NIBBLE_BIAS, input_sum, products[row]);
            sums[row] = fma_(scale, product, fma_(low, input_sum, sums[row]));
        }
    } else {
        float products[2] = {0, 0};
        UNROLL for (int quad = 0; quad < per_lane(KIND) / 4; ++quad) {
            const float4 x = load_inputs<KIND>(inputs, chunk, lane, quad);
            UNROLL for (int row = 0; row < 2; ++row)
                products[row] = dot(unpack<KIND>(pieces[row], quad), x, products[row]);
        }
        UNROLL for (int row = 0; row < 2; ++row)
            if constexpr (KIND == INT8_G32)
                sums[row] = fma_(half_to_float(pieces[row].scales), products[row], sums[row]);
            else
                sums[row] += products[row];
    }
}

// One weight of a row.
template <int KIND, int COLS>
DEVICE float weight_at(const unsigned char* codes, const unsigned char* scales, int row, int col) {
    codes += static_cast<long long>(row) * row_nbytes(KIND, COLS);
    scales += static_cast<long long>(row) * scales_nbytes(KIND, COLS);
    const int group = col / GROUP;
    if constexpr (KIND == FP32) {
        return reinterpret_cast<const float*>(codes)[col];
    } else if constexpr (KIND == BF16) {
        return bf16_to_float(reinterpret_cast<const unsigned short*>(codes)[col]);
    } else if constexpr (KIND == INT4_G32) {
        const int byte = codes[group * 16 + col % 16];
        const int code = col % GROUP < 16 ? byte & 15 : byte >> 4;
        const unsigned short* pair = reinterpret_cast<const unsigned short*>(scales) + 2 * group;
        return fma_(static_cast<float>(code), half_to_float(pair[0]), half_to_float(pair[1]));
    } else {
        const float code = static_cast<signed char>(codes[col]);
        if constexpr (KIND == INT8) return code * *reinterpret_cast<const float*>(scales);
        return code * half_to_float(reinterpret_cast<const unsigned short*>(scales)[group]);
    }
}
