// Products of M activation rows with T tiles (of 16 rows) of a weight matrix: the inner loops of
// linear and swiglu. Every output is one chain of operations whose order depends on the kinds of
// weight and activation alone, so the bits do not depend on what is computed together.

// Tiles that are read side by side when few activation rows leave registers for them.
constexpr int kMaxStreams = kDotRows < 4 ? kDotRows : 4;

// With many rows, blocks of kBlockRows rows and kBlockTiles tiles fill the registers.
#if !defined(MLF_BLOCK)
constexpr int kBlockRows = kDotRows, kBlockTiles = 1;
#endif

// The formats of weights, as the loop below sees them: `Header` is what precedes the codes of a
// group in the stream, `dot` gives sums of products as floats, and `add` adds them to a total.

// One scale per row and group, two groups to a header.
template <int T>
struct ScalePairs {
  const uint16_t* scales[T] = {};
  void read(TileReader* tiles, int64_t group) {
    MLF_UNROLL for (int t = 0; t < T; ++t) scales[t] =
        group % 2 ? scales[t] + kTileRows : reinterpret_cast<const uint16_t*>(tiles[t].next());
  }
  VecF scale() const { return load_half(scales[0]); }
  VecF add(VecF dot, VecF scale, int t, VecF total) const {
    return fma(mul(dot, scale), load_half(scales[t]), total);
  }
};

struct Int8Tile {  // one scale per row, applied at the end
  static constexpr WeightKind kKind = WeightKind::int8;
  using Codes = Int8Codes;
  template <int T>
  struct Header {
    void read(TileReader*, int64_t) {}
    VecF add(VecF dot, VecF scale, int, VecF total) const { return fma(dot, scale, total); }
    VecF add_min(float, int, VecF total) const { return total; }
  };
  template <int R, int T>
  MLF_INLINE static void dot(TileReader* tiles, const CodeRows<R>& rows, VecF* out) {
    group_values<R, T>(tiles, rows, out);
  }
};

struct Int8GroupTile {
  static constexpr WeightKind kKind = WeightKind::int8_g32;
  using Codes = Int8Codes;
  template <int T>
  struct Header : ScalePairs<T> {
    VecF add_min(float, int, VecF total) const { return total; }
  };
  template <int R, int T>
  MLF_INLINE static void dot(TileReader* tiles, const CodeRows<R>& rows, VecF* out) {
    Int8Tile::dot<R, T>(tiles, rows, out);
  }
};

// Scale and min: the sum of (scale * code + min) * x = scale * dot + min * sum(x).
struct Int4Tile {
  static constexpr WeightKind kKind = WeightKind::int4_g32;
  using Codes = Int4Codes;
  template <int T>
  struct Header {
    const uint16_t* halves[T] = {};
    void read(TileReader* tiles, int64_t) {
      MLF_UNROLL for (int t = 0; t < T; ++t) halves[t] =
          reinterpret_cast<const uint16_t*>(tiles[t].next());
    }
    VecF scale() const { return load_half(halves[0]); }
    VecF min() const { return load_half(halves[0] + kTileRows); }
    VecF add(VecF dot, VecF scale, int t, VecF total) const {
      return fma(mul(dot, scale), load_half(halves[t]), total);
    }
    VecF add_min(float group_sum, int t, VecF total) const {
      return fma(load_half(halves[t] + kTileRows), splat(group_sum), total);
    }
  };
  template <int R, int T>
  MLF_INLINE static void dot(TileReader* tiles, const CodeRows<R>& rows, VecF* out) {
    group_values_int4<R, T>(tiles, rows, out);
  }
};

