// One tile times rows of a panel, kMatrixRows at once, for ISAs with matrix instructions, or with
// too few registers for tile_dot. The operations on each output are those of tile_dot, in the same
// order.
#if defined(MLF_MATRIX)

// Rows of a panel that are multiplied so.
inline int64_t matrix_rows(int64_t rows) { return rows / kMatrixRows * kMatrixRows; }

// total + a group's products, of which group `at` of the block says how much they count.
template <class Format>
MLF_INLINE VecF add_group(VecF total, VecI products, const PanelBlock& block, int64_t at,
                          float scale, float group_sum) {
  const VecF dot = to_float(products);
  if constexpr (Format::kKind == WeightKind::int8) return fma(dot, splat(scale), total);
  total = fma(mul(dot, splat(scale)), load(block.scales[at]), total);
  if constexpr (is_int4(Format::kKind)) return fma(load(block.mins[at]), splat(group_sum), total);
  return total;
}

#if defined(MLF_AMX)

// totals[r * stride] += the first `count` groups of the block times row + r of x, of kMatrixRows
// rows, whose own groups start at `first`. Products of the next groups are on their way while sums
// are scaled and added.
template <class Format>
inline void matrix_block(const PanelBlock& block, const Activations& all, const PanelInputs&,
                         int64_t row, int64_t first, int64_t count, int64_t stride, VecF* totals) {
  const Activations x = all.from_row(row);
  alignas(64) MatrixSums results[2][kMatrixSums];
  const int8_t* codes = x.codes + first * kGroup;
  const auto multiply = [&](int64_t at) {
    const int64_t left = count - at;
    if (left > 0)
      matrix_products(block.groups + at, left < kMatrixSums ? left : kMatrixSums,
                      codes + at * kGroup, x.padded_cols(), results[at / kMatrixSums % 2]);
  };
  VecF sums[kMatrixRows];
  MLF_UNROLL for (int r = 0; r < kMatrixRows; ++r) sums[r] = totals[r * stride];
  multiply(0);
  for (int64_t at = 0; at < count; ++at) {
    if (at % kMatrixSums == 0) multiply(at + kMatrixSums);
    const MatrixSums& found = results[at / kMatrixSums % 2][at % kMatrixSums];
    const float* scales = x.scales + first + at;
    const float* group_sums = x.group_sums + first + at;
    MLF_UNROLL for (int r = 0; r < kMatrixRows; ++r) sums[r] =
        add_group<Format>(sums[r], load_ints(found[r]), block, at, scales[r * x.groups()],
                          group_sums[r * x.groups()]);
  }
  MLF_UNROLL for (int r = 0; r < kMatrixRows; ++r) totals[r * stride] = sums[r];
}

// The same with one scale per token: integers are added up over all groups.
inline void matrix_block_w8a8(const PanelBlock& block, const Activations& all, const PanelInputs&,
                              int64_t row, int64_t first, int64_t count, VecI* totals) {
  const Activations x = all.from_row(row);
  alignas(64) MatrixSums results[kMatrixSums];
  matrix_products(block.groups, count, x.codes + first * kGroup, x.padded_cols(), results);
  for (int64_t i = 0; i < kMatrixSums && i < count; ++i)
    for (int r = 0; r < kMatrixRows; ++r) totals[r] = add(totals[r], load_ints(results[i][r]));
}

#else

// As above, of words. Sums of products take the registers, so totals are in memory.
template <class Format>
inline void matrix_block(const PanelBlock& block, const Activations& all, const PanelInputs& inputs,
                         int64_t row, int64_t first, int64_t count, int64_t stride, VecF* totals) {
  const Activations x = all.from_row(row);
  const int64_t cols = x.padded_cols(), groups = x.groups();
  for (int64_t at = 0; at < count; ++at) {
    const int64_t group = first + at;
    VecI products[kMatrixRows];
    if constexpr (is_int4(Format::kKind)) {
      panel_products_int4<kMatrixRows>(block.groups[at], x.codes + group * kGroup, cols, products);
    } else {
      MLF_UNROLL for (VecI& each : products) each = splat_int(0);
      panel_products<kMatrixRows>(block.groups[at], inputs.words + row * cols + group * kGroup,
                                  cols, products);
    }
    MLF_UNROLL for (int r = 0; r < kMatrixRows; ++r) totals[r * stride] =
        add_group<Format>(totals[r * stride], products[r], block, at, x.scales[r * groups + group],
                          x.group_sums[r * groups + group]);
  }
}

