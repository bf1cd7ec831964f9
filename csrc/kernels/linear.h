// Matrix products with weights of every kind, and the fused SwiGLU (Shazeer 2020).

inline int tile_width(const Weight& weight, int64_t tile) {
  const int64_t left = weight.rows - tile * kTileRows;
  return static_cast<int>(left < kTileRows ? left : kTileRows);
}

// Hardware prefetchers stop at every 4 KB page, and leave one or two streams half idle: those fetch
// one page ahead by software, and so do the six of 4-bit weights, whose lines take longest to use.
// Three or four streams are faster without.
constexpr int64_t kFetchBytes = 4096;

// What the reader of a tile, one of T streams, fetches: weights wanted later, or its own next ones.
// Of two passes that share the former, each takes every second line: a tile's worth at once would
// keep its loads waiting (measured with layer sharing: 5% of a step).
template <int T>
inline int64_t ahead_of(const Tiles& tiles, int64_t tile) {
  if (tiles.ahead && tiles.stride == 2) return tiles.ahead + (tiles.phase ? kOddSteps : kEvenSteps);
  if (tiles.ahead && tile % tiles.stride == tiles.phase) return tiles.ahead + kEveryStep;
  return T < 3 || T == 6 ? kFetchBytes + kEveryStep : 0;
}

// Call use(Constant<M>(), first row) for blocks of M rows: as many as fit the registers beside T
// tiles, and powers of two for the rest.
template <int T, class Use>
inline void for_each_row_block(int64_t rows, Use use) {
  constexpr int kMost = T == kBlockTiles ? kBlockRows : kDotRows / T;
  constexpr int kPower = kMost >= 8 ? 8 : kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
  int64_t row = 0;
  if constexpr (kMost > kPower)  // two equal blocks are better than a large and a small one
    for (; rows - row >= kMost && rows - row != 2 * kPower; row += kMost)
      use(Constant<kMost>(), row);
  for_each_block<kPower>(rows, use, row);
}

// Rows that are multiplied together, and their wide groups in one list.
struct Panel {
  // A tenth of the groups of 64 rows of 5120 inputs; a megabyte would be too much of a small stack.
  static constexpr int64_t kMaxRows = 64, kMaxWide = 1024;

  Activations x;
  int64_t rows;
  WideGroup wide[kMaxWide];
  int64_t wide_count = 0;
#if defined(MLF_OWN_GROUP_DOT) || defined(MLF_MATRIX)
  PanelInputs inputs;
#endif

  Panel(const Activations& all, int64_t first_row, int64_t left)
      : x(all.from_row(first_row)), rows(left < kMaxRows ? left : kMaxRows) {
    const int64_t groups = x.groups();
    while (lists_wide_groups() && count_wide() > kMaxWide) rows /= 2;
#if defined(MLF_OWN_GROUP_DOT) || defined(MLF_MATRIX)
    if (x.kind != ActivationKind::floating && rows > PanelInputs::most_rows(groups)) {
      const int64_t most = PanelInputs::most_rows(groups), few = kPanelRows - 1;
      rows = most > few ? most : rows < few ? rows : few;
    }
    inputs.take(x, rows);
#endif
    if (!lists_wide_groups()) return;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t row = 0; row < rows; ++row)
        if (x.wide[row * groups + group]) wide[wide_count++] = wide_group(row, group);
  }
  bool lists_wide_groups() const {
    return x.kind == ActivationKind::int8_g32 && x.may_be_wide && rows > kRowsWithLowCodes;
  }
  // Do products with such weights ask for sums of low codes, be there any or none?
  bool has_low_sums(WeightKind kind) const {
    const bool by_group = x.kind == ActivationKind::int8_g32 || kind != WeightKind::int8;
    return x.kind != ActivationKind::floating && by_group && rows > kRowsWithLowCodes;
  }
  int64_t count_wide() const {
    int64_t count = 0;
    for (int64_t i = 0; i < rows * x.groups(); ++i) count += x.wide[i];
    return count;
  }
  WideGroup wide_group(int64_t row, int64_t group) const {
    const int64_t at = row * x.groups() + group;
    WideGroup found{{},
                    x.offsets[2 * at + 1],
                    low_scale(x.scales[at]),
                    static_cast<int32_t>(row),
                    static_cast<int32_t>(group)};
    memcpy(found.codes, x.low_codes + row * x.padded_cols() + group * kGroup, kGroup);
    return found;
  }

  WideGroups wide_groups() const { return {wide, wide + wide_count}; }

  // use(y, first row, Constant<M>()) for blocks of M rows: y[m * T + t] = row m of them . tiles[t].
  template <int T, class Use>
  void dot(const TileRef (&tiles)[T], Use use) const {
    VecF low[kMaxRows * kBlockTiles];
    if (has_low_sums(tiles[0].weight->kind)) wide_dot<T>(wide_groups(), rows, tiles, low);
#if defined(MLF_OWN_GROUP_DOT)
    if constexpr (T == 1) {
      if (rows >= kPanelRows && is_quantized(tiles[0].weight->kind)) {
        VecF y[kMaxRows];
        panel_dot<kMaxRows>(x, inputs, low, rows, tiles[0], y);
        for (int64_t row = 0; row < rows; ++row) use(y + row, row, Constant<1>());
        return;
      }
    }
#endif
    int64_t done = 0;
#if defined(MLF_MATRIX)
    if constexpr (T <= kBlockTiles) {
      if (rows >= kPanelRows && is_quantized(tiles[0].weight->kind)) {
        VecF y[kMaxRows * T];
        done = matrix_rows(rows);
        for (int t = 0; t < T; ++t)
          matrix_dot<kMaxRows>(x, inputs, low + t, done, T, tiles[t], y + t);
        for (int64_t row = 0; row < done; ++row) use(y + row * T, row, Constant<1>());
      }
    }
#endif
    TileRef again[T];  // what the first rows have fetched is there
    for (int t = 0; t < T; ++t) again[t] = {tiles[t].weight, tiles[t].tile, 0};
    for_each_row_block<T>(rows - done, [&](auto count, int64_t first) {
      constexpr int M = decltype(count)::value;
      const int64_t row = done + first;
      VecF y[M * T];
      tile_dot<M, T>(x.from_row(row), low + row * T, row ? again : tiles, y);
      use(y, row, count);
    });
  }
};

