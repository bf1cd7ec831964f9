// Rounding of activations to 8-bit codes.

// The largest |x|, or NaN if any x is not finite.
inline float max_abs(const float* x, int64_t cols) {
  VecI largest = splat_int(0);
  for_each_vec(cols,
               [&](int64_t i, int n) { largest = max(largest, abs_bits(load_upto(x + i, n))); });
  const int32_t bits = max_lane(largest);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value - value == 0.0f ? value : NAN;
}

// The factor that turns a row into codes, and its scale. A row too small for its reciprocal to be
// finite counts as zero; one that is not finite has codes 0 and the scale NaN.
struct CodeScale {
  float inverse, scale;
};
constexpr float kLeastLargest = 0x1p-100f;
inline CodeScale code_scale(float largest, float max_code = kMaxCode) {
  if (!(largest >= kLeastLargest)) return {0.0f, largest < kLeastLargest ? 0.0f : NAN};
  return {max_code / largest, largest / max_code};
}

inline float low_scale(float scale) { return scale * (1.0f / kLowSteps); }

// Round one group of inputs: x holds those that are there, at most 32. Only groups that MayBeWide
// get low codes.
template <bool MayBeWide>
inline void quantize_group_as(const float* x, int64_t count, CodeScale scale,
                              const Activations& out, int64_t row, int64_t group) {
  constexpr int kVecs = kGroup / 16;
  int8_t* codes = out.codes + row * out.padded_cols() + group * kGroup;
  int8_t* low_codes = out.low_codes + row * out.padded_cols() + group * kGroup;
  VecF rest[kVecs];  // what the codes leave, in units of their scale
  VecI sums = splat_int(0);
  VecF energy = splat(0.0f);
  for (int i = 0; i < kVecs; ++i) {
    const int64_t left = count - 16 * i;
    const VecF v = scale.inverse == 0.0f ? splat(0.0f)  // also where x is not finite
                   : left >= 16 ? load(x + 16 * i)
                                : load_first(x + 16 * i, left > 0 ? static_cast<int>(left) : 0);
    const VecF scaled = mul(v, splat(scale.inverse));
    const VecI code = round_to_int(scaled);
    if constexpr (MayBeWide) {
      const VecF rounded = to_float(code);
      rest[i] = sub(scaled, rounded);
      energy = fma(rounded, rounded, energy);  // exact
    }
    store_codes(codes + 16 * i, code);
    sums = add(sums, code);
  }
  bool wide = false;
  int32_t low_total = 0;
  if constexpr (MayBeWide) {
    wide = sum(energy) <= static_cast<float>(kWideEnergy);
    VecI low_sums = splat_int(0);
    for (int i = 0; i < kVecs; ++i) {
      const VecI low = wide ? round_to_int(mul(rest[i], splat(kLowSteps))) : splat_int(0);
      store_codes(low_codes + 16 * i, low);
      low_sums = add(low_sums, low);
    }
    low_total = sum(low_sums);
  } else {
    memset(low_codes, 0, kGroup);
  }
  const int64_t at = row * out.groups() + group;
  const int32_t total = sum(sums);
  out.scales[at] = scale.scale;
  out.wide[at] = wide;
  out.offsets[2 * at] = -kInt8Offset * total;
  out.offsets[2 * at + 1] = -kInt8Offset * low_total;
  out.group_sums[at] = fmaf(low_scale(scale.scale), static_cast<float>(low_total),
                            scale.scale * static_cast<float>(total));
}

inline void quantize_group(const float* x, int64_t count, CodeScale scale, const Activations& out,
                           int64_t row, int64_t group) {
  if (out.may_be_wide && out.kind == ActivationKind::int8_g32)
    quantize_group_as<true>(x, count, scale, out, row, group);
  else quantize_group_as<false>(x, count, scale, out, row, group);
}

void quantize_activations(const float* x, const Activations& out, int64_t rows) {
  const bool per_token = out.kind == ActivationKind::int8;
  for (int64_t row = 0; row < rows; ++row, x += out.cols) {
    CodeScale scale = per_token ? code_scale(max_abs(x, out.cols)) : CodeScale{};
    for (int64_t group = 0; group < out.groups(); ++group) {
      const float* values = x + group * kGroup;
      const int64_t left = out.cols - group * kGroup, count = left < kGroup ? left : kGroup;
      if (!per_token) scale = code_scale(max_abs(values, count));
      quantize_group(values, count, scale, out, row, group);
    }
  }
}

void quantize_per_token(const float* x, int8_t* q, float* scale, int64_t rows, int64_t cols) {
  for (int64_t row = 0; row < rows; ++row, x += cols, q += cols) {
    const CodeScale of_row = code_scale(max_abs(x, cols));
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