// As above, bit for bit, with minimums that follow from the scales.
struct Int4SymmetricTile {
  static constexpr WeightKind kKind = WeightKind::int4_sym_g32;
  using Codes = Int4Codes;
  template <int T>
  struct Header : ScalePairs<T> {
    VecF min() const { return mul(this->scale(), splat(kSymmetricMin)); }
    VecF add_min(float group_sum, int t, VecF total) const {
      return fma(load_half(this->scales[t]), splat(kSymmetricMin * group_sum), total);
    }
  };
  template <int R, int T>
  MLF_INLINE static void dot(TileReader* tiles, const CodeRows<R>& rows, VecF* out) {
    Int4Tile::dot<R, T>(tiles, rows, out);
  }
};

// low[row * stride + t] (16 outputs) += low codes of the wide groups of many rows . tiles[t]: group
// by group, so that a group's weights are loaded once, for a row in nine or so.
template <class Format, int T>
inline void wide_dot_tiles(const uint8_t* const* tiles, const WideGroups& wide, int64_t stride,
                           VecF* low) {
  for (const WideGroup* at = wide.begin; at < wide.end;) {
    const int64_t group = at->group;
    // from the header that the group shares, where it has one
    const int64_t first = group / kGroupsPerHeader * kGroupsPerHeader;
    TileReader readers[T];
    MLF_UNROLL for (int t = 0; t < T; ++t)
        readers[t] = {tiles[t] + header_line(Format::kKind, first) * kStepBytes, 0};
    typename Format::template Header<T> header;
    header.read(readers, first);
    if (group != first) {
      MLF_UNROLL for (int t = 0; t < T; ++t) readers[t].line =
          tiles[t] + header_line(Format::kKind, group) * kStepBytes;
      header.read(readers, group);
    }
    typename Format::Codes codes[T];
    MLF_UNROLL for (int t = 0; t < T; ++t) codes[t].read(readers[t]);
    for (; at < wide.end && at->group == group; ++at) {
      VecF* totals = low + at->row * stride;
      MLF_UNROLL for (int t = 0; t < T; ++t) {
        const VecF sum = codes[t].dot_row(at->codes, at->offset);
        totals[t] = header.add(sum, splat(at->scale), t, totals[t]);
      }
    }
  }
}

// total[m * T + t] (16 outputs) = x[m] . tile[t]: an exact integer per group, then a fused
// multiply-add with its scales. Low codes have totals of their own, added at the end. Few rows take
// them along, because a stream that is read twice is slow; for many they are there already, in
// `low`.
#if defined(MLF_OWN_GROUP_DOT)
// total += the low codes of a row . one group of a tile. Not inlined: it is rare, and may not take
// registers from the loop that calls it.
template <class Format>
__attribute__((noinline, cold)) void add_low_codes(TileReader reader,
                                                   typename Format::template Header<1> header,
                                                   const Activations& x, int64_t row, int64_t group,
                                                   VecF* total) {
  typename Format::Codes codes;
  codes.read(reader);
  const VecF dot = codes.dot_row(x.low_codes + row * x.padded_cols() + group * kGroup, 0);
  *total = header.add(dot, splat(low_scale(x.scales[row * x.groups() + group])), 0, *total);
}

