// Matrix products with weights of every kind, and the fused SwiGLU (Shazeer 2020).

inline int tile_width(const Weight& weight, int64_t tile) {
  const int64_t left = weight.rows - tile * kTileRows;
  return static_cast<int>(left < kTileRows ? left : kTileRows);
}

// The tiles first, first + stride, ...; what they fetch ahead is fetched by the first rows alone.
template <int T>
inline TileSet tile_set(const Tiles& tiles, int64_t first, int64_t stride, bool fetch) {
  TileSet set{first, stride, {}};
  for (int t = 0; t < T; ++t)
    if (fetch && (first + t * stride) % tiles.stride == tiles.phase) set.ahead[t] = tiles.ahead;
  return set;
}

// T streams of equally many tiles, and what is left in fewer.
template <int T>
inline void linear_streams(const Activations& x, const Weight& weight, float* out, int64_t rows,
                           int64_t out_stride, Tiles tiles, bool accumulate) {
  const int64_t length = (tiles.end - tiles.begin) / T;
  for (int64_t first = tiles.begin; first < tiles.begin + length; ++first) {
    for_each_block<kDotRows / T>(rows, [&](auto m_count, int64_t first_row) {
      constexpr int M = decltype(m_count)::value;
      VecF y[M * T];
      tile_dot<M, T>(x.from_row(first_row), weight,
                     tile_set<T>(tiles, first, length, first_row == 0), y);
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
      linear_streams<T / 2>(x, weight, out, rows, out_stride, tiles, accumulate);
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
  with_streams<kMaxStreams>(rows, [&](auto count) {
    linear_streams<decltype(count)::value>(x, weight, out, rows, out_stride, tiles, accumulate);
  });
}

// silu(gate) * up for M rows and T tiles: into row m, column t * kGroup of `out`.
template <int M, int T>
inline void swiglu_tiles(const Activations& x, const Weight& gate, const Weight& up,
                         const TileSet& set, float (*out)[T * kGroup]) {
  VecF g[M * T], u[M * T];
  tile_dot<M, T>(x, gate, set, g);
  tile_dot<M, T>(x, up, set, u);
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
inline void swiglu_streams(const Activations& x, const Weight& gate, const Weight& up,
                           const Activations& out, int64_t rows, Tiles tiles) {
  const int64_t groups = T == 1 ? ceil_div(tiles.end - tiles.begin, kTilesPerGroup)
                                : (tiles.end - tiles.begin) / kTilesPerGroup;
  const int64_t length = groups / T, stride = length * kTilesPerGroup;
  for (int64_t first = tiles.begin; first < tiles.begin + stride; first += kTilesPerGroup) {
    for_each_block<kDotRows / T>(rows, [&](auto m_count, int64_t first_row) {
      constexpr int M = decltype(m_count)::value;
      float group[M][T * kGroup];
      for (int64_t i = 0; i < kTilesPerGroup && first + i < tiles.end; ++i)
        swiglu_tiles<M, T>(x.from_row(first_row), gate, up,
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
    if (tiles.begin < tiles.end) swiglu_streams<T / 2>(x, gate, up, out, rows, tiles);
  }
}

void swiglu(const Activations& x, const Weight& gate, const Weight& up, const Activations& out,
            int64_t rows, const Tiles& tiles) {
  with_streams<kMaxStreams>(rows, [&](auto count) {
    swiglu_streams<decltype(count)::value>(x, gate, up, out, rows, tiles);
  });
}
