// Weight matrices of every kind with the numbers that they stand for, laid out here after the words
// of csrc/quant.h; and rounded activations.
#pragma once

#include "activation_buffer.h"
#include "harness.h"

namespace mlf::test {

// A half-precision number, as bits and as what it is: |value| in [2^-12, 8).
struct Half {
  uint16_t bits;
  float value;
};
inline float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size =
      exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return static_cast<float>(bits & 0x8000 ? -size : size);
}
inline Half random_half(Random& random, bool negative) {
  const uint16_t bits = static_cast<uint16_t>(
      (negative ? 0x8000 : 0) | random.integer(3, 17) << 10 | random.integer(0, 1023));
  return {bits, half_value(bits)};
}

enum class Fill { random, largest, smallest, mixed };  // of codes; mixed: both extremes, in turn
constexpr Fill kFills[] = {Fill::random, Fill::largest, Fill::smallest, Fill::mixed};

inline int make_code(Fill fill, Random& random, int low, int high, int64_t at) {
  switch (fill) {
    case Fill::random:
      return random.integer(low, high);
    case Fill::largest:
      return high;
    case Fill::smallest:
      return low;
    case Fill::mixed:
      return at % 2 ? low : high;
  }
  return 0;
}

struct Matrix {
  Weight weight;
  std::vector<uint8_t> storage;
  std::vector<int> codes;           // (rows, cols), of quantized kinds
  std::vector<float> scales, mins;  // (rows, groups)
  std::vector<double> values;       // (rows, cols)

  int64_t groups() const { return ceil_div(weight.cols, kGroup); }
  int64_t at(int64_t row, int64_t col) const { return row * weight.cols + col; }
  int64_t in_group(int64_t row, int64_t col) const { return row * groups() + col / kGroup; }
};

inline Matrix make_matrix(WeightKind kind, int64_t rows, int64_t cols, Fill fill, uint32_t seed) {
  Random random(seed);
  Matrix m;
  m.weight = {kind, rows, cols, nullptr};
  m.values.resize(rows * cols);
  const int64_t nbytes = m.weight.nbytes();
  m.storage.assign(nbytes + 64, 0);
  uint8_t* data = m.storage.data() + (64 - reinterpret_cast<uintptr_t>(m.storage.data()) % 64) % 64;
  m.weight.data = data;
  if (!is_quantized(kind)) {
    for (int64_t i = 0; i < rows * cols; ++i) {
      const float value = random.uniform();
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (kind == WeightKind::bf16) bits &= 0xffff0000;
      float kept;
      std::memcpy(&kept, &bits, 4);
      m.values[i] = kept;
      const uint16_t high = static_cast<uint16_t>(bits >> 16);
      if (kind == WeightKind::bf16) std::memcpy(data + 2 * i, &high, 2);
      else std::memcpy(data + 4 * i, &bits, 4);
    }
    return m;
  }
  const bool int4 = kind == WeightKind::int4_g32 || kind == WeightKind::int4_sym_g32;
  const bool whole = kind == WeightKind::int8, has_min = kind == WeightKind::int4_g32;
  const int64_t codes_of_group = int4 ? 256 : 512;  // bytes
  const int64_t groups = m.groups();
  m.codes.resize(rows * cols);
  m.scales.resize(rows * groups);
  m.mins.resize(rows * groups);
  for (int64_t row = 0; row < rows; ++row) {
    uint8_t* tile = data + row / 16 * tile_nbytes(kind, cols);
    const int64_t lane = row % 16;
    const float of_row = 0.001f + std::fabs(random.uniform());
    if (whole) std::memcpy(tile + 4 * lane, &of_row, 4);
    for (int64_t group = 0; group < groups; ++group) {
      // where the header that the group uses starts, and its first line of codes
      uint8_t* header = whole     ? tile
                        : has_min ? tile + group * (64 + codes_of_group)
                                  : tile + group / 2 * (64 + 2 * codes_of_group);
      const int64_t behind = whole ? group : has_min ? 0 : group % 2;  // groups of codes before
      uint8_t* lines = header + 64 + behind * codes_of_group;
      const Half scale = random_half(random, false), min = random_half(random, true);
      const int64_t place = has_min ? lane : group % 2 * 16 + lane;
      if (!whole) std::memcpy(header + 2 * place, &scale.bits, 2);
      if (has_min) std::memcpy(header + 32 + 2 * lane, &min.bits, 2);
      m.scales[row * groups + group] = whole ? of_row : scale.value;
      m.mins[row * groups + group] = has_min ? min.value : int4 ? -8 * scale.value : 0.0f;
      for (int64_t i = 0; i < kGroup && group * kGroup + i < cols; ++i) {
        const int64_t col = group * kGroup + i, step = i / 4;
        const int code = make_code(fill, random, int4 ? 0 : -128, int4 ? 15 : 127, row + col);
        uint8_t& byte = lines[(int4 ? step % 4 : step) * 64 + lane * 4 + i % 4];
        if (int4) byte = static_cast<uint8_t>(byte | (step < 4 ? code : code << 4));
        else byte = static_cast<uint8_t>(code);
        m.codes[m.at(row, col)] = code;
        m.values[m.at(row, col)] = static_cast<double>(m.scales[row * groups + group]) * code +
                                   m.mins[row * groups + group];
      }
    }
  }
  return m;
}

// Inputs as a table rounds them, and the values that their codes stand for.
struct Inputs {
  ActivationBuffer buffer;
  Activations view;
  std::vector<double> values;  // (rows, cols)
};
inline void make_inputs(Inputs& inputs, const KernelTable& table, ActivationKind kind,
                        const std::vector<float>& x, int64_t rows, int64_t cols,
                        bool may_be_wide = true) {
  inputs.buffer.resize(rows, cols);
  inputs.view = inputs.buffer.view(kind, cols);
  inputs.view.may_be_wide = may_be_wide;
  const Activations view = inputs.view;
  inputs.values.assign(x.begin(), x.end());
  if (kind == ActivationKind::floating) {
    std::copy(x.begin(), x.end(), view.values);
    return;
  }
  table.quantize_activations(x.data(), view, rows);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col) {
      const int64_t i = row * view.padded_cols() + col;
      inputs.values[row * cols + col] =
          static_cast<double>(view.scales[row * view.groups() + col / kGroup]) *
          (view.codes[i] + view.low_codes[i] / 254.0);
    }
}

// Numbers whose codes are the largest in every place (all of one sign, or of both), or any.
inline std::vector<float> make_floats(Fill fill, int64_t n, Random& random) {
  std::vector<float> x(n);
  for (int64_t i = 0; i < n; ++i)
    x[i] = fill == Fill::random     ? random.uniform() * (i % 37 == 5 ? 40.0f : 1.0f)
           : fill == Fill::largest  ? 1.0f
           : fill == Fill::smallest ? -1.0f
                                    : (i % 2 ? -1.0f : 1.0f);
  return x;
}

}  // namespace mlf::test
