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

// Takes back what load_step_int8 added to the codes; modulo 2^32, like the sum it is added to.
inline VecI int8_offset(int32_t sum) {
  return splat_int(
      static_cast<int32_t>(0u - static_cast<uint32_t>(kInt8Offset) * static_cast<uint32_t>(sum)));
}

// y[m] (16 outputs) = x[first_row + m] . tile, for m < M.
template <int M>
inline void tile_dot_int8(TileReader reader, const Activations& x, int64_t first_row, VecF* y) {
  const VecF scales = load(reinterpret_cast<const float*>(reader.next()));
  const int64_t groups = x.groups(), stride = x.codes_stride();
  const uint8_t* inputs = x.row_codes(first_row);
  DotSum acc[M];
  MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = dot_zero();
  for (int64_t group = 0; group < groups; ++group, inputs += 2 * kGroup) {
    MLF_UNROLL for (int step = 0; step < kStepsPerGroup; ++step) {
      const DotWeights w = load_step_int8(reader.next());
      MLF_UNROLL for (int m = 0; m < M; ++m) dot(acc[m], w, load_inputs(inputs + m * stride, step));
    }
  }
  MLF_UNROLL for (int m = 0; m < M; ++m) {
    const VecI offset = int8_offset(x.sums[first_row + m]);
    const VecF total = to_float(add(dot_result(acc[m]), offset));
    y[m] = mul(total, mul(scales, splat(x.scales[first_row + m])));
  }
}

// As above for groups of 32 inputs: an exact integer sum per group, then one fma with its scale.
template <int M>
inline void tile_dot_int8_g32(TileReader reader, const Activations& x, int64_t first_row, VecF* y) {
  const int64_t groups = x.groups(), stride = x.codes_stride();
  const uint8_t* inputs = x.row_codes(first_row);
  const int32_t* sums = x.group_sums + first_row * groups;
  const uint16_t* scales = nullptr;
  VecF total[M];
  MLF_UNROLL for (int m = 0; m < M; ++m) total[m] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group, inputs += 2 * kGroup) {
    scales = group % 2 ? scales + kTileRows : reinterpret_cast<const uint16_t*>(reader.next());
    DotSum acc[M];
    MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = dot_zero();
    MLF_UNROLL for (int step = 0; step < kStepsPerGroup; ++step) {
      const DotWeights w = load_step_int8(reader.next());
      MLF_UNROLL for (int m = 0; m < M; ++m) dot(acc[m], w, load_inputs(inputs + m * stride, step));
    }
    const VecF scale = load_half(scales);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const VecI offset = int8_offset(sums[m * groups + group]);
      total[m] = fma(to_float(add(dot_result(acc[m]), offset)), scale, total[m]);
    }
  }
  MLF_UNROLL for (int m = 0; m < M; ++m) y[m] = mul(total[m], splat(x.scales[first_row + m]));
}

// Groups of 32 with scale and min: sum of (scale * code + min) * x = scale * dot + min * sum(x).
template <int M>
inline void tile_dot_int4_g32(TileReader reader, const Activations& x, int64_t first_row, VecF* y) {
  const int64_t groups = x.groups(), stride = x.codes_stride();
  const uint8_t* inputs = x.row_codes(first_row);
  const int32_t* sums = x.group_sums + first_row * groups;
  VecF total[M];
  MLF_UNROLL for (int m = 0; m < M; ++m) total[m] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group, inputs += 2 * kGroup) {
    const uint16_t* header = reinterpret_cast<const uint16_t*>(reader.next());
    DotSum acc[M];
    MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = dot_zero();
    MLF_UNROLL for (int step = 0; step < kStepsPerGroup / 2; ++step) {
      DotWeights low, high;
      load_steps_int4(reader.next(), low, high);
      MLF_UNROLL for (int m = 0; m < M; ++m) {
        dot(acc[m], low, load_inputs(inputs + m * stride, step));
        dot(acc[m], high, load_inputs(inputs + m * stride, step + kStepsPerGroup / 2));
      }
    }
    const VecF scale = load_half(header), min = load_half(header + kTileRows);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const float group_sum = static_cast<float>(sums[m * groups + group]);
      total[m] = fma(to_float(dot_result(acc[m])), scale, total[m]);
      total[m] = fma(min, splat(group_sum), total[m]);
    }
  }
  MLF_UNROLL for (int m = 0; m < M; ++m) y[m] = mul(total[m], splat(x.scales[first_row + m]));
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
inline void rows_dot(const T* weight, const Activations& x, int64_t first_row,
                     float (*y)[kTileRows]) {
  VecF acc[M][R];
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) acc[m][r] = splat(0.0f);
  const float* values = x.values + first_row * x.cols;
  for_each_vec(x.cols, [&](int64_t k, int n) {
    VecF w[R];
    for (int r = 0; r < R; ++r) w[r] = load_weights(weight + r * x.cols + k, n);
    for (int m = 0; m < M; ++m) {
      const VecF v = load_upto(values + m * x.cols + k, n);
      for (int r = 0; r < R; ++r) acc[m][r] = fma(w[r], v, acc[m][r]);
    }
  });
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) y[m][r] = sum(acc[m][r]);
}

template <int M, class T>
inline void tile_dot_float(const T* weight, int64_t rows, const Activations& x, int64_t first_row,
                           VecF* y) {
  constexpr int R = kVecRegisters / M < 1 ? 1 : kVecRegisters / M > 4 ? 4 : kVecRegisters / M;
  float out[M][kTileRows] = {};
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    rows_dot<M, R>(weight + r * x.cols, x, first_row,
                   reinterpret_cast<float (*)[kTileRows]>(&out[0][r]));
  for (; r < rows; ++r)
    rows_dot<M, 1>(weight + r * x.cols, x, first_row,
                   reinterpret_cast<float (*)[kTileRows]>(&out[0][r]));
  for (int m = 0; m < M; ++m) y[m] = load(out[m]);
}

// Not inlined: its callers share one copy of these loops, and a call is small beside a tile.
template <int M>
__attribute__((noinline)) void tile_dot(const Activations& x, const Weight& weight, int64_t tile,
                                        int64_t first_row, int64_t ahead, VecF* y) {
  const int64_t row = tile * kTileRows;
  const int64_t rows = weight.rows - row < kTileRows ? weight.rows - row : kTileRows;
  const TileReader reader{weight.data + tile * tile_nbytes(weight.kind, weight.cols), ahead};
  switch (weight.kind) {
    case WeightKind::fp32:
      return tile_dot_float<M>(reinterpret_cast<const float*>(weight.data) + row * weight.cols,
                               rows, x, first_row, y);
    case WeightKind::bf16:
      return tile_dot_float<M>(reinterpret_cast<const uint16_t*>(weight.data) + row * weight.cols,
                               rows, x, first_row, y);
    case WeightKind::int8:
      return tile_dot_int8<M>(reader, x, first_row, y);
    case WeightKind::int8_g32:
      return tile_dot_int8_g32<M>(reader, x, first_row, y);
    case WeightKind::int4_g32:
      return tile_dot_int4_g32<M>(reader, x, first_row, y);
  }
}
