// Products of activation rows with one tile (16 rows) of a weight matrix: the inner loops of
// linear and swiglu. Every output is one chain of operations whose order depends on the weight
// kind alone, so the bits do not depend on how many activation rows are computed together.

// Bytes between the load of a weight and its software prefetch. The hardware prefetcher stops at
// every 4 KB page; one page ahead covers a DRAM latency at 40 GB/s per core (100 ns).
constexpr int kPrefetchBytes = 4096;

// Reads a tile from front to end, a cache line at a time. Besides, each step may fetch the line
// `ahead` bytes away, which a later layer wants, into the second-level cache; 0 names the line at
// hand.
struct TileReader {
  const uint8_t* line;
  int64_t ahead;

  const uint8_t* next() {
    const uint8_t* at = line;
    __builtin_prefetch(at + kPrefetchBytes);
    __builtin_prefetch(at + ahead, 0, 2);
    line += kStepBytes;
    return at;
  }
};

// One group of 8-bit weights times M activation rows, exactly: an integer sum per row.
template <int M>
inline void group_dot_int8(TileReader& reader, const Activations& x, int64_t group, DotSum* acc) {
  const int8_t* inputs = x.codes + group * kGroup;
  MLF_UNROLL for (int step = 0; step < kStepsPerGroup; ++step) {
    const DotWeights w = load_step_int8(reader.next());
    MLF_UNROLL for (int m = 0; m < M; ++m)
        dot(acc[m], w, load_inputs(inputs + m * x.padded_cols() + step * kStep));
  }
}

// As above for 4-bit weights.
template <int M>
inline void group_dot_int4(TileReader& reader, const Activations& x, int64_t group,
                           NibbleSum* acc) {
  const int8_t* inputs = x.codes + group * kGroup;
  MLF_UNROLL for (int step = 0; step < kStepsPerGroup / 2; ++step) {
    NibbleWeights low, high;
    load_steps_int4(reader.next(), low, high);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const int8_t* row = inputs + m * x.padded_cols() + step * kStep;
      dot(acc[m], low, load_nibble_inputs(row));
      dot(acc[m], high, load_nibble_inputs(row + kGroup / 2));
    }
  }
}

// y[m] (16 outputs) = x[m] . tile, for m < M, with one scale per token: the sum over all inputs is
// an exact integer. It fits int32 up to 2^31 / 127^2 = 133000 inputs.
template <int M>
inline void tile_dot_w8a8(TileReader reader, const Activations& x, VecF* y) {
  const VecF scales = load(reinterpret_cast<const float*>(reader.next()));
  const int64_t groups = x.groups();
  DotSum acc[M];
  MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = dot_begin(0);
  for (int64_t group = 0; group < groups; ++group) group_dot_int8<M>(reader, x, group, acc);
  MLF_UNROLL for (int m = 0; m < M; ++m) {
    int32_t offset = 0;
    if (kInt8Offset)
      for (int64_t group = 0; group < groups; ++group) offset += x.offsets[m * groups + group];
    const VecF total = to_float(add(dot_result(acc[m]), splat_int(offset)));
    y[m] = mul(total, mul(scales, splat(x.scales[m * groups])));
  }
}

// With one scale per token and group: an exact integer per group, then one fma with its scale.
template <int M>
inline void tile_dot_int8(TileReader reader, const Activations& x, VecF* y) {
  const VecF scales = load(reinterpret_cast<const float*>(reader.next()));
  const int64_t groups = x.groups();
  VecF total[M];
  MLF_UNROLL for (int m = 0; m < M; ++m) total[m] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    DotSum acc[M];
    MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = dot_begin(x.offsets[m * groups + group]);
    group_dot_int8<M>(reader, x, group, acc);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const VecF scale = splat(x.scales[m * groups + group]);
      total[m] = fma(to_float(dot_result(acc[m])), scale, total[m]);
    }
  }
  MLF_UNROLL for (int m = 0; m < M; ++m) y[m] = mul(total[m], scales);
}

