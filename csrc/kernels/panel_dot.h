// One tile times all rows of a panel, for ISAs that gain from rearranging its codes first: nibbles
// become bytes and scales floats once, not once per few rows. In blocks of groups that stay in the
// first-level cache together with the rows that they are multiplied with. The operations on each
// output are those of tile_dot, in the same order.
#if defined(MLF_OWN_GROUP_DOT) || defined(MLF_MATRIX)

#if defined(MLF_MATRIX)
constexpr int kPanelStep = 1;
inline void panel_store_outputs(float* p, VecF v) { store(p, v); }
#elif !defined(MLF_PAIRED_PANELS)
constexpr int kPanelRows = 16;  // from so many rows on
constexpr int kPanelStep = 1;   // rows whose sums share registers: a unit

inline void panel_pack_int4(const uint8_t* lines, uint8_t* out) {
  for (int i = 0; i < 256; i += 16) {
    const uint8x16_t both = vld1q_u8(lines + i);
    vst1q_u8(out + i, vandq_u8(both, vdupq_n_u8(15)));
    vst1q_u8(out + i + 256, vshrq_n_u8(both, 4));
  }
}
template <int M>
MLF_INLINE void panel_dot_group(const uint8_t* group, const int8_t* const* codes, DotSum* acc) {
  dot_group<M, 1>(&group, codes, acc);
}
inline void panel_store_outputs(float* p, VecF v) { store(p, v); }
// sum + a * b, a * b, with one number b of a unit.
MLF_INLINE float32x4_t unit_fma(float32x4_t a, const float* b, float32x4_t sum) {
  return vfmaq_n_f32(sum, a, *b);
}
MLF_INLINE float32x4_t unit_mul(float32x4_t a, const float* b) { return vmulq_n_f32(a, *b); }

// The rows of a panel as units: as they are.
struct PanelInputs {
  static constexpr int kFloats = 1;  // that hold one number of a unit
  int64_t groups;
  const int8_t* codes;
  const float *scales, *group_sums;

  static int64_t most_rows(int64_t) { return INT64_MAX; }
  void take(const Activations& x, int64_t) {
    groups = x.groups();
    codes = x.codes;
    scales = x.scales;
    group_sums = x.group_sums;
  }
};
#endif

#if !defined(MLF_MATRIX)
constexpr int64_t kBlockGroups = 32;  // 16 KB of codes, 4 to 8 KB of scales
constexpr int64_t kPackedGroupBytes = kGroup * kTileRows;
#endif

struct PanelBlock {
  alignas(64) uint8_t codes[kBlockGroups][kPackedGroupBytes];
  const uint8_t* groups[kBlockGroups];  // there, or in the tile itself
  float scales[kBlockGroups][kPanelStep * kTileRows];
  float mins[kBlockGroups][kPanelStep * kTileRows];
};

// Read the groups [first, last) of a tile.
template <class Format>
inline void prepare_block(TileReader& tile, typename Format::template Header<1>& header,
                          int64_t first, int64_t last, PanelBlock& block) {
  for (int64_t group = first; group < last; ++group) {
    const int64_t at = group - first;
    header.read(&tile, group);
    if constexpr (Format::kKind != WeightKind::int8)
      panel_store_outputs(block.scales[at], header.scale());
    block.groups[at] = block.codes[at];
    if constexpr (is_int4(Format::kKind)) {
      panel_store_outputs(block.mins[at], header.min());
      panel_pack_int4(tile.next_lines(kStepsPerGroup / 2), block.codes[at]);
    } else {
      const uint8_t* lines = tile.next_lines(kStepsPerGroup);
#if defined(MLF_PACKED_INT8)
      panel_pack(lines, block.codes[at]);
#else
      block.groups[at] = lines;
#endif
    }
  }
}

#endif
#if defined(MLF_OWN_GROUP_DOT)

// U units of a panel, at some group.
template <int U>
struct PanelUnits {
  const int8_t* codes[U];
  const float* scales[U];
  const float* group_sums[U];