// With 32 registers of 128 bits the totals take most of them, so tiles take turns, group by group:
// each is still a stream of its own. A wide group, one in nine or so, is multiplied again with its
// low codes, whose totals are in memory.
template <class Format, int M, int T>
inline void tile_dot_groups(TileReader* tiles, const Activations& x, const VecF* low_done,
                            VecF* total) {
  constexpr bool kAlong = M <= kRowsWithLowCodes;
  const int64_t groups = x.groups();
  VecF sums[M * T];
  MLF_UNROLL for (int i = 0; i < M * T; ++i) sums[i] = splat(0.0f);
  if constexpr (kAlong)
    for (int i = 0; i < M * T; ++i) total[i] = splat(0.0f);
  TileReader readers[T];  // copies: nobody has their address, so they can be in registers
  typename Format::template Header<1> headers[T];
  MLF_UNROLL for (int t = 0; t < T; ++t) readers[t] = tiles[t];
  for (int64_t group = 0; group < groups; ++group) {
    const auto rows = CodeRows<M>::of(x, group, Constant<M>());
    float scales[M], group_sums[M];
    bool wide[M];
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      scales[m] = x.scales[m * groups + group];
      group_sums[m] = x.group_sums[m * groups + group];
      wide[m] = x.wide[m * groups + group] != 0;
    }
    MLF_UNROLL for (int t = 0; t < T; ++t) {
      headers[t].read(readers + t, group);
      const TileReader start = readers[t];
      VecF dots[M];
      Format::template dot<M, 1>(readers + t, rows, dots);
      MLF_UNROLL for (int m = 0; m < M; ++m) {
        VecF& sum = sums[m * T + t];
        sum = headers[t].add(dots[m], splat(scales[m]), 0, sum);
        sum = headers[t].add_min(group_sums[m], 0, sum);
      }
      if constexpr (kAlong) {
        MLF_UNROLL for (int m = 0; m < M; ++m) if (__builtin_expect(wide[m], 0))
            add_low_codes<Format>(start, headers[t], x, m, group, total + m * T + t);
      }
    }
  }
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] =
      add(sums[i], kAlong ? total[i] : low_done[i]);
}
#else
template <class Format, int M, int T>
MLF_INLINE void tile_dot_groups(TileReader* tiles, const Activations& x, const VecF* low_done,
                                VecF* total) {
  constexpr bool kAlong = M <= kRowsWithLowCodes;
  const int64_t groups = x.groups();
  typename Format::template Header<T> header;
  VecF sums[M * T], low[M * T];
  MLF_UNROLL for (int i = 0; i < M * T; ++i) sums[i] = low[i] = splat(0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    header.read(tiles, group);
    VecF dots[2 * M * T];
    bool any_wide = false;
    if constexpr (kAlong)
      for (int m = 0; m < M; ++m) any_wide |= x.wide[m * groups + group] != 0;
    if (kAlong && any_wide) {
      if constexpr (kAlong)
        Format::template dot<2 * M, T>(tiles, CodeRows<2 * M>::of(x, group, Constant<M>()), dots);
      MLF_UNROLL for (int i = 0; i < M * T; ++i) {
        const VecF scale = splat(low_scale(x.scales[i / T * groups + group]));
        low[i] = header.add(dots[M * T + i], scale, i % T, low[i]);
      }
    } else {
      Format::template dot<M, T>(tiles, CodeRows<M>::of(x, group, Constant<M>()), dots);
    }
    MLF_UNROLL for (int i = 0; i < M * T; ++i) {
      const int64_t at = i / T * groups + group;
      sums[i] = header.add(dots[i], splat(x.scales[at]), i % T, sums[i]);
      sums[i] = header.add_min(x.group_sums[at], i % T, sums[i]);
    }
  }
  MLF_UNROLL for (int i = 0; i < M * T; ++i) total[i] = add(sums[i], kAlong ? low[i] : low_done[i]);
}
#endif

