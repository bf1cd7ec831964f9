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

// The wide groups of some rows, row by row: a row, or tile after tile, looks only at its own.
struct WideGroup {
  uint16_t row, group;
};
struct WideGroups {
  const WideGroup* begin;
  const WideGroup* end;
};

// Lines of a tile before the codes of a group.
inline int64_t lines_before(WeightKind kind, int64_t group) {
  if (kind == WeightKind::int8) return 1 + group * kStepsPerGroup;
  if (kind == WeightKind::int8_g32) return group / 2 + 1 + group * kStepsPerGroup;
  return group + 1 + group * kStepsPerGroup / 2;
}

// One group of 8-bit weights times M rows of codes, exactly: integer sums acc[m * T + t]. The codes
// and the offsets of rows are so far apart.
template <int M, int T>
inline void group_dot_int8(TileReader* tiles, const int8_t* codes, int64_t stride,
                           const int32_t* offsets, int64_t offset_stride, DotSum* acc) {
  MLF_UNROLL for (int i = 0; i < M * T; ++i) acc[i] = dot_begin(offsets[i / T * offset_stride]);
  MLF_UNROLL for (int step = 0; step < kStepsPerGroup; ++step) {
    DotWeights w[T];
    MLF_UNROLL for (int t = 0; t < T; ++t) w[t] = load_step_int8(tiles[t].next());
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const DotInputs a = load_inputs(codes + m * stride + step * kStep);
      MLF_UNROLL for (int t = 0; t < T; ++t) dot(acc[m * T + t], w[t], a);
    }
  }
}

// As above for 4-bit weights, which need no offsets.
template <int M, int T>
inline void group_dot_int4(TileReader* tiles, const int8_t* codes, int64_t stride, NibbleSum* acc) {
  MLF_UNROLL for (int i = 0; i < M * T; ++i) acc[i] = nibble_begin();
  MLF_UNROLL for (int step = 0; step < kStepsPerGroup / 2; ++step) {
    NibbleWeights low[T], high[T];
    MLF_UNROLL for (int t = 0; t < T; ++t) load_steps_int4(tiles[t].next(), low[t], high[t]);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const int8_t* row = codes + m * stride + step * kStep;
      const auto first = load_nibble_inputs(row), second = load_nibble_inputs(row + kGroup / 2);
      MLF_UNROLL for (int t = 0; t < T; ++t) {
        dot(acc[m * T + t], low[t], first);
        dot(acc[m * T + t], high[t], second);
      }
    }
  }
}

// Add the low codes of wide groups: y[m * T + t] += scale of the input * scale of the weight, if it
// has one per group, * sum of products. They are few, so that rows are taken one by one.
template <int T>
inline void add_wide_groups(const TileReader* tiles, WeightKind kind, const Activations& x,
                            const WideGroups& wide, int64_t first_row, VecF* y) {
  const int64_t groups = x.groups();
  for (const WideGroup* at = wide.begin; at < wide.end; ++at) {
    const int64_t row = at->row - first_row, group = at->group, i = row * groups + group;
    const int8_t* codes = x.low_codes + row * x.padded_cols() + group * kGroup;
    const VecF scale = splat(low_scale(x.scales[i]));
    TileReader lines[T];
    MLF_UNROLL for (int t = 0; t < T; ++t)
        lines[t] = {tiles[t].line + lines_before(kind, group) * kStepBytes, 0};
    VecF part[T];
    if (kind == WeightKind::int4_g32) {
      NibbleSum acc[T];
      group_dot_int4<1, T>(lines, codes, 0, acc);
      MLF_UNROLL for (int t = 0; t < T; ++t) part[t] = to_float(dot_result(acc[t]));
    } else {
      DotSum acc[T];
      group_dot_int8<1, T>(lines, codes, 0, x.offsets + 2 * i + 1, 0, acc);
      MLF_UNROLL for (int t = 0; t < T; ++t) part[t] = to_float(dot_result(acc[t]));
    }
    MLF_UNROLL for (int t = 0; t < T; ++t) {
      VecF& sum = y[row * T + t];
      if (kind == WeightKind::int8) {
        sum = fma(part[t], scale, sum);
        continue;
      }
      const int64_t header = kind == WeightKind::int4_g32 ? lines_before(kind, group) - 1
                                                          : lines_before(kind, group / 2 * 2) - 1;
      const uint16_t* halves =
          reinterpret_cast<const uint16_t*>(tiles[t].line + header * kStepBytes);
      const int64_t second = kind == WeightKind::int8_g32 && group % 2 ? kTileRows : 0;
      sum = fma(mul(part[t], scale), load_half(halves + second), sum);
    }
  }
}