  PanelUnits(const PanelInputs& x, int64_t first_unit, int64_t group) {
    MLF_UNROLL for (int u = 0; u < U; ++u) {
      const int64_t at = (first_unit + u) * x.groups + group;
      codes[u] = x.codes + at * kGroup * kPanelStep;
      scales[u] = x.scales + at * PanelInputs::kFloats;
      group_sums[u] = x.group_sums + at * PanelInputs::kFloats;
    }
  }
  void next() {
    MLF_UNROLL for (int u = 0; u < U; ++u) {
      codes[u] += kGroup * kPanelStep;
      scales[u] += PanelInputs::kFloats;
      group_sums[u] += PanelInputs::kFloats;
    }
  }
};

#if defined(MLF_PANEL_HALVES)
// The same operations for 4 rows, in assembly (panel_q.h).
constexpr int kHalfRows = 4;
template <class Format>
__attribute__((noinline)) void panel_halves(const PanelBlock& block,
                                            const PanelUnits<kHalfRows / kPanelStep>& units,
                                            int64_t count, VecF* totals) {
  PanelBlockArgs args{reinterpret_cast<float*>(totals),
                      block.groups,
                      block.scales[0],
                      block.mins[0],
                      count,
                      {},
                      {},
                      {}};
  for (int u = 0; u < kHalfRows / kPanelStep; ++u) {
    args.codes[u] = units.codes[u];
    args.unit_scales[u] = units.scales[u];
    args.unit_sums[u] = units.group_sums[u];
  }
  if constexpr (Format::kKind == WeightKind::int8)
    MLF_PANEL_ASM(MLF_FIRST_DOT MLF_FIRST(MLF_ADD) MLF_SECOND_DOT MLF_SECOND(MLF_ADD)
                      MLF_NEXT_UNITS);
  else if constexpr (Format::kKind == WeightKind::int8_g32)
    MLF_PANEL_ASM(MLF_FIRST_DOT MLF_FIRST(MLF_ADD_SCALED) MLF_SECOND_DOT MLF_SECOND(MLF_ADD_SCALED)
                      MLF_NEXT_UNITS MLF_NEXT_SCALES);
  else
    MLF_PANEL_ASM(MLF_FIRST_DOT MLF_FIRST(MLF_ADD_SCALED) MLF_FIRST(MLF_ADD_MINS)
                      MLF_SECOND_DOT MLF_SECOND(MLF_ADD_SCALED) MLF_SECOND(MLF_ADD_MINS)
                          MLF_NEXT_UNITS MLF_NEXT_SCALES MLF_NEXT_MINS);
}
#endif

// totals += the groups of a block of the tile times M rows, of which each unit has kPanelStep
// vectors: 4 numbers of q[i] of vector v are at offset 16 * v + 4 * i of what is kept per output.
template <class Format, int M>
inline void panel_block(const PanelBlock& block, PanelUnits<M / kPanelStep> units, int64_t count,
                        VecF* totals) {
#if defined(MLF_PANEL_HALVES)
  if constexpr (M == kHalfRows) return panel_halves<Format>(block, units, count, totals);
#endif
  VecF sums[M];
  MLF_UNROLL for (int m = 0; m < M; ++m) sums[m] = totals[m];
  for (int64_t at = 0; at < count; ++at, units.next()) {
    DotSum acc[M];
    MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = group_begin();
    panel_dot_group<M>(block.groups[at], units.codes, acc);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const VecF dot = group_value(acc[m]);
      const float *scale = units.scales[m / kPanelStep], *sum = units.group_sums[m / kPanelStep];
      MLF_EACH_Q {
        const int offset = m % kPanelStep * kTileRows + 4 * i;
        float32x4_t& total = sums[m].q[i];
        if constexpr (Format::kKind == WeightKind::int8) total = unit_fma(dot.q[i], scale, total);
        else
          total = vfmaq_f32(total, unit_mul(dot.q[i], scale), vld1q_f32(block.scales[at] + offset));
        if constexpr (is_int4(Format::kKind))
          total = unit_fma(vld1q_f32(block.mins[at] + offset), sum, total);
      }
    }
  }
  MLF_UNROLL for (int m = 0; m < M; ++m) totals[m] = sums[m];
}

// With one scale per token, integers are added up over all groups.
template <int M>
inline void panel_block_w8a8(const PanelBlock& block, PanelUnits<M / kPanelStep> units,
                             int64_t count, DotSum* totals) {
  DotSum acc[M];
  MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = totals[m];
  for (int64_t at = 0; at < count; ++at) {
    panel_dot_group<M>(block.groups[at], units.codes, acc);
    units.next();
  }
  MLF_UNROLL for (int m = 0; m < M; ++m) totals[m] = acc[m];
}