inline void matrix_block_w8a8(const PanelBlock& block, const Activations& x,
                              const PanelInputs& inputs, int64_t row, int64_t first, int64_t count,
                              VecI* totals) {
  const int16_t* words = inputs.words + row * x.padded_cols() + first * kGroup;
  VecI sums[kMatrixRows];
  MLF_UNROLL for (int r = 0; r < kMatrixRows; ++r) sums[r] = totals[r];
  for (int64_t at = 0; at < count; ++at)
    panel_products<kMatrixRows>(block.groups[at], words + at * kGroup, x.padded_cols(), sums);
  MLF_UNROLL for (int r = 0; r < kMatrixRows; ++r) totals[r] = sums[r];
}

#endif

// Call use(block, first row, first group, groups) for all rows, kMatrixRows at once, and blocks of
// groups.
template <class Format, class Use>
inline void for_each_matrix_block(TileReader tile, int64_t groups, int64_t rows, Use use) {
  typename Format::template Header<1> header;
  PanelBlock block;
  for (int64_t first = 0; first < groups; first += kBlockGroups) {
    const int64_t last = first + kBlockGroups < groups ? first + kBlockGroups : groups;
    prepare_block<Format>(tile, header, first, last, block);
    for (int64_t row = 0; row < rows; row += kMatrixRows) use(block, row, first, last - first);
  }
}

template <class Format>
inline void matrix_groups(const TileReader& tile, const Activations& x, const PanelInputs& inputs,
                          const VecF* low, int64_t rows, int64_t stride, VecF* y) {
  for (int64_t row = 0; row < rows; ++row) y[row * stride] = splat(0.0f);
  for_each_matrix_block<Format>(
      tile, x.groups(), rows,
      [&](const PanelBlock& block, int64_t row, int64_t first, int64_t count) {
        matrix_block<Format>(block, x, inputs, row, first, count, stride, y + row * stride);
      });
  for (int64_t row = 0; row < rows; ++row)
    y[row * stride] = add(y[row * stride], low[row * stride]);
}

template <int Rows>
inline void matrix_w8a8(const TileReader& tile, const Activations& x, const PanelInputs& inputs,
                        int64_t rows, int64_t stride, VecF* y) {
  VecI totals[Rows];
  for (int64_t row = 0; row < rows; ++row) totals[row] = splat_int(0);
  for_each_matrix_block<Int8Tile>(
      tile, x.groups(), rows,
      [&](const PanelBlock& block, int64_t row, int64_t first, int64_t count) {
        matrix_block_w8a8(block, x, inputs, row, first, count, totals + row);
      });
  for (int64_t row = 0; row < rows; ++row)
    y[row * stride] = mul(to_float(totals[row]), splat(x.scales[row * x.groups()]));
}

// y[row * stride] = x[row] . tile for `rows` rows, a multiple of kMatrixRows and at most Rows;
// `low` see wide_dot. Not inlined, as tile_dot.
template <int Rows>
__attribute__((noinline)) void matrix_dot(const Activations& x, const PanelInputs& inputs,
                                          const VecF* low, int64_t rows, int64_t stride,
                                          const TileRef& ref, VecF* y) {
  TileReader tile{ref.data(), ref.ahead};
  const WeightKind kind = ref.weight->kind;
  if (kind == WeightKind::int4_g32)
    return matrix_groups<Int4Tile>(tile, x, inputs, low, rows, stride, y);
  if (kind == WeightKind::int4_sym_g32)
    return matrix_groups<Int4SymmetricTile>(tile, x, inputs, low, rows, stride, y);
  if (kind == WeightKind::int8_g32)
    return matrix_groups<Int8GroupTile>(tile, x, inputs, low, rows, stride, y);
  const VecF scales = load(reinterpret_cast<const float*>(tile.next()));
  if (x.kind == ActivationKind::int8) matrix_w8a8<Rows>(tile, x, inputs, rows, stride, y);
  else matrix_groups<Int8Tile>(tile, x, inputs, low, rows, stride, y);
  for (int64_t row = 0; row < rows; ++row) y[row * stride] = mul(y[row * stride], scales);
}

#endif
