// Rounding of activations to integer codes, one scale per token.

// The largest |x|, or NaN if any x is not finite.
inline float max_abs(const float* x, int64_t cols) {
  VecF largest = splat(0.0f), zero = splat(0.0f);
  for_each_vec(cols, [&](int64_t i, int n) {
    const VecF v = load_upto(x + i, n);
    largest = max(largest, abs(v));
    zero = add(zero, sub(v, v));  // NaN for infinities too
  });
  return max_lane(largest) + sum(zero);
}

// The factor that turns a row into codes, and its scale. A row too small for its reciprocal to be
// finite counts as zero; one that is not finite has codes 0 and the scale NaN.
struct RowScale {
  float inverse, scale;
};
inline RowScale row_scale(float largest, float max_code) {
  if (!(largest >= 0x1p-100f)) return {0.0f, largest < 0x1p-100f ? 0.0f : NAN};
  return {max_code / largest, largest / max_code};
}

void quantize_activations(const float* x, const Activations& out, int64_t first_row, int64_t rows,
                          int32_t max_code) {
  const int64_t groups = out.groups();
  for (int64_t row = first_row; row < first_row + rows; ++row, x += out.cols) {
    const RowScale scale = row_scale(max_abs(x, out.cols), static_cast<float>(max_code));
    const VecF inverse = splat(scale.inverse);
    uint8_t* codes = out.row_codes(row);
    int32_t total = 0;
    for (int64_t group = 0; group < groups; ++group) {
      VecI group_sum = splat_int(0);
      for (int64_t k = group * kGroup; k < (group + 1) * kGroup; k += 16) {
        const int64_t left = out.cols - k;  // inputs beyond cols are padded with code 0
        const VecF v = scale.inverse == 0.0f ? splat(0.0f)
                       : left >= 16 ? load(x + k)
                                    : load_first(x + k, left > 0 ? static_cast<int>(left) : 0);
        const VecI code = round_to_int(mul(v, inverse));
        store_inputs(codes, k, code);
        group_sum = add(group_sum, code);
      }
      const int32_t group_total = sum(group_sum);
      out.group_sums[row * groups + group] = group_total;
      total += group_total;
    }
    out.scales[row] = scale.scale;
    out.sums[row] = total;
  }
}

void quantize_per_token(const float* x, int8_t* q, float* scale, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, x += cols, q += cols) {
    const RowScale of_row = row_scale(max_abs(x, cols), 127.0f);
    const VecF inverse = splat(of_row.inverse);
    for_each_vec(cols, [&](int64_t i, int n) {
      float rounded[16];
      store(rounded, to_float(round_to_int(
                         of_row.inverse == 0.0f ? inverse : mul(load_upto(x + i, n), inverse))));
      for (int j = 0; j < n; ++j) q[i + j] = static_cast<int8_t>(rounded[j]);
    });
    scale[row] = of_row.scale;
  }
}
