// Rows of stored weights, and their products with digits of the inputs by tensor cores.
//
// An input is the sum of two numbers that tensor cores take, its *digits*: two of bf16 for weights in
// bf16; for integer ones two of eight bits, relative to the largest of the 128 inputs that a warp
// receives together, so that sums are exact and codes are multiplied as they are stored.
//
// A chunk is 64 bytes of each row of eight pairs: lane 4 r + q has 16 of both rows of pair r, its
// *pieces*. An instruction multiplies a matrix A of 16 rows, the weights, with a matrix B of 8
// columns: columns 2 q and 2 q + 1 have both digits of the inputs of the lanes q, and zeros for
// others. So what a lane gets are the two digits' products of its own weights, whose scales are its
// own, too; only lanes whose column is their own have inputs to load.
#pragma once
#include <primitives.cuh>

// see `mobilellm_fast/cuda/weights.py`
enum Kind { FP32, BF16, INT8, INT8_G32, INT4_G32 };

constexpr int LANES = 32;
constexpr int GROUP = 32;            // inputs that share a scale
constexpr int PIECE_NBYTES = 16;     // of a row, that a lane has of a chunk
constexpr int QUARTERS = 4;          // lanes that share a row
constexpr int CHUNK_NBYTES = QUARTERS * PIECE_NBYTES;
constexpr int TILE_PAIRS = LANES / QUARTERS;  // of rows, that a chunk has pieces of

constexpr int up_to(int n, int unit) { return (n + unit - 1) / unit; }
constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }

// Weights of a piece, and of a chunk's row.
constexpr int piece_inputs(int kind) { return kind == BF16 ? 8 : kind == INT4_G32 ? 32 : 16; }
constexpr int chunk_inputs(int kind) { return QUARTERS * piece_inputs(kind); }

constexpr int row_nbytes(int kind, int cols) {
    return kind == INT4_G32 ? up_to(cols, GROUP) * 16 : kind == BF16 ? cols * 2 : cols;
}

// Bytes of the scales of a row; those of `INT8` belong to whoever has the sum.
constexpr int scales_nbytes(int kind, int cols) {
    return kind == INT8       ? 4
           : kind == INT8_G32 ? up_to(cols, GROUP) * 2
           : kind == INT4_G32 ? up_to(cols, GROUP) * 4
                              : 0;
}
constexpr bool has_scales(int kind) { return kind == INT8_G32 || kind == INT4_G32; }
// Bytes of a chunk's scales of a row.
constexpr int chunk_scales_nbytes(int kind) { return kind == INT4_G32 ? 16 : 4; }

// What a code of 1 is multiplied as.
constexpr float code_unit(int kind) { return kind == INT4_G32 ? 16 : 1; }

struct alignas(16) Codes16 {
    unsigned words[4];
};
// What a lane has of a chunk.
struct Pieces {
    Codes16 codes[2];
    unsigned scales[2];
};

DEVICE float bf16_to_float(unsigned bits) { return as_float(bits << 16); }

// Digits of the inputs of a chunk: those of column 2 q + d, one behind the other, are digits d of the
// inputs of the lanes q.
constexpr int digit_nbytes(int kind) { return kind == BF16 ? 2 : 1; }
constexpr int column_nbytes(int kind) { return piece_inputs(kind) * digit_nbytes(kind); }
constexpr int digits_nbytes(int kind) { return 2 * QUARTERS * column_nbytes(kind); }

// What is needed of a chunk's inputs beside their digits.
struct InputScale {
    float unit;  // of products of codes and digits
    float sum;   // of the inputs of this lane's pieces, for weights with a minimum
};

constexpr float LARGEST_DIGITS = 32512;  // 127 * 256: the larger digit fits into a byte
constexpr float SMALLEST_DIGITS = 1e-30f;  // stand for at least this; its reciprocal is finite

