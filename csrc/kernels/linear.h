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
      tile_dot<M>(x.from_row(first_row), weight, tile, first_row ? 0 : ahead, y);
      for (int m = 0; m < M; ++m) {
        float* p = out + (first_row + m) * out_stride + tile * kTileRows;
        store_upto(p, accumulate ? add(load_upto(p, width), y[m]) : y[m], width);
      }
    });
  }
}

// silu(gate) * up for one tile and M rows.
template <int M>
inline void swiglu_tile(const Activations& x, const Weight& gate, const Weight& up, int64_t tile,
                        int64_t ahead, VecF* y) {
  VecF u[M];
  tile_dot<M>(x, gate, tile, ahead, y);
  tile_dot<M>(x, up, tile, ahead, u);
  for (int m = 0; m < M; ++m) y[m] = mul(silu(y[m]), u[m]);
}

// Two tiles make a group of the next layer's inputs, which is rounded while it is in registers.
void swiglu(const Activations& x, const Weight& gate, const Weight& up, const Activations& out,
            int64_t rows, const Tiles& tiles) {
  for (int64_t first = tiles.begin; first < tiles.end; first += kTilesPerGroup) {
    const int64_t end = first + kTilesPerGroup < tiles.end ? first + kTilesPerGroup : tiles.end;
    const int64_t left = gate.rows - first * kTileRows, width = left < kGroup ? left : kGroup;
    for_each_block<kDotRows>(rows, [&](auto m_count, int64_t first_row) {
      constexpr int M = decltype(m_count)::value;
      float group[M][kGroup];
      for (int64_t tile = first; tile < end; ++tile) {
        const int64_t ahead = tile % tiles.stride == tiles.phase ? tiles.ahead : 0;
        VecF y[M];
        swiglu_tile<M>(x.from_row(first_row), gate, up, tile, first_row ? 0 : ahead, y);
        for (int m = 0; m < M; ++m) store(group[m] + (tile - first) * kTileRows, y[m]);
      }
      for (int m = 0; m < M; ++m) {
        const int64_t row = first_row + m;
        if (out.kind == ActivationKind::int8_g32) {
          quantize_group(group[m], width, code_scale(max_abs(group[m], width)), out, row,
                         first / kTilesPerGroup);
        } else {
          memcpy(out.values + row * out.cols + first * kTileRows, group[m],
                 sizeof(float) * static_cast<size_t>((end - first) * kTileRows < width
                                                         ? (end - first) * kTileRows
                                                         : width));
        }
      }
    });
  }
}
