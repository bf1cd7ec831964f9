// Products of M activation rows with T tiles (of 16 rows) of a weight matrix: the inner loops of
// linear and swiglu. Every output is one chain of operations whose order depends on the kinds of
// weight and activation alone, so the bits do not depend on what is computed together.

// Tiles that are read side by side when few activation rows leave registers for them.
constexpr int kMaxStreams = kDotRows < 4 ? kDotRows : 4;

// Reads a tile from front to end, a cache line at a time. Besides, each step may fetch the line
// `ahead` bytes away, which a later layer wants, into the second-level cache; 0 names the line at
// hand.
struct TileReader {
  const uint8_t* line;
  int64_t ahead;

  const uint8_t* next() {
    const uint8_t* at = line;
    if (ahead) __builtin_prefetch(at + ahead, 0, 2);
    line += kStepBytes;
    return at;
  }
};

// Does any of M rows have low codes in this group?
template <int M>
inline bool any_wide(const Activations& x, int64_t group) {
  uint8_t any = 0;
  MLF_UNROLL for (int m = 0; m < M; ++m) any |= x.wide[m * x.groups() + group];
  return any;
}

// The lines that were read last, again: for the low codes.
template <int T>
struct Again {
  TileReader tiles[T];

  Again(const TileReader* read, int lines) {
    MLF_UNROLL for (int t = 0; t < T; ++t) tiles[t] = {read[t].line - lines * kStepBytes, 0};
  }
};

// One group of 8-bit weights times codes, exactly: an integer sum per row and tile, acc[m * T + t],
// from its offset on (of `Activations::offsets`, 0 for codes, 1 for low codes).
template <int M, int T>
inline void group_dot_int8(TileReader* tiles, const Activations& x, const int8_t* codes, int which,
                           int64_t group, DotSum* acc) {
  const int8_t* inputs = codes + group * kGroup;
  MLF_UNROLL for (int i = 0; i < M * T; ++i) acc[i] =
      dot_begin(x.offsets[2 * (i / T * x.groups() + group) + which]);
  MLF_UNROLL for (int step = 0; step < kStepsPerGroup; ++step) {
    DotWeights w[T];
    MLF_UNROLL for (int t = 0; t < T; ++t) w[t] = load_step_int8(tiles[t].next());
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const DotInputs a = load_inputs(inputs + m * x.padded_cols() + step * kStep);
      MLF_UNROLL for (int t = 0; t < T; ++t) dot(acc[m * T + t], w[t], a);
    }
  }
}

// As above for 4-bit weights.
template <int M, int T>
inline void group_dot_int4(TileReader* tiles, const Activations& x, const int8_t* codes,
                           int64_t group, NibbleSum* acc) {
  const int8_t* inputs = codes + group * kGroup;
  MLF_UNROLL for (int i = 0; i < M * T; ++i) acc[i] = nibble_begin();
  MLF_UNROLL for (int step = 0; step < kStepsPerGroup / 2; ++step) {
    NibbleWeights low[T], high[T];
    MLF_UNROLL for (int t = 0; t < T; ++t) load_steps_int4(tiles[t].next(), low[t], high[t]);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const int8_t* row = inputs + m * x.padded_cols() + step * kStep;
      const auto first = load_nibble_inputs(row), second = load_nibble_inputs(row + kGroup / 2);
      MLF_UNROLL for (int t = 0; t < T; ++t) {
        dot(acc[m * T + t], low[t], first);
        dot(acc[m * T + t], high[t], second);
      }
    }
  }
}