// Store the digits of four inputs, the first at `place` in its chunk, where the warp's lanes will read
// them. Returns what a step of the smaller digit stands for, which all of the warp's share, and the sum
// of the four in such steps.
template <int KIND>
DEVICE float store_digits(unsigned char* chunk, int place, const float (&values)[4], int& sum) {
    constexpr int PIECE = piece_inputs(KIND), COLUMN = column_nbytes(KIND);
    unsigned char* const to = chunk + place / PIECE * 2 * COLUMN + place % PIECE * digit_nbytes(KIND);
    if constexpr (KIND == BF16) {
        const unsigned first = pack_bf16(values[0], values[1]), second = pack_bf16(values[2], values[3]);
        *reinterpret_cast<uint2*>(to) = make_uint2(first, second);
        constexpr unsigned UPPER = 0xFFFF0000u;
        *reinterpret_cast<uint2*>(to + COLUMN) = make_uint2(
            pack_bf16(values[0] - as_float(first << 16), values[1] - as_float(first & UPPER)),
            pack_bf16(values[2] - as_float(second << 16), values[3] - as_float(second & UPPER)));
        return 1;
    } else {
        // as bits, among which NaN is the largest
        unsigned bits = as_bits(SMALLEST_DIGITS);
        UNROLL for (int i = 0; i < 4; ++i) {
            const unsigned magnitude = as_bits(values[i]) & 0x7FFFFFFFu;
            bits = magnitude > bits ? magnitude : bits;
        }
        const float largest = as_float(reduce_max(bits));
        const float inverse = LARGEST_DIGITS * reciprocal(largest);
        // A sum of this size has no fraction: its last 16 bits are the rounded product and 2^15.
        constexpr float BIG = (1 << 23) + (1 << 22) + (1 << 15);
        constexpr unsigned BIG_BITS = 0x4B408000u;
        unsigned numbers[4], total = 0 - 4 * BIG_BITS;  // modulo 2^32
        UNROLL for (int i = 0; i < 4; ++i) {
            numbers[i] = as_bits(fma_(values[i], inverse, BIG));
            total += numbers[i];
        }
        sum = static_cast<int>(total);
        // two in a word; the larger digit is rounded to nearest, and loses its 128 of the 2^15
        const unsigned first = byte_perm(numbers[0], numbers[1], 0x5410);
        const unsigned second = byte_perm(numbers[2], numbers[3], 0x5410);
        constexpr unsigned HALVES = 0x00800080u, SIGNS = 0x80808080u;
        *reinterpret_cast<unsigned*>(to) =
            byte_perm(first + HALVES, second + HALVES, 0x7531) ^ SIGNS;
        *reinterpret_cast<unsigned*>(to + COLUMN) = byte_perm(first, second, 0x6420);
        // the reciprocal of more may be taken for none
        return largest > 1e37f ? as_float(0x7FC00000u) : largest * (1 / LARGEST_DIGITS);
    }
}

DEVICE uint4 load_digits(const unsigned char* place) { return *reinterpret_cast<const uint4*>(place); }

// A lane's sums over its pieces of a tile, of both rows of its pair.
template <int KIND>
struct TileSums {
    float rows[2];

    DEVICE TileSums() : rows{0, 0} {}

    // `digits` is where the column of this lane begins.
    DEVICE void add(const Pieces& pieces, const unsigned char* digits, const InputScale& scale) {
        const unsigned(&a)[4] = pieces.codes[0].words, (&b)[4] = pieces.codes[1].words;
        int sums[4] = {0, 0, 0, 0};
        const uint4 x = load_digits(digits);
        if constexpr (KIND == INT4_G32) {
            // codes in the upper halves of their bytes, where they are 16 times as much, apart
            constexpr unsigned LOW = 0x0F0F0F0Fu, HIGH = 0xF0F0F0F0u;
            int low[4] = {0, 0, 0, 0};
            multiply_tile(low, a[0] & LOW, b[0] & LOW, a[1] & LOW, b[1] & LOW, x.x, x.y);
            multiply_tile(low, a[2] & LOW, b[2] & LOW, a[3] & LOW, b[3] & LOW, x.z, x.w);
            const uint4 y = load_digits(digits + 16);
            multiply_tile_unsigned(
                sums, a[0] & HIGH, b[0] & HIGH, a[1] & HIGH, b[1] & HIGH, y.x, y.y);
            multiply_tile_unsigned(
                sums, a[2] & HIGH, b[2] & HIGH, a[3] & HIGH, b[3] & HIGH, y.z, y.w);
            UNROLL for (int i = 0; i < 4; ++i) sums[i] += 16 * low[i];
        } else {
            multiply_tile(sums, a[0], b[0], a[1], b[1], x.x, x.y);
            multiply_tile(sums, a[2], b[2], a[3], b[3], x.z, x.w);
        }
        UNROLL for (int row = 0; row < 2; ++row) {
            const float sum =
                static_cast<float>(sums[2 * row] * 256 + sums[2 * row + 1]) * scale.unit;
            if constexpr (KIND == INT8) {
                rows[row] += sum;
            } else {
                const float unit = half_to_float(pieces.scales[row] & 0xFFFF);
                rows[row] = fma_(unit, sum, rows[row]);
                if constexpr (KIND == INT4_G32)
                    rows[row] = fma_(half_to_float(pieces.scales[row] >> 16), scale.sum, rows[row]);
            }
        }
    }

    DEVICE float first() const { return rows[0]; }
    DEVICE float second() const { return rows[1]; }
};

template <>
struct TileSums<BF16> {
    float sums[2][4];  // of every other instruction, so that fewer wait for each other

    DEVICE TileSums() : sums{} {}

    DEVICE void add(const Pieces& pieces, const unsigned char* digits, const InputScale&) {
        const unsigned(&a)[4] = pieces.codes[0].words, (&b)[4] = pieces.codes[1].words;
        const uint4 x = load_digits(digits);
        multiply_tile(sums[0], a[0], b[0], a[1], b[1], x.x, x.y);
        multiply_tile(sums[1], a[2], b[2], a[3], b[3], x.z, x.w);
    }

    DEVICE float first() const { return (sums[0][0] + sums[0][1]) + (sums[1][0] + sums[1][1]); }
    DEVICE float second() const { return (sums[0][2] + sums[0][3]) + (sums[1][2] + sums[1][3]); }
};

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
