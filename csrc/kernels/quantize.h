// Rounding of activations to integer codes, one scale per token.

inline float max_abs(const float* x, int64_t cols) {
  VecF largest = splat(0.0f);
  for_each_vec(cols, [&](int64_t i, int n) { largest = max(largest, abs(load_upto(x + i, n))); });
  return max_lane(largest);
}

void quantize_activations(const float* x, const Activations& out, int64_t first_row, int64_t rows,
                          int32_t max_code) {
  const int64_t groups = out.groups();
  for (int64_t row = first_row; row < first_row + rows; ++row, x += out.cols) {
    const float largest = max_abs(x, out.cols);
    const float code_max = static_cast<float>(max_code);
    const VecF inverse = splat(largest > 0.0f ? code_max / largest : 0.0f);
    uint8_t* codes = out.row_codes(row);
    int32_t total = 0;
    for (int64_t group = 0; group < groups; ++group) {
      VecI group_sum = splat_int(0);
      for (int64_t k = group * kGroup; k < (group + 1) * kGroup; k += 16) {
        const int64_t left = out.cols - k;  // inputs beyond cols are padded with code 0
        const VecF v = left >= 16 ? load(x + k) : load_first(x + k, left > 0 ? static_cast<int>(left) : 0);
        const VecI code = round_to_int(mul(v, inverse));
        store_inputs(codes, k, code);
        group_sum = add(group_sum, code);
      }
      const int32_t group_total = sum(group_sum);
      out.group_sums[row * groups + group] = group_total;
      total += group_total;
    }
    out.scales[row] = largest / code_max;
    out.sums[row] = total;
  }
}

void quantize_per_token(const float* x, int8_t* q, float* scale, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, x += cols, q += cols) {
    const float largest = max_abs(x, cols);
    const VecF inverse = splat(largest > 0.0f ? 127.0f / largest : 0.0f);
    for_each_vec(cols, [&](int64_t i, int n) {
      float rounded[16];
      store(rounded, to_float(round_to_int(mul(load_upto(x + i, n), inverse))));
      for (int j = 0; j < n; ++j) q[i + j] = static_cast<int8_t>(rounded[j]);
    });
    scale[row] = largest / 127.0f;
  }
}