// With one scale per token: the sum over all inputs is an exact integer. It fits int32 up to
// 2^31 / (128 * 127) = 132104 inputs.
template <int M, int T>
MLF_INLINE void tile_dot_w8a8(TileReader* tiles, const Activations& x, VecF* y) {
  VecI total[M * T];
  sums_of_groups<M, T>(tiles, x, total);
  MLF_UNROLL for (int i = 0; i < M * T; ++i) y[i] =
      mul(to_float(total[i]), splat(x.scales[i / T * x.groups()]));
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

// A tile to be multiplied, together with others of the same kind and width. Those far from each
// other are separate streams for the hardware prefetcher, which one stream alone leaves half idle.
struct TileRef {
  const Weight* weight;
  int64_t tile;
  int64_t ahead;  // see TileReader

  const uint8_t* data() const {
    return weight->data + tile * tile_nbytes(weight->kind, weight->cols);
  }
};

// low[row * T + t] (16 outputs) = low codes of the wide groups of `rows` rows . tiles[t], for more
// rows than take them along.
template <int T>
__attribute__((noinline)) void wide_dot(const WideGroups& wide, int64_t rows, const TileRef* tiles,
                                        VecF* low) {
  constexpr int kAtOnce = T % kBlockTiles == 0 ? kBlockTiles : 1;  // what registers hold
  for (int64_t i = 0; i < rows * T; ++i) low[i] = splat(0.0f);
  const WeightKind kind = tiles[0].weight->kind;
  for (int t = 0; t < T; t += kAtOnce) {
    const uint8_t* data[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i)
      data[i] = tiles[t + i].data() + (kind == WeightKind::int8 ? kHeaderBytes : 0);
    if (kind == WeightKind::int4_g32) wide_dot_tiles<Int4Tile, kAtOnce>(data, wide, T, low + t);
    else if (kind == WeightKind::int4_sym_g32)
      wide_dot_tiles<Int4SymmetricTile, kAtOnce>(data, wide, T, low + t);
    else if (kind == WeightKind::int8_g32)
      wide_dot_tiles<Int8GroupTile, kAtOnce>(data, wide, T, low + t);
    else wide_dot_tiles<Int8Tile, kAtOnce>(data, wide, T, low + t);
  }
}

// As tile_dot below, for quantized weights.
template <int M, int T, bool Fetches>
MLF_INLINE void tile_dot_quantized(const Activations& x, const VecF* low, const TileRef* refs,
                                   VecF* y) {
  const WeightKind kind = refs[0].weight->kind;
  TileReader tiles[T];
  for (int t = 0; t < T; ++t) tiles[t] = {refs[t].data(), Fetches ? refs[t].ahead : 0};
  if (kind == WeightKind::int4_g32) return tile_dot_groups<Int4Tile, M, T>(tiles, x, low, y);
  if (kind == WeightKind::int4_sym_g32)
    return tile_dot_groups<Int4SymmetricTile, M, T>(tiles, x, low, y);
  if (kind == WeightKind::int8_g32) return tile_dot_groups<Int8GroupTile, M, T>(tiles, x, low, y);
  VecF scales[T];
  for (int t = 0; t < T; ++t) scales[t] = load(reinterpret_cast<const float*>(tiles[t].next()));
  if (x.kind == ActivationKind::int8) tile_dot_w8a8<M, T>(tiles, x, y);
  else tile_dot_groups<Int8Tile, M, T>(tiles, x, low, y);
  for (int i = 0; i < M * T; ++i) y[i] = mul(y[i], scales[i % T]);
}

// y[m * T + t] (16 outputs) = x[m] . tiles[t], for m < M and t < T; `low` see wide_dot.
// Not inlined: its callers share one copy of these loops, and a call is small beside a tile.
template <int M, int T>
__attribute__((noinline)) void tile_dot(const Activations& x, const VecF* low, const TileRef* refs,
                                        VecF* y) {
  const WeightKind kind = refs[0].weight->kind;
  if (!is_quantized(kind)) {
    for (int t = 0; t < T; ++t) {
      const Weight& weight = *refs[t].weight;
      const int64_t row = refs[t].tile * kTileRows;
      const int64_t rows = weight.rows - row < kTileRows ? weight.rows - row : kTileRows;
      VecF column[M];
      if (kind == WeightKind::fp32)
        tile_dot_float<M>(reinterpret_cast<const float*>(weight.data) + row * weight.cols, rows, x,
                          column);
      else
        tile_dot_float<M>(reinterpret_cast<const uint16_t*>(weight.data) + row * weight.cols, rows,
                          x, column);
      for (int m = 0; m < M; ++m) y[m * T + t] = column[m];
    }
    return;
  }
  bool fetches = false;
  for (int t = 0; t < T; ++t) fetches |= refs[t].ahead != 0;
  // Lone rows have a loop of their own without branches for prefetches: from cache, they cost 10%.
  if (M == 1 && !fetches) return tile_dot_quantized<M, T, false>(x, low, refs, y);
  tile_dot_quantized<M, T, true>(x, low, refs, y);
}
