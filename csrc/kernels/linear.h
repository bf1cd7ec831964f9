// Matrix products with weights of every kind, and the fused SwiGLU (Shazeer 2020).

inline int tile_width(const Weight& weight, int64_t tile) {
  const int64_t left = weight.rows - tile * kTileRows;
  return static_cast<int>(left < kTileRows ? left : kTileRows);
}

// Few streams leave the hardware's prefetchers idle, which also stop at every 4 KB page: they fetch
// one page ahead by software. Four streams are faster without.
constexpr int64_t kFetchBytes = 4096;

// The tiles first, first + stride, ...; what they fetch ahead is fetched by the first rows alone.
template <int T>
inline TileSet tile_set(const Tiles& tiles, int64_t first, int64_t stride, bool fetch) {
  TileSet set{first, stride, {}};
  for (int t = 0; t < T; ++t) {
    const bool wanted = (first + t * stride) % tiles.stride == tiles.phase;
    if (fetch) set.ahead[t] = wanted && tiles.ahead ? tiles.ahead : T < 4 ? kFetchBytes : 0;
  }
  return set;
}

// Rows that are multiplied together, and their wide groups in one list.
struct Panel {
  static constexpr int64_t kMaxRows = 64, kMaxWide = kMaxCols / kGroup;

  Activations x;
  int64_t rows;
  WideGroup wide[kMaxWide];
  int32_t starts[kMaxRows + 1] = {};  // of each row in the list

  Panel(const Activations& all, int64_t first_row, int64_t left) : x(all.from_row(first_row)) {
    const int64_t groups = x.groups();
    rows = left < kMaxRows ? left : kMaxRows;
    if (x.kind != ActivationKind::int8_g32 || rows <= kRowsWithLowCodes) return;
    while (rows > 1 && rows * groups > kMaxWide) rows /= 2;
    int32_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t group = 0; group < groups; ++group) {
        wide[count] = {static_cast<uint16_t>(row), static_cast<uint16_t>(group)};
        count += x.wide[row * groups + group];
      }
      starts[row + 1] = count;
    }
  }
  WideGroups wide_groups(int64_t row, int64_t count) const {
    return {wide + starts[row], wide + starts[row + count]};
  }

  template <int M, int T>
  void dot(int64_t first_row, const Weight& weight, const TileSet& set, VecF* y) const {
    tile_dot<M, T>(x.from_row(first_row), wide_groups(first_row, M), first_row, weight, set, y);
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
    for_each_block<kDotRows / T>(x.rows, [&](auto m_count, int64_t first_row) {
      constexpr int M = decltype(m_count)::value;
      VecF y[M * T];
      x.dot<M, T>(first_row, weight, tile_set<T>(tiles, first, length, first_row == 0), y);
      for (int t = 0; t < T; ++t) {
        const int64_t tile = first + t * length;
        const int width = tile_width(weight, tile);
        for (int m = 0; m < M; ++m) {
          float* p = out + (first_row + m) * out_stride + tile * kTileRows;
          const VecF v = y[m * T + t];
          store_upto(p, accumulate ? add(load_upto(p, width), v) : v, width);
        }
      }
    });
  }
  tiles.begin += T * length;
  if constexpr (T > 1) {
    if (tiles.begin < tiles.end)
      linear_streams<T / 2>(x, weight, out, out_stride, tiles, accumulate);
  }
}

// Call body(Constant<T>()) with the number of tiles that fit the registers beside so many rows.
template <int T, class Body>
inline void with_streams(int64_t rows, Body body) {
  if constexpr (T > 1) {
    if (T * rows > kDotRows) return with_streams<T / 2>(rows, body);
  }
  body(Constant<T>());
}

void linear(const Activations& x, const Weight& weight, float* out, int64_t rows,
            int64_t out_stride, const Tiles& tiles, bool accumulate) {
  for_each_panel(x, rows, [&](const Panel& panel, int64_t row) {
    with_streams<kMaxStreams>(panel.rows, [&](auto count) {
      linear_streams<decltype(count)::value>(panel, weight, out + row * out_stride, out_stride,
                                             tiles, accumulate);
    });
  });
}

// silu(gate) * up for M rows and T tiles: into row m, column t * kGroup of `out`.
template <int M, int T>
inline void swiglu_tiles(const Panel& x, int64_t first_row, const Weight& gate, const Weight& up,
                         const TileSet& set, float (*out)[T * kGroup]) {
  VecF g[M * T], u[M * T];
  x.dot<M, T>(first_row, gate, set, g);
  x.dot<M, T>(first_row, up, set, u);
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < T; ++t) store(out[m] + t * kGroup, mul(silu(g[m * T + t]), u[m * T + t]));
}

// Two tiles make a group of the next layer's inputs, which is rounded while it is at hand.
inline void store_group(const float* values, const Activations& out, int64_t row, int64_t group) {
  const int64_t left = out.cols - group * kGroup, count = left < kGroup ? left : kGroup;
  if (out.kind == ActivationKind::int8_g32)
    quantize_group(values, count, code_scale(max_abs(values, count)), out, row, group, true);
  else memcpy(out.values + row * out.cols + group * kGroup, values, sizeof(float) * count);
}

// T streams of equally many groups, and what is left in fewer.
template <int T>
inline void swiglu_streams(const Panel& x, const Weight& gate, const Weight& up,
                           const Activations& out, Tiles tiles) {
  const int64_t groups = T == 1 ? ceil_div(tiles.end - tiles.begin, kTilesPerGroup)
                                : (tiles.end - tiles.begin) / kTilesPerGroup;
  const int64_t length = groups / T, stride = length * kTilesPerGroup;
  for (int64_t first = tiles.begin; first < tiles.begin + stride; first += kTilesPerGroup) {
    for_each_block<kDotRows / T>(x.rows, [&](auto m_count, int64_t first_row) {
      constexpr int M = decltype(m_count)::value;
      float group[M][T * kGroup];
      for (int64_t i = 0; i < kTilesPerGroup && first + i < tiles.end; ++i)
        swiglu_tiles<M, T>(x, first_row, gate, up,
                           tile_set<T>(tiles, first + i, stride, first_row == 0),
                           reinterpret_cast<float (*)[T * kGroup]>(&group[0][i * kTileRows]));
      for (int m = 0; m < M; ++m)
        for (int t = 0; t < T; ++t)
          store_group(group[m] + t * kGroup, out, first_row + m,
                      (first + t * stride) / kTilesPerGroup);
    });
  }
  tiles.begin += T * stride;
  if constexpr (T > 1) {
    if (tiles.begin < tiles.end) swiglu_streams<T / 2>(x, gate, up, out, tiles);
  }
}

void swiglu(const Activations& x, const Weight& gate, const Weight& up, const Activations& out,
            int64_t rows, const Tiles& tiles) {
  for_each_panel(x, rows, [&](const Panel& panel, int64_t row) {
    with_streams<kMaxStreams>(panel.rows, [&](auto count) {
      swiglu_streams<decltype(count)::value>(panel, gate, up, out.from_row(row), tiles);
    });
  });
}