// y[m * T + t] (16 outputs) = x[m] . tile[t], with one scale per token: the sum over all inputs is
// an exact integer. It fits int32 up to 2^31 / 127^2 = 133000 inputs.
template <int M, int T>
inline void tile_dot_w8a8(TileReader* tiles, const Activations& x, VecF* y) {
  const int64_t groups = x.groups(), stride = x.padded_cols();
  VecF scales[T];
  MLF_UNROLL for (int t = 0; t < T; ++t) scales[t] =
      load(reinterpret_cast<const float*>(tiles[t].next()));
  VecI total[M * T];
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = splat_int(0);
  for (int64_t group = 0; group < groups; ++group) {
    DotSum acc[M * T];
    group_dot_int8<M, T>(tiles, x.codes + group * kGroup, stride, x.offsets + 2 * group, 2 * groups,
                         acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = add(total[i], dot_result(acc[i]));
  }
  MLF_UNROLL for (int i = 0; i < M * T; ++i) y[i] =
      mul(to_float(total[i]), mul(scales[i % T], splat(x.scales[i / T * groups])));
}

// With one scale per token and group: an exact integer per group, then one fma with its scale.
template <int M, int T>
inline void tile_dot_int8(TileReader* tiles, const Activations& x, const WideGroups& wide,
                          int64_t first_row, VecF* y) {
  const int64_t groups = x.groups(), stride = x.padded_cols();
  TileReader starts[T];
  MLF_UNROLL for (int t = 0; t < T; ++t) starts[t] = tiles[t];
  VecF scales[T], total[M * T];
  MLF_UNROLL for (int t = 0; t < T; ++t) scales[t] =
      load(reinterpret_cast<const float*>(tiles[t].next()));
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    DotSum acc[M * T];
    group_dot_int8<M, T>(tiles, x.codes + group * kGroup, stride, x.offsets + 2 * group, 2 * groups,
                         acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] =
        fma(to_float(dot_result(acc[i])), splat(x.scales[i / T * groups + group]), total[i]);
  }
  MLF_UNROLL for (int i = 0; i < M * T; ++i) y[i] = total[i];
  add_wide_groups<T>(starts, WeightKind::int8, x, wide, first_row, y);
  MLF_UNROLL for (int i = 0; i < M * T; ++i) y[i] = mul(y[i], scales[i % T]);
}

// Weights with a scale per group, too.
template <int M, int T>
inline void tile_dot_int8_g32(TileReader* tiles, const Activations& x, VecF* y) {
  const int64_t groups = x.groups(), stride = x.padded_cols();
  const uint16_t* halves[T];
  VecF total[M * T];
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    MLF_UNROLL for (int t = 0; t < T; ++t) halves[t] =
        group % 2 ? halves[t] + kTileRows : reinterpret_cast<const uint16_t*>(tiles[t].next());
    DotSum acc[M * T];
    group_dot_int8<M, T>(tiles, x.codes + group * kGroup, stride, x.offsets + 2 * group, 2 * groups,
                         acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) {
      const VecF scale = splat(x.scales[i / T * groups + group]);
      total[i] = fma(mul(to_float(dot_result(acc[i])), scale), load_half(halves[i % T]), total[i]);
    }
  }
  MLF_UNROLL for (int i = 0; i < M * T; ++i) y[i] = total[i];
}

// With scale and min: the sum of (scale * code + min) * x = scale * dot + min * sum(x).
template <int M, int T>
inline void tile_dot_int4_g32(TileReader* tiles, const Activations& x, VecF* y) {
  const int64_t groups = x.groups(), stride = x.padded_cols();
  VecF total[M * T];
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    const uint16_t* halves[T];
    MLF_UNROLL for (int t = 0; t < T; ++t) halves[t] =
        reinterpret_cast<const uint16_t*>(tiles[t].next());
    NibbleSum acc[M * T];
    group_dot_int4<M, T>(tiles, x.codes + group * kGroup, stride, acc);
    MLF_UNROLL for (int i = 0; i < M * T; ++i) {
      const int64_t at = i / T * groups + group;
      const VecF part = mul(to_float(dot_result(acc[i])), splat(x.scales[at]));
      total[i] = fma(part, load_half(halves[i % T]), total[i]);
      total[i] = fma(load_half(halves[i % T] + kTileRows), splat(x.group_sums[at]), total[i]);
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

// y[m * T + t] (16 outputs) = x[m] . tile[t], for m < M and t < T; `wide` are the wide groups of
// these rows, which count from `first_row` there.
// Not inlined: its callers share one copy of these loops, and a call is small beside a tile.
template <int M, int T>
__attribute__((noinline)) void tile_dot(const Activations& x, const WideGroups& wide,
                                        int64_t first_row, const Weight& weight, const TileSet& set,
                                        VecF* y) {
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
  TileReader tiles[T], starts[T];
  const int64_t nbytes = tile_nbytes(weight.kind, weight.cols);
  for (int t = 0; t < T; ++t)
    starts[t] = tiles[t] = {weight.data + (set.first + t * set.stride) * nbytes, set.ahead[t]};
  if (weight.kind == WeightKind::int8) {
    if (x.kind == ActivationKind::int8) return tile_dot_w8a8<M, T>(tiles, x, y);
    return tile_dot_int8<M, T>(tiles, x, wide, first_row, y);
  }
  if (weight.kind == WeightKind::int4_g32) tile_dot_int4_g32<M, T>(tiles, x, y);
  else tile_dot_int8_g32<M, T>(tiles, x, y);
  add_wide_groups<T>(starts, weight.kind, x, wide, first_row, y);
}