// Call body(panel, first row) for all rows.
template <class Body>
inline void for_each_panel(const Activations& x, int64_t rows, Body body) {
  for (int64_t row = 0; row < rows;) {
    const Panel panel(x, row, rows - row);
    body(panel, row);
    row += panel.rows;
  }
}

// T streams of equally many tiles, and what is left in fewer.
template <int T>
inline void linear_streams(const Panel& x, const Weight& weight, float* out, int64_t out_stride,
                           Tiles tiles, bool accumulate) {
  const int64_t length = (tiles.end - tiles.begin) / T;
  for (int64_t first = tiles.begin; first < tiles.begin + length; ++first) {
    TileRef refs[T];
    for (int t = 0; t < T; ++t) {
      const int64_t tile = first + t * length;
      refs[t] = {&weight, tile, ahead_of<T>(tiles, tile)};
    }
    x.dot<T>(refs, [&](const VecF* y, int64_t first_row, auto count) {
      for (int t = 0; t < T; ++t) {
        const int width = tile_width(weight, refs[t].tile);
        for (int m = 0; m < decltype(count)::value; ++m) {
          float* p = out + (first_row + m) * out_stride + refs[t].tile * kTileRows;
          const VecF v = y[m * T + t];
          store_upto(p, accumulate ? add(load_upto(p, width), v) : v, width);
        }
      }
    });
  }
  tiles.begin += T * length;
  if constexpr (T > 1) {
    if (tiles.begin < tiles.end)
      linear_streams<(T > 4 ? 4 : T / 2)>(x, weight, out, out_stride, tiles, accumulate);
  }
}

// Call body(Constant<T>()) with the number of tiles for so many rows: few rows take as many as fit
// the registers beside them, to read many streams; many rows take those of a block.
template <int T, class Body>
inline void with_most_streams(int64_t rows, Body body) {
  if constexpr (T > kBlockTiles) {
    if (T * rows > kDotRows) return with_most_streams<T / 2>(rows, body);
  }
  body(Constant<T>());
}

// As above; `alone` is the best number for a single row, where the ISA has registers for it.
template <class Body>
inline void with_streams(int64_t rows, int alone, Body body) {
  if constexpr (kDotRows >= 8) {
    if (rows == 1 && alone == 6) return body(Constant<6>());
    if (rows == 1 && alone == 3) return body(Constant<3>());
    if (rows == 1 && alone == 2) return body(Constant<2>());
  }
  with_most_streams<kMaxStreams>(rows, body);
}

// Streams of equal length, so that none is left at the end.
inline int streams_of_row(const Weight& weight, int64_t tiles) {
  if (is_int4(weight.kind) && tiles >= 6) return 6;
  return tiles % 4 != 0 && tiles % 3 == 0 ? 3 : 4;
}

void linear(const Activations& x, const Weight& weight, float* out, int64_t rows,
            int64_t out_stride, const Tiles& tiles, bool accumulate) {
  for_each_panel(x, rows, [&](const Panel& panel, int64_t row) {
    const int alone = streams_of_row(weight, tiles.end - tiles.begin);
    with_streams(panel.rows, alone, [&](auto count) {
      linear_streams<decltype(count)::value>(panel, weight, out + row * out_stride, out_stride,
                                             tiles, accumulate);
    });
  });
}