// Weights with a scale per group, too.
template <int M>
inline void tile_dot_int8_g32(TileReader reader, const Activations& x, VecF* y) {
  const int64_t groups = x.groups();
  const uint16_t* halves = nullptr;
  MLF_UNROLL for (int m = 0; m < M; ++m) y[m] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    halves = group % 2 ? halves + kTileRows : reinterpret_cast<const uint16_t*>(reader.next());
    DotSum acc[M];
    MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = dot_begin(x.offsets[m * groups + group]);
    group_dot_int8<M>(reader, x, group, acc);
    const VecF scales = load_half(halves);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const VecF scale = splat(x.scales[m * groups + group]);
      y[m] = fma(mul(to_float(dot_result(acc[m])), scale), scales, y[m]);
    }
  }
}

// With scale and min: the sum of (scale * code + min) * x = scale * dot + min * sum(x).
template <int M>
inline void tile_dot_int4_g32(TileReader reader, const Activations& x, VecF* y) {
  const int64_t groups = x.groups();
  MLF_UNROLL for (int m = 0; m < M; ++m) y[m] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(reader.next());
    NibbleSum acc[M];
    MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = nibble_begin();
    group_dot_int4<M>(reader, x, group, acc);
    const VecF scales = load_half(halves), mins = load_half(halves + kTileRows);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const int64_t at = m * groups + group;
      y[m] = fma(mul(to_float(dot_result(acc[m])), splat(x.scales[at])), scales, y[m]);
      y[m] = fma(mins, splat(x.group_sums[at]), y[m]);
    }
  }
}

inline VecF load_weights(const float* p, int n) { return load_upto(p, n); }
inline VecF load_weights(const uint16_t* p, int n) {
  if (n == 16) return load_bf16(p);
  uint16_t rest[16] = {};
  memcpy(rest, p, sizeof(uint16_t) * n);
  return load_bf16(rest);
}

// Float weights are row-major, as torch has them: dot products along the row, R rows at a time.
template <int M, int R, class T>
inline void rows_dot(const T* weight, const Activations& x, float (*y)[kTileRows]) {
  VecF acc[M][R];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) acc[m][r] = splat(0.0f);
  for_each_vec(x.cols, [&](int64_t k, int n) {
    VecF w[R];
    for (int r = 0; r < R; ++r) w[r] = load_weights(weight + r * x.cols + k, n);
    for (int m = 0; m < M; ++m) {
      const VecF v = load_upto(x.values + m * x.cols + k, n);
      for (int r = 0; r < R; ++r) acc[m][r] = fma(w[r], v, acc[m][r]);
    }
  });
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) y[m][r] = sum(acc[m][r]);
}

template <int M, class T>
inline void tile_dot_float(const T* weight, int64_t rows, const Activations& x, VecF* y) {
  constexpr int R = kVecRegisters / M < 1 ? 1 : kVecRegisters / M > 4 ? 4 : kVecRegisters / M;
  float out[M][kTileRows] = {};
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    rows_dot<M, R>(weight + r * x.cols, x, reinterpret_cast<float (*)[kTileRows]>(&out[0][r]));
  for (; r < rows; ++r)
    rows_dot<M, 1>(weight + r * x.cols, x, reinterpret_cast<float (*)[kTileRows]>(&out[0][r]));
  for (int m = 0; m < M; ++m) y[m] = load(out[m]);
}

// y[m] (16 outputs) = x[m] . tile, for m < M.
// Not inlined: its callers share one copy of these loops, and a call is small beside a tile.
template <int M>
__attribute__((noinline)) void tile_dot(const Activations& x, const Weight& weight, int64_t tile,
                                        int64_t ahead, VecF* y) {
  const int64_t row = tile * kTileRows;
  const int64_t rows = weight.rows - row < kTileRows ? weight.rows - row : kTileRows;
  const TileReader reader{weight.data + tile * tile_nbytes(weight.kind, weight.cols), ahead};
  switch (weight.kind) {
    case WeightKind::fp32:
      return tile_dot_float<M>(reinterpret_cast<const float*>(weight.data) + row * weight.cols,
                               rows, x, y);
    case WeightKind::bf16:
      return tile_dot_float<M>(reinterpret_cast<const uint16_t*>(weight.data) + row * weight.cols,
                               rows, x, y);
    case WeightKind::int8:
      if (x.kind == ActivationKind::int8) return tile_dot_w8a8<M>(reader, x, y);
      return tile_dot_int8<M>(reader, x, y);
    case WeightKind::int8_g32:
      return tile_dot_int8_g32<M>(reader, x, y);
    case WeightKind::int4_g32:
      return tile_dot_int4_g32<M>(reader, x, y);
  }
}
