// Memory layout of weights and activations; mobilellm_fast/quant.py is the Python half.
#pragma once

#include <cstdint>

// Everything here is compiled under several instruction sets: inlined always, so that the linker
// never has to choose between their copies.
#define MLF_INLINE inline __attribute__((always_inline))

namespace mlf {

enum class WeightKind : int32_t { fp32, bf16, int8, int8_g32, int4_g32 };

constexpr int kTileRows = 16;  // output rows of a tile: int32 lanes of one 512-bit register
constexpr int kStep = 4;       // inputs of one row side by side: one lane of a dot instruction
constexpr int kGroup = 32;     // inputs that share a scale; quantized inputs are padded to it
constexpr int kStepBytes = kTileRows * kStep;
constexpr int kStepsPerGroup = kGroup / kStep;
static_assert(kStepBytes == 64, "one step of one tile is one cache line");

MLF_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MLF_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

MLF_INLINE constexpr bool is_quantized(WeightKind kind) { return kind >= WeightKind::int8; }

// A tile is one forward stream: hardware prefetchers lose a stream that looks back, for instance at
// scales kept apart from the codes (measured: half the bandwidth). Its records, each a multiple of
// a cache line, are
//   int8      float scale[16], then all steps: int8 code[steps][16 rows][4 inputs]
//   int8_g32  for each two groups: fp16 scale[2][16], then their steps (the last may stand alone)
//   int4_g32  for each group: fp16 scale[16], fp16 min[16], then 4 x 64 bytes: step j in the low
//             nibbles, step j + 4 in the high ones
constexpr int kHeaderBytes = 64;
MLF_INLINE constexpr int64_t tile_nbytes(WeightKind kind, int64_t cols) {
  const int64_t groups = ceil_div(cols, kGroup);
  const int64_t headers = kind == WeightKind::int8       ? 1
                          : kind == WeightKind::int8_g32 ? ceil_div(groups, 2)
                                                         : groups;
  const int64_t code_nbytes = kTileRows * groups * kGroup / (kind == WeightKind::int4_g32 ? 2 : 1);
  return headers * kHeaderBytes + code_nbytes;
}

// A weight matrix (rows outputs, cols inputs). Float kinds are row-major.
struct Weight {
  WeightKind kind;
  int64_t rows;
  int64_t cols;
  const uint8_t* data;

  MLF_INLINE int64_t tiles() const { return ceil_div(rows, kTileRows); }
  MLF_INLINE int64_t nbytes() const {
    if (kind == WeightKind::fp32) return rows * cols * 4;
    if (kind == WeightKind::bf16) return rows * cols * 2;
    return tiles() * tile_nbytes(kind, cols);
  }
};

// Inputs of a linear layer, one row per token: floats for float weights, integer codes otherwise.
// Codes take 2 bytes per input; each ISA orders them as its dot product likes.
struct Activations {
  float* values;        // (rows, cols)
  uint8_t* codes;       // (rows, 2 * padded cols)
  float* scales;        // (rows): value = scale * code
  int32_t* sums;        // (rows): sum of all codes
  int32_t* group_sums;  // (rows, groups): sum of the codes of each group of 32
  int64_t cols;

  MLF_INLINE int64_t groups() const { return ceil_div(cols, kGroup); }
  MLF_INLINE int64_t codes_stride() const { return 2 * groups() * kGroup; }
  MLF_INLINE uint8_t* row_codes(int64_t row) const { return codes + row * codes_stride(); }
};

enum class ActivationKind : int32_t { floating, int16, int8 };

// Largest activation code. 16 bits as far as they go: a sum of `cols` products with int8 codes
// must fit int32 (2^31 / (128 * cols)), and a code must split into two signed bytes (<= 127 * 256).
MLF_INLINE constexpr int32_t max_code(ActivationKind kind, int64_t cols) {
  if (kind == ActivationKind::int8) return 127;
  const int64_t fits = ((int64_t{1} << 31) - 1) / (128 * round_up(cols, kGroup));
  return static_cast<int32_t>(fits < 127 * 256 ? fits : 127 * 256);
}

}  // namespace mlf