// Two tiles make a group of the next layer's inputs, which is rounded while it is at hand.
inline void store_group(const float* values, const Activations& out, int64_t row, int64_t group) {
  const int64_t left = out.cols - group * kGroup, count = left < kGroup ? left : kGroup;
  if (out.kind == ActivationKind::int8_g32)
    quantize_group(values, count, code_scale(max_abs(values, count)), out, row, group);
  else memcpy(out.values + row * out.cols + group * kGroup, values, sizeof(float) * count);
}

// out = silu(gate) * up for one row of one group.
inline void store_gated(const float* gate, const float* up, const Activations& out, int64_t row,
                        int64_t group) {
  float values[kGroup];
  for (int i = 0; i < kGroup; i += 16) store(values + i, mul(silu(load(gate + i)), load(up + i)));
  store_group(values, out, row, group);
}

// T streams of equally many groups, and what is left in fewer. Gate and up are read side by side.
// As many groups as the buffer holds are gated and rounded together: each is a long chain of
// operations, and memory would rest meanwhile.
template <int T>
inline void swiglu_streams(const Panel& x, const Weight& gate, const Weight& up,
                           const Activations& out, Tiles tiles) {
  constexpr int S = T == 1 ? 1 : T / 2;  // groups at once
  const int64_t groups = S == 1 ? ceil_div(tiles.end - tiles.begin, kTilesPerGroup)
                                : (tiles.end - tiles.begin) / kTilesPerGroup;
  const int64_t length = groups / S, stride = length * kTilesPerGroup;
  const int64_t first_group = tiles.begin / kTilesPerGroup, fit = Panel::kMaxRows / x.rows;
  // of the gate and up of each stream: (groups, rows)
  float dots[2 * S][Panel::kMaxRows][kGroup];
  for (int64_t first = 0, end; first < length; first = end) {
    end = first + fit < length ? first + fit : length;
    for (int64_t group = first; group < end; ++group) {
      const int64_t tile = tiles.begin + group * kTilesPerGroup, at = (group - first) * x.rows;
      for (int64_t i = 0; i < kTilesPerGroup && tile + i < tiles.end; ++i) {
        TileRef refs[2 * S];
        for (int s = 0; s < S; ++s) {
          const int64_t own = tile + i + s * stride;
          refs[2 * s] = {&gate, own, ahead_of<T>(tiles, own)};
          refs[2 * s + 1] = {&up, own, ahead_of<T>(tiles, own)};
        }
        constexpr int kTogether = T == 1 ? 1 : T;
        for (int t = 0; t < 2 * S; t += kTogether) {
          const auto& some = reinterpret_cast<const TileRef(&)[kTogether]>(refs[t]);
          x.dot<kTogether>(some, [&](const VecF* y, int64_t row, auto count) {
            for (int m = 0; m < decltype(count)::value; ++m)
              for (int j = 0; j < kTogether; ++j)
                store(dots[t + j][at + row + m] + i * kTileRows, y[m * kTogether + j]);
          });
        }
      }
    }
    for (int s = 0; s < S; ++s)
      for (int64_t group = first; group < end; ++group)
        for (int64_t row = 0; row < x.rows; ++row) {
          const int64_t at = (group - first) * x.rows + row;
          store_gated(dots[2 * s][at], dots[2 * s + 1][at], out, row,
                      first_group + s * length + group);
        }
  }
  tiles.begin += S * stride;
  if constexpr (S > 1) {
    if (tiles.begin < tiles.end) swiglu_streams<(T > 4 ? 4 : T / 2)>(x, gate, up, out, tiles);
  }
}

// Gate and up together. The second of two passes over a shared block reads it from the last-level
// cache, where two streams take one thread 0.94 of the time of four. int4 gains nothing by fewer.
inline int streams_of_gated_row(const Weight& gate, const Tiles& tiles) {
  if (is_int4(gate.kind)) return 6;
  return tiles.ahead && tiles.stride == 2 && tiles.phase == 1 ? 2 : 4;
}

void swiglu(const Activations& x, const Weight& gate, const Weight& up, const Activations& out,
            int64_t rows, const Tiles& tiles) {
  for_each_panel(x, rows, [&](const Panel& panel, int64_t row) {
    if (gate.kind != up.kind)  // tiles that are multiplied together have one kind
      return swiglu_streams<1>(panel, gate, up, out.from_row(row), tiles);
    with_streams(panel.rows, streams_of_gated_row(gate, tiles), [&](auto count) {
      if constexpr (decltype(count)::value != 3)  // gate and up
        swiglu_streams<decltype(count)::value>(panel, gate, up, out.from_row(row), tiles);
    });
  });
}
