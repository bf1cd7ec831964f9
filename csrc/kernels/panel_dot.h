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
constexpr int kPanelStep = 1;

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
#endif

constexpr int64_t kBlockGroups = 32;  // 16 KB of codes, 4 to 8 KB of scales

struct PanelBlock {
  alignas(64) uint8_t codes[kBlockGroups][kGroup * kTileRows];
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
#if defined(MLF_PAIRED_PANELS)
      panel_pack(lines, block.codes[at]);
#else
      block.groups[at] = lines;
#endif
    }
  }
}

#endif
#if defined(MLF_OWN_GROUP_DOT)

// M rows of a panel. Where rows come in pairs, the last one of an odd number is its own partner.
template <int M>
struct PanelRows {
  const int8_t* codes[M];
  const float* scales[M];
  const float* group_sums[M];

  PanelRows(const Activations& x, int64_t rows, int64_t first_row) {
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      const int64_t row = first_row + m < rows ? first_row + m : rows - 1;
      codes[m] = x.codes + row * x.padded_cols();
      scales[m] = x.scales + row * x.groups();
      group_sums[m] = x.group_sums + row * x.groups();
    }
  }
  static VecF at(const float* const* of_rows, int m, int64_t group) {
#if defined(MLF_PAIRED_PANELS)
    return panel_splat(of_rows[m / 2 * 2][group], of_rows[m / 2 * 2 + 1][group]);
#else
    return splat(of_rows[m][group]);
#endif
  }
  // Which of the 16 numbers per output go with sum m.
  static int outputs_of(int m) { return m % kPanelStep * kTileRows; }
};

// totals[m] += the groups [first, last) of the tile times M rows.
template <class Format, int M>
inline void panel_block(const PanelBlock& block, PanelRows<M> rows, int64_t first, int64_t last,
                        VecF* totals) {
  VecF sums[M];
  MLF_UNROLL for (int m = 0; m < M; ++m) {
    sums[m] = totals[m];
    rows.codes[m] += first * kGroup;
  }
  for (int64_t group = first; group < last; ++group) {
    DotSum acc[M];
    MLF_UNROLL for (int m = 0; m < M; ++m) acc[m] = group_begin();
    panel_dot_group<M>(block.groups[group - first], rows.codes, acc);
    MLF_UNROLL for (int m = 0; m < M; ++m) {
      rows.codes[m] += kGroup;
      const int64_t at = group - first;
      const VecF dot = group_value(acc[m]), scale = rows.at(rows.scales, m, group);
      if constexpr (Format::kKind == WeightKind::int8) {
        sums[m] = fma(dot, scale, sums[m]);
      } else {
        const VecF of_weights = load(block.scales[at] + rows.outputs_of(m));
        sums[m] = fma(mul(dot, scale), of_weights, sums[m]);
      }
      if constexpr (is_int4(Format::kKind))
        sums[m] = fma(load(block.mins[at] + rows.outputs_of(m)), rows.at(rows.group_sums, m, group),
                      sums[m]);
    }
  }
  MLF_UNROLL for (int m = 0; m < M; ++m) totals[m] = sums[m];
}

// With one scale per token, integers are added up over all groups.
template <int M>
inline void panel_block_w8a8(const PanelBlock& block, PanelRows<M> rows, int64_t first,
                             int64_t last, DotSum* totals) {
  DotSum acc[M];
  MLF_UNROLL for (int m = 0; m < M; ++m) {
    acc[m] = totals[m];
    rows.codes[m] += first * kGroup;
  }
  for (int64_t at = 0; at < last - first; ++at) {
    panel_dot_group<M>(block.groups[at], rows.codes, acc);
    MLF_UNROLL for (int m = 0; m < M; ++m) rows.codes[m] += kGroup;
  }
  MLF_UNROLL for (int m = 0; m < M; ++m) totals[m] = acc[m];
}

// Call use(Constant<M>(), first row) for all rows, and prepare(first, last) before each block of
// groups: the loops of both kinds.
template <class Format, class Use>
inline void for_each_panel_block(const TileReader& start, int64_t groups, int64_t rows, Use use) {
  TileReader tile = start;
  typename Format::template Header<1> header;
  PanelBlock block;
  for (int64_t first = 0; first < groups; first += kBlockGroups) {
    const int64_t last = first + kBlockGroups < groups ? first + kBlockGroups : groups;
    prepare_block<Format>(tile, header, first, last, block);
    if constexpr (kPanelStep == 1)
      for_each_block<kDotRows>(
          rows, [&](auto count, int64_t row) { use(count, row, block, first, last); });
    else
      for_each_block<kDotRows / kPanelStep>(ceil_div(rows, kPanelStep), [&](auto pairs, int64_t i) {
        use(Constant<decltype(pairs)::value * kPanelStep>(), i * kPanelStep, block, first, last);
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
inline void panel_groups(const TileReader& start, const Activations& x, const VecF* low,
                         int64_t rows, VecF* y) {
  for (int64_t row = 0; row < rows + rows % kPanelStep; ++row) y[row] = splat(0.0f);
  for_each_panel_block<Format>(
      start, x.groups(), rows,
      [&](auto count, int64_t row, const PanelBlock& block, int64_t first, int64_t last) {
        constexpr int M = decltype(count)::value;
        panel_block<Format, M>(block, PanelRows<M>(x, rows, row), first, last, y + row);
      });
  unpair_rows(y, rows);
  for (int64_t row = 0; row < rows; ++row) y[row] = add(y[row], low[row]);
}

template <int Rows>
inline void panel_w8a8(const TileReader& start, const Activations& x, int64_t rows, VecF* y) {
  DotSum totals[Rows];
  for (int64_t row = 0; row < rows + rows % kPanelStep; ++row) totals[row] = dot_begin(0);
  for_each_panel_block<Int8Tile>(
      start, x.groups(), rows,
      [&](auto count, int64_t row, const PanelBlock& block, int64_t first, int64_t last) {
        constexpr int M = decltype(count)::value;
        panel_block_w8a8<M>(block, PanelRows<M>(x, rows, row), first, last, totals + row);
      });
  for (int64_t row = 0; row < rows + rows % kPanelStep; ++row)
    y[row] = to_float(dot_result(totals[row]));
  unpair_rows(y, rows);
  for (int64_t row = 0; row < rows; ++row) y[row] = mul(y[row], splat(x.scales[row * x.groups()]));
}

// Not inlined, as tile_dot.
template <int Rows>
__attribute__((noinline)) void panel_dot(const Activations& x, const VecF* low, int64_t rows,
                                         const TileRef& ref, VecF* y) {
  TileReader start{ref.data(), ref.ahead};
  const WeightKind kind = ref.weight->kind;
  if (kind == WeightKind::int4_g32) return panel_groups<Int4Tile, Rows>(start, x, low, rows, y);
  if (kind == WeightKind::int4_sym_g32)
    return panel_groups<Int4SymmetricTile, Rows>(start, x, low, rows, y);
  if (kind == WeightKind::int8_g32)
    return panel_groups<Int8GroupTile, Rows>(start, x, low, rows, y);
  const VecF scales = load(reinterpret_cast<const float*>(start.next_lines(1)));
  if (x.kind == ActivationKind::int8) panel_w8a8<Rows>(start, x, rows, y);
  else panel_groups<Int8Tile, Rows>(start, x, low, rows, y);
  for (int64_t row = 0; row < rows; ++row) y[row] = mul(y[row], scales);
}

#endif
