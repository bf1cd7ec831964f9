// Memory layout of weights and activations; mobilellm_fast/quant.py is the Python half.
#pragma once

#include <cstdint>

// Everything here is compiled under several instruction sets: inlined always, so that the linker
// never has to choose between their copies.
#define MLF_INLINE inline __attribute__((always_inline))

namespace mlf {

enum class WeightKind : int32_t { fp32, bf16, int8, int8_g32, int4_g32, int4_sym_g32 };

constexpr int kTileRows = 16;  // output rows of a tile: int32 lanes of one 512-bit register
constexpr int kStep = 4;       // inputs of one row side by side: one lane of a dot instruction
constexpr int kGroup = 32;     // inputs that share a scale; quantized inputs are padded to it
constexpr int64_t kMaxCols = 8192 * kGroup;  // of a weight matrix
constexpr int kStepBytes = kTileRows * kStep;
constexpr int kStepsPerGroup = kGroup / kStep;
constexpr int kTilesPerGroup = kGroup / kTileRows;  // output tiles that make an input group
static_assert(kStepBytes == 64, "one step of one tile is one cache line");

MLF_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MLF_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

MLF_INLINE constexpr bool is_quantized(WeightKind kind) { return kind >= WeightKind::int8; }
MLF_INLINE constexpr bool is_int4(WeightKind kind) { return kind >= WeightKind::int4_g32; }

// A tile is one forward stream: hardware prefetchers lose a stream that looks back, for instance at
// scales kept apart from the codes (measured: half the bandwidth). Its records, each a multiple of
// a cache line, are
//   int8      float scale[16], then all steps: int8 code[steps][16 rows][4 inputs]
//   int8_g32  for each two groups: fp16 scale[2][16], then their steps (the last may stand alone)
//   int4_g32  for each group: fp16 scale[16], fp16 min[16], then 4 x 64 bytes: step j in the low
//             nibbles, step j + 4 in the high ones
//   int4_sym_g32  for each two groups: fp16 scale[2][16], then codes as of int4_g32; the minimum is
//             kSymmetricMin scales
constexpr int kHeaderBytes = 64;
constexpr float kSymmetricMin = -8;  // codes 0..15 stand for -8..7
MLF_INLINE constexpr int64_t tile_nbytes(WeightKind kind, int64_t cols) {
  const int64_t groups = ceil_div(cols, kGroup);
  const int64_t headers = kind == WeightKind::int8       ? 1
                          : kind == WeightKind::int4_g32 ? groups
                                                         : ceil_div(groups, 2);
  const int64_t code_nbytes = kTileRows * groups * kGroup / (is_int4(kind) ? 2 : 1);
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

// What the inputs of a linear layer are rounded to: nothing, 8 bits with one scale per token (the
// paper's W8A8), or 8 bits with one scale per token and group, 16 bits in wide groups: those in
// which the largest input leaves few of the 8 bits to the others. A few inputs of trained models
// are much larger than their neighbours; rounding those groups alone more finely takes away most of
// the error, for little time.
enum class ActivationKind : int32_t { floating, int8, int8_g32 };

constexpr int32_t kMaxCode = 127;  // codes are symmetric: -127..127
// A group is wide if the squares of its codes sum up to at most this: in a normal group of 32 it is
// five times as much. Between 1/10 and 1/6 of all groups of SmolLM2-135M.
constexpr int32_t kWideEnergy = 7 * kMaxCode * kMaxCode / 4;
constexpr float kLowSteps = 2 * kMaxCode;  // value = scale * (code + low code / kLowSteps)

// Inputs of a linear layer, one row per token: floats for float weights, integer codes otherwise.
struct Activations {
  ActivationKind kind;
  int64_t cols;
  float* values;      // (rows, cols)
  int8_t* codes;      // (rows, padded cols), 0 beyond cols
  int8_t* low_codes;  // (rows, padded cols), 0 in groups that are not wide
  float* scales;      // (rows, groups): value = scale * code
  int32_t* offsets;   // (rows, groups, 2): what the sums of products with both codes start from
  float* group_sums;  // (rows, groups): sum of the values of a group
  uint8_t* wide;      // (rows, groups): 1 where there are low codes
  bool may_be_wide = true;  // false: no group is, whatever is in it

  MLF_INLINE int64_t groups() const { return ceil_div(cols, kGroup); }
  MLF_INLINE int64_t padded_cols() const { return groups() * kGroup; }
  MLF_INLINE Activations from_row(int64_t row) const {
    return {kind,
            cols,
            values + row * cols,
            codes + row * padded_cols(),
            low_codes + row * padded_cols(),
            scales + row * groups(),
            offsets + 2 * row * groups(),
            group_sums + row * groups(),
            wide + row * groups(),
            may_be_wide};
  }
};

}  // namespace mlf