// y[m * T + t] (16 outputs) = x[m] . tile[t], with one scale per token: the sum over all inputs is
// an exact integer. It fits int32 up to 2^31 / 127^2 = 133000 inputs.
template <int M, int T>
inline void tile_dot_w8a8(TileReader* tiles, const Activations& x, VecF* y) {
  const int64_t groups = x.groups();
  VecF scales[T];
  MLF_UNROLL for (int t = 0; t < T; ++t) scales[t] =
      load(reinterpret_cast<const float*>(tiles[t].next()));
  VecI total[M * T];
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = splat_int(0);
  for (int64_t group = 0; group < groups; ++group) {
    DotSum acc[M * T];
    group_dot_int8<M, T>(tiles, x, x.codes, 0, group, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = add(total[i], dot_result(acc[i]));
  }
  MLF_UNROLL for (int i = 0; i < M * T; ++i) y[i] =
      mul(to_float(total[i]), mul(scales[i % T], splat(x.scales[i / T * groups])));
}

// With one scale per token and group: an exact integer per group, then one fma with its scale.
template <int M, int T>
inline void tile_dot_int8(TileReader* tiles, const Activations& x, VecF* y) {
  const int64_t groups = x.groups();
  VecF scales[T], total[M * T];
  MLF_UNROLL for (int t = 0; t < T; ++t) scales[t] =
      load(reinterpret_cast<const float*>(tiles[t].next()));
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    DotSum acc[M * T];
    group_dot_int8<M, T>(tiles, x, x.codes, 0, group, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] =
        fma(to_float(dot_result(acc[i])), splat(x.scales[i / T * groups + group]), total[i]);
    if (!any_wide<M>(x, group)) continue;
    group_dot_int8<M, T>(Again<T>(tiles, kStepsPerGroup).tiles, x, x.low_codes, 1, group, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = fma(
        to_float(dot_result(acc[i])), splat(low_scale(x.scales[i / T * groups + group])), total[i]);
  }
  MLF_UNROLL for (int i = 0; i < M * T; ++i) y[i] = mul(total[i], scales[i % T]);
}

// Weights with a scale per group, too.
template <int M, int T>
inline void tile_dot_int8_g32(TileReader* tiles, const Activations& x, VecF* y) {
  const int64_t groups = x.groups();
  const uint16_t* halves[T];
  VecF total[M * T];
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    MLF_UNROLL for (int t = 0; t < T; ++t) halves[t] =
        group % 2 ? halves[t] + kTileRows : reinterpret_cast<const uint16_t*>(tiles[t].next());
    DotSum acc[M * T];
    group_dot_int8<M, T>(tiles, x, x.codes, 0, group, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) {
      const VecF scale = splat(x.scales[i / T * groups + group]);
      total[i] = fma(mul(to_float(dot_result(acc[i])), scale), load_half(halves[i % T]), total[i]);
    }
    if (!any_wide<M>(x, group)) continue;
    group_dot_int8<M, T>(Again<T>(tiles, kStepsPerGroup).tiles, x, x.low_codes, 1, group, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) {
      const VecF scale = splat(low_scale(x.scales[i / T * groups + group]));
      total[i] = fma(mul(to_float(dot_result(acc[i])), scale), load_half(halves[i % T]), total[i]);
    }
  }
  MLF_UNROLL for (int i = 0; i < M * T; ++i) y[i] = total[i];
}

// With scale and min: the sum of (scale * code + min) * x = scale * dot + min * sum(x).
template <int M, int T>
inline void tile_dot_int4_g32(TileReader* tiles, const Activations& x, VecF* y) {
  const int64_t groups = x.groups();
  VecF total[M * T];
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    const uint16_t* halves[T];
    MLF_UNROLL for (int t = 0; t < T; ++t) halves[t] =
        reinterpret_cast<const uint16_t*>(tiles[t].next());
    NibbleSum acc[M * T];
    group_dot_int4<M, T>(tiles, x, x.codes, group, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) {
      const int64_t at = i / T * groups + group;
      const VecF part = mul(to_float(dot_result(acc[i])), splat(x.scales[at]));
      total[i] = fma(part, load_half(halves[i % T]), total[i]);
      total[i] = fma(load_half(halves[i % T] + kTileRows), splat(x.group_sums[at]), total[i]);
    }
    if (!any_wide<M>(x, group)) continue;
    group_dot_int4<M, T>(Again<T>(tiles, kStepsPerGroup / 2).tiles, x, x.low_codes, group, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) {
      const VecF scale = splat(low_scale(x.scales[i / T * groups + group]));
      total[i] = fma(mul(to_float(dot_result(acc[i])), scale), load_half(halves[i % T]), total[i]);
    }
  }
  MLF_UNROLL for (int i = 0; i < M * T; ++i) y[i] = total[i];
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

// Which tiles are multiplied together: first, first + stride, ... Tiles far from each other are
// separate streams for the hardware prefetcher, which one stream alone leaves half idle.
struct TileSet {
  int64_t first, stride;
  int64_t ahead[kMaxStreams];  // see TileReader, for each tile
};

// y[m * T + t] (16 outputs) = x[m] . tile[t], for m < M and t < T.
// Not inlined: its callers share one copy of these loops, and a call is small beside a tile.
template <int M, int T>
__attribute__((noinline)) void tile_dot(const Activations& x, const Weight& weight,
                                        const TileSet& set, VecF* y) {
  if (!is_quantized(weight.kind)) {
    for (int t = 0; t < T; ++t) {
      const int64_t row = (set.first + t * set.stride) * kTileRows;
      const int64_t rows = weight.rows - row < kTileRows ? weight.rows - row : kTileRows;
      VecF column[M];
      if (weight.kind == WeightKind::fp32)
        tile_dot_float<M>(reinterpret_cast<const float*>(weight.data) + row * weight.cols, rows, x,
                          column);
      else
        tile_dot_float<M>(reinterpret_cast<const uint16_t*>(weight.data) + row * weight.cols, rows,
                          x, column);
      for (int m = 0; m < M; ++m) y[m * T + t] = column[m];
    }
    return;
  }
  TileReader tiles[T];
  const int64_t nbytes = tile_nbytes(weight.kind, weight.cols);
  for (int t = 0; t < T; ++t)
    tiles[t] = {weight.data + (set.first + t * set.stride) * nbytes, set.ahead[t]};
  if (weight.kind == WeightKind::int4_g32) return tile_dot_int4_g32<M, T>(tiles, x, y);
  if (weight.kind == WeightKind::int8_g32) return tile_dot_int8_g32<M, T>(tiles, x, y);
  if (x.kind == ActivationKind::int8) return tile_dot_w8a8<M, T>(tiles, x, y);
  tile_dot_int8<M, T>(tiles, x, y);
}