// Call use(Constant<M>(), first row, block, units, groups) for all rows, and each block of groups:
// the loops of both kinds.
template <class Format, class Use>
inline void for_each_panel_block(const TileReader& start, const PanelInputs& x, int64_t rows,
                                 Use use) {
  constexpr int kUnits = kDotRows / kPanelStep;
  TileReader tile = start;
  typename Format::template Header<1> header;
  PanelBlock block;
  for (int64_t first = 0; first < x.groups; first += kBlockGroups) {
    const int64_t last = first + kBlockGroups < x.groups ? first + kBlockGroups : x.groups;
    prepare_block<Format>(tile, header, first, last, block);
    for_each_block<kUnits>(ceil_div(rows, kPanelStep), [&](auto units, int64_t unit) {
      constexpr int U = decltype(units)::value;
      use(Constant<U * kPanelStep>(), unit * kPanelStep, block, PanelUnits<U>(x, unit, first),
          last - first);
    });
  }
}

inline void unpair_rows([[maybe_unused]] VecF* y, [[maybe_unused]] int64_t rows) {
#if defined(MLF_PAIRED_PANELS)
  for (int64_t row = 0; row < rows; row += 2) panel_unpair(y[row], y[row + 1]);
#endif
}

// y[row] = x[row] . tile for all `rows`, at most Rows, which is even; `low` see wide_dot.
template <class Format, int Rows>
inline void panel_groups(const TileReader& start, const PanelInputs& x, const VecF* low,
                         int64_t rows, VecF* y) {
  for (int64_t row = 0; row < rows + rows % kPanelStep; ++row) y[row] = splat(0.0f);
  for_each_panel_block<Format>(
      start, x, rows,
      [&](auto m, int64_t row, const PanelBlock& block, const auto& units, int64_t count) {
        panel_block<Format, decltype(m)::value>(block, units, count, y + row);
      });
  unpair_rows(y, rows);
  for (int64_t row = 0; row < rows; ++row) y[row] = add(y[row], low[row]);
}

template <int Rows>
inline void panel_w8a8(const TileReader& start, const PanelInputs& x, const Activations& rows_of,
                       int64_t rows, VecF* y) {
  DotSum totals[Rows];
  for (int64_t row = 0; row < rows + rows % kPanelStep; ++row) totals[row] = dot_begin(0);
  for_each_panel_block<Int8Tile>(
      start, x, rows,
      [&](auto m, int64_t row, const PanelBlock& block, const auto& units, int64_t count) {
        panel_block_w8a8<decltype(m)::value>(block, units, count, totals + row);
      });
  for (int64_t row = 0; row < rows + rows % kPanelStep; ++row)
    y[row] = to_float(dot_result(totals[row]));
  unpair_rows(y, rows);
  for (int64_t row = 0; row < rows; ++row)
    y[row] = mul(y[row], splat(rows_of.scales[row * rows_of.groups()]));
}

// Not inlined, as tile_dot. `inputs` are the rows x as units.
template <int Rows>
__attribute__((noinline)) void panel_dot(const Activations& x, const PanelInputs& inputs,
                                         const VecF* low, int64_t rows, const TileRef& ref,
                                         VecF* y) {
  TileReader start{ref.data(), ref.ahead};
  const WeightKind kind = ref.weight->kind;
  if (kind == WeightKind::int4_g32)
    return panel_groups<Int4Tile, Rows>(start, inputs, low, rows, y);
  if (kind == WeightKind::int4_sym_g32)
    return panel_groups<Int4SymmetricTile, Rows>(start, inputs, low, rows, y);
  if (kind == WeightKind::int8_g32)
    return panel_groups<Int8GroupTile, Rows>(start, inputs, low, rows, y);
  const VecF scales = load(reinterpret_cast<const float*>(start.next_lines(1)));
  if (x.kind == ActivationKind::int8) panel_w8a8<Rows>(start, inputs, x, rows, y);
  else panel_groups<Int8Tile, Rows>(start, inputs, low, rows, y);
  for (int64_t row = 0; row < rows; ++row) y[row] = mul(y[row], scales);
}

#endif
