// Matrix products with weights of every kind, and the fused SwiGLU (Shazeer 2020).

inline int tile_width(const Weight& weight, int64_t tile) {
  const int64_t left = weight.rows - tile * kTileRows;
  return static_cast<int>(left < kTileRows ? left : kTileRows);
}

void linear(const Activations& x, const Weight& weight, float* out, int64_t rows,
            int64_t out_stride, const Tiles& tiles, bool accumulate) {
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t ahead = tile % tiles.stride == tiles.phase ? tiles.ahead : 0;
    const int width = tile_width(weight, tile);
    for_each_block<kDotRows>(rows, [&](auto m_count, int64_t first_row) {
      constexpr int M = decltype(m_count)::value;
      VecF y[M];
      tile_dot<M>(x, weight, tile, first_row, first_row ? 0 : ahead, y);
      for (int m = 0; m < M; ++m) {
        float* p = out + (first_row + m) * out_stride + tile * kTileRows;
        store_upto(p, accumulate ? add(load_upto(p, width), y[m]) : y[m], width);
      }
    });
  }
}

void swiglu(const Activations& x, const Weight& gate, const Weight& up, float* out, int64_t rows,
            int64_t out_stride, const Tiles& tiles) {
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t ahead = tile % tiles.stride == tiles.phase ? tiles.ahead : 0;
    const int width = tile_width(gate, tile);
    for_each_block<kDotRows>(rows, [&](auto m_count, int64_t first_row) {
      constexpr int M = decltype(m_count)::value;
      VecF g[M], u[M];
      const int64_t fetch = first_row ? 0 : ahead;  // once is enough
      tile_dot<M>(x, gate, tile, first_row, fetch, g);
      tile_dot<M>(x, up, tile, first_row, fetch, u);
      for (int m = 0; m < M; ++m) {
        float* p = out + (first_row + m) * out_stride + tile * kTileRows;
        store_upto(p, mul(silu(g[m]), u[m]), width);
      }
    });
  }
}
